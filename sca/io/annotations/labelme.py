"""LabelMe's files, one per image: https://github.com/wkentaro/labelme.

Shapes are drawn as LabelMe's own `shape_to_mask` draws them. LabelMe shows an image as its EXIF orientation has it, and
so do `sca.io.images`: its points are in pixels of the upright image.
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
from sca.io.annotations.annotation import Annotation, Size, Skip, find_unread_caption
from sca.io.annotations.shapes import Points, bound_points, check_reach, decode_embedded, decode_mask
from sca.io.errors import InputError, Reject, raise_error
from sca.io.images import open_image, read_image
from sca.io.validation import check_numbers, check_type, read_field, check_object, read_size

IGNORED = "__ignore__"  # the label of pixels that count for nothing
POLYGONS = ("polygon", "oriented_rectangle", "rotation", "quadrilateral")  # the latter two: X-AnyLabeling's names
SIDES = ("imageWidth", "imageHeight")
LINES = ("line", "linestrip")
MIN_POINTS = dict.fromkeys(POLYGONS, 3) | {"rectangle": 2, "circle": 2, "mask": 1}  # of shapes with an inside


class Shape(NamedTuple):
    place: str
    kind: str
    points: Points
    record: Mapping[str, Any]


def find_size(content: Mapping[str, Any], image: Path, where: str) -> Size:
    """Return the size of the image: as the file records it, or else that of the image file, or of the image inside.

    Raises:
        InputError: If nothing says how large the image is.
    """
    if recorded := read_size(content, where, SIDES):
        return recorded
    try:
        return open_image_of(content, image, where).size
    except InputError as error:
        raise InputError(f"{where}: no 'imageWidth' and 'imageHeight', and {error}") from error


def list_files(folder: Path) -> list[Path]:
    """Return the files of a folder that may be LabelMe's, sorted: those with the suffix .json, in any case."""
    return sorted(path for path in folder.iterdir() if path.suffix.lower() == ".json")


def open_image_of(content: Mapping[str, Any], image: Path, where: str) -> Image.Image:
    """Open an image file as `sca.open_image` does, or the image inside the file where there is no image file.

    Raises:
        InputError: If neither is an image, or one is larger than is allowed.
    """
    if content.get("imageData") is None or os.path.lexists(image):
        return open_image(image)
    return open_embedded(content, where)


def open_embedded(content: Mapping[str, Any], where: str) -> Image.Image:
    """Open the image inside a file, `imageData`, as `sca.open_image` does.

    Raises:
        InputError: If it is not an image, or larger than is allowed.
    """
    what = f"{where}, 'imageData'"
    try:
        data = decode_embedded(content.get("imageData"), what)
    except ValueError as error:
        raise InputError(str(error)) from error
    return read_image(io.BytesIO(data), what, pixels=masks.PIXEL_LIMIT)


def read_shapes(
    content: Mapping[str, Any], size: Size, where: str, skip: Skip, reject: Reject = raise_error
) -> list[Annotation]:
    """Read the regions of a file, in order. Shapes with the same label and `group_id` are one region.

    Args:
        content: The file.
        size: Width and height of the upright image.
        where: The file, for messages.
        skip: Called for each shape that cannot be kept.
        reject: Called for each region that cannot be read, with an error that names it (default: raise the error).

    Raises:
        InputError: If the file has no shapes.
    """
    groups: dict[Any, list[Shape]] = {}
    for number, record in enumerate(read_field(content, "shapes", list, where)):
        try:
            shape = _parse_shape(record, f"{where}, shapes[{number}]")
        except InputError as error:
            reject(error)
            continue
        if shape.record["label"] == IGNORED:
            skip(f"shape labeled {IGNORED}", shape.place)
            continue
        group = record.get("group_id")
        groups.setdefault(number if group is None else (shape.record["label"], str(group)), []).append(shape)
    found = []
    for group in groups.values():
        try:
            annotation = _read_group(group, size, skip)
        except InputError as error:
            reject(error)
        else:
            found += [annotation] if annotation else []
    return found


