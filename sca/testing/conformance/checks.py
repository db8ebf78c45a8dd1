"""Registration and results of conformance checks."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class CheckResult:
    """Result of one check.

    Attributes:
        name: Name of the check.
        passed: Whether the component passed, or the check does not apply.
        expected: Expected behavior.
        details: Problem, or the reason why the check does not apply.
        source: Where the expected behavior is documented.
    """

    name: str
    passed: bool
    expected: str
    details: str
    source: str

    def __str__(self) -> str:
        if self.passed:
            return f"ok      {self.name}: {self.details}"
        return f"FAILED  {self.name}: {self.details}. Expected: {self.expected} See {self.source}."


@dataclass(frozen=True)
class ConformanceCheck:
    """Registered check.

    Attributes:
        name: Name of the check.
        kinds: Kinds of components (plural) that it applies to.
        expected: Expected behavior.
        source: Where the expected behavior is documented; None for the protocol of the kind.
        function: Function that returns None or the problem.
    """

    name: str
    kinds: tuple[str, ...]
    expected: str
    source: str | None
    function: Callable[[Any], str | None]


CHECKS: list[ConformanceCheck] = []


class DoesNotApply(Exception):
    """Exception of a check that does not apply to a component; the message is the reason."""


def register_check(*kinds: str, source: str | None = None) -> Callable[[Callable[[Any], str | None]], Any]:
    """Register a function as a check of components.

    Args:
        *kinds: Kinds of components (plural).
        source: Where the expected behavior is documented. Default: the protocol of the kind.

    Returns:
        The decorator.
    """

    def register(function: Callable[[Any], str | None]) -> Callable[[Any], str | None]:
        documentation = inspect.getdoc(function)
        assert documentation is not None
        expected = " ".join(documentation.partition("\n\n")[0].split())
        CHECKS.append(ConformanceCheck(function.__name__.replace("_", "-"), kinds, expected, source, function))
        return function

    return register
