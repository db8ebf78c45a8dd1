"""Streaming of JSON files that are never fully in memory.

Invalid content raises an InputError that names the file and the location in it.
"""

from __future__ import annotations

import json
import re
from codecs import BOM_UTF8
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from tqdm.auto import tqdm

from sca.data.record_parsing import make_read_error, make_truncation_error
from sca.io.errors import InputError
from sca.io.json import check_depth, open_regular_file
from sca.io.text import escape_terminal

CHUNK_BYTES = 1 << 22  # minimum bytes per read
WHITESPACE = re.compile(r"[ \t\r\n]*")
NUMBER_CHARACTERS = "0123456789.eE+-"  # a number at the end of the window may continue
LIST_START = object()  # marks the start of a list


def iter_list_elements(path: Path) -> Iterator[Any]:
    """Iterate over the elements of a JSON file that contains a list.

    Args:
        path: JSON file.

    Returns:
        Iterator over the parsed elements, which raises InputError if the file is unreadable, invalid, or not a list.
    """
    return (value for value, _, _ in iter_located_elements(path))


def iter_located_elements(path: Path) -> Iterator[tuple[Any, int, int]]:
    """Iterate over the elements of a JSON file that contains a list, with their positions.

    Args:
        path: JSON file.

    Yields:
        (value, start, end): one element at a time, parsed, and its byte range.

    Raises:
        InputError: The file is unreadable, invalid, or not a list.
    """
    for key, value, start, end in iter_members(path):
        if key is not None:
            raise InputError(f"{path} must be a list of objects, not an object with {key!r}")
        if value is not LIST_START:
            yield value, start, end


def iter_members(path: Path) -> Iterator[tuple[str | None, Any, int, int]]:
    """Iterate over the members of a JSON object, or the elements of a list.

    A member that is a list yields `LIST_START` first, and then each of its elements. Other members yield one value.

    Args:
        path: JSON file.

    Yields:
        (key, value, start, end): the key, None if the file is a list; the value; and its byte range.

    Raises:
        InputError: The file is unreadable or invalid.
    """
    try:
        with open_regular_file(path) as file, make_read_progress(path) as bar:
            window = _JsonWindow(file, path, bar)
            if window.take_character("[{") == "[":
                yield from _iter_list(window, None)
            elif not window.skip_character("}"):
                separator = ","
                while separator == ",":
                    key, _, _ = window.parse_value()
                    if not isinstance(key, str):
                        raise window.make_error("expected a key in quotes")
                    window.take_character(":")
                    if window.skip_character("["):
                        yield from _iter_list(window, key)
                    else:
                        yield key, *window.parse_value()
                    separator = window.take_character(",}")
            if window.peek():
                raise window.make_error("unexpected content after the end")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not JSON: {error}") from None
    except OSError as error:
        raise make_read_error(path, error) from error


def _iter_list(window: _JsonWindow, key: str | None) -> Iterator[tuple[str | None, Any, int, int]]:
    yield key, LIST_START, 0, 0
    separator = "]" if window.skip_character("]") else ","
    while separator == ",":
        yield key, *window.parse_value()
        separator = window.take_character(",]")


class _JsonWindow:
    """Window of a JSON file with one character per byte, so that positions are byte offsets.

    A value with non-ASCII text is decoded again as UTF-8.
    """

    def __init__(self, file: BinaryIO, path: Path, bar: tqdm[Any]):
        self._file, self._path, self._bar = file, path, bar
        self._decoder = json.JSONDecoder()
        self._text, self._position, self._window_start = "", 0, len(BOM_UTF8)  # offset of the window
        if file.read(self._window_start) != BOM_UTF8:
            self._window_start = file.seek(0)

    def peek(self) -> str:
        """Return the next non-whitespace character; empty at the end."""
        while True:
            self._position = WHITESPACE.match(self._text, self._position).end()  # type: ignore[union-attr]
            if self._position < len(self._text):
                return self._text[self._position]
            if not self._read_chunk():
                return ""

    def skip_character(self, character: str) -> bool:
        """Skip the next character if it is `character`, and return whether it was."""
        is_next = self.peek() == character
        self._position += is_next
        return is_next

    def take_character(self, characters: str) -> str:
        """Return and skip the next character, which must be one of `characters`."""
        next_character = self.peek()
        if not next_character or next_character not in characters:
            raise self.make_error(f"expected {' or '.join(map(repr, characters))}")
        self._position += 1
        return next_character

    def parse_value(self) -> tuple[Any, int, int]:
        """Parse the next value, and return it with its byte range."""
        self.peek()
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._position)
                if self._text[end : end + 1].strip(NUMBER_CHARACTERS) or not self._read_chunk():
                    break
            except json.JSONDecodeError as error:
                if not self._read_chunk():
                    raise self.make_error(error.msg) from None
            except (RecursionError, ValueError) as error:  # ValueError: an integer with thousands of digits
                raise self.make_error(
                    "nested too deeply" if isinstance(error, RecursionError) else str(error)
                ) from None
        try:
            check_depth(value)
        except InputError as error:
            raise self.make_error(str(error)) from None
        start, raw_value = self._window_start + self._position, self._text[self._position : end]
        if not raw_value.isascii():
            value = json.loads(raw_value.encode("latin-1").decode("utf-8"))
        self._position = end
        return value, start, start + len(raw_value)

    def make_error(self, problem: str) -> InputError:
        return make_truncation_error(
            self._path, problem, self._window_start + self._position, self._window_start + len(self._text)
        )

    def _read_chunk(self) -> bool:
        """Read more of the file, doubling the window for a long value; return False at the end."""
        chunk = self._file.read(max(CHUNK_BYTES, len(self._text) - self._position))
        if not chunk:
            return False
        self._window_start += self._position
        self._text, self._position = self._text[self._position :] + chunk.decode("latin-1"), 0
        self._bar.update(len(chunk))
        return True


def make_read_progress(path: Path) -> tqdm[Any]:
    """Return a progress bar over the bytes of a file, shown on a terminal only."""
    return tqdm(
        total=path.stat().st_size, desc=escape_terminal(path.name), unit="B", unit_scale=True, leave=False, disable=None
    )
