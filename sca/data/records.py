"""The records of publishers' JSON, one after another or by their place, and never all of a file in memory.

Whatever is wrong is an InputError that names the file and the place in it.
"""

from __future__ import annotations

import json
import re
from array import array
from codecs import BOM_UTF8
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from tqdm.auto import tqdm

from sca.data.fields import cut, unreadable
from sca.io.errors import InputError, Reject
from sca.io.json import check_depth, open_regular_file, parse_json
from sca.io.text import escape_terminal
from sca.io.validation import read_field, read_object

CHUNK = 1 << 22  # bytes that are read at a time
SPACE = re.compile(r"[ \t\r\n]*")
NUMBER = "0123456789.eE+-"  # a number at the edge of what is read may go on
LIST = object()  # stands where a list begins


class Records:
    """Objects of one list of a JSON file, read again each time: `records[number]` -> the object and its place in words.

    In memory are where each of them stands, and its whole numbers that have names in `keys`, as arrays of `columns`;
    the first of them identifies a record. Meant for many millions: some 30 bytes each.
    """

    def __init__(self, path: Path, where: str, keys: Sequence[str]):
        self.path, self.where, self.keys = path, where, keys
        self.columns = {key: array("q") for key in keys}
        self._starts, self._lengths = array("q"), array("I")
        self._places: array | None = None  # in the list, of each record, where records before it were passed over
        self._passed = 0
        self.repeated: set[int] = set()  # records with the identity of an earlier one
        self._file: BinaryIO | None = None

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, number: int) -> tuple[dict[str, Any], str]:
        if self._file is None:
            self._file = self.path.open("rb")
        self._file.seek(self._starts[number])
        return json.loads(self._file.read(self._lengths[number])), self.place(number)

    def place(self, number: int) -> str:
        place = number if self._places is None else self._places[number]
        return f"{self.where}[{place}] ({self.keys[0]} {self.columns[self.keys[0]][number]})"

    def skip(self) -> None:
        """Pass over one record of the list, which has no number then."""
        self._places = array("q", range(len(self))) if self._places is None else self._places
        self._passed += 1

    def add(self, record: Any, start: int, end: int) -> None:
        """Notes one more record, which stands at these bytes."""
        place = f"{self.where}[{len(self) + self._passed}]"
        values: list[int] = []
        for key in self.keys:
            where = f"{place} ({self.keys[0]} {values[0]})" if values else place
            values.append(read_field(record, key, int, where))
        self.note(values, start, end)

    def note(self, values: Sequence[int], start: int, end: int) -> None:
        """The same, with the whole numbers that are kept of it."""
        for key, value in zip(self.keys, values, strict=True):
            self.columns[key].append(value)
        if self._places is not None:
            self._places.append(len(self) + self._passed)
        self._starts.append(start)
        self._lengths.append(end - start)

    def unique(self, reject: Reject | None = None) -> Records:
        """Check that each record has an identity of its own.

        Args:
            reject: Receives the InputError of each record with that of an earlier one, which is then among those that
                are `repeated`; None raises it.

        Returns:
            The records themselves.
        """
        known, order = np.asarray(self.columns[self.keys[0]]), self._order
        again = order[1:][known[order][1:] == known[order][:-1]]
        for number in np.sort(again).tolist():
            problem = InputError(f"{self.place(number)}: this {self.keys[0]} was given before")
            if reject is None:
                raise problem
            reject(problem)
            self.repeated.add(number)
        return self

    def find(self, identities: Sequence[int]) -> np.ndarray:
        """The numbers of the records with these identities, -1 where there is none."""
        known, wanted = np.asarray(self.columns[self.keys[0]]), np.asarray(identities)
        if not len(known):
            return np.full(len(wanted), -1)
        places = np.searchsorted(known, wanted, sorter=self._order)
        found = self._order[places.clip(max=len(known) - 1)]
        return np.where(known[found] == wanted, found, -1)

    @cached_property
    def _order(self) -> np.ndarray:
        """(R,) the numbers of the records in the order of their identities; there are to be no more of them."""
        return np.argsort(np.asarray(self.columns[self.keys[0]]), kind="stable")

    def owners(self, key: str, others: Records, what: str, reject: Reject | None = None) -> np.ndarray:
        """The number among `others` of what each record names under `key`.

        Args:
            reject: Receives the InputError of each record that leads nowhere; None raises it.

        Returns:
            (R,) the numbers; -1 for records that lead nowhere or are repeated.
        """
        found = others.find(self.columns[key])
        for lost in np.flatnonzero(found < 0).tolist():
            problem = InputError(f"{self.place(lost)}: {key} {self.columns[key][lost]} is not among {what}")
            if reject is None:
                raise problem
            reject(problem)
        found[list(self.repeated)] = -1
        return found


