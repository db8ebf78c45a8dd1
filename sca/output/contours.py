"""Mask contours as an SVG path and as polygons."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from sca.io import masks
from sca.io.errors import InputError

Ring = list[list[int]]  # corners [x, y]; the first is not repeated at the end
MAX_OUTLINE_STEPS = 800  # maximum longest side of a mask's box in steps; a larger mask is drawn coarser


def mask_to_svg_path(mask: np.ndarray) -> str:
    """Convert a (height, width) mask to SVG path data along its pixel edges, in image pixels, for the even-odd rule."""
    box = masks.mask_to_box(mask)
    if box is None:
        return ""
    left, top, right, bottom = (int(value) for value in box)
    step = math.ceil(max(right - left, bottom - top) / MAX_OUTLINE_STEPS)
    return "".join(map(_ring_to_svg_path, _iter_rings(mask, (left, top, right, bottom), step)))


def mask_to_polygons(mask: np.ndarray) -> list[list[Ring]]:
    """Convert a (height, width) mask to polygons along its pixel edges: each is an outer ring followed by its holes.

    A polygon covers pixels connected by edges, and is valid as in OGC's simple features: no ring crosses or touches
    itself, outer rings turn from x to y, holes the other way.
    """
    box = masks.mask_to_box(mask)
    if box is None:
        return []
    rings = (
        ring
        for edge in _iter_rings(mask, tuple(int(value) for value in box), 1)
        for ring in _split_at_touching_corners(edge)
    )
    outer: list[list[Ring]] = []
    holes: list[tuple[int, int, Ring]] = []
    for ring in rings:
        x, y = min(ring, key=lambda corner: (corner[1], corner[0]))  # of the pixel at the ring's uppermost corner
        oriented_ring = ring if (_compute_signed_area(ring) > 0) == mask[y, x] else ring[::-1]
        if mask[y, x]:
            outer.append([oriented_ring])
        else:
            holes.append((x, y - 1, oriented_ring))
    if holes:
        polygon_index = _paint_polygons(outer, *mask.shape)
        for x, y, hole in holes:
            outer[polygon_index[y, x]].append(hole)
    return outer


def rings_to_mask(rings: Sequence[Ring | np.ndarray], width: int, height: int) -> np.ndarray:
    """Convert rings with integer corners and axis-aligned edges to a (height, width) bool mask, by the even-odd rule.

    Args:
        rings: Closed rings of corners (x, y) in pixels.
        width: Width of the mask in pixels.
        height: Height of the mask in pixels.

    Returns:
        (height, width) bool mask.

    Raises:
        InputError: A ring has other corners or edges.
    """
    crossings = np.zeros((height + 1, width + 1), bool)
    for ring in rings:
        corners = np.asarray(ring, np.float64).reshape(-1, 2)
        integer_corners = corners.astype(np.int64)
        offsets = np.roll(integer_corners, -1, axis=0) - integer_corners
        if (integer_corners != corners).any() or (offsets.all(axis=1)).any():
            raise InputError("edges that do not follow pixels")
        if integer_corners.min(initial=0) < 0 or (integer_corners > (width, height)).any():
            raise InputError(f"corners outside the {width} x {height} image")
        for (x, y), (_, dy) in zip(integer_corners.tolist(), offsets.tolist(), strict=True):
            if dy:
                crossings[min(y, y + dy) : max(y, y + dy), x] ^= True
    return np.logical_xor.accumulate(crossings, axis=1)[:height, :width]


def _iter_rings(mask: np.ndarray, box: tuple[int, ...], step: int) -> Iterator[Ring]:
    """Yield every closed contour, corner by corner, with steps of `step` pixels."""
    left, top, right, bottom = box
    pixels = mask[top:bottom, left:right]
    for axis in (0, 1):
        pixels = np.logical_or.reduceat(pixels, np.arange(0, pixels.shape[axis], step), axis=axis)
    corners = _find_corners(np.pad(pixels, 1))
    points = np.minimum(corners[:, :2] * step, [right - left, bottom - top])
    yield from _trace_rings(np.add(points, (left, top)).tolist(), _pair_corners(corners, 0), _pair_corners(corners, 1))


def _find_corners(padded: np.ndarray) -> np.ndarray:
    """Return corners (K, 4): x, y, and the order of two corners at one place, horizontally and vertically.

    If two pixels touch only at a corner, both contours turn there, each around its own pixel.
    """
    pixels = np.stack([padded[:-1, :-1], padded[:-1, 1:], padded[1:, :-1], padded[1:, 1:]])
    y, x = np.nonzero(np.logical_xor.reduce(pixels))
    zeros = np.zeros_like(x)
    simple_corners = np.stack([x, y, zeros, zeros], 1)
    is_diagonal = (pixels[0] == pixels[3]) & (pixels[1] == pixels[2]) & (pixels[0] != pixels[1])
    y, x = np.nonzero(is_diagonal)
    is_left_above = pixels[0][y, x].astype(x.dtype)  # whether the upper pixel is the left one
    left_corners = np.stack([x, y, np.zeros_like(x), 1 - is_left_above], 1)
    right_corners = np.stack([x, y, np.ones_like(x), is_left_above], 1)
    return np.concatenate([simple_corners, left_corners, right_corners])


def _pair_corners(corners: np.ndarray, axis: int) -> list[int]:
    """Return the other end of each corner's edge: along a line, corners are the ends of edges in pairs."""
    pairs = np.lexsort((corners[:, 2 + axis], corners[:, axis], corners[:, 1 - axis])).reshape(-1, 2)
    partners = np.empty(len(corners), np.int64)
    partners[pairs] = pairs[:, ::-1]
    return partners.tolist()


