"""Read LabelMe files, one per image: https://github.com/wkentaro/labelme.

Shapes are rasterized as in LabelMe's `shape_to_mask`. LabelMe applies the EXIF orientation, as `sca.io.images` does:
points are in pixels of the upright image.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from sca.io import masks
from sca.io.annotations.annotation import Annotation, ImageSize, SkipCallback, describe_unread_caption
from sca.io.annotations.shapes import (
    Points,
    check_points_near_image,
    compute_bounding_box,
    decode_base64_image,
    decode_base64_mask,
)
from sca.io.errors import InputError, RejectCallback, raise_error
from sca.io.images import open_image, read_image
from sca.io.validation import check_numbers, check_object, check_type, read_field, read_recorded_size

IGNORED_LABEL = "__ignore__"  # label of pixels to ignore
POLYGON_TYPES = ("polygon", "oriented_rectangle", "rotation", "quadrilateral")  # the last two are X-AnyLabeling's names
SIZE_FIELDS = ("imageWidth", "imageHeight")
LINE_TYPES = ("line", "linestrip")
# Minimum number of points of shapes with an interior.
MIN_POINTS = dict.fromkeys(POLYGON_TYPES, 3) | {"rectangle": 2, "circle": 2, "mask": 1}


class LabelMeShape(NamedTuple):
    """One shape of a LabelMe file, with the record that contains it."""

    location: str
    shape_type: str
    points: Points
    record: Mapping[str, Any]


def find_image_size(content: Mapping[str, Any], image_path: Path, display_name: str) -> ImageSize:
    """Return the image size: as recorded in the file, else that of the image file, else that of the embedded image.

    Args:
        content: Content of the LabelMe file.
        image_path: Path of the image file, which may not exist.
        display_name: Name of the LabelMe file in messages.

    Returns:
        Width and height of the upright image.

    Raises:
        InputError: The size is unknown.
    """
    if recorded := read_recorded_size(content, display_name, SIZE_FIELDS):
        return recorded
    try:
        return open_annotated_image(content, image_path, display_name).size
    except InputError as error:
        raise InputError(f"{display_name}: no 'imageWidth' and 'imageHeight', and {error}") from error


def list_labelme_files(folder: Path) -> list[Path]:
    """List the files of a folder with the suffix .json in any case, sorted."""
    return sorted(path for path in folder.iterdir() if path.suffix.lower() == ".json")


def open_annotated_image(content: Mapping[str, Any], image_path: Path, display_name: str) -> Image.Image:
    """Open the image file as `sca.open_image` does, or the embedded image if the file does not exist.

    Args:
        content: Content of the LabelMe file.
        image_path: Path of the image file, which may not exist.
        display_name: Name of the LabelMe file in messages.

    Returns:
        The upright RGB image.

    Raises:
        InputError: Neither is an image, or it is too large.
    """
    if content.get("imageData") is None or os.path.lexists(image_path):
        return open_image(image_path)
    return open_embedded_image(content, display_name)


def open_embedded_image(content: Mapping[str, Any], display_name: str) -> Image.Image:
    """Open the embedded image, `imageData`, as `sca.open_image` does.

    Args:
        content: Content of the LabelMe file.
        display_name: Name of the LabelMe file in messages.

    Returns:
        The upright RGB image.

    Raises:
        InputError: The data are not an image, or too large.
    """
    subject = f"{display_name}, 'imageData'"
    try:
        data = decode_base64_image(content.get("imageData"), subject)
    except ValueError as error:
        raise InputError(str(error)) from error
    return read_image(io.BytesIO(data), subject, max_pixels=masks.PIXEL_LIMIT)


def read_annotations(
    content: Mapping[str, Any],
    size: ImageSize,
    display_name: str,
    skip: SkipCallback,
    reject: RejectCallback = raise_error,
) -> list[Annotation]:
    """Read the regions of a file, in order. Shapes with the same label and `group_id` are one region.

    Args:
        content: Content of the file.
        size: Width and height of the upright image.
        display_name: Name of the file in messages.
        skip: Called for each shape that cannot be kept.
        reject: Called with an error for each region that is invalid. Raises it by default.

    Returns:
        The annotations, in the order of their first shapes.

    Raises:
        InputError: The file has no list of shapes.
    """
    groups: dict[Any, list[LabelMeShape]] = {}
    for number, record in enumerate(read_field(content, "shapes", list, display_name)):
        try:
            shape = _parse_shape(record, f"{display_name}, shapes[{number}]")
        except InputError as error:
            reject(error)
            continue
        if shape.record["label"] == IGNORED_LABEL:
            skip(f"shape labeled {IGNORED_LABEL}", shape.location)
            continue
        group = record.get("group_id")
        groups.setdefault(number if group is None else (shape.record["label"], str(group)), []).append(shape)
    annotations = []
    for group in groups.values():
        try:
            annotation = _read_group(group, size, skip)
        except InputError as error:
            reject(error)
        else:
            annotations += [annotation] if annotation else []
    return annotations


def draw_shape(shape: LabelMeShape, size: ImageSize) -> np.ndarray:
    """Draw a polygon, rectangle, circle or mask as LabelMe does: (height, width) bool.

    Args:
        shape: Shape of the LabelMe file.
        size: Width and height of the image.

    Returns:
        (height, width) bool mask.

    Raises:
        InputError: The shape cannot be drawn.
    """
    points = [(float(x), float(y)) for x, y in shape.points]
    check_points_near_image(points, size)
    if shape.shape_type == "mask":
        return _paste_mask(shape, size)
    canvas = Image.fromarray(np.zeros(size[::-1], np.uint8))
    pen = ImageDraw.Draw(canvas)
    if shape.shape_type == "rectangle":
        pen.rectangle(compute_bounding_box(points), fill=1, outline=1)
    elif shape.shape_type == "circle":
        (x, y), edge_point = points[:2]
        radius = math.dist((x, y), edge_point)
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=1, outline=1)
    else:
        pen.polygon(points, fill=1, outline=1)
    return np.array(canvas, bool)


def _parse_shape(record: Any, location: str) -> LabelMeShape:
    check_object(record, location)
    shape_type = record.get("shape_type") or "polygon"
    for key, value in (("label", record.get("label")), ("shape_type", shape_type)):
        check_type(f"{location}, {key!r}", value, str, InputError)
    points = read_field(record, "points", list, location)
    if not points:
        raise InputError(f"{location}, 'points' is empty; expected a list of [x, y]")
    for point in points:
        check_numbers(f"{location}, 'points'", point, "x, y")
    return LabelMeShape(location, shape_type, [(x, y) for x, y in points], record)


def _read_group(shapes: Sequence[LabelMeShape], size: ImageSize, skip: SkipCallback) -> Annotation | None:
    """Merge shapes into a region: a rectangle's box, the union of filled shapes, a point, or the box of lines."""
    filled_shapes = [shape for shape in shapes if len(shape.points) >= MIN_POINTS.get(shape.shape_type, math.inf)]
    other_shapes = [shape for shape in shapes if len(shape.points) < MIN_POINTS.get(shape.shape_type, math.inf)]
    annotation = None
    if filled_shapes:
        annotation = _read_filled_shapes(shapes, filled_shapes, size, skip)
    elif len(other_shapes) == 1 and other_shapes[0].shape_type == "point":
        return _make_annotation(shapes, point=other_shapes[0].points[0])
    elif all(shape.shape_type in LINE_TYPES for shape in other_shapes):
        x1, y1, x2, y2 = compute_bounding_box(point for shape in other_shapes for point in shape.points)
        if x1 < x2 and y1 < y2:
            skip("line, read as its box", shapes[0].location)
            return _make_annotation(shapes, box=(x1, y1, x2, y2))
    for shape in other_shapes:
        reason = "keypoint" if shape.shape_type == "point" else f"LabelMe shape {shape.shape_type!r}"
        skip(f"{shape.shape_type} of too few points" if shape.shape_type in MIN_POINTS else reason, shape.location)
    return annotation


