"""Checks of values from a person or a file. Each error is one line with the value and the fix.

`subject` is the value's name in messages, such as "train.steps" or "a.json, images[3], 'width'". `location` is a file
and a record. Fields of recipes and sweeps raise RegistryError, records of files InputError.
"""

from __future__ import annotations

import json
import math
import numbers
from collections.abc import Collection, Iterable, Mapping
from typing import Any, TypeGuard

from sca_registry import RegistryError
from sca_registry.errors import make_unknown_name_error

from sca.io.coordinates import PIXEL_LIMIT, Box
from sca.io.errors import InputError

XYWH_FORMAT = "x, y, width, height"
TYPE_DESCRIPTIONS = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "a string",
    Mapping: "a table",
    dict: "an object",
    list: "a list",
}


def is_int64(value: Any) -> bool:
    """Return whether a value is a Python or NumPy integer, not a bool, that fits into 64 bits."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool) and -(1 << 63) <= int(value) < 1 << 63


def is_finite_number(value: Any) -> TypeGuard[float]:
    """Return whether a value is a number that is finite as a float; False for bool, NaN, infinity and 10**400."""
    try:
        return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False


def has_type(value: Any, expected_type: type) -> bool:
    """Return whether a value has a type of `TYPE_DESCRIPTIONS`: numbers must be finite, booleans match only `bool`."""
    if expected_type is int:
        return is_int64(value)
    return is_finite_number(value) if expected_type is float else isinstance(value, expected_type)


def check_type(subject: str, value: Any, expected_type: type, error_class: type[ValueError] = RegistryError) -> None:
    """Check that a value has a type of `TYPE_DESCRIPTIONS`; raise `error_class` otherwise."""
    if not has_type(value, expected_type):
        raise error_class(f"{subject} is {value!r:.80}; expected {TYPE_DESCRIPTIONS[expected_type]}")


def check_same_type(subject: str, value: Any, default: Any) -> None:
    """Check that a value has the type of its default; raise RegistryError otherwise."""
    check_type(subject, value, next(kind for kind in TYPE_DESCRIPTIONS if isinstance(default, kind)))


def check_list(subject: str, values: Any, element_type: type, minimum: int = 0) -> None:
    """Check a list of at least `minimum` elements of one type; raise RegistryError otherwise."""
    is_long_enough = isinstance(values, list | tuple) and len(values) >= minimum
    if not is_long_enough or not all(has_type(value, element_type) for value in values):
        plural = {int: "integers", str: "strings", float: "numbers"}[element_type]
        count = f"{minimum} or more " if minimum else ""
        raise RegistryError(f"{subject} is {values!r:.80}; expected a list of {count}{plural}")


def check_range(subject: str, value: Any, expected_type: type, minimum: float = 0, maximum: float = math.inf) -> None:
    """Check a number, `int` or `float`, from `minimum` to `maximum`; raise RegistryError otherwise."""
    check_type(subject, value, expected_type)
    if not minimum <= value <= maximum:
        limits = f" of at least {minimum}" if math.isinf(maximum) else f" from {minimum} to {maximum}"
        raise RegistryError(f"{subject} is {value}; expected {TYPE_DESCRIPTIONS[expected_type]}{limits}")


def check_choice(subject: str, value: Any, choices: Iterable[str]) -> None:
    """Check that a text is one of several choices; raise RegistryError, with the closest one and all, otherwise."""
    check_type(subject, value, str)
    if value not in (allowed := list(choices)):
        raise make_unknown_name_error(f"{subject} is {value!r}", value, allowed)


def check_keys(subject: str, table: Any, allowed_keys: Collection[str]) -> None:
    """Check that a table has only allowed keys; raise RegistryError otherwise."""
    check_type(subject, table, Mapping)
    for key in table:
        if key not in allowed_keys:
            raise make_unknown_name_error(f"unknown key {key!r} in {subject}", str(key), allowed_keys)


def check_numbers(subject: str, values: Any, expected_format: str) -> None:
    """Check a list of finite numbers of the length of `expected_format`, such as "x, y"; raise InputError otherwise."""
    count = len(expected_format.split(","))
    if not isinstance(values, list | tuple) or len(values) != count or not all(map(is_finite_number, values)):
        raise InputError(f"{subject} is {values!r:.80}; expected {count} numbers ({expected_format})")


def check_encodable(subject: str, value: Any) -> None:
    """Check that a JSON value can be encoded as UTF-8, without lone surrogates; raise InputError otherwise."""
    if isinstance(value, str) and value.isascii():
        return
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        surrogate = ascii(error.object[error.start])
        raise InputError(
            f"{subject} contains {surrogate}, half of a surrogate pair, which is not text; remove it"
        ) from error


def check_image_name(subject: str, value: Any) -> str:
    """Check and return an image name, which may contain lone surrogates; raise InputError otherwise."""
    if not isinstance(value, str) or not value.strip() or "\0" in value:
        raise InputError(f"{subject} is {value!r:.80}; expected the file name of an image")
    return value


def check_object(value: Any, location: str) -> dict[str, Any]:
    """Check and return a JSON object; raise InputError otherwise."""
    check_type(location, value, dict, InputError)
    return value


def require_key(record: Any, key: str, location: str) -> Any:
    """Return the value of a key in a JSON object; raise InputError if the record is not an object or lacks the key."""
    if key not in check_object(record, location):
        raise InputError(f"{location}: no {key!r}; it has: {', '.join(map(str, record)) or 'nothing'}")
    return record[key]


def read_field(record: Any, key: str, expected_type: type, location: str) -> Any:
    """Return the value of a key; raise InputError unless it has the expected type, and text can be encoded."""
    value = require_key(record, key, location)
    check_type(f"{location}, {key!r}", value, expected_type, InputError)
    if expected_type is str:
        check_encodable(f"{location}, {key!r}", value)
    return value


def read_number_list(record: Any, key: str, expected_format: str, location: str) -> Any:
    """Return the list of numbers of a key, see `check_numbers`."""
    values = require_key(record, key, location)
    check_numbers(f"{location}, {key!r}", values, expected_format)
    return values


def read_image_name(record: Any, key: str, location: str) -> str:
    """Return the image name of a key, see `check_image_name`."""
    return check_image_name(f"{location}, {key!r}", require_key(record, key, location))


def read_id(record: Any, key: str, location: str) -> int | str:
    """Return the id of a key; raise InputError unless it is an integer or text."""
    value = require_key(record, key, location)
    if not isinstance(value, int | str) or isinstance(value, bool):
        raise InputError(f"{location}, {key!r} is {value!r:.80}; expected an integer or a string")
    return value


def parse_texts(subject: str, value: Any) -> list[str]:
    """Return the texts of a text or a list of texts; raise InputError otherwise."""
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise InputError(f"{subject} is {value!r:.80}; expected a string, or a list of strings")
    return texts


def read_recorded_size(
    record: Mapping[str, Any], location: str, keys: tuple[str, str] = ("width", "height")
) -> tuple[int, int] | None:
    """Return the recorded width and height of an image in pixels; None if either is missing.

    Args:
        record: Record with the size.
        location: Subject of the error messages.
        keys: Names of the fields with the width and the height.

    Returns:
        Width and height, or None.

    Raises:
        InputError: The values are not a valid image size.
    """
    width, height = (record.get(key) for key in keys)
    if width is None or height is None:
        return None
    if not is_int64(width) or not is_int64(height) or min(width, height) < 1:
        names = " and ".join(map(repr, keys))
        raise InputError(
            f"{location}: {names} are {(width, height)!r:.80}; expected the size of the image in integer pixels"
        )
    if width * height > PIXEL_LIMIT:
        raise InputError(f"{location}: the image is {width} x {height}; at most {PIXEL_LIMIT:,} pixels are allowed")
    return width, height


def require_recorded_size(record: Any, location: str) -> tuple[int, int]:
    """Return the recorded width and height, as `read_recorded_size` does; raise InputError if either is missing."""
    for key in ("width", "height"):
        check_type(f"{location}, {key!r}", require_key(record, key, location), int, InputError)
    size = read_recorded_size(record, location)
    assert size is not None
    return size


def read_xywh_box(record: Any, key: str, location: str) -> Box:
    """Return the box x, y, width, height of a key as x1, y1, x2, y2; raise InputError for an invalid one."""
    return xywh_to_xyxy(f"{location}, {key!r}", *read_number_list(record, key, XYWH_FORMAT, location))


def xywh_to_xyxy(subject: str, x: float, y: float, width: float, height: float) -> Box:
    """Convert a corner and a size to x1, y1, x2, y2; raise InputError for a negative size or an infinite corner."""
    if min(width, height) < 0:
        raise InputError(f"{subject} has width {width} and height {height}; expected values of at least 0")
    if not math.isfinite(float(x) + float(width)) or not math.isfinite(float(y) + float(height)):
        raise InputError(f"{subject} has a corner that is not finite; expected the box in image pixels")
    return x, y, x + width, y + height
