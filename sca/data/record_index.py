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

from sca.data.json_stream import LIST_START, iter_members, make_read_progress
from sca.data.record_parsing import make_read_error
from sca.io.errors import InputError, RejectCallback
from sca.io.json import open_regular_file, parse_json
from sca.io.validation import check_object, read_field


class RecordIndex:
    """Objects of one list of a JSON file, read again each time: `records[number]` -> the object and its place in words.

    In memory are where each of them stands, and its integers under `keys`, as arrays of `columns`;
    the first of them identifies a record. Meant for many millions: some 30 bytes each.
    """

    def __init__(self, path: Path, where: str, keys: Sequence[str]):
        self.path, self.location, self.keys = path, where, keys
        self.columns = {key: array("q") for key in keys}
        self._starts, self._lengths = array("q"), array("I")
        self._list_positions: array | None = (
            None  # in the list, of each record, where records before it were passed over
        )
        self._num_skipped = 0
        self.duplicates: set[int] = set()  # records with the identity of an earlier one
        self._file: BinaryIO | None = None

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, number: int) -> tuple[dict[str, Any], str]:
        if self._file is None:
            self._file = self.path.open("rb")
        self._file.seek(self._starts[number])
        return json.loads(self._file.read(self._lengths[number])), self.describe_location(number)

    def describe_location(self, number: int) -> str:
        position = number if self._list_positions is None else self._list_positions[number]
        return f"{self.location}[{position}] ({self.keys[0]} {self.columns[self.keys[0]][number]})"

    def skip(self) -> None:
        """Pass over one record of the list, which has no number then."""
        self._list_positions = array("q", range(len(self))) if self._list_positions is None else self._list_positions
        self._num_skipped += 1

    def add(self, record: Any, start: int, end: int) -> None:
        """Notes one more record, which stands at these bytes."""
        location = f"{self.location}[{len(self) + self._num_skipped}]"
        values: list[int] = []
        for key in self.keys:
            field_location = f"{location} ({self.keys[0]} {values[0]})" if values else location
            values.append(read_field(record, key, int, field_location))
        self.add_values(values, start, end)

    def add_values(self, values: Sequence[int], start: int, end: int) -> None:
        """The same, with the whole numbers that are kept of it."""
        for key, value in zip(self.keys, values, strict=True):
            self.columns[key].append(value)
        if self._list_positions is not None:
            self._list_positions.append(len(self) + self._num_skipped)
        self._starts.append(start)
        self._lengths.append(end - start)

    def check_unique_ids(self, reject: RejectCallback | None = None) -> RecordIndex:
        """Check that each record has an identity of its own.

        Args:
            reject: Receives the InputError of each record with that of an earlier one, which is then among those that
                are `duplicates`; None raises it.

        Returns:
            The records themselves.
        """
        ids, order = np.asarray(self.columns[self.keys[0]]), self._indices_by_id
        repeated_indices = order[1:][ids[order][1:] == ids[order][:-1]]
        for number in np.sort(repeated_indices).tolist():
            problem = InputError(f"{self.describe_location(number)}: this {self.keys[0]} was given before")
            if reject is None:
                raise problem
            reject(problem)
            self.duplicates.add(number)
        return self

    def find_indices(self, requested_ids: Sequence[int]) -> np.ndarray:
        """The numbers of the records with these identities, -1 where there is none."""
        ids, requested = np.asarray(self.columns[self.keys[0]]), np.asarray(requested_ids)
        if not len(ids):
            return np.full(len(requested), -1)
        positions = np.searchsorted(ids, requested, sorter=self._indices_by_id)
        candidates = self._indices_by_id[positions.clip(max=len(ids) - 1)]
        return np.where(ids[candidates] == requested, candidates, -1)

    @cached_property
    def _indices_by_id(self) -> np.ndarray:
        """(R,) the numbers of the records in the order of their identities; there are to be no more of them."""
        return np.argsort(np.asarray(self.columns[self.keys[0]]), kind="stable")

    def resolve_references(
        self, key: str, targets: RecordIndex, target_name: str, reject: RejectCallback | None = None
    ) -> np.ndarray:
        """The index among `targets` of what each record names under `key`.

        Args:
            reject: Receives the InputError of each record that leads nowhere; None raises it.

        Returns:
            (R,) the numbers; -1 for records that lead nowhere or are repeated.
        """
        target_indices = targets.find_indices(self.columns[key])
        for unresolved_index in np.flatnonzero(target_indices < 0).tolist():
            value = self.columns[key][unresolved_index]
            problem = InputError(
                f"{self.describe_location(unresolved_index)}: {key} {value} is not among {target_name}"
            )
            if reject is None:
                raise problem
            reject(problem)
        target_indices[list(self.duplicates)] = -1
        return target_indices


