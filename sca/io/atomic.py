"""Atomic writes: files and folders appear complete or not at all. This module does not import torch."""

from __future__ import annotations

import ctypes
import errno
import os
import secrets
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path

from sca.io.errors import InputError, OutputError
from sca.io.file_lock import is_locked, lock_file
from sca.io.images import format_path
from sca.io.json import open_regular_file

DRAFT_NAME = ".sca-{}.part"  # name of a file while it is written
RANDOM_HEX_GLOB = "[0-9a-f]" * 16  # matches `secrets.token_hex(8)`
COPY_CHUNK_BYTES = 2**20


class AtomicFile:
    """File that is written in pieces: `write` adds a complete piece, or nothing and raises `OutputError`.

    The file grows under a temporary name in the same folder. `commit` syncs it to disk and renames it. `discard`
    removes it and leaves an older file unchanged.

    Args:
        path: Final path.
        visible: Grow under the final name if no file exists there, so that every piece can be read immediately.

    Raises:
        OutputError: The file cannot be created, or `path` is a folder or a device.
    """

    def __init__(self, path: Path, visible: bool = False):
        self.path = path
        with translate_output_errors(path):
            self.replaces_file: bool = _is_replaceable_file(path)
            self._write_path = (
                path if visible and not self.replaces_file else path.with_name(DRAFT_NAME.format(secrets.token_hex(8)))
            )
            self._file = open(self._write_path, "xb", buffering=0)  # noqa: SIM115 (closed by commit and discard)
            lock_file(self._file)  # a draft that can be locked was left by a killed process

    def write(self, content: str | bytes | memoryview) -> None:
        """Append a piece; text is encoded as UTF-8."""
        start = self._file.tell()
        try:
            with translate_output_errors(self.path):
                write_all_bytes(self._file.fileno(), content.encode() if isinstance(content, str) else content)
        except BaseException:
            self._file.truncate(start)
            self._file.seek(start)
            raise

    def commit(self, sync_folder: bool = True) -> None:
        """Sync the file to disk and rename it to its final name.

        Args:
            sync_folder: Also sync the name. A caller that writes many files syncs their folder once at the end.
        """
        try:
            with translate_output_errors(self.path):
                os.fsync(self._file.fileno())
                self._file.close()
                if self._write_path != self.path:
                    os.replace(self._write_path, self.path)
                if sync_folder:
                    sync_path(self.path.parent)
        except OutputError:
            self.discard()
            raise

    def copy_to(self, other: AtomicFile) -> None:
        """Append the pieces written so far to another file."""
        with translate_output_errors(self.path), open(self._write_path, "rb") as file:
            while chunk := file.read(COPY_CHUNK_BYTES):
                other.write(chunk)

    def discard(self) -> None:
        """Close the file and remove its temporary file."""
        self._file.close()
        if self._write_path != self.path:
            self._write_path.unlink(missing_ok=True)


def write_file(path: Path, content: str | bytes | memoryview, sync_folder: bool = True) -> None:
    """Write a complete file: it has the new content, or the old one if `OutputError` is raised.

    Args:
        path: File.
        content: Content; text is encoded as UTF-8.
        sync_folder: See `AtomicFile.commit`.
    """
    file = AtomicFile(path)
    try:
        file.write(content)
    except BaseException:
        file.discard()
        raise
    file.commit(sync_folder)


def write_all_bytes(descriptor: int, content: bytes | memoryview) -> None:
    """Write all bytes to an open file descriptor."""
    remaining = memoryview(content)
    while remaining:
        remaining = remaining[os.write(descriptor, remaining) :]


@contextmanager
def write_folder(folder: Path, replaceable: Iterable[str] = ()) -> Iterator[Path]:
    """Write a folder that appears complete under its name, or not at all.

    The draft is a hidden sibling folder. An older folder is exchanged in one step if the file system supports it
    (Linux, macOS). Otherwise, a kill between two renames leaves the older folder as `.NAME.previous`.

    Args:
        folder: Final path.
        replaceable: Names of entries that an older folder may contain. A folder with any other entry is not replaced.

    Yields:
        The draft folder.

    Raises:
        OutputError: `folder` is a file, contains other entries, or cannot be written.
    """
    check_folder_replaceable(folder, replaceable)
    draft = folder.parent / f".{folder.name}.{secrets.token_hex(8)}"
    previous = get_previous_folder(folder)
    with translate_output_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_draft_folders(folder)
        draft.mkdir()
        draft_lock = _lock_folder(draft)
        try:
            yield draft
            sync_tree(draft)
            check_folder_replaceable(folder, replaceable)
            if not folder.exists():
                os.rename(draft, folder)
            elif not _exchange_folders(draft, folder):
                shutil.rmtree(previous, ignore_errors=True)
                os.rename(folder, previous)
                os.rename(draft, folder)
                shutil.rmtree(previous, ignore_errors=True)
            sync_path(folder.parent)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
            if draft_lock is not None:
                os.close(draft_lock)


