"""Launcher jobs that check components of plugins, because a plugin may crash its process."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sca_registry import RegistryError, get_registry
from sca_registry.options import REQUIRED

from sca.testing.conformance import check_part
from sca.testing.conformance.harnesses import HARNESSES, PartHarness
from sca.testing.tiny import tiny_options


def try_part(config: Mapping[str, Any], folder: str) -> dict[str, str]:
    """Import a component and run its conformance checks.

    A component that its card alone cannot build, or that rejects its options with a ValueError, is only imported.

    Args:
        config: `kind` and `name` of the component.
        folder: Unused.

    Returns:
        `state` and `reason` as in `sca_registry.registry.RegistryEntry`.
    """
    kind, name = config["kind"], config["name"]
    entry, options = get_registry(kind).load_entry(name), tiny_options(kind, name)
    if entry.state != "ok":
        return {"state": entry.state, "reason": entry.reason}
    missing_options = [option for option, value in entry.options.items() if value is REQUIRED and option not in options]
    if missing_options or (entry.options.get("weights") and not options):
        return _imported(f"it needs {', '.join(missing_options) or 'its weights'}")
    results = check_part(kind, name, **options)
    if len(results) == 1 and isinstance(refusal := _find_refusal(kind, name, options), ValueError):
        return _imported(str(refusal))  # the options are invalid, not the component
    broken = [finding for finding in results if not finding.passed]
    if not broken:
        return {"state": "ok", "reason": ""}
    names, found = ", ".join(finding.name for finding in broken), " ".join(broken[0].details.split())[:200]
    reason = f"breaks promises ({names}). {found} `sca check {kind} {name}` shows details"
    return {"state": "broken", "reason": reason}


def import_parts(config: Mapping[str, Any], folder: str) -> dict[str, list[dict[str, str]]]:
    """Import components without building them.

    Args:
        config: `parts`, a list of tables with `kind` and `name`.
        folder: Unused.

    Returns:
        `states`, a list with the `state` and `reason` of each component.
    """
    entries = [get_registry(part["kind"]).load_entry(part["name"]) for part in config["parts"]]
    return {"states": [{"state": entry.state, "reason": entry.reason} for entry in entries]}


def _imported(reason: str) -> dict[str, str]:
    return {"state": "ok", "reason": f"imported, not tried: {reason}"}


def _find_refusal(kind: str, name: str, options: Mapping[str, Any]) -> BaseException | None:
    """Return the exception that the factory of a component raises for its options, or None."""
    plural = get_registry(kind).kind.plural
    try:
        HARNESSES.get(plural, PartHarness)(plural, name, options).build()
    except RegistryError as error:
        return error.__cause__
    return None
