"""What a promise is, and what is found of it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Finding:
    """How one promise was kept: `written` says where it is made."""

    check: str
    passed: bool
    expected: str
    found: str
    written: str

    def __str__(self) -> str:
        if self.passed:
            return f"ok      {self.check}: {self.found}"
        return f"FAILED  {self.check}: expected: {self.expected} Found: {self.found}. See {self.written}"


@dataclass(frozen=True)
class Promise:
    name: str
    kinds: tuple[str, ...]
    expected: str
    written: str | None  # None: the protocol of the kind
    keeps: Callable[[Any], str | None]


PROMISES: list[Promise] = []


class DoesNotApply(Exception):
    """Raised by a check that has nothing to try on this part; the message says why."""


def promise(*kinds: str, written: str | None = None) -> Callable[[Callable[[Any], str | None]], Any]:
    """Adds the function below it to what parts of these kinds (plural) are tried for."""

    def add(keeps: Callable[[Any], str | None]) -> Callable[[Any], str | None]:
        expected = " ".join(inspect.getdoc(keeps).partition("\n\n")[0].split())
        PROMISES.append(Promise(keeps.__name__.replace("_", "-"), kinds, expected, written, keeps))
        return keeps

    return add
