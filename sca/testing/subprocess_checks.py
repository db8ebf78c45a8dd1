"""Checks of components in separate processes, because a broken component may crash or hang."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from tempfile import TemporaryDirectory
from typing import Any

from sca_registry.registry import RegistryEntry

from sca.launchers.local import LocalLauncher
from sca.launchers.task import Task

IMPORT_TIMEOUT = 300.0  # seconds for all built-in components


def check_components(entries: Sequence[RegistryEntry], timeout: float) -> list[RegistryEntry]:
    """Import the built-in components and check those of plugins in separate processes.

    Args:
        entries: Components with their states according to package metadata.
        timeout: Seconds per component of a plugin, excluding the imports of this package.

    Returns:
        The components with their actual states, in the same order.
    """
    unchecked = [entry for entry in entries if entry.state == "unchecked"]
    states = _run_jobs(
        "plugin_check:check_plugin_component", [{"kind": e.kind, "name": e.name} for e in unchecked], timeout
    )
    checked = dict(zip(map(_get_key, unchecked), states, strict=True))
    checked |= _import_builtins([entry for entry in entries if entry.state == "ok"])
    return [replace(entry, **checked.get(_get_key(entry), {})) for entry in entries]


def _import_builtins(entries: Sequence[RegistryEntry]) -> dict[tuple[str, str], Mapping[str, str]]:
    """Import components in one process, or one process per module if that process crashes."""
    components = [{"kind": entry.kind, "name": entry.name} for entry in entries]
    (outcome,) = _run_jobs("plugin_check:import_components", [{"components": components}], IMPORT_TIMEOUT)
    if "states" in outcome:
        return dict(zip(map(_get_key, entries), outcome["states"], strict=True))
    modules = [entry.factory.partition(":")[0] for entry in entries]
    first_components = dict(zip(reversed(modules), reversed(components), strict=True))
    outcomes = _run_jobs(
        "plugin_check:import_components", [{"components": [p]} for p in first_components.values()], IMPORT_TIMEOUT
    )
    by_module = {
        module: outcome["states"][0] if "states" in outcome else outcome
        for module, outcome in zip(first_components, outcomes, strict=True)
    }
    return {_get_key(entry): by_module[module] for entry, module in zip(entries, modules, strict=True)}


def _run_jobs(job: str, configs: Iterable[Mapping[str, Any]], timeout: float) -> list[Mapping[str, Any]]:
    """Run conformance jobs and return their results; a crashed job has the state "broken"."""
    with TemporaryDirectory() as scratch:
        tasks = [
            Task(
                str(index), f"sca.testing.conformance.{job}", {**config, "device": "cpu"}, f"{scratch}/{index}", timeout
            )
            for index, config in enumerate(configs)
        ]
        results = {outcome.task.key: outcome.result for outcome in LocalLauncher(os.cpu_count() or 1).run_tasks(tasks)}
    return [_check_result(results.get(task.key)) for task in tasks]


def _check_result(result: Mapping[str, Any] | None) -> Mapping[str, Any]:
    if result is None:
        return {"state": "broken", "reason": "the process of its checks was killed"}
    if result.get("state") in ("crashed", "timed-out"):
        return {"state": "broken", "reason": f"the process of its checks failed: {result['reason']}"}
    return {key: value for key, value in result.items() if key in ("state", "reason", "states")}


def _get_key(entry: RegistryEntry) -> tuple[str, str]:
    return entry.kind, entry.name
