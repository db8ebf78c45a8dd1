"""Greedy non-maximum suppression."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor


def suppress_overlaps(is_overlapping: Callable[[int, Tensor], Tensor], scores: Tensor) -> Iterator[int]:
    """Yield the places that stay, best first: of two that overlap too much, the one with the better score.

    Overlaps are computed a row at a time and only for what stays, so memory grows with N and a caller can stop.

    Args:
        is_overlapping: Returns whether one place overlaps too much with each of the places (K,): (K,) bool.
        scores: (N,) on the CPU.
    """
    order = scores.argsort(descending=True, stable=True)
    while len(order):
        best, order = int(order[0]), order[1:]
        yield best
        if len(order):
            order = order[~is_overlapping(best, order)]
