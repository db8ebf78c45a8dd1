"""Memory that requests hold together, and how it goes back to the system."""

from __future__ import annotations

import ctypes
import sys
import threading

import torch

SMALL_REQUEST_SHARE = 1 / 64  # of a budget that one request may take when large ones have taken their share
LARGE_REQUESTS_SHARE = 3 / 4  # of a budget that large requests may take together


class BudgetError(Exception):
    """What a request needs is not free now."""


class ByteBudget:
    """Bytes that all requests may hold at a time. A quarter of them is kept for small requests."""

    def __init__(self, max_bytes: int):
        self.max_bytes, self.leased_bytes = max_bytes, 0
        self._freed = threading.Condition()

    @property
    def max_request_bytes(self) -> int:
        """The most that one request can have."""
        return int(self.max_bytes * LARGE_REQUESTS_SHARE)

    def is_small_request(self, num_bytes: int) -> bool:
        return num_bytes <= self.max_bytes * SMALL_REQUEST_SHARE

    def create_lease(self) -> MemoryLease:
        return MemoryLease(self)

    def resize_lease(self, lease: MemoryLease, num_bytes: int, timeout: float) -> None:
        """Resize a lease, see `MemoryLease.resize`."""
        max_total_bytes = self.max_bytes if self.is_small_request(num_bytes) else self.max_request_bytes

        def can_resize() -> bool:
            return (
                lease.has_ended
                or num_bytes <= lease.leased_bytes
                or self.leased_bytes + num_bytes - lease.leased_bytes <= max_total_bytes
            )

        with self._freed:
            if not can_resize() and (
                num_bytes > max_total_bytes or not self._freed.wait_for(can_resize, max(0.0, timeout))
            ):
                raise BudgetError(
                    f"{self.leased_bytes >> 20} MiB of {self.max_bytes >> 20} are in use: try again later"
                )
            if lease.has_ended:  # by a request that went while its work went on
                return
            self.leased_bytes += num_bytes - lease.leased_bytes
            lease.leased_bytes = num_bytes
            self._freed.notify_all()

    def end_lease(self, lease: MemoryLease) -> None:
        """Take back what a lease holds, for good."""
        with self._freed:
            self.leased_bytes -= lease.leased_bytes
            lease.leased_bytes, lease.has_ended = 0, True
            self._freed.notify_all()


class MemoryLease:
    """What one request holds of a budget; given back at the end of a `with` block."""

    def __init__(self, budget: ByteBudget):
        self._budget, self.leased_bytes, self.has_ended = budget, 0, False

    def resize(self, num_bytes: int, timeout: float = 0.0) -> None:
        """Hold `num_bytes` once they are free. Raise BudgetError if they are not free within `timeout` seconds."""
        self._budget.resize_lease(self, num_bytes, timeout)

    def add(self, num_bytes: int) -> None:
        self.resize(self.leased_bytes + num_bytes)

    def __enter__(self) -> MemoryLease:
        return self

    def __exit__(self, *_: object) -> None:
        self._budget.end_lease(self)


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
