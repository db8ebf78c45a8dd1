"""Launcher jobs that check components of plugins, because a plugin may crash its process."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sca_registry import RegistryError, get_registry
from sca_registry.options import REQUIRED

from sca.testing.conformance import check_component
from sca.testing.conformance.harnesses import HARNESSES, ComponentHarness
from sca.testing.tiny import get_tiny_options


def check_plugin_component(config: Mapping[str, Any], folder: str) -> dict[str, str]:
    """Import a component and run its conformance checks.

    A component that its card alone cannot build, or that rejects its options with a ValueError, is only imported.

    Args:
        config: `kind` and `name` of the component.
        folder: Unused.

    Returns:
        `state` and `reason` as in `sca_registry.registry.RegistryEntry`.
    """
    kind, name = config["kind"], config["name"]
    entry, options = get_registry(kind).load_entry(name), get_tiny_options(kind, name)
    if entry.state != "ok":
        return {"state": entry.state, "reason": entry.reason}
    missing_options = [option for option, value in entry.options.items() if value is REQUIRED and option not in options]
    if missing_options or (entry.options.get("weights") and not options):
        return _make_imported_result(f"required: {', '.join(missing_options) or 'weights'}")
    results = check_component(kind, name, **options)
    if len(results) == 1 and isinstance(refusal := _find_refusal(kind, name, options), ValueError):
        return _make_imported_result(str(refusal))  # the options are invalid, not the component
    failed = [result for result in results if not result.passed]
    if not failed:
        return {"state": "ok", "reason": ""}
    names, details = ", ".join(each.name for each in failed), " ".join(failed[0].details.split())[:200]
    reason = f"failed checks: {names}. {details}; run `sca check {kind} {name}`"
    return {"state": "broken", "reason": reason}


def import_components(config: Mapping[str, Any], folder: str) -> dict[str, list[dict[str, str]]]:
    """Import components without building them.

    Args:
        config: `components`, a list of tables with `kind` and `name`.
        folder: Unused.

    Returns:
        `states`, a list with the `state` and `reason` of each component.
    """
    entries = [get_registry(component["kind"]).load_entry(component["name"]) for component in config["components"]]
    return {"states": [{"state": entry.state, "reason": entry.reason} for entry in entries]}


def _make_imported_result(reason: str) -> dict[str, str]:
    return {"state": "ok", "reason": f"imported, not checked ({reason})"}


def _find_refusal(kind: str, name: str, options: Mapping[str, Any]) -> BaseException | None:
    """Return the exception that the factory of a component raises for its options, or None."""
    plural = get_registry(kind).kind.plural
    try:
        HARNESSES.get(plural, ComponentHarness)(plural, name, options).build()
    except RegistryError as error:
        return error.__cause__
    return None
