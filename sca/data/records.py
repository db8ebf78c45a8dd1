"""The records of publishers' JSON, one after another or by their place, and never all of a file in memory.

Whatever is wrong is an InputError that names the file and the place in it.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from sca.data.fields import unreadable
from sca.data.json_stream import LIST, elements, reading
from sca.io.errors import InputError, Reject
from sca.io.json import open_regular_file, parse_json
from sca.io.validation import read_field, check_object


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


def read_jsonl_records(path: Path, reject: Reject | None = None) -> Iterator[tuple[dict[str, Any], int, int, int]]:
    """The objects of a file that has one a line, each with the number of the line, from 1, and the bytes where it
    stands; blank lines are passed over.

    Args:
        reject: Receives the InputError of a line that is no object, which is then passed over; None raises it.
    """
    start = 0
    try:
        with open_regular_file(path) as file, reading(path) as bar:
            for line_number, line in enumerate(file, 1):
                end = start + len(line)
                place = f"{path}: line {line_number}"
                try:
                    record = check_object(parse_json(line, place, surrogates=True), place) if line.strip() else None
                except ValueError as error:
                    if reject is None:
                        raise
                    reject(error)
                    record = None
                if record is not None:
                    yield record, line_number, start, end
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
