"""Convert records and annotations of labeling tools to captions."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import groupby
from typing import Any, cast

from sca_registry.contracts import Caption, Prompt

from sca.io import masks
from sca.io.annotations.annotation import Annotation, SkipCounter
from sca.io.annotations.shapes import clip_annotated_box
from sca.io.coordinates import Box
from sca.io.errors import InputError, RejectCallback
from sca.io.prompts import parse_prompt
from sca.io.validation import (
    check_numbers,
    check_type,
    is_finite_number,
    is_int64,
    read_field,
    read_image_name,
    require_key,
    require_recorded_size,
)
from sca.output.captioned_image import CaptionedImage, ImageSize

REGION_LABEL = "region"  # label of a region without a name in the formats of labeling tools


def parse_image(record: Any, location: str) -> CaptionedImage:
    """Parse an image of a journal: `image`, `width`, `height` and `captions`, each as in a line of JSON Lines.

    Args:
        record: JSON value.
        location: File and line for error messages.

    Returns:
        The image with its captions.

    Raises:
        InputError: A field is missing or invalid.
    """
    size = ImageSize(*require_recorded_size(record, location))
    caption_records = read_field(record, "captions", list, location)
    captions = [_parse_caption(each, size, index, location) for index, each in enumerate(caption_records)]
    return CaptionedImage(read_image_name(record, "image", location), size, captions, None)


def group_records_by_image(
    records: Iterable[tuple[str, Any]], skip: SkipCounter, reject: RejectCallback
) -> Iterator[CaptionedImage]:
    """Yield images from records, grouped by image.

    Args:
        records: Location and value of each record.
        skip: Counts contents that cannot be kept.
        reject: Called with an error for each damaged record.

    Yields:
        An image with its captions.

    Raises:
        InputError: The records of an image are not consecutive.
    """
    seen_names: set[str] = set()
    for name, image_records in groupby(_iter_named_records(records, reject), key=lambda record: record[0]):
        captions: list[Caption] = []
        size, model = None, None
        for _, location, record_data in image_records:
            if size is None and name in seen_names:
                raise InputError(f"{location}: {name!r} has records in several places; sort the records by image")
            seen_names.add(name)
            try:
                record_size = ImageSize(*require_recorded_size(record_data, location))
                if record_size != (size or record_size):
                    raise InputError(
                        f"{location}: the image size is {record_size.width} x {record_size.height}, but an earlier "
                        f"record has {size}"
                    )
                size, model = record_size, record_data.get("model") or model
                caption = fit_caption_box(
                    _parse_caption(record_data, size, len(captions), location), size, location, skip
                )
            except InputError as error:
                reject(error)
            else:
                captions += [caption] if caption else []
        if size is not None:
            yield CaptionedImage(name, size, captions, model)


def _iter_named_records(records: Iterable[tuple[str, Any]], reject: RejectCallback) -> Iterator[tuple[str, str, Any]]:
    for location, record in records:
        try:
            name = read_image_name(record, "image", location)
        except InputError as error:
            reject(error)
        else:
            yield name, location, record


def _parse_caption(record: Mapping[str, Any], size: ImageSize, default_region_id: int, location: str) -> Caption:
    text = _read_caption_text(record, location)
    rle, box, prompt_fields = record.get("mask"), record.get("box"), record.get("prompt")
    try:
        rle = None if rle is None else masks.parse_rle(rle)
        parsed_prompt = parse_prompt(prompt_fields, location, *size) if prompt_fields else Prompt()
    except ValueError as error:
        raise InputError(str(error) if str(error).startswith(location) else f"{location}, 'mask': {error}") from error
    if rle is not None and rle["size"] != [size.height, size.width]:
        raise InputError(f"{location}, 'mask': its size is {rle['size']}, the image's {[size.height, size.width]}")
    if box is not None:
        check_numbers(f"{location}, 'box'", box, "x1, y1, x2, y2")
    alternatives = read_field(record, "alternatives", list, location) if record.get("alternatives") else []
    return Caption(
        text,
        _parse_score(record.get("score")),
        None if box is None else cast("Box", tuple(map(float, box))),
        rle,
        _parse_optional_score(record, "predicted_iou"),
        parsed_prompt,
        record["region_id"] if is_int64(record.get("region_id")) else default_region_id,
        tuple(_parse_alternative(each, f"{location}, 'alternatives'") for each in alternatives),
        name=record["name"] if isinstance(record.get("name"), str) else None,
        proposal_score=_parse_optional_score(record, "proposal_score"),
        confidence=_parse_optional_score(record, "confidence"),
        ood_score=_parse_optional_score(record, "ood_score"),
        question=record["question"] if isinstance(record.get("question"), str) else None,
    )


def _read_caption_text(plain: Any, where: str) -> str:
    """Parse a caption, which may contain a lone surrogate."""
    text = require_key(plain, "caption", where)
    check_type(f"{where}, 'caption'", text, str, InputError)
    return text


def _parse_alternative(value: Any, location: str) -> tuple[str, float]:
    return _read_caption_text(value, location), _parse_score(value.get("score"))


def _parse_score(value: Any) -> float:
    return float(value) if is_finite_number(value) else math.nan


def _parse_optional_score(record: Mapping[str, Any], field: str) -> float | None:
    return None if record.get(field) is None else _parse_score(record[field])


def annotations_to_captions(
    annotations: Iterable[Annotation], size: ImageSize, skip: SkipCounter, reject: RejectCallback
) -> list[Caption]:
    """Convert annotations of one image to captions; `skip` counts and `reject` receives those that cannot be used."""
    captions = []
    for index, annotation in enumerate(annotations):
        try:
            captions += [caption] if (caption := annotation_to_caption(annotation, size, index, skip)) else []
        except InputError as error:
            reject(error)
    return captions


def annotation_to_caption(annotation: Annotation, size: ImageSize, region_id: int, skip: SkipCounter) -> Caption | None:
    """Convert an annotation to a caption; None, and counted, if its box is normalized or outside the image."""
    prompt = Prompt()
    if annotation.point:
        x, y = annotation.point
        if not (0 <= x < size.width and 0 <= y < size.height):
            size_text = f"{size.width} x {size.height}"
            raise InputError(f"{annotation.location}: the point {x:g}, {y:g} is outside the image of {size_text}")
        prompt = Prompt(points=((x, y, 1),))
    if annotation.unread_caption:
        skip(annotation.unread_caption, annotation.location)
    if not annotation.texts:
        skip("region without text", annotation.location)
    text, *alternatives = annotation.texts or ("",)
    caption = Caption(
        text,
        _parse_score(annotation.score),
        annotation.box,
        annotation.mask,
        None if annotation.predicted_iou is None else _parse_score(annotation.predicted_iou),
        prompt,
        region_id,
        tuple((alternative, math.nan) for alternative in alternatives),
        name=None if annotation.label == REGION_LABEL else annotation.label,
        proposal_score=None if annotation.proposal_score is None else _parse_score(annotation.proposal_score),
    )
    return fit_caption_box(caption, size, annotation.location, skip)


def fit_caption_box(caption: Caption, size: ImageSize, location: str, skip: SkipCounter) -> Caption | None:
    """Clip the box of a caption to its image; None, and counted, if the box is normalized or outside."""
    if caption.box is None:
        return caption
    box = clip_annotated_box(caption.box, size, location, skip, caption.mask)
    return None if box is None else replace(caption, box=box)