def draw_shape(shape: Shape, size: Size) -> np.ndarray:
    """Draw a polygon, rectangle, circle or mask as LabelMe does: (height, width) bool.

    Raises:
        InputError: If it cannot be drawn.
    """
    points = [(float(x), float(y)) for x, y in shape.points]
    check_reach(points, size)
    if shape.kind == "mask":
        return _place_mask(shape, size)
    drawn = Image.fromarray(np.zeros(size[::-1], np.uint8))
    pen = ImageDraw.Draw(drawn)
    if shape.kind == "rectangle":
        pen.rectangle(bound_points(points), fill=1, outline=1)
    elif shape.kind == "circle":
        (x, y), edge = points[:2]
        radius = math.dist((x, y), edge)
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=1, outline=1)
    else:
        pen.polygon(points, fill=1, outline=1)
    return np.array(drawn, bool)


def _parse_shape(record: Any, place: str) -> Shape:
    check_object(record, place)
    kind = record.get("shape_type") or "polygon"
    for key, value in (("label", record.get("label")), ("shape_type", kind)):
        check_type(f"{place}, {key!r}", value, str, InputError)
    points = read_field(record, "points", list, place)
    if not points:
        raise InputError(f"{place}, 'points' is empty; give a list of [x, y]")
    for point in points:
        check_numbers(f"{place}, 'points'", point, "x, y")
    return Shape(place, kind, [(x, y) for x, y in points], record)


def _read_group(shapes: Sequence[Shape], size: Size, skip: Skip) -> Annotation | None:
    """Read shapes as one region: the box of a rectangle, or the mask of all that have an inside; else a point or the
    box of lines.
    """
    filled = [shape for shape in shapes if len(shape.points) >= MIN_POINTS.get(shape.kind, math.inf)]
    rest = [shape for shape in shapes if len(shape.points) < MIN_POINTS.get(shape.kind, math.inf)]
    found = None
    if filled:
        found = _read_filled(shapes, filled, size, skip)
    elif len(rest) == 1 and rest[0].kind == "point":
        return _describe(shapes, point=rest[0].points[0])
    elif all(shape.kind in LINES for shape in rest):
        x1, y1, x2, y2 = bound_points(point for shape in rest for point in shape.points)
        if x1 < x2 and y1 < y2:
            skip("line, read as its box", shapes[0].place)
            return _describe(shapes, box=(x1, y1, x2, y2))
    for shape in rest:
        reason = "keypoint" if shape.kind == "point" else f"LabelMe shape {shape.kind!r}"
        skip(f"{shape.kind} of too few points" if shape.kind in MIN_POINTS else reason, shape.place)
    return found


def _read_filled(shapes: Sequence[Shape], filled: Sequence[Shape], size: Size, skip: Skip) -> Annotation | None:
    if len(filled) == 1 and filled[0].kind == "rectangle":
        return _describe(shapes, box=bound_points(filled[0].points))
    mask = np.zeros(size[::-1], bool)
    for shape in filled:
        try:
            mask |= draw_shape(shape, size)
        except ValueError as error:
            raise InputError(f"{shape.place}: a {shape.kind} that cannot be read: {error}") from error
    if not mask.any():
        return skip("shape covering no pixel", filled[0].place)
    code = masks.encode(mask)
    return _describe(shapes, box=masks.box_of(code), mask=code)


def _place_mask(shape: Shape, size: Size) -> np.ndarray:
    inside = decode_mask(shape.record.get("mask"), "'mask'", size)
    x, y = (int(value) for value in bound_points(shape.points)[:2])
    height, width = inside.shape
    if min(x, y) < 0 or x + width > size[0] or y + height > size[1]:
        raise InputError(f"'mask' of {width} x {height} at {x}, {y} reaches outside the image of {size[0]} x {size[1]}")
    mask = np.zeros(size[::-1], bool)
    mask[y : y + height, x : x + width] = inside
    return mask


def _describe(shapes: Sequence[Shape], **geometry: Any) -> Annotation:
    """An annotation with the texts of its shapes, each once."""
    first, records = shapes[0], [shape.record for shape in shapes]
    texts = [record["description"] for record in records if record.get("description")]
    for text in texts:
        check_type(f"{first.place}, 'description'", text, str, InputError)
    score, iou = (next((r[key] for r in records if r.get(key) is not None), None) for key in ("score", "iou"))
    label = first.record["label"]
    captions = tuple(dict.fromkeys(texts))
    unread = next(filter(None, (find_unread_caption(record, ("description",)) for record in records)), None)
    unread = None if captions else unread
    return Annotation(first.place, label=label, captions=captions, score=score, iou=iou, unread=unread, **geometry)
