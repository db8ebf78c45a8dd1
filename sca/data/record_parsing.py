"""Reading and validation of records in publishers' files.

Invalid content raises an InputError that names the file, the record and the field. The argument `location` names the
file and the record.
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
    """Error for a dataset without usable samples; names what was skipped and the image folder."""


def read_dataset_json(path: Path) -> Any:
    """Read a JSON file of a dataset in UTF-8, UTF-16 or UTF-32.

    Args:
        path: JSON file.

    Returns:
        The parsed content.

    Raises:
        InputError: The file is unreadable or invalid.
    """
    try:
        content = read_regular_file(path)
        return parse_json(content.decode(json.detect_encoding(content)), str(path), allow_surrogates=True)
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    except OSError as error:
        raise make_read_error(path, error) from error


def make_truncation_error(path: Path, problem: str, position: int, size: int) -> InputError:
    """Return an InputError for a JSON file that is invalid at a byte position, and possibly truncated."""
    offset_text = f"{problem} at {position} of {size} bytes"
    return InputError(f"{path} is not valid JSON: {offset_text}; copy or download it again")


def make_read_error(path: Path, error: OSError) -> InputError:
    """Return an InputError for a file that cannot be read."""
    return InputError(f"cannot read {path}: {error.strerror or error}")


def check_benchmark_split(split: str, *splits: str) -> None:
    """Check that a benchmark has a split.

    Args:
        split: Requested split.
        *splits: Splits of the benchmark.

    Raises:
        InputError: The benchmark has no such split.
    """
    if split not in splits:
        raise InputError(f"the benchmark has no split {split!r}; use {' or '.join(splits)}")


def iter_identified_records(
    records: Iterable[Any], list_location: str, key: str = "id", reject: RejectCallback | None = None
) -> Iterator[tuple[dict[str, Any], str]]:
    """Iterate over records with a unique id.

    Args:
        records: Records of a list.
        list_location: Location of the list for error messages.
        key: Field of the id.
        reject: Callback for the InputError of a record without a unique id, which is then skipped; None raises it.

    Yields:
        Each record and its location.

    Raises:
        InputError: A record has no unique id and `reject` is None.
    """
    ids: set[int] = set()
    for number, record in enumerate(records):
        location = f"{list_location}[{number}]"
        try:
            record_id = read_field(record, key, int, location)
            location = f"{location} ({key} {record_id})"
            if record_id in ids:
                raise InputError(f"{location}: duplicate {key}")
        except ValueError as error:
            if reject is None:
                raise
            reject(error)
            continue
        ids.add(record_id)
        yield record, location


def parse_phrases(value: Any, key: str, location: str) -> list[str]:
    """Return the phrases of a string or a list of strings, without surrounding whitespace.

    Args:
        value: String, list of strings, or None for no phrases.
        key: Field for error messages.
        location: File and record for error messages.

    Returns:
        The phrases; empty for None.

    Raises:
        InputError: The value has the wrong type, or cannot be encoded as UTF-8.
    """
    subject = f"{location}, {key!r}"
    phrases = [] if value is None else parse_texts(subject, value)
    for phrase in phrases:
        check_encodable(subject, phrase)
    return [phrase.strip() for phrase in phrases]


def count_unread_caption(record: dict[str, Any], read_keys: Sequence[str], location: str, skip: SkipCallback) -> None:
    """Count a caption under a key that is not in `read_keys`, see `describe_unread_caption`."""
    if reason := describe_unread_caption(record, read_keys):
        skip(reason, location)


def parse_mask(
    value: Any, key: str, width: int, height: int, location: str, skip: SkipCallback
) -> dict[str, Any] | None:
    """Convert a mask to compressed RLE.

    Args:
        value: Polygons, uncompressed RLE or compressed RLE.
        key: Field for error messages.
        width: Image width in pixels.
        height: Image height in pixels.
        location: File and record for error messages.
        skip: Callback that counts skipped content by reason.

    Returns:
        COCO RLE; None, and counted, if the mask is empty.

    Raises:
        InputError: The value is not a mask.
    """
    try:
        rle = coco.parse_segmentation(value, (width, height), lambda reason: skip(reason, location))
    except ValueError as error:
        raise InputError(f"{location}: {key} {error}") from error
    if rle is not None and not masks.compute_mask_area(rle):
        skip("empty mask", location)
        return None
    return rle
