"""Random access to the records of large JSON files, which are never fully in memory.

Invalid content raises an InputError that names the file and the location in it.
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
    """Index of the objects of a list in a JSON file: `records[i]` returns an object and its location.

    Each access reads the object from the file. Only byte ranges and the integer fields `keys` are in memory, about 30
    bytes per record, so that files with many millions of records can be indexed.

    Args:
        path: JSON file.
        where: Location of the list for error messages.
        keys: Integer fields to keep, starting with the id.

    Attributes:
        columns: Values of each key, an array with one value per record.
        duplicates: Indices of records that repeat an earlier id.
    """

    def __init__(self, path: Path, where: str, keys: Sequence[str]):
        self.path = path
        self.location = where
        self.keys = keys
        self.columns: dict[str, array[int]] = {key: array("q") for key in keys}
        self._starts, self._lengths = array("q"), array("I")
        self._list_positions: array | None = None  # list position of each record, once a record was skipped
        self._num_skipped = 0
        self.duplicates: set[int] = set()
        self._file: BinaryIO | None = None

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, number: int) -> tuple[dict[str, Any], str]:
        if self._file is None:
            self._file = self.path.open("rb")
        self._file.seek(self._starts[number])
        return json.loads(self._file.read(self._lengths[number])), self.describe_location(number)

    def describe_location(self, number: int) -> str:
        """Return the file, list position and id of a record for error messages."""
        position = number if self._list_positions is None else self._list_positions[number]
        return f"{self.location}[{position}] ({self.keys[0]} {self.columns[self.keys[0]][number]})"

    def skip(self) -> None:
        """Skip one record of the list, which has no index."""
        self._list_positions = array("q", range(len(self))) if self._list_positions is None else self._list_positions
        self._num_skipped += 1

    def add(self, record: Any, start: int, end: int) -> None:
        """Add a record stored at the bytes `start` to `end` of the file.

        Args:
            record: Record.
            start: First byte.
            end: Byte after the last one.

        Raises:
            InputError: A key is missing or not an integer.
        """
        location = f"{self.location}[{len(self) + self._num_skipped}]"
        values: list[int] = []
        for key in self.keys:
            field_location = f"{location} ({self.keys[0]} {values[0]})" if values else location
            values.append(read_field(record, key, int, field_location))
        self.add_values(values, start, end)

    def add_values(self, values: Sequence[int], start: int, end: int) -> None:
        """Add a record stored at the bytes `start` to `end` of the file by the values of its keys."""
        for key, value in zip(self.keys, values, strict=True):
            self.columns[key].append(value)
        if self._list_positions is not None:
            self._list_positions.append(len(self) + self._num_skipped)
        self._starts.append(start)
        self._lengths.append(end - start)

    def check_unique_ids(self, reject: RejectCallback | None = None) -> RecordIndex:
        """Check that ids are unique.

        Args:
            reject: Callback for the InputError of each record that repeats an id, which is added to `duplicates`; None
                raises it.

        Returns:
            The index itself.

        Raises:
            InputError: An id is repeated and `reject` is None.
        """
        ids, order = np.asarray(self.columns[self.keys[0]]), self._indices_by_id
        repeated_indices = order[1:][ids[order][1:] == ids[order][:-1]]
        for number in np.sort(repeated_indices).tolist():
            problem = InputError(f"{self.describe_location(number)}: duplicate {self.keys[0]}")
            if reject is None:
                raise problem
            reject(problem)
            self.duplicates.add(number)
        return self

    def find_indices(self, requested_ids: Sequence[int]) -> np.ndarray:
        """Return the (R,) indices of the records with these ids, -1 for unknown ids."""
        ids, requested = np.asarray(self.columns[self.keys[0]]), np.asarray(requested_ids)
        if not len(ids):
            return np.full(len(requested), -1)
        positions = np.searchsorted(ids, requested, sorter=self._indices_by_id)
        candidates = self._indices_by_id[positions.clip(max=len(ids) - 1)]
        return np.where(ids[candidates] == requested, candidates, -1)

    @cached_property
    def _indices_by_id(self) -> np.ndarray:
        """(R,) record indices sorted by id; no record may be added afterwards."""
        return np.argsort(np.asarray(self.columns[self.keys[0]]), kind="stable")

    def resolve_references(
        self, key: str, targets: RecordIndex, target_name: str, reject: RejectCallback | None = None
    ) -> np.ndarray:
        """Find the records of another list that these records reference.

        Args:
            key: Integer field that references an id in `targets`.
            targets: Index of the other list.
            target_name: Name of the other list for error messages.
            reject: Callback for the InputError of each invalid reference; None raises it.

        Returns:
            (R,) indices in `targets`; -1 for invalid references and for `duplicates`.

        Raises:
            InputError: A reference is invalid and `reject` is None.
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
    """Index of the lines of a file; the first key is the id and the last one the line number."""

    def describe_location(self, number: int) -> str:
        """Return the file, line number and id of a record for error messages."""
        name, line = self.keys[0], self.columns[self.keys[-1]][number]
        return f"{self.location}: line {line} ({name} {self.columns[name][number]})"


def read_jsonl_records(
    path: Path, reject: RejectCallback | None = None
) -> Iterator[tuple[dict[str, Any], int, int, int]]:
    """Read the objects of a JSON Lines file, skipping blank lines.

    Args:
        path: JSON Lines file.
        reject: Callback for the InputError of a line that is not an object, which is then skipped; None raises it.

    Yields:
        Each object, its line number from 1, and the byte range (start, end) of its line.

    Raises:
        InputError: The file is unreadable, or a line is invalid and `reject` is None.
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
    """Group indices by owner.

    Args:
        owners: (R,) owner of each index in 0..count-1, or -1 for none.
        count: Number of owners.

    Returns:
        Iterator over (owner, its indices in order), for all owners.
    """
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
    """Index lists of a JSON object in one pass over the file.

    Other members of the object are ignored.

    Args:
        path: JSON file.
        lists: Lists to index, each with the `keys` of its `RecordIndex`.
        full_lists: Lists to read into memory.
        expected_content: Description of the expected content for error messages.
        reject: Callback of each list for the InputError of a record without a key, which is then skipped; a list
            without one raises it.
        optional: Further lists to read into memory, if they exist.

    Returns:
        The indexes by list, and the lists in memory.

    Raises:
        InputError: The file is invalid, or a list is missing.
    """
    indexes = {key: RecordIndex(path, f"{path}: {key}", keys) for key, keys in lists.items()}
    lists_in_memory: dict[str, list[Any]] = {}
    is_list_by_key: dict[str, bool] = {}  # for each member of the object
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
