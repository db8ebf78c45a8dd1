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

from sca.data.fields import cut, unreadable
from sca.io.errors import InputError
from sca.io.json import check_depth, open_regular_file
from sca.io.text import escape_terminal

CHUNK = 1 << 22  # bytes that are read at a time
SPACE = re.compile(r"[ \t\r\n]*")
NUMBER = "0123456789.eE+-"  # a number at the edge of what is read may go on
LIST = object()  # stands where a list begins


def stream(path: Path) -> Iterator[Any]:
    """The elements of a file that is a JSON list, one after another."""
    for key, value, _, _ in elements(path):
        if key is not None:
            raise InputError(f"{path} must be a list of objects, and is an object with {key!r}")
        if value is not LIST:
            yield value


def elements(path: Path) -> Iterator[tuple[str | None, Any, int, int]]:
    """What a JSON object or list has, in order, as (key, value, start, end) with the bytes where the value stands.

    Of a member that is a list first `LIST` comes, and then its elements; any other comes as a whole. Where the file is
    a list, the key is None.
    """
    try:
        with open_regular_file(path) as file, reading(path) as bar:
            text = _Text(file, path, bar)
            if text.take("[{") == "[":
                yield from _elements(text, None)
            elif not text.skip("}"):
                separator = ","
                while separator == ",":
                    key, _, _ = text.value()
                    if not isinstance(key, str):
                        raise text.cut("no name in quotes")
                    text.take(":")
                    if text.skip("["):
                        yield from _elements(text, key)
                    else:
                        yield key, *text.value()
                    separator = text.take(",}")
            if text.peek():
                raise text.cut("there is more after the end")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not JSON: {error}") from None
    except OSError as error:
        raise unreadable(path, error) from error


def _elements(text: _Text, key: str | None) -> Iterator[tuple[str | None, Any, int, int]]:
    yield key, LIST, 0, 0
    separator = "]" if text.skip("]") else ","
    while separator == ",":
        yield key, *text.value()
        separator = text.take(",]")


class _Text:
    """A window of a JSON file, with a character a byte, so that where something stands is known.

    Text that is not ASCII is decoded once more when its value is taken.
    """

    def __init__(self, file: BinaryIO, path: Path, bar: tqdm):
        self._file, self._path, self._bar = file, path, bar
        self._decoder = json.JSONDecoder()
        self._text, self._at, self._gone = "", 0, len(BOM_UTF8)  # bytes before the window
        if file.read(self._gone) != BOM_UTF8:
            self._gone = file.seek(0)

    def peek(self) -> str:
        """The next character that is no space; empty at the end."""
        while True:
            self._at = SPACE.match(self._text, self._at).end()  # type: ignore[union-attr]
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more():
                return ""

    def skip(self, wanted: str) -> bool:
        """Whether this comes next; then it is passed."""
        found = self.peek() == wanted
        self._at += found
        return found

    def take(self, wanted: str) -> str:
        """The next character, which is one of those wanted."""
        found = self.peek()
        if not found or found not in wanted:
            raise self.cut(f"no {' or '.join(map(repr, wanted))}")
        self._at += 1
        return found

    def value(self) -> tuple[Any, int, int]:
        """The value that comes next, and at which bytes it stands."""
        self.peek()
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
                if self._text[end : end + 1].strip(NUMBER) or not self._more():
                    break
            except json.JSONDecodeError as error:
                if not self._more():
                    raise self.cut(error.msg) from None
            except (RecursionError, ValueError) as error:  # the latter for an integer of thousands of digits
                raise self.cut("nested too deep" if isinstance(error, RecursionError) else str(error)) from None
        try:
            check_depth(value)
        except InputError as error:
            raise self.cut(str(error)) from None
        start, written = self._gone + self._at, self._text[self._at : end]
        if not written.isascii():
            value = json.loads(written.encode("latin-1").decode("utf-8"))
        self._at = end
        return value, start, start + len(written)

    def cut(self, problem: str) -> InputError:
        return cut(self._path, problem, self._gone + self._at, self._gone + len(self._text))

    def _more(self) -> bool:
        """Whether there was more; of one long value twice as much each time."""
        chunk = self._file.read(max(CHUNK, len(self._text) - self._at))
        if not chunk:
            return False
        self._gone += self._at
        self._text, self._at = self._text[self._at :] + chunk.decode("latin-1"), 0
        self._bar.update(len(chunk))
        return True


def reading(path: Path) -> tqdm:
    """A bar over the bytes of a file, on a terminal."""
    return tqdm(
        total=path.stat().st_size, desc=escape_terminal(path.name), unit="B", unit_scale=True, leave=False, disable=None
    )
