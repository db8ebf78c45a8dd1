"""Checks of fields that a person wrote in a recipe or a sweep: one line that names the field and what it takes."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from sca_registry import RegistryError
from sca_registry.messages import unknown

from sca.io.numbers import is_finite_number

KINDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    Mapping: "a table",
    list: "a list",
}


def check_type(key: str, value: Any, kind: type) -> None:
    """Check the type of a field.

    Args:
        key: What the message calls the field, such as "train.steps".
        value: What was written.
        kind: One of `KINDS`; `float` takes any finite number and no other type takes a bool for a number.

    Raises:
        RegistryError: If the value has another type.
    """
    valid = is_finite_number(value) if kind is float else isinstance(value, kind)
    if not valid or (isinstance(value, bool) and kind is not bool):
        raise RegistryError(f"{key} is {value!r:.80}: give {KINDS[kind]}")


def check_same_type(key: str, value: Any, default: Any) -> None:
    """Check that a field has the type of its default. Raises RegistryError like `check_type`."""
    check_type(key, value, next(kind for kind in KINDS if isinstance(default, kind)))


def check_list(key: str, values: Any, kind: type, minimum: int = 0) -> None:
    """Check a list of at least `minimum` elements of one type. Raises RegistryError."""
    if not isinstance(values, list | tuple) or len(values) < minimum or not all(_is(kind, value) for value in values):
        plural = {int: "whole numbers", str: "strings", float: "numbers"}[kind]
        count = f"{minimum} or more " if minimum else ""
        raise RegistryError(f"{key} is {values!r:.80}: give a list of {count}{plural}")


def check_minimum(key: str, value: Any, minimum: int) -> None:
    """Check a whole number of `minimum` or more. Raises RegistryError."""
    check_type(key, value, int)
    if value < minimum:
        raise RegistryError(f"{key} is {value}: give a whole number, {minimum} or more")


def check_not_negative(key: str, value: Any) -> None:
    """Check a finite number of 0 or more. Raises RegistryError."""
    check_type(key, value, float)
    if value < 0:
        raise RegistryError(f"{key} is {value}: give a number, 0 or more")


def check_choice(key: str, value: Any, choices: Iterable[str]) -> None:
    """Check a text that is one of several. Raises RegistryError, with the closest and all of them."""
    check_type(key, value, str)
    if value not in (known := list(choices)):
        raise unknown(f"{key} is {value!r}", value, known)


def check_keys(what: str, table: Any, known: Collection[str]) -> None:
    """Check that a field is a table with no other keys than those known. Raises RegistryError."""
    check_type(what, table, Mapping)
    for key in table:
        if key not in known:
            raise unknown(f"{what} has no {key!r}", str(key), known)


def _is(kind: type, value: Any) -> bool:
    return is_finite_number(value) if kind is float else isinstance(value, kind) and not isinstance(value, bool)
