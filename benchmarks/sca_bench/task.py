"""What launchers are given and give."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple


@dataclass(frozen=True)
class Task:
    """A row to be made. folder: for its log. timeout: seconds. gpus, memory (GiB): what it asks of a machine."""

    key: str
    config: Mapping[str, Any]
    folder: str
    timeout: float = 3600.0
    gpus: int = 0
    memory: float = 0.0
    force: bool = False


class Outcome(NamedTuple):
    """A row that was made, or why it was not: it has `state`, `reason`, `seconds` and what was measured."""

    task: Task
    row: dict[str, Any]
