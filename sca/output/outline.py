"""The edge of a mask: as an SVG path, and as polygons."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from sca import masks

Ring = list[list[int]]  # corners [x, y], the first not again at the end
DETAIL = 800  # the longest side of a mask's box in steps; a larger mask is drawn coarser


def outline(mask: np.ndarray) -> str:
    """(height, width) mask -> path data along the edges of its pixels, in image pixels, for the even-odd rule."""
    box = masks.box_of(mask)
    if box is None:
        return ""
    left, top, right, bottom = (int(value) for value in box)
    step = math.ceil(max(right - left, bottom - top) / DETAIL)
    return "".join(map(_path, _rings(mask, (left, top, right, bottom), step)))


def polygons(mask: np.ndarray) -> list[list[Ring]]:
    """(height, width) mask -> polygons along the edges of its pixels: of each its outer ring, then its holes."""
    box = masks.box_of(mask)
    if box is None:
        return []
    outer: list[list[Ring]] = []
    holes: list[Ring] = []
    for ring in _rings(mask, tuple(int(value) for value in box), 1):
        x, y = _first(ring)
        if mask[y, x]:
            outer.append([ring])
        else:
            holes.append(ring)
    for hole in holes:
        x, y = _first(hole)
        around = [polygon for polygon in outer if _contains(polygon[0], x + 0.5, y + 0.5)]
        min(around, key=lambda polygon: _extent(polygon[0])).append(hole)
    return outer


def fill(rings: Sequence[Ring], width: int, height: int) -> np.ndarray:
    """The mask (height, width) bool inside of rings with whole corners and edges along the axes, by the even-odd rule.

    ValueError for other rings.
    """
    crossed = np.zeros((height + 1, width + 1), bool)
    for ring in rings:
        corners = np.asarray(ring, np.float64).reshape(-1, 2)
        whole = corners.astype(np.int64)
        steps = np.roll(whole, -1, axis=0) - whole
        if (whole != corners).any() or (steps.all(axis=1)).any():
            raise ValueError("edges that do not follow pixels")
        if whole.min(initial=0) < 0 or (whole > (width, height)).any():
            raise ValueError(f"corners outside the {width} x {height} image")
        for (x, y), (_, down) in zip(whole.tolist(), steps.tolist(), strict=True):
            if down:
                crossed[min(y, y + down) : max(y, y + down), x] ^= True
    return np.logical_xor.accumulate(crossed, axis=1)[:height, :width]


def _rings(mask: np.ndarray, box: tuple[int, ...], step: int) -> Iterator[Ring]:
    """Every closed edge, corner by corner, in steps of so many pixels."""
    left, top, right, bottom = box
    inside = mask[top:bottom, left:right]
    for axis in (0, 1):
        inside = np.logical_or.reduceat(inside, np.arange(0, inside.shape[axis], step), axis=axis)
    corners = _corners(np.pad(inside, 1))  # (K, 2) x y
    if step > 1:
        corners = np.minimum(corners * step, [right - left, bottom - top])
    yield from _followed(np.add(corners, (left, top)).tolist(), _next(corners, (0, 1)), _next(corners, (1, 0)))


def _corners(padded: np.ndarray) -> np.ndarray:
    """Where the edge turns; where two pixels touch by a corner only, it crosses itself and goes straight on."""
    y, x = np.nonzero(padded[:-1, :-1] ^ padded[:-1, 1:] ^ padded[1:, :-1] ^ padded[1:, 1:])
    return np.stack([x, y], 1)


def _next(corners: np.ndarray, order: tuple[int, int]) -> list[int]:
    """The other end of each corner's edge: along a line, corners are its edges' ends in pairs."""
    pairs = np.lexsort((corners[:, order[0]], corners[:, order[1]])).reshape(-1, 2)
    other = np.empty(len(corners), np.int64)
    other[pairs] = pairs[:, ::-1]
    return other.tolist()


def _followed(corners: list[list[int]], across: list[int], down: list[int]) -> Iterator[Ring]:
    """Follows the edges, one across and one down in turn, until every corner has been passed."""
    seen = bytearray(len(corners))
    for start in range(len(corners)):
        if seen[start]:
            continue
        ring, here = [], start
        while not seen[here]:
            turn = across[here]
            seen[here] = seen[turn] = 1
            ring += [corners[here], corners[turn]]
            here = down[turn]
        yield ring


def _path(ring: Ring) -> str:
    pieces = [f"M{ring[0][0]} {ring[0][1]}"]
    after = [*ring[1:], ring[0]]
    for place in range(0, len(ring), 2):
        (x, _), (turn, y), (_, there) = ring[place], after[place], after[place + 1]
        pieces.append(f"h{turn - x}v{there - y}")
    return "".join([*pieces, "z"])


def _first(ring: Ring) -> list[int]:
    """The pixel below and right of the ring's first corner from above: it is within the ring."""
    return min(ring, key=lambda corner: (corner[1], corner[0]))


def _contains(ring: Ring, x: float, y: float) -> bool:
    """Whether a ray to the left crosses the ring an odd number of times."""
    corners = np.asarray(ring)
    after = np.roll(corners, -1, axis=0)
    low, high = np.minimum(corners[:, 1], after[:, 1]), np.maximum(corners[:, 1], after[:, 1])
    return bool(((corners[:, 0] < x) & (low < y) & (y < high)).sum() % 2)


def _extent(ring: Ring) -> int:
    """The area of the ring's box."""
    corners = np.asarray(ring)
    width, height = corners.max(axis=0) - corners.min(axis=0)
    return int(width * height)
