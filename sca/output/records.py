"""Captions of the regions that a file records, as records of its own or as annotations of a labeling tool."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import groupby
from typing import Any

from sca_registry.contracts import Caption, Prompt

from sca.io import masks
from sca.io.annotations.annotation import Annotation, SkipCounter
from sca.io.annotations.shapes import fit_box
from sca.io.errors import InputError, Reject
from sca.io.prompts import read_prompt
from sca.io.validation import (
    check_numbers,
    check_type,
    is_finite_number,
    is_int64,
    read_field,
    read_name,
    require,
    require_size,
)
from sca.output.captioned import Captioned, Size


def read_image(plain: Any, where: str) -> Captioned:
    """Read an image of a journal: `image`, `width`, `height` and `captions`, each as in a line of JSON lines.

    Raises:
        InputError: A field is missing or invalid.
    """
    size = Size(*require_size(plain, where))
    captions = read_field(plain, "captions", list, where)
    told = [_caption(each, size, number, where) for number, each in enumerate(captions)]
    return Captioned(read_name(plain, "image", where), size, told, None)


def group_records(records: Iterable[tuple[str, Any]], skip: SkipCounter, reject: Reject) -> Iterator[Captioned]:
    """Read images from records; the records of an image follow each other."""
    seen: set[str] = set()
    for name, some in groupby(_named(records, reject), key=lambda record: record[0]):
        captions, size, model = [], None, None
        for _, where, plain in some:
            if size is None and name in seen:
                raise InputError(f"{where}: {name!r} had records before, with others between; sort them by image")
            seen.add(name)
            try:
                given = Size(*require_size(plain, where))
                if given != (size or given):
                    raise InputError(f"{where}: the image is {given.width} x {given.height}, and was {size} before")
                size, model = given, plain.get("model") or model
                caption = fit_caption(_caption(plain, size, len(captions), where), size, where, skip)
            except InputError as error:
                reject(error)
            else:
                captions += [caption] if caption else []
        if size is not None:
            yield Captioned(name, size, captions, model)


def _named(records: Iterable[tuple[str, Any]], reject: Reject) -> Iterator[tuple[str, str, Any]]:
    for where, plain in records:
        try:
            name = read_name(plain, "image", where)
        except InputError as error:
            reject(error)
        else:
            yield name, where, plain


def _caption(plain: Mapping[str, Any], size: Size, region: int, where: str) -> Caption:
    text = _text(plain, where)
    code, box, prompt = plain.get("mask"), plain.get("box"), plain.get("prompt")
    try:
        code = None if code is None else masks.checked(code)
        asked = read_prompt(prompt, where, *size) if prompt else Prompt()
    except ValueError as error:
        raise InputError(str(error) if str(error).startswith(where) else f"{where}, 'mask': {error}") from error
    if code is not None and code["size"] != [size.height, size.width]:
        raise InputError(f"{where}, 'mask': its size is {code['size']}, the image's {[size.height, size.width]}")
    if box is not None:
        check_numbers(f"{where}, 'box'", box, "x1, y1, x2, y2")
    others = read_field(plain, "others", list, where) if plain.get("others") else []
    return Caption(
        text,
        _number(plain.get("score")),
        None if box is None else tuple(map(float, box)),
        code,
        None if plain.get("iou") is None else _number(plain["iou"]),
        asked,
        plain["region"] if is_int64(plain.get("region")) else region,
        tuple(_other(each, f"{where}, 'others'") for each in others),
    )


def _text(plain: Any, where: str) -> str:
    """A caption, which may contain half of a surrogate pair."""
    text = require(plain, "caption", where)
    check_type(f"{where}, 'caption'", text, str, InputError)
    return text


def _other(plain: Any, where: str) -> tuple[str, float]:
    return _text(plain, where), _number(plain.get("score"))


def _number(value: Any) -> float:
    return float(value) if is_finite_number(value) else math.nan


def to_captions(annotations: Iterable[Annotation], size: Size, skip: SkipCounter, reject: Reject) -> list[Caption]:
    captions = []
    for number, annotation in enumerate(annotations):
        try:
            captions += [caption] if (caption := to_caption(annotation, size, number, skip)) else []
        except InputError as error:
            reject(error)
    return captions


def to_caption(annotation: Annotation, size: Size, region: int, skip: SkipCounter) -> Caption | None:
    """The caption of an annotation; None, and counted, where its box is normalized or outside of the image."""
    prompt = Prompt()
    if annotation.point:
        x, y = annotation.point
        if not (0 <= x < size.width and 0 <= y < size.height):
            sides = f"{size.width} x {size.height}"
            raise InputError(f"{annotation.place}: the point {x:g}, {y:g} is outside the image of {sides}")
        prompt = Prompt(points=((x, y, 1),))
    if annotation.unread:
        skip(annotation.unread, annotation.place)
    if not annotation.texts:
        skip("region without text", annotation.place)
    text, *others = annotation.texts or ("",)
    caption = Caption(
        text,
        _number(annotation.score),
        annotation.box,
        annotation.mask,
        None if annotation.iou is None else _number(annotation.iou),
        prompt,
        region,
        tuple((other, math.nan) for other in others),
    )
    return fit_caption(caption, size, annotation.place, skip)


def fit_caption(caption: Caption, size: Size, where: str, skip: SkipCounter) -> Caption | None:
    """Clip the box of a caption to its image; None, and counted, for a box that is normalized or outside."""
    if caption.box is None:
        return caption
    box = fit_box(caption.box, size, where, skip, caption.mask)
    return None if box is None else replace(caption, box=box)
