"""Read COCO annotations: `bbox` and `segmentation`, as polygons or as compressed or uncompressed RLE."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from sca.io import masks
from sca.io.annotations.annotation import Annotation, ImageSize, SkipCallback, describe_unread_caption
from sca.io.annotations.shapes import Points, compute_bounding_box, fill_polygons
from sca.io.coordinates import Box
from sca.io.errors import InputError
from sca.io.validation import XYWH_FORMAT, check_numbers, is_finite_number, parse_texts, xywh_to_xyxy

SHORT_POLYGON = "polygon with fewer than three points"
CountCallback = Callable[[str], None]  # counts a reason


def read_annotation(
    record: Mapping[str, Any], location: str, size: ImageSize | None, label: str | None, skip: SkipCallback
) -> Annotation:
    """Read an annotation. A `bbox` without an area is replaced by the box of the segmentation.

    Args:
        record: Annotation.
        location: File and record, for messages.
        size: Width and height of the image; None reads the box without the mask.
        label: Name of the category.
        skip: Called for each item that cannot be kept.

    Returns:
        The annotation, with its box and mask in image pixels.

    Raises:
        InputError: A field is invalid; the message names it.
    """
    segmentation = get_segmentation(record)
    box = _parse_nonempty_bbox(record.get("bbox"), location, skip)
    try:
        mask = _parse_nonempty_segmentation(segmentation, size, location, skip) if size else None
        if box is None and segmentation:
            # With a size, reasons were already counted for the mask.
            count = (lambda reason: None) if size else partial(_count_reason, skip, location)
            box = masks.mask_to_box(mask) if mask else compute_segmentation_box(segmentation, count)
    except ValueError as error:
        raise InputError(f"{location}, 'segmentation' {error}") from error
    if has_keypoints(record):
        skip("keypoints", location)
    texts = record.get("caption")
    captions = () if texts is None else tuple(parse_texts(f"{location}, 'caption'", texts))
    unread_caption = describe_unread_caption(record, ("caption",))
    scores: dict[str, Any] = {key: record.get(key) for key in ("score", "predicted_iou", "proposal_score")}
    return Annotation(location, box, mask, None, label, captions, unread_caption=unread_caption, **scores)


def _parse_nonempty_bbox(value: Any, location: str, skip: SkipCallback) -> Box | None:
    box = parse_bbox(value, f"{location}, 'bbox'")
    if box is None or (box[0] < box[2] and box[1] < box[3]):
        return box
    if any(value):  # all zeros encode a region without a box
        skip("empty box", location)
    return None


def _parse_nonempty_segmentation(
    value: Any, size: ImageSize, location: str, skip: SkipCallback
) -> dict[str, Any] | None:
    mask = parse_segmentation(value, size, partial(_count_reason, skip, location))
    if mask is None or masks.compute_mask_area(mask):
        return mask
    skip("polygon covering no pixel" if isinstance(value, list) else "empty mask", location)
    return None


def _count_reason(skip: SkipCallback, location: str, reason: str) -> None:
    skip(reason, location)


def map_category_names(content: Mapping[str, Any]) -> dict[str, str]:
    """Map category ids, as text, to names."""
    categories = content.get("categories")
    named_categories = (
        [each for each in categories if isinstance(each, Mapping)] if isinstance(categories, list) else []
    )
    return {
        str(each.get("id")): clean_category_name(each["name"])
        for each in named_categories
        if isinstance(each.get("name"), str)
    }


def clean_category_name(name: str) -> str:
    """Replace the underscores in a category name with spaces."""
    return name.replace("_", " ").strip()


def parse_bbox(value: Any, subject: str) -> Box | None:
    """Convert a `bbox` [x, y, width, height] to x1, y1, x2, y2; None without one.

    Args:
        value: JSON value of `bbox`.
        subject: Subject of the error messages.

    Returns:
        x1, y1, x2, y2, or None.

    Raises:
        InputError: The value is not a box; the message begins with `subject`.
    """
    if value is None or value == []:
        return None
    check_numbers(subject, value, XYWH_FORMAT)
    return xywh_to_xyxy(subject, *value)


def parse_segmentation(value: Any, size: ImageSize, count: CountCallback) -> dict[str, Any] | None:
    """Convert a `segmentation` to a compressed RLE, which may be empty; None without one.

    Args:
        value: Polygons [[x, y, x, y, ...]], or an RLE, compressed or not.
        size: Width and height of the image.
        count: Called for each polygon without an interior.

    Returns:
        A compressed RLE with `size` and `counts`, or None.

    Raises:
        InputError: The value is invalid; the message describes the expected format.
    """
    if not value:
        return None
    width, height = size
    if isinstance(value, list):
        polygons = parse_polygons(value, count)
        return fill_polygons(polygons, size) if polygons else None
    if not isinstance(value, dict) or not isinstance(value.get("counts"), str | list):
        raise InputError("must be polygons, or an RLE with size and counts")
    if value.get("size") != [height, width]:
        raise InputError(f"has size {value.get('size')!r:.80}, but the image is {[height, width]} (height, width)")
    try:
        return masks.parse_rle(value)
    except ValueError as error:
        raise InputError(f"is not a valid RLE of {width} x {height} pixels: {error}") from None


def parse_polygons(value: list[Any], count: CountCallback) -> list[Points]:
    """Parse polygons [[x, y, x, y, ...]]; those with fewer than three points are counted and skipped.

    Args:
        value: JSON value of `segmentation`.
        count: Called for each skipped polygon.

    Returns:
        The points (x, y) of each polygon.

    Raises:
        InputError: The value is invalid; the message describes the expected format.
    """
    polygons: list[Points] = []
    for flat in value:
        if not isinstance(flat, list) or len(flat) % 2 or not all(map(is_finite_number, flat)):
            raise InputError("must contain lists of x, y, x, y, ... as polygons")
        if len(flat) < 6:
            count(SHORT_POLYGON)
        else:
            polygons.append(list(zip(flat[::2], flat[1::2], strict=True)))
    return polygons


def compute_segmentation_box(value: Any, count: CountCallback) -> Box | None:
    """Return the bounding box of a `segmentation` whose image size is unknown; None if it is empty.

    Args:
        value: JSON value of `segmentation`.
        count: Called for each skipped polygon.

    Returns:
        x1, y1, x2, y2, or None.

    Raises:
        InputError: The value is invalid; the message describes the expected format.
    """
    if isinstance(value, dict):
        try:
            return masks.mask_to_box(masks.parse_rle(value))
        except ValueError as error:
            raise InputError(f"is not a valid RLE: {error}") from None
    if not isinstance(value, list):
        raise InputError("must be polygons, or an RLE with size and counts")
    polygons = parse_polygons(value, count)
    return compute_bounding_box(point for polygon in polygons for point in polygon) if polygons else None


def get_segmentation(record: Mapping[str, Any]) -> Any:
    """Return the `segmentation` of an annotation; None if `isbox`, set by our export, marks it as a copy of the box."""
    return None if record.get("isbox") else record.get("segmentation")


def has_keypoints(record: Mapping[str, Any]) -> bool:
    """Return whether an annotation has labeled keypoints (x, y, visibility; 0 is not labeled), which are not kept."""
    keypoints = record.get("keypoints")
    return isinstance(keypoints, list) and any(keypoints[2::3])
