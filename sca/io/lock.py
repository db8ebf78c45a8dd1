"""Exclusive locks that end with the process that holds them, however it ends."""

from __future__ import annotations

import errno
import os
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

try:
    import fcntl
except ImportError:  # Windows has no flock
    fcntl = None  # type: ignore[assignment]

UNSUPPORTED = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EBADF, errno.EINVAL}


class LockedError(ValueError):
    """A file or folder that another process is writing; the message is one line."""


def lock(file: IO[Any] | int) -> bool:
    """Take an exclusive lock on an open file without waiting.

    Returns:
        False if another process holds it; True if it was taken, or if the file system has no locks.
    """
    if fcntl is None:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        warnings.warn(f"no file locks here ({error.strerror}); run one command at a time", stacklevel=2)
    return True


def is_locked(file: IO[Any] | int) -> bool:
    """Whether another process holds the lock of an open file, or may: where that cannot be known."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    fcntl.flock(file, fcntl.LOCK_UN)
    return False


@contextmanager
def held_lock(path: Path, shown: str) -> Iterator[None]:
    """Hold the lock file `path`; it is removed afterwards.

    Args:
        path: The lock file.
        shown: What is locked, for the message.

    Raises:
        LockedError: Another process holds the lock.
    """
    while True:
        file = open(path, "ab")  # noqa: SIM115 (closed below)
        if not lock(file):
            file.close()
            raise LockedError(f"{shown} is being written by another process; wait for it, or choose another folder")
        if _is_at(file, path):
            break
        file.close()  # its last holder has removed it meanwhile
    _held.add(file)
    try:
        yield
    finally:
        if not file.closed:  # a forked child has closed it
            with suppress(OSError):
                if _is_at(file, path):
                    path.unlink()
            file.close()


def _is_at(file: IO[Any], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


_held: weakref.WeakSet[Any] = weakref.WeakSet()


def _release_in_child() -> None:
    """A forked worker must not keep the lock of a parent that was killed."""
    for file in list(_held):
        if not file.closed:
            file.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_release_in_child)
