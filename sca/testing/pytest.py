"""Pytest fixture for the tests of plugin packages.

    pytest_plugins = ["sca.testing.pytest"]

    def test_mixer_passes_conformance(conformance):
        conformance("mixer", MyMixer, depth=1)

The first line belongs in a test module or in the top-level conftest.py.
"""

from __future__ import annotations

from collections.abc import Callable
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
        failures = [str(result) for result in results if not result.passed]
        if failures:
            pytest.fail("\n".join(failures), pytrace=False)
        return results

    return check_conformance
