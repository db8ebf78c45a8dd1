"""What launchers are given and give."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple


@dataclass(frozen=True)
class Task:
    """A piece of work. key: its unique name. function: "module:function", which is called with config and folder and
    returns a table of plain values with a `state`. config: plain values, with the `device` to compute on. folder: for
    the log and other files. timeout: seconds. num_gpus, memory_gib: required resources. deadline: Unix time after which
    it is neither started nor left running; a task stopped by its deadline has no outcome.
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
    """What a job gave; or, of one whose process ended otherwise, a table with `state` ("crashed" or "timed-out"),
    `reason` and `seconds`.
    """

    task: Task
    result: dict[str, Any]
