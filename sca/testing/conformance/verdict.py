"""What is wrong with a part of a plugin, as a job of a launcher: a plugin may end the process that tries it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sca_registry import RegistryError, registry
from sca_registry.options import REQUIRED
from sca_registry.states import BREAKS

from sca.testing.conformance import check
from sca.testing.conformance.promises import Finding
from sca.testing.conformance.trials import TRIALS, Trial


def try_part(config: Mapping[str, Any], folder: str) -> dict[str, str]:
    """Import a part and check its promises.

    A part that its card alone does not build, or that refuses its options with a ValueError, is only imported.

    Args:
        config: `kind` and `name` of the part.
        folder: Unused.

    Returns:
        `problem`: what is wrong, or "". `note`: a remark, or "".
    """
    kind, name = config["kind"], config["name"]
    parts = registry(kind)
    small = parts.card(name).small
    try:
        factory = parts.get(name)
        options = parts.describe(name).options
        missing = [option for option, value in options.items() if value is REQUIRED and option not in small]
        if missing or (options.get("weights") and not small):
            return {"problem": "", "note": f"imported, not tried: it needs {', '.join(missing) or 'its weights'}"}
        findings = check(kind, name, **small)
        refused = find_refusal(kind, factory, small) if len(findings) == 1 else None
    except RegistryError as error:
        return {"problem": str(error), "note": ""}
    if isinstance(refused, ValueError):  # a person's mistake, not the part's
        return {"problem": "", "note": f"imported, not tried: {refused}"}
    return {"problem": summarize_broken(kind, name, findings), "note": ""}


def find_refusal(kind: str, factory: Callable[..., Any], options: Mapping[str, Any]) -> Exception | None:
    """Return what a factory raises for its options."""
    try:
        factory(*TRIALS.get(registry(kind).kind.plural, Trial).upstream, **options)
    except Exception as error:  # the code of a plugin may raise anything
        return error
    return None


def summarize_broken(kind: str, name: str, findings: Sequence[Finding]) -> str:
    """Return the promises that are broken, in one line, or "" if there are none."""
    broken = [finding for finding in findings if not finding.passed]
    names = ", ".join(finding.check for finding in broken)
    return f"{BREAKS} ({names}). {broken[0].found} `sca check {kind} {name}` shows details" if broken else ""
