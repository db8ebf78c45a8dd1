"""Bounded JSON reading: untrusted content causes an InputError, never a hang, a traceback or exhausted memory."""

from __future__ import annotations

import io
import json
import math
import os
import re
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from sca.io.errors import InputError, IrregularFileError, RejectCallback, raise_error
from sca.io.validation import check_encodable

MAX_JSON_BYTES = 128 * 2**20  # the largest tokenizer.json in use has 35 MB
MAX_PIPE_BYTES = 2**30  # maximum size of a pipe that is read into memory
MAX_DEPTH = 100  # far below the depth at which copying, comparing or writing a value fails
LFS_POINTER_PREFIX = b"version https://git-lfs.github.com/spec/"  # first bytes of a Git LFS pointer
DESCRIPTOR_PATH_PATTERN = re.compile(r"/dev/(?:stdin|fd/\d+)|/proc/self/fd/\d+")
SURROGATE_ESCAPE_PATTERN = re.compile(r"\\u[dD][89a-fA-F]")


def read_json(path: str | Path, max_bytes: int | None = MAX_JSON_BYTES, require_finite: bool = False) -> Any:
    """Read a JSON file.

    Args:
        path: Regular UTF-8 file, with or without a byte order mark.
        max_bytes: Maximum size in bytes; None for files that only the user can have named.
        require_finite: Reject NaN, Infinity and numbers that overflow to it.

    Returns:
        The parsed value.

    Raises:
        OSError: The file does not exist or cannot be read.
        InputError: The file is not a regular file, too large, not UTF-8, not JSON, or nested too deeply.
    """
    return parse_json(read_regular_file(path, max_bytes), str(path), require_finite)


