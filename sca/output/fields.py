"""Fields of the records that captions are read from, checked as they are read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from sca.io.annotations.annotation import AnnotationError, read_size
from sca.io.json import JsonError, parse_json
from sca.io.numbers import is_finite_number
from sca.output.captioned import ReadError, Size


def parse(text: str, where: str) -> Any:
    try:
        return parse_json(text, surrogates=True)
    except JsonError as error:
        raise ReadError(f"{where}: not whole JSON: {error}") from error


def read_object(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise ReadError(f"{where}: an object, not {value!r:.40}")
    return value


def read_list(table: Mapping[str, Any], field: str, where: str) -> list[Any]:
    if not isinstance(table.get(field), list):
        raise ReadError(f"{where}, {field!r}: a list, not {table.get(field)!r:.40}")
    return table[field]


def read_name(record: Any, field: str, where: str) -> str:
    value = read_object(record, where).get(field)
    if not isinstance(value, str) or not value or "\0" in value:
        raise ReadError(f"{where}, {field!r}: the name of an image, not {value!r:.40}")
    return value


def read_key(record: Mapping[str, Any], field: str, where: str) -> int | str:
    value = record.get(field)
    if not isinstance(value, int | str):
        raise ReadError(f"{where}, {field!r}: a number or text, not {value!r:.40}")
    return value


def read_image_size(record: Mapping[str, Any], where: str) -> Size:
    try:
        size = read_size(read_object(record, where), ("width", "height"), where)
    except AnnotationError as error:
        raise ReadError(str(error)) from error
    if size is None:
        raise ReadError(f"{where}: 'width' and 'height' of the image are missing; give both in pixels")
    return Size(*size)


def read_numbers(value: Any, count: int, where: str) -> tuple[float, ...]:
    good = isinstance(value, list | tuple) and len(value) == count
    if not good or not all(map(is_finite_number, value)):
        raise ReadError(f"{where}: {count} numbers, not {value!r:.60}")
    return tuple(float(x) for x in value)


def read_number(value: Any) -> float:
    return float(value) if is_finite_number(value) else math.nan
