"""Pytest fixtures for the tests of plugin packages.

    pytest_plugins = ["sca.testing.pytest"]

    def test_mixer_passes_conformance(conformance):
        conformance("mixer", MyMixer, depth=1)

    def test_encoder_equals_timm(parity):
        parity("encoder", "my-resnet", "timm:resnet50")

The first line belongs in a test module or in the top-level conftest.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest


@pytest.fixture
def conformance() -> Callable[..., Any]:
    """Return the function `conformance(kind, component, **options)`.

    It takes the arguments of `check_component`, fails the test if a check fails, and otherwise returns the results.
    """

    def check_conformance(kind: str, component: str | Callable[..., Any], /, **options: Any) -> Any:
        from sca.testing.conformance import check_component  # imports torch only when used

        results = check_component(kind, component, **options)
        _fail_with_lines([str(result) for result in results if not result.passed])
        return results

    return check_conformance


@pytest.fixture
def parity() -> Callable[..., Any]:
    """Return the function `parity(kind, component, against, **options)`.

    It takes the arguments of `check_parity`, fails the test if an output differs, and otherwise returns the results.
    """

    def compare_with_library(kind: str, component: str | Callable[..., Any], against: str, /, **options: Any) -> Any:
        from sca.testing.parity import check_parity, format_results  # imports torch only when used

        results = check_parity(kind, component, against, **options)
        _fail_with_lines(format_results([result for result in results if not result.passed]))
        return results

    return compare_with_library


def _fail_with_lines(lines: Sequence[str]) -> None:
    if lines:
        pytest.fail("\n".join(lines), pytrace=False)
