"""Conformance checks: test a component against the contract of its kind on small tensors.

    for result in check_part("mixer", "query", depth=1):
        print(result)

A check is a function decorated with `@register_check(...)`. Its name is that of the check, and the first paragraph of
its docstring is the expected behavior. It returns None if the component passes, else the problem. Upstream components
are stand-ins with only the attributes in the contract, so a component that accesses others fails.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from traceback import extract_tb
from typing import Any

import torch
from sca_registry import get_registry
from sca_registry.contracts import COMPONENT_KINDS

from sca.testing.conformance import (  # noqa: F401 (register their checks)
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
from sca.testing.conformance.harnesses import HARNESSES, ComponentHarness

__all__ = ["CHECKS", "CheckResult", "check_component"]

LIBRARY_FOLDERS = {"conformance", "torch", "transformers", "timm", "open_clip", "sca_registry"}


def check_component(kind: str, component: str | Callable[..., Any], /, **options: Any) -> list[CheckResult]:
    """Run all checks of a kind on a component.

    Checks that apply to every kind run first. If the component cannot be built or run, the remaining checks are
    skipped. Exceptions of the component, except KeyboardInterrupt, become results. The random state of torch is
    restored.

    Args:
        kind: Kind of the component, singular or plural.
        component: Registered name, or factory.
        **options: Options of the factory, and the `split` of a dataset (default "val").

    Returns:
        One result per check.

    Raises:
        RegistryError: The kind is unknown.
    """
    kind_info = get_registry(kind).kind
    harness = HARNESSES.get(kind_info.plural, ComponentHarness)(kind_info.plural, component, options)
    with torch.random.fork_rng(devices=[]):
        results = []
        checks = [each for each in CHECKS if kind_info.plural in each.kinds]
        for conformance_check in sorted(checks, key=lambda each: each.function.__module__ != common.__name__):
            results.append(_run_check(conformance_check, harness))
            if (
                conformance_check.function in (common.factory_returns_component, common.forward_succeeds)
                and not results[-1].passed
            ):
                break
    return results


def _format_error_location(error: BaseException) -> str:
    """Format the last line of plugin code in a traceback, ignoring libraries and the checks."""
    plugin_frames = [
        frame for frame in extract_tb(error.__traceback__) if not set(Path(frame.filename).parts) & LIBRARY_FOLDERS
    ]
    return f" ({Path(plugin_frames[-1].filename).name}:{plugin_frames[-1].lineno})" if plugin_frames else ""


def _run_check(conformance_check: ConformanceCheck, harness: ComponentHarness) -> CheckResult:
    source = conformance_check.source or f"sca_registry.contracts.{COMPONENT_KINDS[harness.kind].protocol.__name__}"
    torch.manual_seed(0)
    try:
        problem = conformance_check.function(harness)
    except DoesNotApply as exception:
        return CheckResult(conformance_check.name, True, conformance_check.expected, f"skipped: {exception}", source)
    except Exception as error:
        problem = f"{type(error).__name__}: {' '.join(str(error).split())}{_format_error_location(error)}"
    return CheckResult(conformance_check.name, problem is None, conformance_check.expected, problem or "passed", source)
