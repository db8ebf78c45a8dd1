"""Memory that requests hold together, and how it goes back to the system."""

from __future__ import annotations

import ctypes
import sys
import threading

import torch

SMALL = 1 / 64  # of a budget that one request may take when large ones have taken their share
LARGE = 3 / 4  # of a budget that large requests may take together


class BudgetError(Exception):
    """What a request needs is not free now."""


class ByteBudget:
    """Bytes that all requests may hold at a time. A quarter of them is kept for small requests."""

    def __init__(self, limit: int):
        self.limit, self.held = limit, 0
        self._freed = threading.Condition()

    @property
    def largest(self) -> int:
        """The most that one request can have."""
        return int(self.limit * LARGE)

    def is_small(self, count: int) -> bool:
        return count <= self.limit * SMALL

    def lease(self) -> Lease:
        return Lease(self)

    def change(self, lease: Lease, count: int, seconds: float) -> None:
        """What `Lease.set` does."""
        most = self.limit if self.is_small(count) else self.largest

        def fits() -> bool:
            return lease.ended or count <= lease.held or self.held + count - lease.held <= most

        with self._freed:
            if not fits() and (count > most or not self._freed.wait_for(fits, max(0.0, seconds))):
                raise BudgetError(f"{self.held >> 20} MiB of {self.limit >> 20} are in use: try again later")
            if lease.ended:  # by a request that went while its work went on
                return
            self.held += count - lease.held
            lease.held = count
            self._freed.notify_all()

    def end(self, lease: Lease) -> None:
        """Take back what a lease holds, for good."""
        with self._freed:
            self.held -= lease.held
            lease.held, lease.ended = 0, True
            self._freed.notify_all()


class Lease:
    """What one request holds of a budget; given back at the end of a `with` block."""

    def __init__(self, budget: ByteBudget):
        self._budget, self.held, self.ended = budget, 0, False

    def set(self, count: int, seconds: float = 0.0) -> None:
        """Hold `count` bytes from now on, once they are free. BudgetError if they are not in `seconds`."""
        self._budget.change(self, count, seconds)

    def add(self, count: int) -> None:
        self.set(self.held + count)

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *_: object) -> None:
        self._budget.end(self)


def release_memory() -> None:
    """Give memory that was freed back to the system, where the C library keeps it."""
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "malloc_trim"):  # glibc; others do so by themselves
        ctypes.CDLL(None).malloc_trim(0)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is about memory; on a CPU torch raises a RuntimeError for it."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(
        text in str(error) for text in ("can't allocate memory", "not enough memory", "out of memory")
    )