def parse_json(text: str | bytes, location: str, require_finite: bool = False, allow_surrogates: bool = False) -> Any:
    """Parse JSON text, such as a file or one line of a JSON Lines file.

    Args:
        text: One JSON value.
        location: Name in messages: a file, or a file and a line.
        require_finite: Reject NaN, Infinity and numbers that overflow to it.
        allow_surrogates: Accept lone surrogates, which a truncated caption or a file name that is not UTF-8 can
            contain.

    Returns:
        The parsed value.

    Raises:
        InputError: The text is not JSON, is nested too deeply, or contains a lone surrogate. The message omits the
            text.
    """
    try:
        text = text.decode("utf-8-sig") if isinstance(text, bytes) else text
        value = FINITE_DECODER.decode(text) if require_finite else json.loads(text)
        check_depth(value)
        if not allow_surrogates and SURROGATE_ESCAPE_PATTERN.search(text):
            check_encodable("it", value)
    except UnicodeDecodeError as error:
        raise InputError(f"{location} is not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    except RecursionError as error:
        raise InputError(f"{location} is not valid JSON: nested deeper than {MAX_DEPTH} levels") from error
    except json.JSONDecodeError as error:
        position = f"column {error.colno}" if error.lineno == 1 else f"line {error.lineno}, column {error.colno}"
        raise InputError(
            f"{location} is not valid JSON: {error.msg.removesuffix(' at')} at {position}; correct the file, or copy "
            "it again"
        ) from error
    except ValueError as error:  # including integers of thousands of digits
        raise InputError(
            f"{location} is not valid JSON: {str(error).split(';')[0]}; correct the file, or copy it again"
        ) from error
    return value


def parse_json_lines(
    lines: Iterable[bytes], display_name: str, reject: RejectCallback = raise_error
) -> Iterator[tuple[str, Any]]:
    """Yield the values of JSON Lines, each with its location "FILE, line N"; blank lines are skipped.

    Args:
        lines: Lines, such as an open file.
        display_name: Name of the file in messages.
        reject: Called with the error of each line that is not JSON, which is then skipped. Raises it by default.

    Yields:
        The location and the value of a line.
    """
    for number, line in enumerate(lines, 1):
        location = f"{display_name}, line {number}"
        if line.strip():
            try:
                value = parse_json(line.rstrip(b"\r\n"), location, allow_surrogates=True)
            except InputError as error:
                reject(error)
            else:
                yield location, value


def read_regular_file(path: str | Path, max_bytes: int | None = None, allow_pipe: bool = False) -> bytes:
    """Read a regular file; never block on a FIFO or a device.

    Args:
        path: File.
        max_bytes: Maximum size in bytes.
        allow_pipe: See `open_regular_file`.

    Returns:
        The content of the file.

    Raises:
        OSError: The file does not exist or cannot be read.
        InputError: The file is not a regular file, or too large.
    """
    with open_regular_file(path, allow_pipe=allow_pipe) as file:
        content = file.read(-1 if max_bytes is None else max_bytes + 1)
    if max_bytes is not None and len(content) > max_bytes:
        raise InputError(
            f"{path} is larger than {max_bytes:,} bytes, the limit for a file of its kind; pass a smaller file"
        )
    return content


def open_regular_file(path: str | Path, require_seekable: bool = False, allow_pipe: bool = False) -> BinaryIO:
    """Open a regular file for reading; never block on a FIFO or a device.

    Args:
        path: File.
        require_seekable: Read a pipe into memory, so that the result can seek.
        allow_pipe: Accept a pipe that a shell passes as an open descriptor, /dev/stdin or /dev/fd/N. Set it only for a
            path that a person typed: a name inside a file must not wait for standard input.

    Returns:
        The open file.

    Raises:
        OSError: The file does not exist or cannot be read.
        IrregularFileError: The file is not a regular file.
        InputError: The file is a Git LFS pointer, or a pipe to read into memory exceeds `MAX_PIPE_BYTES`.
    """
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    mode = os.fstat(descriptor).st_mode
    is_pipe = allow_pipe and stat.S_ISFIFO(mode) and DESCRIPTOR_PATH_PATTERN.fullmatch(str(path))
    if not (stat.S_ISREG(mode) or is_pipe):
        os.close(descriptor)
        raise IrregularFileError(f"{path} is not a regular file; pass a file that contains the data itself")
    if hasattr(os, "O_NONBLOCK"):
        os.set_blocking(descriptor, True)
    if (
        stat.S_ISREG(mode)
        and hasattr(os, "pread")
        and os.pread(descriptor, len(LFS_POINTER_PREFIX), 0) == LFS_POINTER_PREFIX
    ):
        os.close(descriptor)
        raise InputError(f"{path} is a Git LFS pointer, not the file itself; run `git lfs pull` in its repository")
    return (
        _read_pipe_into_memory(descriptor, path)
        if require_seekable and not stat.S_ISREG(mode)
        else open(descriptor, "rb")
    )


def _read_pipe_into_memory(descriptor: int, path: str | Path) -> BinaryIO:
    with open(descriptor, "rb") as file:
        content = file.read(MAX_PIPE_BYTES + 1)
    if len(content) > MAX_PIPE_BYTES:
        raise InputError(f"{path} has more than {MAX_PIPE_BYTES:,} bytes, the limit for a pipe; pass a file")
    return io.BytesIO(content)


def is_json_lines_file(path: str | Path, file: BinaryIO, key: str) -> bool:
    """Return whether a file contains JSON Lines: by its suffix or, for a pipe without one, by its first line.

    Args:
        path: Path of the file.
        file: Open seekable file; rewound to its start.
        key: Key of every line, which a file with a single JSON value does not have.

    Returns:
        True for JSON Lines.
    """
    if not DESCRIPTOR_PATH_PATTERN.fullmatch(str(path)):
        return is_json_lines_name(path)
    lines = (line for line in file if line.strip())
    try:
        first = parse_json(next(lines, b""), str(path), allow_surrogates=True)
    except InputError:
        first = None
    file.seek(0)
    return isinstance(first, dict) and key in first


def is_json_lines_name(path: str | Path) -> bool:
    """Return whether a file name has a JSON Lines suffix, in any case."""
    return str(path).lower().endswith((".jsonl", ".ndjson"))


def check_depth(value: Any) -> None:
    """Raise InputError if a parsed value is nested deeper than MAX_DEPTH."""
    if _is_deeper_than(value, MAX_DEPTH):
        raise InputError(f"nested deeper than {MAX_DEPTH} levels")


def _is_deeper_than(value: Any, depth: int) -> bool:
    level = [value]
    for _ in range(depth):
        level = [
            child
            for container in level
            if isinstance(container, dict | list)
            for child in (container.values() if isinstance(container, dict) else container)
            if isinstance(child, dict | list)
        ]
        if not level:
            return False
    return True


def _reject_constant(name: str) -> None:
    raise InputError(f"{name} is not a finite number")


def _parse_finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise InputError(f"{text[:20]} is not a finite number")
    return value


FINITE_DECODER = json.JSONDecoder(parse_constant=_reject_constant, parse_float=_parse_finite)
