"""Greedy non-maximum suppression."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor


def suppress(overlap: Callable[[int, Tensor], Tensor], scores: Tensor, limit: float) -> Iterator[int]:
    """Yield the places that stay, best first: of two that overlap by more than `limit`, the one with the better score.

    Overlaps are computed a row at a time and only for what stays, so memory grows with N and a caller can stop.

    Args:
        overlap: Returns the overlap of one place with each of the places (K,), such as the IoU of boxes or of masks.
        scores: (N,) on the CPU.
        limit: Greatest overlap of two that both stay.
    """
    order = scores.argsort(descending=True, stable=True)
    while len(order):
        best, order = int(order[0]), order[1:]
        yield best
        if len(order):
            order = order[~(overlap(best, order) > limit)]
