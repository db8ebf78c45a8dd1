"""Captions of the regions that a file records, as records of its own or as annotations of a labeling tool."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import groupby
from typing import Any

from sca_registry.contracts import Caption, Prompt

from sca.io import masks
from sca.io.annotations.annotation import Annotation, AnnotationError, Reject, SkipCounter
from sca.io.annotations.shapes import fit_box
from sca.io.numbers import is_int64
from sca.io.prompts import read_prompt
from sca.output import fields
from sca.output.captioned import Captioned, ReadError, Size


def read_image(plain: Any, where: str) -> Captioned:
    """Read an image of a journal: `image`, `width`, `height` and `captions`, each as in a line of JSON lines.

    Raises:
        ReadError: A field is missing or invalid.
    """
    size = fields.read_image_size(fields.read_object(plain, where), where)
    told = [
        _caption(fields.read_object(each, where), size, n, where)
        for n, each in enumerate(fields.read_list(plain, "captions", where))
    ]
    return Captioned(fields.read_name(plain, "image", where), size, told, None)


def group_records(records: Iterable[tuple[str, Any]], skip: SkipCounter, reject: Reject) -> Iterator[Captioned]:
    """Read images from records; the records of an image follow each other."""
    seen: set[str] = set()
    for name, some in groupby(_named(records, reject), key=lambda record: record[0]):
        captions, size, model = [], None, None
        for _, where, plain in some:
            if size is None and name in seen:
                raise ReadError(f"{where}: {name!r} had records before, with others between; sort them by image")
            seen.add(name)
            try:
                given = fields.read_image_size(plain, where)
                if given != (size or given):
                    raise ReadError(f"{where}: the image is {given.width} x {given.height}, and was {size} before")
                size, model = given, plain.get("model") or model
                caption = fit_caption(_caption(plain, size, len(captions), where), size, where, skip)
            except ReadError as error:
                reject(error)
            else:
                captions += [caption] if caption else []
        if size is not None:
            yield Captioned(name, size, captions, model)


def _named(records: Iterable[tuple[str, Any]], reject: Reject) -> Iterator[tuple[str, str, Any]]:
    for where, plain in records:
        try:
            name = fields.read_name(plain, "image", where)
        except ReadError as error:
            reject(error)
        else:
            yield name, where, plain


def _caption(plain: Mapping[str, Any], size: Size, region: int, where: str) -> Caption:
    text = plain.get("caption")
    if not isinstance(text, str):
        raise ReadError(f"{where}, 'caption': text, not {text!r:.40}")
    code, box, prompt = plain.get("mask"), plain.get("box"), plain.get("prompt")
    try:
        code = None if code is None else masks.checked(code)
        asked = read_prompt(prompt, where, *size) if prompt else Prompt()
    except ValueError as error:
        raise ReadError(str(error) if str(error).startswith(where) else f"{where}, 'mask': {error}") from error
    if code is not None and code["size"] != [size.height, size.width]:
        raise ReadError(f"{where}, 'mask': its size is {code['size']}, the image's {[size.height, size.width]}")
    others = fields.read_list(plain, "others", where) if plain.get("others") else []
    return Caption(
        text,
        fields.read_number(plain.get("score")),
        None if box is None else fields.read_numbers(box, 4, f"{where}, 'box'"),
        code,
        None if plain.get("iou") is None else fields.read_number(plain["iou"]),
        asked,
        plain["region"] if is_int64(plain.get("region")) else region,
        tuple(_other(each, f"{where}, 'others'") for each in others),
    )


def _other(plain: Any, where: str) -> tuple[str, float]:
    text = fields.read_object(plain, where).get("caption")
    if not isinstance(text, str):
        raise ReadError(f"{where}, 'caption': text, not {text!r:.40}")
    return text, fields.read_number(plain.get("score"))


def to_captions(annotations: Iterable[Annotation], size: Size, skip: SkipCounter, reject: Reject) -> list[Caption]:
    captions = []
    for number, annotation in enumerate(annotations):
        try:
            captions += [caption] if (caption := to_caption(annotation, size, number, skip)) else []
        except AnnotationError as error:
            reject(error)
    return captions


def to_caption(annotation: Annotation, size: Size, region: int, skip: SkipCounter) -> Caption | None:
    """The caption of an annotation; None, and counted, where its box is normalized or outside of the image."""
    prompt = Prompt()
    if annotation.point:
        x, y = annotation.point
        if not (0 <= x < size.width and 0 <= y < size.height):
            sides = f"{size.width} x {size.height}"
            raise AnnotationError(f"{annotation.place}: the point {x:g}, {y:g} is outside the image of {sides}")
        prompt = Prompt(points=((x, y, 1),))
    if annotation.unread:
        skip(annotation.unread, annotation.place)
    if not annotation.texts:
        skip("region without text", annotation.place)
    text, *others = annotation.texts or ("",)
    caption = Caption(
        text,
        fields.read_number(annotation.score),
        annotation.box,
        annotation.mask,
        None if annotation.iou is None else fields.read_number(annotation.iou),
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