def get_previous_folder(folder: Path) -> Path:
    """Return the path of the older folder after a kill, on file systems that cannot exchange two folders."""
    return folder.parent / f".{folder.name}.previous"


def check_folder_replaceable(folder: Path, replaceable: Iterable[str] = ()) -> None:
    """Raise OutputError unless `folder` is new, empty, or contains only `replaceable` entries."""
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise OutputError(f"{format_path(folder)} is not a folder; choose another one")
    if not folder.is_dir():
        return
    others = sorted({entry.name for entry in folder.iterdir()} - set(replaceable))
    if others:
        entry_names = ", ".join(map(format_path, others[:3])) + (", ..." if len(others) > 3 else "")
        raise OutputError(
            f"{format_path(folder)} is not a new or empty folder: it contains {entry_names}; choose another one"
        )


def remove_drafts(folder: Path) -> None:
    """Remove the temporary files of killed processes; those of running processes are locked and kept."""
    for draft in folder.glob(DRAFT_NAME.format(RANDOM_HEX_GLOB)):
        with suppress(OSError, InputError), open_regular_file(draft) as file:
            if not is_locked(file):
                draft.unlink(missing_ok=True)


def create_writable_folder(folder: Path) -> None:
    """Create a folder, and check that files can be created in it before anything is computed."""
    with translate_output_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()


def sync_path(path: Path) -> None:
    """Flush a file or a folder to disk."""
    if os.name != "posix" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Flush a folder and everything in it to disk."""
    for path in [*folder.rglob("*"), folder]:
        sync_path(path)


@contextmanager
def translate_output_errors(path: Path) -> Iterator[None]:
    """Convert an OSError for `path` to an OutputError with the system's reason and the fix."""
    try:
        yield
    except OutputError:
        raise
    except OSError as error:
        raise make_write_error(path, error) from error


def make_write_error(path: Path | str, error: OSError) -> OutputError:
    """Return the error for a path that cannot be written, with the system's reason and the fix."""
    if isinstance(error, PermissionError):
        remedy = "choose a folder that you may write in"
    elif isinstance(error, FileExistsError | NotADirectoryError | IsADirectoryError):
        remedy = "choose another folder"
    else:
        remedy = "free some space or choose another folder"
    return OutputError(
        f"cannot write {format_path(path)}: {error.strerror or str(error) or type(error).__name__}; {remedy}"
    )


def _is_replaceable_file(path: Path) -> bool:
    """Return whether a file exists at `path`; raise OSError for a folder or a device, which must not be replaced."""
    if not path.name:
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return False
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if not (stat.S_ISREG(mode) or stat.S_ISLNK(mode)):
        raise FileExistsError(errno.EEXIST, "Not a regular file")
    return True


def _lock_folder(folder: Path) -> int | None:
    """Return a locked descriptor of a draft folder, which marks it as being written; None if locks are unsupported."""
    if os.name != "posix":
        return None
    descriptor = os.open(folder, os.O_RDONLY)
    lock_file(descriptor)
    return descriptor


def _remove_draft_folders(folder: Path) -> None:
    """Remove the draft folders of killed processes."""
    for draft in folder.parent.glob(f".{escape(folder.name)}.{RANDOM_HEX_GLOB}"):
        with suppress(OSError):
            descriptor = os.open(draft, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0))  # never blocks on a FIFO
            try:
                if not is_locked(descriptor):
                    shutil.rmtree(draft, ignore_errors=True)
            finally:
                os.close(descriptor)


def _exchange_folders(one: Path, other: Path) -> bool:
    """Exchange two folders in one step; return False if the system or the file system does not support it."""
    library = ctypes.CDLL(None, use_errno=True) if os.name == "posix" else None
    names = os.fsencode(one), os.fsencode(other)
    if sys.platform == "linux" and library is not None and hasattr(library, "renameat2"):
        at_cwd, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
        return library.renameat2(at_cwd, names[0], at_cwd, names[1], exchange) == 0
    if sys.platform == "darwin" and hasattr(library, "renamex_np"):
        return library.renamex_np(*names, 2) == 0  # RENAME_SWAP
    return False
