"""Greedy non-maximum suppression."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor


def suppress_overlaps(is_overlapping: Callable[[int, Tensor], Tensor], scores: Tensor) -> Iterator[int]:
    """Yield the indices that non-maximum suppression keeps, best first.

    Overlaps are computed row by row and only for kept indices: memory is linear in N, and the caller can stop early.

    Args:
        is_overlapping: Function of an index and other indices (K,) that returns which of them overlap too much with it,
            (K,) bool.
        scores: (N,) scores on the CPU.

    Yields:
        The index of a kept element.
    """
    order = scores.argsort(descending=True, stable=True)
    while len(order):
        best, order = int(order[0]), order[1:]
        yield best
        if len(order):
            order = order[~is_overlapping(best, order)]
