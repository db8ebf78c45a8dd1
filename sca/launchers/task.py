"""Input and output of launchers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple


@dataclass(frozen=True)
class Task:
    """Function call in another process.

    Args:
        key: Unique name of the task.
        function: "module:function", called with `config` and `folder`. It returns a dict of JSON values with the key
            `state`.
        config: JSON values, with the `device` to use.
        folder: Folder for the log and other files.
        timeout: Time limit in seconds.
        num_gpus: Required GPUs.
        memory_gib: Required memory in GiB.
        deadline: Unix time after which the task is not started, and is stopped if running. A task stopped by its
            deadline has no outcome.
    """

    key: str
    function: str
    config: Mapping[str, Any]
    folder: str
    timeout: float = 3600.0
    num_gpus: int = 0
    memory_gib: float = 0.0
    deadline: float = math.inf


class TaskOutcome(NamedTuple):
    """Outcome of a task.

    Attributes:
        task: Task.
        result: Table returned by the function. If its process did not end normally: `state` ("crashed", "timed-out" or
            "failed"), `reason` and `seconds`.
    """

    task: Task
    result: dict[str, Any]
