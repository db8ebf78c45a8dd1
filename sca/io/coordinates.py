"""Coordinates and sizes that a person or a file states, compared with those of the image.

Coordinates are in pixels of the upright image: x to the right, y down, from the upper-left corner. They are continuous:
pixel (x, y) covers x..x+1, y..y+1.
"""

from __future__ import annotations

from collections.abc import Sequence

from sca.io.errors import InputError

Box = tuple[float, float, float, float]
PIXEL_LIMIT = 178_956_970  # maximum number of pixels of an image
MAX_OVERSHOOT = 0.05  # fraction of a side: boxes of real annotations exceed the image by a few pixels only


def find_normalized_scale(box: Sequence[float], width: int, height: int) -> int | None:
    """Return the scale that a box seems to be normalized to: 1, 100 or 1000; None for a box in pixels.

    A box within [0, 1] is never in pixels. Larger scales count only if the box exceeds the image.

    Args:
        box: x1, y1, x2, y2.
        width: Width of the image in pixels.
        height: Height of the image in pixels.

    Returns:
        The scale, or None.
    """
    if min(box) < 0 or max(width, height) <= 1:
        return None
    if max(box) <= 1:
        return 1
    limits = width * (1 + MAX_OVERSHOOT), height * (1 + MAX_OVERSHOOT)
    if max(box[0], box[2]) <= limits[0] and max(box[1], box[3]) <= limits[1]:
        return None
    return next((scale for scale in (100, 1000) if max(box) <= scale), None)


def scale_to_pixels(coordinates: Sequence[float], scale: float, width: int, height: int) -> tuple[float, ...]:
    """Convert coordinates x, y, x, y, ... normalized to [0, `scale`] to pixels, rounded to one decimal."""
    sides = (width, height) * (len(coordinates) // 2)  # of a point or a box
    return tuple(round(value / scale * side, 1) for value, side in zip(coordinates, sides, strict=True))


def compute_resize_factors(recorded: tuple[int, int], actual: tuple[int, int]) -> tuple[float, float]:
    """Return the factors (x, y) that convert coordinates from the recorded to the actual image size.

    Args:
        recorded: Width and height recorded in a file.
        actual: Width and height of the upright image.

    Returns:
        Factors of x and y; 1.0 for equal sizes.

    Raises:
        InputError: The aspect ratios differ by more than the rounding of a resized side.
    """
    long_side_scale = max(actual) / max(recorded)
    rounding = max(1.0, long_side_scale)  # both sides are whole pixels
    if any(abs(old * long_side_scale - new) > rounding for old, new in zip(recorded, actual, strict=True)):
        is_rotated = recorded == actual[::-1]
        cause = "the image was rotated" if is_rotated else "the aspect ratios differ"
        raise InputError(
            f"the annotation file records {recorded[0]} x {recorded[1]} (width x height), but the image is "
            f"{actual[0]} x {actual[1]}: {cause}; use the image that was annotated"
        )
    return actual[0] / recorded[0], actual[1] / recorded[1]


def scale_box(box: Box, factors: tuple[float, float]) -> Box:
    """Scale x1, y1, x2, y2 by the factors (x, y) of `compute_resize_factors`."""
    (x1, y1, x2, y2), (x_scale, y_scale) = box, factors
    return x1 * x_scale, y1 * y_scale, x2 * x_scale, y2 * y_scale


def clip_box(box: Sequence[float], width: int, height: int) -> Box | None:
    """Clip x1, y1, x2, y2 to an image; None if the box is outside."""
    x1, y1, x2, y2 = (min(max(float(v), 0.0), float(limit)) for v, limit in zip(box, (width, height) * 2, strict=True))
    return (x1, y1, x2, y2) if x1 < x2 and y1 < y2 else None
