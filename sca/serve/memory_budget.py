"""Memory budget of requests."""

from __future__ import annotations

import threading

import torch

MAX_SMALL_REQUEST_SHARE = 1 / 64  # maximum share of the budget for one small request
MAX_LARGE_REQUESTS_SHARE = 3 / 4  # share of the budget for all large requests; the rest is reserved for small ones


class MemoryBudgetError(Exception):
    """Error of a request that needs more memory than available."""


class MemoryBudget:
    """Memory budget of all requests. A quarter is reserved for small requests.

    Args:
        max_bytes: Maximum bytes of all requests.

    Attributes:
        leased_bytes: Bytes currently leased.
    """

    def __init__(self, max_bytes: int):
        self.max_bytes = max_bytes
        self.leased_bytes: int = 0
        self._memory_freed = threading.Condition()

    @property
    def max_request_bytes(self) -> int:
        """Maximum bytes of one request."""
        return int(self.max_bytes * MAX_LARGE_REQUESTS_SHARE)

    def is_small_request(self, num_bytes: int) -> bool:
        """Return whether a request of `num_bytes` can use the reserve for small requests."""
        return num_bytes <= self.max_bytes * MAX_SMALL_REQUEST_SHARE

    def create_lease(self) -> MemoryLease:
        """Create an empty lease for one request."""
        return MemoryLease(self)

    def resize_lease(self, lease: MemoryLease, num_bytes: int, timeout: float) -> None:
        """Resize a lease; see `MemoryLease.resize`."""
        max_total_bytes = self.max_bytes if self.is_small_request(num_bytes) else self.max_request_bytes

        def can_resize() -> bool:
            return (
                lease.has_ended
                or num_bytes <= lease.leased_bytes
                or self.leased_bytes + num_bytes - lease.leased_bytes <= max_total_bytes
            )

        with self._memory_freed:
            if not can_resize() and (
                num_bytes > max_total_bytes or not self._memory_freed.wait_for(can_resize, max(0.0, timeout))
            ):
                raise MemoryBudgetError(
                    f"not enough memory ({self.leased_bytes >> 20} of {self.max_bytes >> 20} MiB in use); try again "
                    "later"
                )
            if lease.has_ended:  # the request was cancelled while its work continued
                return
            self.leased_bytes += num_bytes - lease.leased_bytes
            lease.leased_bytes = num_bytes
            self._memory_freed.notify_all()

    def end_lease(self, lease: MemoryLease) -> None:
        """Release the memory of a lease permanently."""
        with self._memory_freed:
            self.leased_bytes -= lease.leased_bytes
            lease.leased_bytes, lease.has_ended = 0, True
            self._memory_freed.notify_all()


class MemoryLease:
    """Memory of one request, released at the end of a `with` block.

    Args:
        budget: Budget that the memory is taken from.

    Attributes:
        leased_bytes: Bytes currently leased.
        has_ended: Whether the lease was released.
    """

    def __init__(self, budget: MemoryBudget):
        self._budget = budget
        self.leased_bytes: int = 0
        self.has_ended: bool = False

    def resize(self, num_bytes: int, timeout: float = 0.0) -> None:
        """Change the size of the lease.

        Args:
            num_bytes: New size in bytes.
            timeout: Seconds to wait for free memory.

        Raises:
            MemoryBudgetError: The memory is not available within `timeout`.
        """
        self._budget.resize_lease(self, num_bytes, timeout)

    def add(self, num_bytes: int) -> None:
        """Grow the lease by `num_bytes`, which can be negative; raise MemoryBudgetError if they are not available."""
        self.resize(self.leased_bytes + num_bytes)

    def __enter__(self) -> MemoryLease:
        return self

    def __exit__(self, *_: object) -> None:
        self._budget.end_lease(self)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error is out of memory; for CPU tensors, torch raises a RuntimeError."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(
        text in str(error) for text in ("can't allocate memory", "not enough memory", "out of memory")
    )