def _trace_rings(
    corners: list[list[int]], horizontal_partners: list[int], vertical_partners: list[int]
) -> Iterator[Ring]:
    """Follow horizontal and vertical edges in turn, until every corner has been visited."""
    visited = bytearray(len(corners))
    for start in range(len(corners)):
        if visited[start]:
            continue
        ring, current = [], start
        while not visited[current]:
            partner = horizontal_partners[current]
            visited[current] = visited[partner] = 1
            ring += [corners[current], corners[partner]]
            current = vertical_partners[partner]
        yield ring


def _ring_to_svg_path(ring: Ring) -> str:
    commands = [f"M{ring[0][0]} {ring[0][1]}"]
    next_corners = [*ring[1:], ring[0]]
    for index in range(0, len(ring), 2):
        (x, _), (next_x, y), (_, next_y) = ring[index], next_corners[index], next_corners[index + 1]
        commands.append(f"h{next_x - x}v{next_y - y}")
    return "".join([*commands, "z"])


def _split_at_touching_corners(ring: Ring) -> Iterator[Ring]:
    """Split a ring that touches itself into simple rings."""
    path: Ring = []
    indices: dict[tuple[int, int], int] = {}
    for x, y in ring:
        start = indices.get((x, y))
        if start is not None:
            loop = path[start:]
            del path[start:]
            for corner in loop:
                del indices[corner[0], corner[1]]
            yield loop
        indices[x, y] = len(path)
        path.append([x, y])
    yield path


def _compute_signed_area(ring: Ring) -> float:
    """Return the signed area of a ring, positive if it turns from x to y."""
    x, y = np.asarray(ring).T
    return float((x * np.roll(y, -1) - np.roll(x, -1) * y).sum() / 2)


def _paint_polygons(outer: list[list[Ring]], height: int, width: int) -> np.ndarray:
    """Return (height, width) indices of the innermost polygon around each pixel."""
    boxes = [(np.min(ring, axis=0), np.max(ring, axis=0)) for ring, *_ in outer]
    polygon_index = np.full((height, width), -1)
    for index in sorted(range(len(outer)), key=lambda index: -np.prod(boxes[index][1] - boxes[index][0])):
        (left, top), (right, bottom) = boxes[index]
        shifted_ring = np.subtract(outer[index][0], (left, top))
        polygon_index[top:bottom, left:right][rings_to_mask([shifted_ring], right - left, bottom - top)] = index
    return polygon_index
