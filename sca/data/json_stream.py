"""The members of a JSON file, one after another and never all of it in memory.

Whatever is wrong is an InputError that names the file and the place in it.
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

CHUNK_BYTES = 1 << 22  # bytes that are read at a time
WHITESPACE = re.compile(r"[ \t\r\n]*")
NUMBER_CHARACTERS = "0123456789.eE+-"  # a number at the edge of what is read may go on
LIST_START = object()  # stands where a list begins


def iter_list_elements(path: Path) -> Iterator[Any]:
    """The elements of a file that is a JSON list, one after another."""
    for key, value, _, _ in iter_members(path):
        if key is not None:
            raise InputError(f"{path} must be a list of objects, and is an object with {key!r}")
        if value is not LIST_START:
            yield value


def iter_members(path: Path) -> Iterator[tuple[str | None, Any, int, int]]:
    """What a JSON object or list has, in order, as (key, value, start, end) with the bytes where the value stands.

    Of a member that is a list first `LIST_START` comes, and then its elements; any other comes as a whole. Where the
    file is a list, the key is None.
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
                        raise window.make_error("no name in quotes")
                    window.take_character(":")
                    if window.skip_character("["):
                        yield from _iter_list(window, key)
                    else:
                        yield key, *window.parse_value()
                    separator = window.take_character(",}")
            if window.peek():
                raise window.make_error("there is more after the end")
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
    """A window of a JSON file, with a character a byte, so that where something stands is known.

    Text that is not ASCII is decoded once more when its value is taken.
    """

    def __init__(self, file: BinaryIO, path: Path, bar: tqdm):
        self._file, self._path, self._bar = file, path, bar
        self._decoder = json.JSONDecoder()
        self._text, self._position, self._window_start = "", 0, len(BOM_UTF8)  # bytes before the window
        if file.read(self._window_start) != BOM_UTF8:
            self._window_start = file.seek(0)

    def peek(self) -> str:
        """The next character that is no space; empty at the end."""
        while True:
            self._position = WHITESPACE.match(self._text, self._position).end()  # type: ignore[union-attr]
            if self._position < len(self._text):
                return self._text[self._position]
            if not self._read_chunk():
                return ""

    def skip_character(self, character: str) -> bool:
        """Whether this comes next; then it is passed."""
        is_next = self.peek() == character
        self._position += is_next
        return is_next

    def take_character(self, characters: str) -> str:
        """The next character, which is one of those wanted."""
        next_character = self.peek()
        if not next_character or next_character not in characters:
            raise self.make_error(f"no {' or '.join(map(repr, characters))}")
        self._position += 1
        return next_character

    def parse_value(self) -> tuple[Any, int, int]:
        """The value that comes next, and at which bytes it stands."""
        self.peek()
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._position)
                if self._text[end : end + 1].strip(NUMBER_CHARACTERS) or not self._read_chunk():
                    break
            except json.JSONDecodeError as error:
                if not self._read_chunk():
                    raise self.make_error(error.msg) from None
            except (RecursionError, ValueError) as error:  # the latter for an integer of thousands of digits
                raise self.make_error("nested too deep" if isinstance(error, RecursionError) else str(error)) from None
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
        """Whether there was more; of one long value twice as much each time."""
        chunk = self._file.read(max(CHUNK_BYTES, len(self._text) - self._position))
        if not chunk:
            return False
        self._window_start += self._position
        self._text, self._position = self._text[self._position :] + chunk.decode("latin-1"), 0
        self._bar.update(len(chunk))
        return True


def make_read_progress(path: Path) -> tqdm:
    """A bar over the bytes of a file, on a terminal."""
    return tqdm(
        total=path.stat().st_size, desc=escape_terminal(path.name), unit="B", unit_scale=True, leave=False, disable=None
    )
