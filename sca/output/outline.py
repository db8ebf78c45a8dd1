"""The edge of a mask as an SVG path."""

from __future__ import annotations

import math

import numpy as np

from sca import masks

DETAIL = 800  # the longest side of a mask's box in steps; a larger mask is drawn coarser


def outline(mask: np.ndarray) -> str:
    """(height, width) mask -> path data along the edges of its pixels, in image pixels, for the even-odd rule."""
    box = masks.box_of(mask)
    if box is None:
        return ""
    left, top, right, bottom = (int(value) for value in box)
    step = math.ceil(max(right - left, bottom - top) / DETAIL)
    inside = mask[top:bottom, left:right]
    for axis in (0, 1):
        inside = np.logical_or.reduceat(inside, np.arange(0, inside.shape[axis], step), axis=axis)
    corners = _corners(np.pad(inside, 1))  # (K, 2) x y
    if step > 1:
        corners = np.minimum(corners * step, [right - left, bottom - top])
    return _path(np.add(corners, (left, top)), _next(corners, (0, 1)), _next(corners, (1, 0)))


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


def _path(corners: np.ndarray, across: list[int], down: list[int]) -> str:
    """Follows the edges, one across and one down in turn, until every corner has been passed."""
    xs, ys = corners.T.tolist()
    seen = bytearray(len(xs))
    pieces = []
    for start in range(len(xs)):
        if seen[start]:
            continue
        pieces.append(f"M{xs[start]} {ys[start]}")
        here = start
        while not seen[here]:
            turn = across[here]
            seen[here] = seen[turn] = 1
            there = down[turn]
            pieces.append(f"h{xs[turn] - xs[here]}v{ys[there] - ys[turn]}")
            here = there
        pieces.append("z")
    return "".join(pieces)
