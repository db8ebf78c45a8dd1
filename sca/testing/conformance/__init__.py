"""The conformance kit: tries a part against the promises of its contract, on tensors that fit into a thimble.

    for result in check_part("mixer", "query", depth=1):
        print(result)

A check is one function under `@register_check(...)`: its name is the check's, the first paragraph of its docstring says
what is expected, and it returns None if the part passes, else what is wrong. The parts upstream are stand-ins
that have what the contract lists and nothing more, so a part that reaches for more is found out.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from traceback import extract_tb
from typing import Any

import torch
from sca_registry import get_registry
from sca_registry.contracts import COMPONENT_KINDS

from sca.testing.conformance import (  # noqa: F401 (their promises)
    captioners,
    common,
    datasets,
    encoders,
    language_models,
    metrics,
    mixers,
    proposers,
    segmenters,
)
from sca.testing.conformance.checks import CHECKS, CheckResult, ConformanceCheck, DoesNotApply
from sca.testing.conformance.harnesses import HARNESSES, PartHarness

__all__ = ["CHECKS", "CheckResult", "check_part"]

LIBRARY_FOLDERS = {"conformance", "torch", "transformers", "timm", "open_clip", "sca_registry"}  # folders


def check_part(kind: str, part: str | Callable[..., Any], /, **options: Any) -> list[CheckResult]:
    """One result for each promise of the kind ("mixer" or "mixers"), those that every kind has first.

    part: a registered name, or a factory. options: of the factory; the dataset's `split` too (default "val"). A part
    that cannot be built, or does not run, is tried no further. Nothing that the part does wrong is raised, except
    KeyboardInterrupt. Random state is put back as it was.

    Raises RegistryError if there is no such kind.
    """
    kind_info = get_registry(kind).kind
    harness = HARNESSES.get(kind_info.plural, PartHarness)(kind_info.plural, part, options)
    with torch.random.fork_rng(devices=[]):
        results = []
        checks = [each for each in CHECKS if kind_info.plural in each.kinds]
        for conformance_check in sorted(checks, key=lambda each: each.function.__module__ != common.__name__):
            results.append(_run_check(conformance_check, harness))
            if conformance_check.function in (common.builds, common.runs) and not results[-1].passed:
                break
    return results


def _format_error_location(error: BaseException) -> str:
    """The last line of somebody's own code that an error passed through, that of libraries and of this kit aside."""
    plugin_frames = [
        frame for frame in extract_tb(error.__traceback__) if not set(Path(frame.filename).parts) & LIBRARY_FOLDERS
    ]
    return f" ({Path(plugin_frames[-1].filename).name}:{plugin_frames[-1].lineno})" if plugin_frames else ""


def _run_check(conformance_check: ConformanceCheck, harness: PartHarness) -> CheckResult:
    source = conformance_check.source or f"sca_registry.contracts.{COMPONENT_KINDS[harness.kind].protocol.__name__}"
    torch.manual_seed(0)
    try:
        problem = conformance_check.function(harness)
    except DoesNotApply as exception:
        return CheckResult(
            conformance_check.name, True, conformance_check.expected, f"does not apply: {exception}", source
        )
    except Exception as error:
        problem = f"{type(error).__name__}: {' '.join(str(error).split())}{_format_error_location(error)}"
    return CheckResult(
        conformance_check.name, problem is None, conformance_check.expected, problem or "as expected", source
    )
