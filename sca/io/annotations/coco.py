"""COCO's annotations: `bbox` and `segmentation`, as polygons or as RLE of either kind."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from sca.io import masks
from sca.io.annotations.annotation import Annotation, Size, Skip, find_unread_caption
from sca.io.annotations.shapes import Points, bound_points, fill_polygons
from sca.io.coordinates import Box
from sca.io.errors import InputError
from sca.io.validation import check_numbers, convert_box, is_finite_number, read_texts

SHORT = "polygon with fewer than three points"
Count = Callable[[str], None]  # counts a reason


def read_annotation(
    record: Mapping[str, Any], place: str, size: Size | None, label: str | None, skip: Skip
) -> Annotation:
    """Read an annotation. A `bbox` without an area gives way to the box of the segmentation.

    Args:
        record: The annotation.
        place: The file and the record, for messages.
        size: Width and height of its image; None reads its box without its mask.
        label: The name of its category.
        skip: Called for each part that cannot be kept.

    Raises:
        InputError: If a field cannot be read; the message names it.
    """
    segmentation = find_segmentation(record)
    box = _read_box_with_area(record.get("bbox"), place, skip)
    try:
        mask = _read_mask_with_area(segmentation, size, place, skip) if size else None
        if box is None and segmentation:
            count = (lambda reason: None) if size else partial(_count, skip, place)  # counted with the mask
            box = masks.box_of(mask) if mask else bound_segmentation(segmentation, count)
    except ValueError as error:
        raise InputError(f"{place}, 'segmentation': {error}") from error
    if has_keypoints(record):
        skip("keypoints", place)
    texts = record.get("caption")
    captions = () if texts is None else tuple(read_texts(f"{place}, 'caption'", texts))
    unread = find_unread_caption(record, ("caption",))
    return Annotation(place, box, mask, None, label, captions, record.get("score"), record.get("iou"), unread)


def _read_box_with_area(value: Any, place: str, skip: Skip) -> Box | None:
    box = read_box(value, f"{place}, 'bbox'")
    if box is None or (box[0] < box[2] and box[1] < box[3]):
        return box
    if any(value):  # all zero is how a region without a box is written
        skip("empty box", place)
    return None


def _read_mask_with_area(value: Any, size: Size, place: str, skip: Skip) -> dict[str, Any] | None:
    mask = read_mask(value, size, partial(_count, skip, place))
    if mask is None or masks.area(mask):
        return mask
    return skip("polygon covering no pixel" if isinstance(value, list) else "empty mask", place)


def _count(skip: Skip, place: str, reason: str) -> None:
    skip(reason, place)


def name_categories(content: Mapping[str, Any]) -> dict[str, str]:
    """Return the name of each category of a file by its id, written as text."""
    categories = content.get("categories")
    named = [each for each in categories if isinstance(each, Mapping)] if isinstance(categories, list) else []
    return {str(each.get("id")): clean_name(each["name"]) for each in named if isinstance(each.get("name"), str)}


def clean_name(name: str) -> str:
    """Return the name of a category with underscores as spaces."""
    return name.replace("_", " ").strip()


def read_box(value: Any, what: str) -> Box | None:
    """Read a `bbox` [x, y, width, height] as x1, y1, x2, y2; None if there is none.

    Raises:
        InputError: It is something else; the message begins with `what`.
    """
    if value is None or value == []:
        return None
    check_numbers(what, value, "x, y, width, height")
    return convert_box(what, *value)


def read_mask(value: Any, size: Size, count: Count) -> dict[str, Any] | None:
    """Read a `segmentation` as a compressed RLE, which may be empty; None if there is none.

    Args:
        value: Polygons [[x, y, x, y, ...]], or an RLE, compressed or not.
        size: Width and height of the image.
        count: Called for each polygon that has no inside.

    Raises:
        InputError: With what it must be.
    """
    if not value:
        return None
    width, height = size
    if isinstance(value, list):
        polygons = read_polygons(value, count)
        return fill_polygons(polygons, size) if polygons else None
    if not isinstance(value, dict) or not isinstance(value.get("counts"), str | list):
        raise InputError("must be polygons, or RLE with size and counts")
    if value.get("size") != [height, width]:
        raise InputError(f"has size {value.get('size')!r:.80} in an image of {[height, width]} (height, width)")
    try:
        return masks.checked(value)
    except ValueError as error:
        raise InputError(f"counts do not add up to the {width * height} pixels of the image: {error}") from None


def read_polygons(value: list[Any], count: Count) -> list[Points]:
    """Read polygons [[x, y, x, y, ...]]; those with fewer than three points are counted and left out.

    Raises:
        InputError: With what they must be.
    """
    polygons = []
    for flat in value:
        if not isinstance(flat, list) or len(flat) % 2 or not all(map(is_finite_number, flat)):
            raise InputError("must be lists of x, y, x, y, ... for its polygons")
        if len(flat) < 6:
            count(SHORT)
        else:
            polygons.append(list(zip(flat[::2], flat[1::2], strict=True)))
    return polygons


def bound_segmentation(value: Any, count: Count) -> Box | None:
    """Return the box around a `segmentation` without the size of its image; None if nothing is inside.

    Raises:
        InputError: With what it must be.
    """
    if isinstance(value, dict):
        return masks.box_of(masks.checked(value))
    if not isinstance(value, list):
        raise InputError("must be polygons, or RLE with size and counts")
    polygons = read_polygons(value, count)
    return bound_points(point for polygon in polygons for point in polygon) if polygons else None


def find_segmentation(record: Mapping[str, Any]) -> Any:
    """Return the `segmentation` of an annotation; None where our export says by `isbox` that it repeats the box."""
    return None if record.get("isbox") else record.get("segmentation")


def has_keypoints(record: Mapping[str, Any]) -> bool:
    """Whether an annotation has keypoints, of which we keep none: x, y, visibility for each; 0 is not labeled."""
    keypoints = record.get("keypoints")
    return isinstance(keypoints, list) and any(keypoints[2::3])
