"""Publishers' files and the fields of their records, checked as they are read.

Whatever is wrong is an InputError that names the file, the record and the field; the `place` of the functions below is
the words that name the first two.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from sca.io import masks
from sca.io.annotations import coco
from sca.io.annotations.annotation import Skip, find_unread_caption
from sca.io.errors import InputError, Reject
from sca.io.json import parse_json, read_regular_file
from sca.io.numbers import is_int64

KINDS = {int: "a whole number", str: "a string", list: "a list", dict: "a table of names and values"}


class EmptyDatasetError(InputError):
    """A dataset of which nothing can be used; the message says what was left out, and where images were looked for."""


def read_json(path: Path) -> Any:
    """A whole JSON file."""
    try:
        return parse_json(read_regular_file(path), str(path), surrogates=True)
    except OSError as error:
        raise unreadable(path, error) from error


def cut(path: Path, problem: str, position: int, size: int) -> InputError:
    place = f"{problem} at {position} of {size} bytes"
    return InputError(f"{path} is not valid JSON: {place}; was it cut off while it was copied or downloaded?")


def unreadable(path: Path, error: OSError) -> InputError:
    return InputError(f"cannot read {path}: {error.strerror or error}")


def identified(
    records: Iterable[Any], place: str, key: str = "id", reject: Reject | None = None
) -> Iterator[tuple[dict[str, Any], str]]:
    """Each record with the words that name it; the ids under `key` are checked to be unique.

    Args:
        reject: Receives the InputError of a record without an id of its own, which is then passed over; None raises it.
    """
    seen: set[int] = set()
    for number, record in enumerate(records):
        where = f"{place}[{number}]"
        try:
            identity = field(table(record, where), key, int, where)
            where = f"{where} ({key} {identity})"
            if identity in seen:
                raise InputError(f"{where}: this {key} was given before")
        except ValueError as error:
            if reject is None:
                raise
            reject(error)
            continue
        seen.add(identity)
        yield record, where


def table(record: Any, place: str) -> dict[str, Any]:
    if not isinstance(record, dict):
        raise InputError(f"{place} must be an object, not {record!r:.80}")
    return record


def field(record: dict[str, Any], key: str, kind: type, place: str) -> Any:
    """What `record` has under `key`, of exactly this kind; a whole number fits into 64 bits."""
    value = _given(record, key, place)
    if type(value) is not kind or (kind is int and not is_number(value)) or (kind is str and not is_text(value)):
        raise InputError(f"{place}: {key} must be {KINDS[kind]}, not {value!r:.80}")
    return value


def size(record: dict[str, Any], place: str) -> tuple[int, int]:
    """Width and height of an image."""
    width, height = (field(record, key, int, place) for key in ("width", "height"))
    if min(width, height) < 1 or max(width, height) >= 1 << 31:
        raise InputError(f"{place}: {width} x {height} is no size for an image")
    return width, height


def four(record: dict[str, Any], key: str, order: str, place: str) -> list[int | float]:
    """Four finite numbers in a list."""
    values = _given(record, key, place)
    if not isinstance(values, list) or len(values) != 4 or not all(map(is_number, values)):
        raise InputError(f"{place}: {key} must be four numbers ({order}), not {values!r:.80}")
    return values


def number(record: dict[str, Any], key: str, place: str) -> int | float:
    value = _given(record, key, place)
    if not is_number(value):
        raise InputError(f"{place}: {key} must be a number, not {value!r:.80}")
    return value


def corners(x: float, y: float, width: float, height: float, place: str) -> tuple[float, float, float, float]:
    """x1 y1 x2 y2 of a box given by its corner and its size."""
    if min(width, height) < 0:
        raise InputError(f"{place}: width {width} and height {height} of the box must not be negative")
    return x, y, x + width, y + height


def phrases(given: Any, key: str, place: str) -> list[str]:
    """The phrases in a string or a list of strings, without space around them; None has none."""
    given = [] if given is None else [given] if isinstance(given, str) else given
    if not isinstance(given, list) or not all(isinstance(phrase, str) for phrase in given):
        raise InputError(f"{place}: {key} must be a string or a list of strings, not {given!r:.80}")
    if not all(map(is_text, given)):
        raise InputError(f"{place}: {key} has a character that is half of one: {given!r:.80}")
    return [phrase.strip() for phrase in given]


def note_unread_caption(record: dict[str, Any], read: Sequence[str], place: str, skip: Skip) -> None:
    """Count a caption under a key that is not among those that are `read`, see `find_unread_caption`."""
    if unread := find_unread_caption(record, read):
        skip(unread, place)


def mask(given: Any, key: str, width: int, height: int, place: str, skip: Skip) -> dict[str, Any] | None:
    """Read a mask that is polygons or RLE of either kind as compressed RLE; None, and counted, if it is empty.

    Raises:
        InputError: If it is neither. One line with the place and the key.
    """
    try:
        code = coco.read_mask(given, (width, height), lambda reason: skip(reason, place))
    except ValueError as error:
        raise InputError(f"{place}: {key} {error}") from error
    if code is not None and not masks.area(code):
        return skip("empty mask", place)
    return code


def is_number(value: Any) -> bool:
    """Whether a value is a finite number that fits into a column of a table."""
    return is_int64(value) or (type(value) is float and math.isfinite(value))


def is_text(text: str) -> bool:
    """Whether it can be written as UTF-8; JSON can escape half a character."""
    return text.isascii() or not re.search("[\ud800-\udfff]", text)


def _given(record: dict[str, Any], key: str, place: str) -> Any:
    if key not in record:
        raise InputError(f"{place}: no {key!r}; it has: {', '.join(map(str, record)) or 'nothing'}")
    return record[key]
