"""The edge of a mask: as an SVG path, and as polygons."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from sca.io import masks
from sca.io.errors import InputError

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
    """(height, width) mask -> polygons along the edges of its pixels: of each its outer ring, then its holes.

    A polygon is of the pixels that touch by an edge, and valid as in OGC's simple features: no ring crosses or touches
    itself, outer rings turn from x to y, holes the other way.
    """
    box = masks.box_of(mask)
    if box is None:
        return []
    rings = (ring for edge in _rings(mask, tuple(int(value) for value in box), 1) for ring in _simple(edge))
    outer: list[list[Ring]] = []
    holes: list[tuple[int, int, Ring]] = []
    for ring in rings:
        x, y = min(ring, key=lambda corner: (corner[1], corner[0]))  # of the pixel in the ring's uppermost corner
        turned = ring if (_area(ring) > 0) == mask[y, x] else ring[::-1]
        if mask[y, x]:
            outer.append([turned])
        else:
            holes.append((x, y - 1, turned))
    if holes:
        owner = _painted(outer, *mask.shape)
        for x, y, hole in holes:
            outer[owner[y, x]].append(hole)
    return outer


def fill(rings: Sequence[Ring], width: int, height: int) -> np.ndarray:
    """The mask (height, width) bool inside of rings with whole corners and edges along the axes, by the even-odd rule.

    InputError for other rings.
    """
    crossed = np.zeros((height + 1, width + 1), bool)
    for ring in rings:
        corners = np.asarray(ring, np.float64).reshape(-1, 2)
        whole = corners.astype(np.int64)
        steps = np.roll(whole, -1, axis=0) - whole
        if (whole != corners).any() or (steps.all(axis=1)).any():
            raise InputError("edges that do not follow pixels")
        if whole.min(initial=0) < 0 or (whole > (width, height)).any():
            raise InputError(f"corners outside the {width} x {height} image")
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
    corners = _corners(np.pad(inside, 1))
    places = np.minimum(corners[:, :2] * step, [right - left, bottom - top])
    yield from _followed(np.add(places, (left, top)).tolist(), _next(corners, 0), _next(corners, 1))


def _corners(padded: np.ndarray) -> np.ndarray:
    """(K, 4): x, y where the edge turns, and which comes first of two in one place: across, and down.

    Where two pixels touch by a corner only, both turn there, each around its own pixel.
    """
    pixels = np.stack([padded[:-1, :-1], padded[:-1, 1:], padded[1:, :-1], padded[1:, 1:]])
    y, x = np.nonzero(np.logical_xor.reduce(pixels))
    none = np.zeros_like(x)
    plain = np.stack([x, y, none, none], 1)
    touching = (pixels[0] == pixels[3]) & (pixels[1] == pixels[2]) & (pixels[0] != pixels[1])
    y, x = np.nonzero(touching)
    falling = pixels[0][y, x].astype(x.dtype)  # whether it is the pixel on the left that is above
    left = np.stack([x, y, np.zeros_like(x), 1 - falling], 1)
    right = np.stack([x, y, np.ones_like(x), falling], 1)
    return np.concatenate([plain, left, right])


def _next(corners: np.ndarray, axis: int) -> list[int]:
    """The other end of each corner's edge: along a line, corners are its edges' ends in pairs."""
    pairs = np.lexsort((corners[:, 2 + axis], corners[:, axis], corners[:, 1 - axis])).reshape(-1, 2)
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


def _simple(ring: Ring) -> Iterator[Ring]:
    """The rings that one is made of that touches itself."""
    path: Ring = []
    places: dict[tuple[int, int], int] = {}
    for x, y in ring:
        start = places.get((x, y))
        if start is not None:
            loop = path[start:]
            del path[start:]
            for turn in loop:
                del places[turn[0], turn[1]]
            yield loop
        places[x, y] = len(path)
        path.append([x, y])
    yield path


def _area(ring: Ring) -> float:
    """Positive if it turns from x to y."""
    x, y = np.asarray(ring).T
    return float((x * np.roll(y, -1) - np.roll(x, -1) * y).sum() / 2)


def _painted(outer: list[list[Ring]], height: int, width: int) -> np.ndarray:
    """(height, width): of each pixel the innermost polygon around it, by its place."""
    boxes = [(np.min(ring, axis=0), np.max(ring, axis=0)) for ring, *_ in outer]
    owner = np.full((height, width), -1)
    for place in sorted(range(len(outer)), key=lambda place: -np.prod(boxes[place][1] - boxes[place][0])):
        (left, top), (right, bottom) = boxes[place]
        moved = np.subtract(outer[place][0], (left, top))
        owner[top:bottom, left:right][fill([moved], right - left, bottom - top)] = place
    return owner
