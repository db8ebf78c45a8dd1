"""Checks of values that a person or a file states; each error is one line with the value and what to give instead.

`what` is what the message calls a value, such as "train.steps" or "a.json, images[3], 'width'", and `place` a file and
a record. Fields of recipes and sweeps raise RegistryError, records of files InputError.
"""

from __future__ import annotations

import json
import math
import numbers
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from sca_registry import RegistryError
from sca_registry.messages import make_unknown_name_error

from sca.io.coordinates import PIXEL_LIMIT, Box
from sca.io.errors import InputError

KINDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    Mapping: "a table",
    dict: "an object",
    list: "a list",
}


def is_int64(value: Any) -> bool:
    """Whether a value is an integer, not a bool, that fits into 64 bits, as in an Arrow table."""
    return type(value) is int and -(1 << 63) <= value < 1 << 63


def is_finite_number(value: Any) -> bool:
    """Whether a value is a number that is finite as a float; a bool, NaN, infinity and 10**400 are not."""
    try:
        return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False


def has_kind(value: Any, kind: type) -> bool:
    """Whether a value is of one of `KINDS`: numbers are finite, and only `bool` takes true and false."""
    checks = {int: is_int64, float: is_finite_number}
    return checks[kind](value) if kind in checks else isinstance(value, kind)


def check_type(what: str, value: Any, kind: type, error: type[ValueError] = RegistryError) -> None:
    """Check that a value is of one of `KINDS`. Raises `error`."""
    if not has_kind(value, kind):
        raise error(f"{what} is {value!r:.80}; give {KINDS[kind]}")


def check_same_type(what: str, value: Any, default: Any) -> None:
    """Check that a value has the type of its default. Raises RegistryError."""
    check_type(what, value, next(kind for kind in KINDS if isinstance(default, kind)))


def check_list(what: str, values: Any, kind: type, minimum: int = 0) -> None:
    """Check a list of at least `minimum` elements of one type. Raises RegistryError."""
    valid = isinstance(values, list | tuple) and len(values) >= minimum
    if not valid or not all(has_kind(value, kind) for value in values):
        plural = {int: "whole numbers", str: "strings", float: "numbers"}[kind]
        count = f"{minimum} or more " if minimum else ""
        raise RegistryError(f"{what} is {values!r:.80}; give a list of {count}{plural}")


def check_range(what: str, value: Any, kind: type, minimum: float = 0, maximum: float = math.inf) -> None:
    """Check a number, `int` or `float`, from `minimum` to `maximum`. Raises RegistryError."""
    check_type(what, value, kind)
    if not minimum <= value <= maximum:
        limits = f", {minimum} or more" if math.isinf(maximum) else f" from {minimum} to {maximum}"
        raise RegistryError(f"{what} is {value}; give {KINDS[kind]}{limits}")


def check_choice(what: str, value: Any, choices: Iterable[str]) -> None:
    """Check text that is one of several. Raises RegistryError, with the closest and all of them."""
    check_type(what, value, str)
    if value not in (known := list(choices)):
        raise make_unknown_name_error(f"{what} is {value!r}", value, known)


def check_keys(what: str, table: Any, known: Collection[str]) -> None:
    """Check a table with no other keys than those known. Raises RegistryError."""
    check_type(what, table, Mapping)
    for key in table:
        if key not in known:
            raise make_unknown_name_error(f"{what} has no {key!r}", str(key), known)


def check_numbers(what: str, values: Any, form: str) -> None:
    """Check a list of finite numbers, as many as `form` names, such as "x, y". Raises InputError."""
    count = len(form.split(","))
    if not isinstance(values, list | tuple) or len(values) != count or not all(map(is_finite_number, values)):
        raise InputError(f"{what} is {values!r:.80}; give {count} numbers ({form})")


def check_encodable(what: str, value: Any) -> None:
    """Check that a JSON value can be written as UTF-8: it may contain half of a surrogate pair. Raises InputError."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = ascii(error.object[error.start])
        raise InputError(f"{what} contains {half}, half of a surrogate pair, which is not text; remove it") from error


def check_name(what: str, value: Any) -> str:
    """Return the name of an image, which may contain half of a surrogate pair. Raises InputError."""
    if not isinstance(value, str) or not value.strip() or "\0" in value:
        raise InputError(f"{what} is {value!r:.80}; give the file name of an image")
    return value


def check_object(value: Any, place: str) -> dict[str, Any]:
    """Return a JSON object. Raises InputError for any other value."""
    check_type(place, value, dict, InputError)
    return value


def require(record: Any, key: str, place: str) -> Any:
    """Return what a JSON object has under a key. Raises InputError if it is something else or lacks the key."""
    if key not in check_object(record, place):
        raise InputError(f"{place}: no {key!r}; it has: {', '.join(map(str, record)) or 'nothing'}")
    return record[key]


def read_field(record: Any, key: str, kind: type, place: str) -> Any:
    """Return what a record has under a key: one of `KINDS`, and text that can be encoded. Raises InputError."""
    value = require(record, key, place)
    check_type(f"{place}, {key!r}", value, kind, InputError)
    if kind is str:
        check_encodable(f"{place}, {key!r}", value)
    return value


def parse_numbers(record: Any, key: str, form: str, place: str) -> Any:
    """Return the list of numbers that a record has under a key, see `check_numbers`."""
    values = require(record, key, place)
    check_numbers(f"{place}, {key!r}", values, form)
    return values


def get_image_name(record: Any, key: str, place: str) -> str:
    """Return the name of an image that a record has under a key, see `check_name`."""
    return check_name(f"{place}, {key!r}", require(record, key, place))


def read_id(record: Any, key: str, place: str) -> int | str:
    """Return the id that a record has under a key. Raises InputError unless it is a whole number or text."""
    value = require(record, key, place)
    if not isinstance(value, int | str) or isinstance(value, bool):
        raise InputError(f"{place}, {key!r} is {value!r:.80}; give a whole number or text")
    return value


def read_texts(what: str, value: Any) -> list[str]:
    """Return the texts in a text or a list of texts. Raises InputError."""
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise InputError(f"{what} is {value!r:.80}; give text, or a list of texts")
    return texts


def read_size(
    record: Mapping[str, Any], place: str, keys: tuple[str, str] = ("width", "height")
) -> tuple[int, int] | None:
    """Return the width and height of an image in pixels, None where a record lacks either.

    Raises:
        InputError: They are not the size of an image that may be opened.
    """
    width, height = (record.get(key) for key in keys)
    if width is None or height is None:
        return None
    if not is_int64(width) or not is_int64(height) or min(width, height) < 1:
        names = " and ".join(map(repr, keys))
        raise InputError(f"{place}: {names} are {(width, height)!r:.80}; give the size of the image in whole pixels")
    if width * height > PIXEL_LIMIT:
        raise InputError(f"{place}: the image is {width} x {height}; at most {PIXEL_LIMIT:,} pixels are allowed")
    return width, height


def require_size(record: Any, place: str) -> tuple[int, int]:
    """Return the width and height that a record states. Raises InputError if it lacks either, as `read_size` does."""
    for key in ("width", "height"):
        check_type(f"{place}, {key!r}", require(record, key, place), int, InputError)
    size = read_size(record, place)
    assert size is not None
    return size


def convert_box(what: str, x: float, y: float, width: float, height: float) -> Box:
    """Convert a corner and a size to x1, y1, x2, y2. Raises InputError for a negative size."""
    if min(width, height) < 0:
        raise InputError(f"{what} has width {width} and height {height}; give none below 0")
    return x, y, x + width, y + height
