"""Convert shapes to masks and boxes. Coordinates are continuous: pixel (x, y) covers x..x+1, y..y+1."""

from __future__ import annotations

import base64
import binascii
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from pycocotools import mask as rle
from sca_registry.contracts import Region

from sca.io import masks
from sca.io.annotations.annotation import ImageSize, SkipCallback
from sca.io.coordinates import Box, clip_box, find_normalized_scale, scale_box
from sca.io.errors import InputError
from sca.io.images import open_image_header

Points = Sequence[tuple[float, float]]
MAX_POINT_DISTANCE = 4  # times the longer image side; polygons with farther points are slow to draw
ROUNDING_TOLERANCE = 1e-6  # pixels by which a box may exceed the image without being counted
NUM_ELLIPSE_CORNERS = 360
MAX_EMBEDDED_BYTES = 64 * 2**20  # base64 size of an embedded image


def fill_polygons(polygons: Iterable[Points], size: ImageSize) -> dict[str, Any]:
    """Rasterize polygons as pycocotools does.

    Args:
        polygons: Polygons of at least three corners (x, y). Overlaps are merged: COCO's polygons have no holes.
        size: Width and height of the image.

    Returns:
        RLE, empty if no pixel is inside.

    Raises:
        InputError: A point is far outside the image.
    """
    width, height = size
    corners = [list(polygon) for polygon in polygons]
    check_points_near_image((point for polygon in corners for point in polygon), size)
    flat = [[float(value) for point in polygon for value in point] for polygon in corners]
    if not flat:
        return masks.encode_rle(np.zeros((height, width), bool))
    encoded = rle.merge(rle.frPyObjects(flat, height, width))
    return {"size": [height, width], "counts": encoded["counts"].decode("ascii")}


def check_points_near_image(points: Iterable[tuple[float, float]], size: ImageSize) -> None:
    """Raise InputError for a point so far outside the image that drawing it would be slow."""
    max_distance = MAX_POINT_DISTANCE * max(size)
    if any(abs(value) > max_distance for point in points for value in point):
        raise InputError(f"has a point far outside the image of {size[0]} x {size[1]}")


def compute_bounding_box(points: Iterable[tuple[float, float]]) -> Box:
    """Return the bounding box of points."""
    xs, ys = zip(*points, strict=True)
    return min(xs), min(ys), max(xs), max(ys)


def clip_annotated_box(
    box: Sequence[float], size: ImageSize, location: str, skip: SkipCallback, mask: Mapping[str, Any] | None = None
) -> Box | None:
    """Clip a box to its image. All readers of regions share this rule for coordinates.

    Args:
        box: x1, y1, x2, y2 as recorded.
        size: Width and height of the image.
        location: File and record, for messages.
        skip: Counts a box that is clipped, outside the image, or not in pixels.
        mask: RLE of the region. If its box also looks normalized, both are just tiny.

    Returns:
        The clipped box; None if it is outside the image or normalized.
    """
    clipped, scale = clip_box(box, *size), find_normalized_scale(box, *size)
    if clipped is None:
        skip("empty box", location)
        return None
    mask_box = masks.mask_to_box(mask) if scale is not None and mask else None
    if scale is not None and (mask_box is None or find_normalized_scale(mask_box, *size) is None):
        skip("normalized box", f"{location}, in 0..{scale} of a {size[0]} x {size[1]} image")
        return None
    if any(abs(old - new) > ROUNDING_TOLERANCE for old, new in zip(box, clipped, strict=True)):
        skip("box clipped", location)
    return clipped


def scale_region(region: Region, factors: tuple[float, float], size: ImageSize) -> Region | None:
    """Scale a region to an image that was resized after annotation.

    Args:
        region: Region in pixels of the recorded image size.
        factors: Factors (x, y) of `compute_resize_factors`.
        size: Width and height of the image.

    Returns:
        The region with its box clipped to the image; None if it is outside.
    """
    box = clip_box(scale_box(region.box, factors), *size)
    if box is None:
        return None
    return replace(region, box=box, mask=None if region.mask is None else masks.resize_rle(region.mask, *size))


def rotate_rectangle(x: float, y: float, width: float, height: float, degrees: float) -> Points:
    """Return the corners of a rectangle rotated clockwise about its first corner (x, y), in pixels."""
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    offsets = ((0, 0), (width, 0), (width, height), (0, height))
    return [
        (x + x_offset * cos - y_offset * sin, y + x_offset * sin + y_offset * cos) for x_offset, y_offset in offsets
    ]


def trace_ellipse(x: float, y: float, radius_x: float, radius_y: float, degrees: float = 0.0) -> Points:
    """Return corners along an ellipse with center (x, y), rotated clockwise about it, in pixels."""
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    angles = (2 * math.pi * step / NUM_ELLIPSE_CORNERS for step in range(NUM_ELLIPSE_CORNERS))
    offsets = ((radius_x * math.cos(angle), radius_y * math.sin(angle)) for angle in angles)
    return [
        (x + x_offset * cos - y_offset * sin, y + x_offset * sin + y_offset * cos) for x_offset, y_offset in offsets
    ]


def decode_base64_image(text: Any, subject: str) -> bytes:
    """Decode a base64 image embedded in an annotation file, with or without a data URI header.

    Args:
        text: JSON value with the encoded image.
        subject: Subject of the error messages.

    Returns:
        The bytes of the image file.

    Raises:
        InputError: The text is not base64, empty, or larger than MAX_EMBEDDED_BYTES.
    """
    if not isinstance(text, str) or not text:
        raise InputError(f"{subject} must be a base64 string, not {text!r:.40}")
    _, _, content = text.partition(",") if text.startswith("data:") else ("", "", text)
    if len(content) * 3 // 4 > MAX_EMBEDDED_BYTES:
        raise InputError(f"{subject} is larger than {MAX_EMBEDDED_BYTES:,} bytes; store the image as a separate file")
    try:
        return base64.b64decode(content, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InputError(f"{subject} is not valid base64: {error}") from error


def decode_base64_mask(text: Any, subject: str, size: ImageSize) -> np.ndarray:
    """Decode a mask embedded in an annotation file as a base64 image.

    Args:
        text: Base64 text.
        subject: Subject of the error messages.
        size: Width and height of the annotated image, the maximum size of the mask.

    Returns:
        (height, width) bool in the mask's own size, see `masks.binarize_mask_image`.

    Raises:
        InputError: The mask cannot be read, or is larger than the image.
    """
    try:
        image = open_image_header(io.BytesIO(decode_base64_image(text, subject)), subject, max_pixels=masks.PIXEL_LIMIT)
        if image.width > size[0] or image.height > size[1]:
            raise InputError(f"{subject} is {image.width} x {image.height}, larger than the image")
        with image:
            return masks.binarize_mask_image(image, image.format in masks.LOSSY_FORMATS)
    except (OSError, SyntaxError) as error:  # damaged pixels after a valid header
        raise InputError(f"{subject}: {error}") from error
