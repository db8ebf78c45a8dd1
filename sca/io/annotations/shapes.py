"""Masks and boxes of shapes. Coordinates are continuous: pixel (x, y) covers x..x+1, y..y+1."""

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
MAX_POINT_DISTANCE = (
    4  # points may lie outside by up to 4 times the longer side of the image: farther ones take long to draw
)
ROUNDING_TOLERANCE = 1e-6  # pixels by which a box may leave the image uncounted
NUM_ELLIPSE_CORNERS = 360
MAX_EMBEDDED_BYTES = 64 * 2**20  # of an image inside an annotation file, as base64


def fill_polygons(polygons: Iterable[Points], size: ImageSize) -> dict[str, Any]:
    """Fill polygons as pycocotools does.

    Args:
        polygons: Each of at least three corners (x, y). Where they overlap they are one: COCO's polygons have no holes.
        size: Width and height of the image.

    Returns:
        The RLE, empty if no pixel lies inside.

    Raises:
        InputError: For a point far outside the image.
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
    """Raise InputError for a point that lies so far outside that drawing it would take long."""
    max_distance = MAX_POINT_DISTANCE * max(size)
    if any(abs(value) > max_distance for point in points for value in point):
        raise InputError(f"has a point far outside the image of {size[0]} x {size[1]}")


def compute_bounding_box(points: Iterable[tuple[float, float]]) -> Box:
    """Return the smallest box around points."""
    xs, ys = zip(*points, strict=True)
    return min(xs), min(ys), max(xs), max(ys)


def clip_annotated_box(
    box: Sequence[float], size: ImageSize, location: str, skip: SkipCallback, mask: Mapping[str, Any] | None = None
) -> Box | None:
    """Clip a box to its image: the rule for coordinates of every reader of regions.

    Args:
        box: x1, y1, x2, y2 as a file states them.
        size: Width and height of the image.
        location: The file and the record, for messages.
        skip: Counts a box that is clipped, outside of the image, or not in its pixels.
        mask: RLE of the region. If its box looks normalized as well, both are tiny.

    Returns:
        The box in the image; None if nothing is left of it, or it is normalized.
    """
    clipped, scale = clip_box(box, *size), find_normalized_scale(box, *size)
    if clipped is None:
        return skip("empty box", location)
    mask_box = masks.mask_to_box(mask) if scale is not None and mask else None
    if scale is not None and (mask_box is None or find_normalized_scale(mask_box, *size) is None):
        return skip("normalized box", f"{location}, in 0..{scale} of a {size[0]} x {size[1]} image")
    if any(abs(old - new) > ROUNDING_TOLERANCE for old, new in zip(box, clipped, strict=True)):
        skip("box clipped", location)
    return clipped


def scale_region(region: Region, factors: tuple[float, float], size: ImageSize) -> Region | None:
    """Scale a region to an image that was resized since.

    Args:
        region: In pixels of the image as the file records it.
        factors: Across and down, see `compare_sizes`.
        size: Width and height of the image.

    Returns:
        The region, its box clipped to the image; None if nothing of it is inside.
    """
    box = clip_box(scale_box(region.box, factors), *size)
    if box is None:
        return None
    return replace(region, box=box, mask=None if region.mask is None else masks.resize_rle(region.mask, *size))


def rotate_rectangle(x: float, y: float, width: float, height: float, degrees: float) -> Points:
    """Return the corners of a rectangle turned clockwise about its first corner (x, y), in pixels."""
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    offsets = ((0, 0), (width, 0), (width, height), (0, height))
    return [
        (x + x_offset * cos - y_offset * sin, y + x_offset * sin + y_offset * cos) for x_offset, y_offset in offsets
    ]


def trace_ellipse(x: float, y: float, radius_x: float, radius_y: float, degrees: float = 0.0) -> Points:
    """Return corners along an ellipse around (x, y), turned clockwise about its center, in pixels."""
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    angles = (2 * math.pi * step / NUM_ELLIPSE_CORNERS for step in range(NUM_ELLIPSE_CORNERS))
    offsets = ((radius_x * math.cos(angle), radius_y * math.sin(angle)) for angle in angles)
    return [
        (x + x_offset * cos - y_offset * sin, y + x_offset * sin + y_offset * cos) for x_offset, y_offset in offsets
    ]


def decode_base64_image(text: Any, subject: str) -> bytes:
    """Decode an image that an annotation file contains as base64, with or without the head of a data URI.

    Raises:
        InputError: If it is not base64, empty, or larger than MAX_EMBEDDED_BYTES.
    """
    if not isinstance(text, str) or not text:
        raise InputError(f"{subject}: base64 text, not {text!r:.40}")
    _, _, content = text.partition(",") if text.startswith("data:") else ("", "", text)
    if len(content) * 3 // 4 > MAX_EMBEDDED_BYTES:
        raise InputError(f"{subject} is larger than {MAX_EMBEDDED_BYTES:,} bytes; keep the image in a file")
    try:
        return base64.b64decode(content, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InputError(f"{subject} is not base64: {error}") from error


def decode_base64_mask(text: Any, subject: str, size: ImageSize) -> np.ndarray:
    """Decode a mask that an annotation file contains as an image in base64.

    Args:
        size: Width and height of the annotated image, which a mask may not exceed.

    Returns:
        (height, width) bool of the mask's own size, see `masks.binarize_image`.

    Raises:
        InputError: If it cannot be read, or is larger than the image.
    """
    try:
        image = open_image_header(io.BytesIO(decode_base64_image(text, subject)), subject, max_pixels=masks.PIXEL_LIMIT)
        if image.width > size[0] or image.height > size[1]:
            raise InputError(f"{subject} is {image.width} x {image.height}, larger than the image")
        with image:
            return masks.binarize_mask_image(image, image.format in masks.LOSSY_FORMATS)
    except (OSError, SyntaxError) as error:  # damaged pixels behind a good header
        raise InputError(f"{subject}: {error}") from error
