"""Components tried in processes of their own, which a plugin may end or block."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from tempfile import TemporaryDirectory
from typing import Any

from sca_registry.registry import Entry

from sca.launchers.local import Local
from sca.launchers.task import Task


def try_parts(entries: Sequence[Entry], timeout: float) -> list[tuple[str, str]]:
    """Try parts, each in a process of its own.

    Args:
        entries: Parts, by kind and name.
        timeout: Seconds for each, without what this package itself imports.

    Returns:
        For each what is wrong with it, or "", and a remark, or "".
    """
    with TemporaryDirectory() as scratch:
        tasks = []
        for number, entry in enumerate(entries):
            config = {"kind": entry.kind, "name": entry.name, "device": "cpu"}
            tasks.append(
                Task(str(number), "sca.testing.conformance.verdict:try_part", config, f"{scratch}/{number}", timeout)
            )
        made = {outcome.task.key: outcome.made for outcome in Local(os.cpu_count() or 1).map(tasks)}
    return [_read_verdict(made.get(task.key)) for task in tasks]


def _read_verdict(made: Mapping[str, Any] | None) -> tuple[str, str]:
    if made is None:
        return "the process that tried it was killed", ""
    if "problem" in made:
        return made["problem"], made["note"]
    return f"the process that tried it failed: {made['reason']}", ""