class LineIndex(RecordIndex):
    """The same of the lines of a file; the first key is an identity, and the last has the number of the line."""

    def describe_location(self, number: int) -> str:
        name, line = self.keys[0], self.columns[self.keys[-1]][number]
        return f"{self.location}: line {line} ({name} {self.columns[name][number]})"


def read_jsonl_records(
    path: Path, reject: RejectCallback | None = None
) -> Iterator[tuple[dict[str, Any], int, int, int]]:
    """The objects of a file that has one a line, each with the number of the line, from 1, and the bytes where it
    stands; blank lines are passed over.

    Args:
        reject: Receives the InputError of a line that is no object, which is then passed over; None raises it.
    """
    start = 0
    try:
        with open_regular_file(path) as file, make_read_progress(path) as bar:
            for line_number, line in enumerate(file, 1):
                end = start + len(line)
                place = f"{path}: line {line_number}"
                try:
                    record = (
                        check_object(parse_json(line, place, allow_surrogates=True), place) if line.strip() else None
                    )
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
        raise make_read_error(path, error) from error


def group_indices_by_owner(owners: np.ndarray | Sequence[int], count: int) -> Iterator[tuple[int, list[int]]]:
    """(R,) owners in 0..count-1, or -1 for none -> each owner with the places that it has in them, in order."""
    owners = np.asarray(owners)
    order = np.argsort(owners, kind="stable")
    bounds = np.searchsorted(owners[order], np.arange(count + 1))
    return ((owner, order[bounds[owner] : bounds[owner + 1]].tolist()) for owner in range(count))


def index_json_lists(
    path: Path,
    lists: Mapping[str, Sequence[str]],
    full_lists: Collection[str],
    expected_content: str,
    reject: Mapping[str, RejectCallback] | None = None,
    optional: Collection[str] = (),
) -> tuple[dict[str, RecordIndex], dict[str, list[Any]]]:
    """The `lists` of a JSON object as `RecordIndex` with these keys, and the lists named in `full_lists` unchanged, and
    those in `optional` where they are there.

    `expected_content` says in messages what the file should be. Other members are passed over. `reject` has
    for a list what receives the InputError of each of its records that lacks a key, which is then passed over; one
    without raises it.
    """
    indexes = {key: RecordIndex(path, f"{path}: {key}", keys) for key, keys in lists.items()}
    lists_in_memory: dict[str, list[Any]] = {}
    is_list_by_key: dict[str, bool] = {}  # each member, and whether it is a list
    for key, value, start, end in iter_members(path):
        if key is None:
            raise InputError(f"{path}: {expected_content}")
        if value is LIST_START:
            is_list_by_key[key] = True
            if key in full_lists or key in optional:
                lists_in_memory[key] = []
        elif is_list_by_key.setdefault(key, False):
            if key in indexes:
                try:
                    indexes[key].add(value, start, end)
                except ValueError as error:
                    if reject is None or key not in reject:
                        raise
                    indexes[key].skip()
                    reject[key](error)
            elif key in lists_in_memory:
                lists_in_memory[key].append(value)
    for key in (*lists, *full_lists):
        if not is_list_by_key.get(key):
            raise InputError(f"{path}: no list {key!r}; it has: {', '.join(is_list_by_key) or 'nothing'}")
    return indexes, lists_in_memory