def _read_filled_shapes(
    shapes: Sequence[LabelMeShape], filled_shapes: Sequence[LabelMeShape], size: ImageSize, skip: SkipCallback
) -> Annotation | None:
    if len(filled_shapes) == 1 and filled_shapes[0].shape_type == "rectangle":
        return _make_annotation(shapes, box=compute_bounding_box(filled_shapes[0].points))
    mask = np.zeros(size[::-1], bool)
    for shape in filled_shapes:
        try:
            mask |= draw_shape(shape, size)
        except ValueError as error:
            raise InputError(f"{shape.location}: cannot read the {shape.shape_type}: {error}") from error
    if not mask.any():
        skip("shape covering no pixel", filled_shapes[0].location)
        return None
    mask_rle = masks.encode_rle(mask)
    return _make_annotation(shapes, box=masks.mask_to_box(mask_rle), mask=mask_rle)


def _paste_mask(shape: LabelMeShape, size: ImageSize) -> np.ndarray:
    mask_patch = decode_base64_mask(shape.record.get("mask"), "'mask'", size)
    x, y = (int(value) for value in compute_bounding_box(shape.points)[:2])
    height, width = mask_patch.shape
    if min(x, y) < 0 or x + width > size[0] or y + height > size[1]:
        raise InputError(f"'mask' of {width} x {height} at {x}, {y} reaches outside the image of {size[0]} x {size[1]}")
    mask = np.zeros(size[::-1], bool)
    mask[y : y + height, x : x + width] = mask_patch
    return mask


def _make_annotation(shapes: Sequence[LabelMeShape], **geometry: Any) -> Annotation:
    """Create an annotation with the unique texts of its shapes."""
    first, records = shapes[0], [shape.record for shape in shapes]
    texts = [record["description"] for record in records if record.get("description")]
    for text in texts:
        check_type(f"{first.location}, 'description'", text, str, InputError)
    scores: dict[str, Any] = {
        key: next((record[key] for record in records if record.get(key) is not None), None)
        for key in ("score", "predicted_iou", "proposal_score")
    }
    label = first.record["label"]
    captions = tuple(dict.fromkeys(texts))
    unread_caption = next(filter(None, (describe_unread_caption(record, ("description",)) for record in records)), None)
    unread_caption = None if captions else unread_caption
    return Annotation(
        first.location,
        label=label,
        captions=captions,
        unread_caption=unread_caption,
        **scores,
        **geometry,
    )
