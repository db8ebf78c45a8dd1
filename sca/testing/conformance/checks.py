"""What a promise is, and what is found of it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class CheckResult:
    """The result of one check; `source` is where the requirement is documented."""

    name: str
    passed: bool
    expected: str
    details: str
    source: str

    def __str__(self) -> str:
        if self.passed:
            return f"ok      {self.name}: {self.details}"
        return f"FAILED  {self.name}: expected: {self.expected} Found: {self.details}. See {self.source}"


@dataclass(frozen=True)
class ConformanceCheck:
    name: str
    kinds: tuple[str, ...]
    expected: str
    source: str | None  # None: the protocol of the kind
    function: Callable[[Any], str | None]


CHECKS: list[ConformanceCheck] = []


class DoesNotApply(Exception):
    """Raised by a check that has nothing to try on this part; the message says why."""


def register_check(*kinds: str, source: str | None = None) -> Callable[[Callable[[Any], str | None]], Any]:
    """Adds the function below it to what parts of these kinds (plural) are tried for."""

    def register(function: Callable[[Any], str | None]) -> Callable[[Any], str | None]:
        expected = " ".join(inspect.getdoc(function).partition("\n\n")[0].split())
        CHECKS.append(ConformanceCheck(function.__name__.replace("_", "-"), kinds, expected, source, function))
        return function

    return register
