"""Append-only file of JSON lines that survives kills, power failures and full disks."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from sca.io.atomic import sync_path, translate_output_errors, write_all_bytes
from sca.io.errors import InputError, LockedError
from sca.io.file_lock import lock_file
from sca.io.images import format_path
from sca.io.json import open_regular_file, parse_json

SYNC_SECONDS = 3.0  # a power failure loses at most the entries of this time
BLOCK_BYTES = 2**20
ENTRY_PREFIX = b"{"  # of every entry

JournalEntry = Mapping[str, Any]


class Journal:
    """Journal opened for appending, under an exclusive lock.

    An undecodable end, such as a torn line or zeros after a power failure, is dropped. Everything that can be decoded
    is kept, even on a full disk, and even if the first line lacks only its newline.

    Args:
        path: File; created if missing.
        completes_group: Whether an entry completes a group. Entries after the last complete group are dropped. By
            default every entry is complete.
        first_line_prefix: Prefix of the first line. A torn first line without it belongs to another kind of file.
        sync_seconds: Minimum time between syncs to disk, in seconds. Entries appended within this time may be unsynced
            until the next append or `close`. 0 syncs every append.

    Raises:
        InputError: The file was not written by `sca`.
        LockedError: Another process has the journal open.
        OutputError: The file cannot be written.
    """

    def __init__(
        self,
        path: Path,
        completes_group: Callable[[JournalEntry], bool] | None = None,
        first_line_prefix: bytes = ENTRY_PREFIX,
        sync_seconds: float = SYNC_SECONDS,
    ):
        self.path: Path = path
        self._sync_seconds = sync_seconds
        is_new = not path.exists()
        if not is_new and not path.is_file():  # a pipe would block
            raise InputError(f"{format_path(path)} is not a regular file; choose another folder")
        with translate_output_errors(path):
            self._file = open(path, "a+b", buffering=0)  # noqa: SIM115 (closed by close)
            if not lock_file(self._file):
                self._file.close()
                raise LockedError(f"{format_path(path)} is being written by another process; wait for it")
            self._size = _find_valid_size(self._file, completes_group)
            self.dropped_bytes: int = os.fstat(self._file.fileno()).st_size - self._size
            if self.dropped_bytes and not self._size and not _is_torn_first_line(self._file, first_line_prefix):
                self._file.close()
                raise InputError(f"{format_path(path)} was not written by sca; choose another folder, or move the file")
            if self.dropped_bytes:
                self._file.truncate(self._size)
            self._append_missing_newline()
            if is_new:
                sync_path(path.parent)
        self._last_sync = time.monotonic()

    @property
    def is_empty(self) -> bool:
        """Whether the journal has no entries."""
        return self._size == 0

    def append(self, *entries: JournalEntry) -> None:
        """Append entries atomically: all of them, or none and raise `OutputError`."""
        lines = encode_lines(entries)
        descriptor = self._file.fileno()
        try:
            with translate_output_errors(self.path):
                write_all_bytes(descriptor, lines)
                if time.monotonic() - self._last_sync >= self._sync_seconds:
                    os.fsync(descriptor)
                    self._last_sync = time.monotonic()
        except BaseException:
            os.ftruncate(descriptor, self._size)
            raise
        self._size += len(lines)

    def _append_missing_newline(self) -> None:
        """Append the newline that the last entry lacks."""
        if self._size:
            self._file.seek(self._size - 1)
            if self._file.read(1) != b"\n":
                write_all_bytes(self._file.fileno(), b"\n")
                self._size += 1

    def close(self) -> None:
        """Sync the journal to disk and release its lock."""
        if self._file.closed:
            return
        try:
            with translate_output_errors(self.path):
                os.fsync(self._file.fileno())
        finally:
            self._file.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_journal(
    path: Path, completes_group: Callable[[JournalEntry], bool] | None = None, first_line_prefix: bytes = ENTRY_PREFIX
) -> Iterator[dict[str, Any]]:
    """Yield the entries of a journal, which may still be growing, without an undecodable end.

    Args:
        path: File; a missing file has no entries.
        completes_group: See `Journal`.
        first_line_prefix: See `Journal`.

    Raises:
        InputError: A line before the end cannot be decoded.
        OSError: The file cannot be read.
    """
    try:
        file = open_regular_file(path)
    except FileNotFoundError:
        return
    with file:
        remaining_bytes = _find_valid_size(file, completes_group)
        file.seek(0)
        if not remaining_bytes and os.fstat(file.fileno()).st_size and not _is_torn_first_line(file, first_line_prefix):
            raise InputError(f"{format_path(path)} was not written by sca; choose another folder, or move the file")
        for number, line in enumerate(file, 1):
            remaining_bytes -= len(line)
            if remaining_bytes < 0:
                return
            entry = _decode_entry(line)
            if entry is None:
                raise InputError(f"{format_path(path)}, line {number}, is damaged; remove the line")
            yield entry


def encode_lines(entries: Iterable[JournalEntry]) -> bytes:
    """Encode entries as the lines of a journal."""
    return b"".join(f"{json.dumps(entry)}\n".encode() for entry in entries)


def _find_valid_size(file: IO[bytes], completes_group: Callable[[JournalEntry], bool] | None) -> int:
    """Return the size in bytes up to the end of the last line that can be decoded and completes a group."""
    for start, line in _iter_lines_backward(file):
        if line.endswith(b"\n") or not start:
            entry = _decode_entry(line)
            if entry is not None and (completes_group is None or completes_group(entry)):
                return start + len(line)
    return 0


def _iter_lines_backward(file: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    """Yield the offset and content of each line, last to first.

    The file is read in blocks: if another process truncates a memory-mapped file, reading it ends the process.
    """
    start = file.seek(0, os.SEEK_END)
    pieces: list[bytes] = []
    while start:
        end, start = start, max(0, start - BLOCK_BYTES)
        file.seek(start)
        first, *others = file.read(end - start).split(b"\n")
        offset = start + len(first) + sum(len(each) + 1 for each in others)
        for part in reversed(others):
            offset -= len(part)
            yield offset, b"".join([part, *reversed(pieces)])
            pieces = [b"\n"]
            offset -= 1
        pieces.append(first)
    yield 0, b"".join(reversed(pieces))


def _is_torn_first_line(file: IO[bytes], first_line_prefix: bytes) -> bool:
    """Return whether a file without a complete entry is a torn first line or zeros, which no text file contains."""
    file.seek(0)
    content = file.read()
    is_other_text = b"\n" in content and b"\0" not in content
    written = content.lstrip(b"\0").partition(b"\0")[0].rstrip(b"\n")
    has_prefix = first_line_prefix.startswith(written[: len(first_line_prefix)])
    return has_prefix and not is_other_text and _decode_entry(content) is None


def _decode_entry(line: bytes) -> dict[str, Any] | None:
    """Decode the entry of a line; None if it is not a complete JSON object."""
    try:
        entry = parse_json(line.decode(), "", allow_surrogates=True)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) else None
