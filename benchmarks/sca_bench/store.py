"""results.jsonl of a sweep: rows that are there once each, whole, and can be read at any instant.

A folder of results has

    results.jsonl     a finished row a line; only appended to, a line at a time, by the one who holds the lock
    rows/KEY/         the log of a row, and what it leaves behind
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sca.io.atomic import write_file
from sca.io.errors import InputError
from sca.io.journal import Journal, encode_lines, read_journal
from sca.io.run_folder import RunFolder

RESULTS_NAME = "results.jsonl"


class ResultStore:
    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.path = self.folder / RESULTS_NAME

    def read_rows(self) -> list[dict[str, Any]]:
        """Every whole row, in the order in which they were finished. InputError for a line in between that is none."""
        rows: dict[str, dict[str, Any]] = {}
        for number, row in enumerate(read_journal(self.path), 1):
            if "key" not in row:
                raise InputError(f"{self.path}, line {number}, is no row: move the file away, or remove the line")
            rows.setdefault(row["key"], row)
        return list(rows.values())

    @contextmanager
    def lock(self) -> Iterator[list[str]]:
        """The right to write. Gives what had to be repaired. LockedError if somebody else has it."""
        with RunFolder(self.folder, "bench"):
            self.read_rows()  # whatever is damaged before the end is named, not cut off
            yield self._drop_torn_line()

    def append(self, row: Mapping[str, Any]) -> None:
        """A finished row: on disk when this returns, or not there at all."""
        with Journal(self.path, sync_seconds=0) as journal:
            journal.append(row)

    def make_row_folder(self, key: str) -> Path:
        """Made anew if it is gone."""
        folder = self.folder / "rows" / key
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def remove_rows(self, keys: set[str]) -> None:
        """Takes rows out, so that they are made again."""
        write_file(self.path, encode_lines(row for row in self.read_rows() if row["key"] not in keys))

    def _drop_torn_line(self) -> list[str]:
        """Drops a last line that was cut off."""
        if not self.path.exists():
            return []
        with Journal(self.path) as journal:
            dropped = journal.dropped_bytes
        return [f"{self.path} ended in the middle of a line; its row is made again"] if dropped else []
