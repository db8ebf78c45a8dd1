"""Publishers' files and the fields of their records, checked as they are read.

Whatever is wrong is an InputError that names the file, the record and the field; the `place` of the functions below is
the words that name the first two.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from sca.io import masks
from sca.io.annotations import coco
from sca.io.annotations.annotation import Skip, find_unread_caption
from sca.io.errors import InputError, Reject
from sca.io.json import parse_json, read_regular_file
from sca.io.validation import check_encodable, read_field, read_texts


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
            identity = read_field(record, key, int, where)
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


def read_phrases(value: Any, key: str, place: str) -> list[str]:
    """Return the phrases in a text or a list of texts, without space around them; None has none."""
    what = f"{place}, {key!r}"
    phrases = [] if value is None else read_texts(what, value)
    for phrase in phrases:
        check_encodable(what, phrase)
    return [phrase.strip() for phrase in phrases]


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
