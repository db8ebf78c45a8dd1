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

    def keep(kind: str, part: str | Callable[..., Any], /, **options: Any) -> Any:
        from sca.testing.conformance import check  # imports torch, which not every test run needs

        findings = check(kind, part, **options)
        broken = [str(finding) for finding in findings if not finding.passed]
        if broken:
            pytest.fail("\n".join(broken), pytrace=False)
        return findings

    return keep
