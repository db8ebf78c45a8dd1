"""results.jsonl of a sweep: each finished row once. The file can be read at any time.

A results folder contains:

    sweep.json        name, device and tables of the sweep that ran last
    results.jsonl     one finished row per line; append-only, written by the process that holds the lock
    features/         features of frozen encoders, shared by the rows
    models/KEY/       trained models, shared by rows with an equal training
    runs/KEY/         training runs that stop at a step, shared by rows that differ only in it
    rows/KEY/         log and output files of a row
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sca.io.atomic import write_file
from sca.io.errors import InputError
from sca.io.journal import Journal, encode_lines, read_journal
from sca.io.json import read_json
from sca.io.run_folder import RunFolder
from sca_bench.sweep import Sweep

RESULTS_NAME, SWEEP_NAME = "results.jsonl", "sweep.json"
ROW_STATES = {
    "done": "built, evaluated and measured",
    "incompatible": "incompatible components",
    "skipped": "the estimated memory exceeds the available memory",
    "out-of-memory": "out of memory",
    "timed-out": "exceeded the timeout",
    "crashed": "the process was ended by a signal that it caused, or without a result",
    "non-finite": "a weight or a loss is NaN or infinite",
    "import-error": "an import failed",
    "failed": "any other error",
}


class ResultStore:
    """Results folder of a sweep."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.path = self.folder / RESULTS_NAME

    def read_rows(self) -> list[dict[str, Any]]:
        """Return every complete row in the order of completion.

        Returns:
            Rows as written by the runner.

        Raises:
            InputError: A line other than the last is not a row.
        """
        rows: dict[str, dict[str, Any]] = {}
        for number, row in enumerate(read_journal(self.path), 1):
            if "key" not in row:
                raise InputError(f"{self.path}, line {number}, is not a row; remove the line, or move the file")
            rows.setdefault(row["key"], row)
        return list(rows.values())

    def write_sweep(self, sweep: Sweep) -> None:
        """Store a sweep beside its rows, for reports."""
        content = {"name": sweep.name, "device": sweep.device, "table": sweep.table}
        write_file(self.folder / SWEEP_NAME, f"{json.dumps(content, indent=1)}\n".encode())

    def read_sweep(self) -> Sweep | None:
        """Read the sweep that ran last; None for results without one.

        Returns:
            The sweep.

        Raises:
            InputError: The file is not a sweep.
            RegistryError: A component of the sweep does not exist here.
        """
        path = self.folder / SWEEP_NAME
        if not path.exists():
            return None
        content = read_json(path)
        try:
            return Sweep.from_dict(content["table"], content["name"], content["device"])
        except (KeyError, TypeError) as error:
            raise InputError(f"{path} is not a sweep; remove it, and run the sweep again") from error

    @contextmanager
    def lock(self) -> Iterator[list[str]]:
        """Lock the folder for writing; yields one line per repair.

        Yields:
            One line per repair of the results file.

        Raises:
            LockedError: Another process holds the lock.
        """
        with RunFolder(self.folder, "bench"):
            self.read_rows()  # damage before the last line is an error, not repaired
            yield self._drop_torn_line()

    def append(self, row: Mapping[str, Any]) -> None:
        """Append a finished row atomically; it is on disk when this returns."""
        with Journal(self.path, sync_seconds=0) as journal:
            journal.append(row)

    def make_row_folder(self, key: str) -> Path:
        """Create the folder of a row if it does not exist."""
        folder = self.folder / "rows" / key
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def remove_rows(self, keys: set[str]) -> None:
        """Remove rows so that they run again."""
        write_file(self.path, encode_lines(row for row in self.read_rows() if row["key"] not in keys))

    def _drop_torn_line(self) -> list[str]:
        """Drop a truncated last line."""
        if not self.path.exists():
            return []
        with Journal(self.path) as journal:
            dropped = journal.dropped_bytes
        return [f"{self.path} ends with an incomplete line; its row runs again"] if dropped else []
