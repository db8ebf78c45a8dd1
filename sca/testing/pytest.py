"""A pytest fixture for the tests of plugin packages.

    pytest_plugins = ["sca.testing.pytest"]

    def test_mixer_passes_conformance(conformance):
        conformance("mixer", MyMixer, depth=1)

The first line is for a test module or the topmost conftest.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest


@pytest.fixture
def conformance() -> Callable[..., Any]:
    """`conformance(kind, part, **options)` fails the test unless the part keeps every promise of its kind, and gives
    the findings; part: a registered name, or a factory.
    """

    def check_conformance(kind: str, part: str | Callable[..., Any], /, **options: Any) -> Any:
        from sca.testing.conformance import check_part  # imports torch, which not every test run needs

        results = check_part(kind, part, **options)
        failures = [str(finding) for finding in results if not finding.passed]
        if failures:
            pytest.fail("\n".join(failures), pytrace=False)
        return results

    return check_conformance
