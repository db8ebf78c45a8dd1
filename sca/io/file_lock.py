"""Exclusive locks that are released when their process ends in any way."""

from __future__ import annotations

import errno
import os
import stat
import time
import warnings
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from sca.io.errors import LockedError, OutputError

try:
    import fcntl
except ImportError:  # Windows has no flock
    fcntl = None  # type: ignore[assignment]

WAIT_SECONDS = 0.2  # between attempts to hold a lock
UNSUPPORTED_ERRNOS = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EBADF, errno.EINVAL}


def lock_file(file: IO[Any] | int) -> bool:
    """Lock an open file exclusively, without waiting.

    Args:
        file: Open file or its descriptor.

    Returns:
        False if another process holds the lock; True if it was acquired or the file system does not support locks.
    """
    if fcntl is None:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in UNSUPPORTED_ERRNOS:
            raise
        warnings.warn(f"no file locks here ({error.strerror}); run one command at a time", stacklevel=2)
    return True


def is_locked(file: IO[Any] | int) -> bool:
    """Return whether another process holds the lock of an open file; True if unknown."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    fcntl.flock(file, fcntl.LOCK_UN)
    return False


@contextmanager
def hold_lock(path: Path, display_name: str) -> Iterator[None]:
    """Hold the lock file `path`, and remove it afterwards.

    Args:
        path: Lock file.
        display_name: Name of the locked object in messages.

    Raises:
        LockedError: Another process holds the lock.
        OutputError: `path` is not a regular file.
        OSError: The file cannot be created.
    """
    while True:
        file = _open_lock_file(path)
        if not lock_file(file):
            file.close()
            raise LockedError(
                f"{display_name} is being written by another process; wait for it, or choose another folder"
            )
        if _is_open_at_path(file, path):
            break
        file.close()  # removed by its previous holder in the meantime
    _held_files.add(file)
    try:
        yield
    finally:
        if not file.closed:  # closed if this is a forked child
            with suppress(OSError):
                if _is_open_at_path(file, path):
                    path.unlink()
            file.close()


@contextmanager
def wait_for_lock(path: Path) -> Iterator[None]:
    """Hold the lock file `path` as `hold_lock` does, after waiting for its holder.

    Args:
        path: Lock file.

    Raises:
        OutputError: `path` is not a regular file.
        OSError: The file cannot be created.
    """
    with ExitStack() as stack:
        while True:
            try:
                stack.enter_context(hold_lock(path, str(path)))
                break
            except LockedError:
                time.sleep(WAIT_SECONDS)
        yield


def _open_lock_file(path: Path) -> IO[bytes]:
    """Create or open a lock file; never block on a FIFO, never follow a link."""
    flags = os.O_CREAT | os.O_WRONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOFOLLOW", 0)
    try:
        descriptor = os.open(path, flags, 0o666)
    except OSError as error:
        if os.path.lexists(path) and not stat.S_ISREG(path.lstat().st_mode):
            raise _make_irregular_file_error(path) from error
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):  # a FIFO with a reader
        os.close(descriptor)
        raise _make_irregular_file_error(path)
    return open(descriptor, "ab")


def _make_irregular_file_error(path: Path) -> OutputError:
    return OutputError(f"{path} is not a regular file; remove it or choose another folder")


def _is_open_at_path(file: IO[Any], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


_held_files: weakref.WeakSet[Any] = weakref.WeakSet()


def _close_locks_in_child() -> None:
    """Close inherited locks, so that a forked worker does not hold the lock of a killed parent."""
    for file in list(_held_files):
        if not file.closed:
            file.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_locks_in_child)
