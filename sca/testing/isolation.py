"""Components tried in processes of their own, which a plugin may end or block."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from tempfile import TemporaryDirectory
from typing import Any

from sca_registry import get_registry
from sca_registry.registry import RegistryEntry

from sca.launchers.local import Local
from sca.launchers.task import Task


def try_parts(entries: Sequence[RegistryEntry], timeout: float) -> list[RegistryEntry]:
    """Import the built-in components, and try those of plugins, each in a process of its own.

    Args:
        entries: Components with the states that metadata shows.
        timeout: Seconds for each component of a plugin, without what this package itself imports.

    Returns:
        The components with the states that were found, in the same order.
    """
    with TemporaryDirectory() as scratch:
        tasks = []
        for number, entry in enumerate(entries):
            if entry.state == "unchecked":
                config = {"kind": entry.kind, "name": entry.name, "device": "cpu"}
                job = "sca.testing.conformance.plugin_check:try_part"
                tasks.append(Task(str(number), job, config, f"{scratch}/{number}", timeout))
        made = {outcome.task.key: outcome.result for outcome in Local(os.cpu_count() or 1).map(tasks)}
    return [_add_findings(entry, made.get(str(number))) for number, entry in enumerate(entries)]


def _add_findings(entry: RegistryEntry, made: Mapping[str, Any] | None) -> RegistryEntry:
    """Return a component with the state that was found.

    Args:
        entry: The component with the state that metadata shows.
        made: What the process that tried it returned; None if it returned nothing, or was not started.
    """
    if entry.state == "ok":
        return get_registry(entry.kind).load_entry(entry.name)
    if entry.state != "unchecked":
        return entry
    if made is None:
        return replace(entry, state="broken", reason="the process that tried it was killed")
    if made["state"] in ("crashed", "timed-out"):
        return replace(entry, state="broken", reason=f"the process that tried it failed: {made['reason']}")
    return replace(entry, state=made["state"], reason=made["reason"])
