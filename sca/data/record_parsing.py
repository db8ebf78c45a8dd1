"""Publishers' files and the fields of their records, checked as they are read.

Whatever is wrong is an InputError that names the file, the record and the field; the `location` of the functions below
names the first two.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from sca.io import masks
from sca.io.annotations import coco
from sca.io.annotations.annotation import SkipCallback, describe_unread_caption
from sca.io.errors import InputError, RejectCallback
from sca.io.json import parse_json, read_regular_file
from sca.io.validation import check_encodable, parse_texts, read_field


class EmptyDatasetError(InputError):
    """A dataset of which nothing can be used; the message says what was left out, and where images were looked for."""


def read_dataset_json(path: Path) -> Any:
    """Read a JSON file of a dataset in UTF-8, UTF-16 or UTF-32."""
    try:
        content = read_regular_file(path)
        return parse_json(content.decode(json.detect_encoding(content)), str(path), allow_surrogates=True)
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text (byte {error.start}); copy it again") from error
    except OSError as error:
        raise make_read_error(path, error) from error


def make_truncation_error(path: Path, problem: str, position: int, size: int) -> InputError:
    offset_text = f"{problem} at {position} of {size} bytes"
    return InputError(f"{path} is not valid JSON: {offset_text}; was it cut off while it was copied or downloaded?")


def make_read_error(path: Path, error: OSError) -> InputError:
    return InputError(f"cannot read {path}: {error.strerror or error}")


def iter_identified_records(
    records: Iterable[Any], list_location: str, key: str = "id", reject: RejectCallback | None = None
) -> Iterator[tuple[dict[str, Any], str]]:
    """Each record with the words that name it; the ids under `key` are checked to be unique.

    Args:
        reject: Receives the InputError of a record without an id of its own, which is then passed over; None raises it.
    """
    ids: set[int] = set()
    for number, record in enumerate(records):
        location = f"{list_location}[{number}]"
        try:
            record_id = read_field(record, key, int, location)
            location = f"{location} ({key} {record_id})"
            if record_id in ids:
                raise InputError(f"{location}: this {key} was given before")
        except ValueError as error:
            if reject is None:
                raise
            reject(error)
            continue
        ids.add(record_id)
        yield record, location


def parse_phrases(value: Any, key: str, location: str) -> list[str]:
    """Return the phrases in a text or a list of texts, without space around them; None has none."""
    subject = f"{location}, {key!r}"
    phrases = [] if value is None else parse_texts(subject, value)
    for phrase in phrases:
        check_encodable(subject, phrase)
    return [phrase.strip() for phrase in phrases]


def count_unread_caption(record: dict[str, Any], read_keys: Sequence[str], location: str, skip: SkipCallback) -> None:
    """Count a caption under a key that is not among those in `read_keys`, see `describe_unread_caption`."""
    if reason := describe_unread_caption(record, read_keys):
        skip(reason, location)


def parse_mask(
    value: Any, key: str, width: int, height: int, location: str, skip: SkipCallback
) -> dict[str, Any] | None:
    """Read a mask that is polygons or RLE of either kind as compressed RLE; None, and counted, if it is empty.

    Raises:
        InputError: If it is neither. One line with the place and the key.
    """
    try:
        rle = coco.parse_segmentation(value, (width, height), lambda reason: skip(reason, location))
    except ValueError as error:
        raise InputError(f"{location}: {key} {error}") from error
    if rle is not None and not masks.compute_mask_area(rle):
        return skip("empty mask", location)
    return rle