class Lines(Records):
    """The same of the lines of a file; the first key is an identity, and the last has the number of the line."""

    def place(self, number: int) -> str:
        name, line = self.keys[0], self.columns[self.keys[-1]][number]
        return f"{self.where}: line {line} ({name} {self.columns[name][number]})"


def read_lines(path: Path, reject: Reject | None = None) -> Iterator[tuple[dict[str, Any], int, int, int]]:
    """The objects of a file that has one a line, each with the number of the line, from 1, and the bytes where it
    stands; blank lines are passed over.

    Args:
        reject: Receives the InputError of a line that is no object, which is then passed over; None raises it.
    """
    start = 0
    try:
        with open_regular_file(path) as file, reading(path) as bar:
            for number, line in enumerate(file, 1):
                end = start + len(line)
                place = f"{path}: line {number}"
                try:
                    record = read_object(parse_json(line, place, surrogates=True), place) if line.strip() else None
                except ValueError as error:
                    if reject is None:
                        raise
                    reject(error)
                    record = None
                if record is not None:
                    yield record, number, start, end
                bar.update(len(line))
                start = end
    except OSError as error:
        raise unreadable(path, error) from error


def grouped(owners: np.ndarray | Sequence[int], count: int) -> Iterator[tuple[int, list[int]]]:
    """(R,) owners in 0..count-1, or -1 for none -> each owner with the places that it has in them, in order."""
    owners = np.asarray(owners)
    order = np.argsort(owners, kind="stable")
    bounds = np.searchsorted(owners[order], np.arange(count + 1))
    return ((owner, order[bounds[owner] : bounds[owner + 1]].tolist()) for owner in range(count))


def index(
    path: Path,
    lists: Mapping[str, Sequence[str]],
    whole: Collection[str],
    what: str,
    reject: Mapping[str, Reject] | None = None,
    optional: Collection[str] = (),
) -> tuple[dict[str, Records], dict[str, list[Any]]]:
    """The `lists` of a JSON object as `Records` with these keys, and the lists named in `whole` unchanged, and
    those in `optional` where they are there.

    `what` says in messages what the file should be. Other members are passed over. `reject` has for a list what
    receives the InputError of each of its records that lacks a key, which is then passed over; one without raises it.
    """
    found = {key: Records(path, f"{path}: {key}", keys) for key, keys in lists.items()}
    kept: dict[str, list[Any]] = {}
    there: dict[str, bool] = {}  # each member, and whether it is a list
    for key, value, start, end in elements(path):
        if key is None:
            raise InputError(f"{path}: {what}")
        if value is LIST:
            there[key] = True
            if key in whole or key in optional:
                kept[key] = []
        elif there.setdefault(key, False):
            if key in found:
                try:
                    found[key].add(value, start, end)
                except ValueError as error:
                    if reject is None or key not in reject:
                        raise
                    found[key].skip()
                    reject[key](error)
            elif key in kept:
                kept[key].append(value)
    for key in (*lists, *whole):
        if not there.get(key):
            raise InputError(f"{path}: no list {key!r}; it has: {', '.join(there) or 'nothing'}")
    return found, kept


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
