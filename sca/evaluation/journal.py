"""predictions.jsonl: what a run was asked and answered, written as it goes and read without the model.

    {"run": {...}}     the first line: what was run, see `sca.evaluation.evaluate`
    {...}              one record a line, see `sca.evaluation.predictions`
    {"done": [...], "unread": 0}   while the run goes on: the places of the images whose records are above, and how many
                       of them could not be read
    {"end": {...}}     the last line, once all is there: counts, and a hash of the truth

A run that was killed goes on where it was: what stands behind the last `done` is thrown away and asked again. When all
is done the file is written once more, in the order of the dataset and without `done`. Of several processes each writes
a file of its own, `predictions.1.jsonl` and so on, which the first then puts together.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sca.evaluation.predictions import Asked
from sca.io.json import IrregularFileError, open_regular_file, parse_json
from sca.output.files import unwritable, write_file

NAME = "predictions.jsonl"
LOOSE = ("versions", "batch")  # what may differ between a run and its continuation
DONE = b'{"done": '


class PredictionsError(ValueError):
    """A predictions file that cannot be read, continued or scored; the message says which line and why."""


@dataclass(frozen=True)
class Predictions:
    """What a file holds. run, end: empty for a file that was made by hand."""

    records: list[dict[str, Any]]
    run: Mapping[str, Any] = field(default_factory=dict)
    end: Mapping[str, Any] = field(default_factory=dict)


class Journal:
    """The predictions of one process of a run, on disk as soon as they are made.

    folder: None to keep them in memory. run: what the first line says. rank: of this process.

    PredictionsError if the folder holds the predictions of another run.
    """

    def __init__(self, folder: Path | None, run: Mapping[str, Any], rank: int = 0):
        self.folder, self.run, self.rank = folder, dict(run), rank
        self.done: set[int] = set()
        self.finished = False
        self._kept: list[dict[str, Any]] = []
        self._unread = 0
        self._file = None
        if folder is not None:
            for path in _files(folder):
                self._take(path)
            if not self.finished:
                self._file = self._open(folder / _name(rank))

    def add(self, asked: Asked) -> None:
        """A batch: on disk when this returns."""
        self.done.update(asked.places)
        if self._file is None:
            self._kept += asked.records
            self._unread += asked.unread
            return
        lines = [*map(_line, asked.records), _line({"done": list(asked.places), "unread": asked.unread})]
        try:
            self._file.write(b"".join(lines))
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise unwritable(self._file.name, error) from error

    def finish(self) -> Predictions:
        """Puts everything together, once each process has added its last."""
        if self.folder is None:
            records = sorted(self._kept, key=lambda each: each["index"])
            return Predictions(records, self.run, _end(records, self._unread))
        path = self.folder / NAME
        if not self.finished:
            if self._file is not None:
                self._file.close()
            parts = [_whole(part) for part in _files(self.folder)]
            records = sorted((record for found, _ in parts for record in found), key=lambda each: each["index"])
            end = _end(records, sum(unread for _, unread in parts))
            write_file(path, b"".join([_line({"run": self.run}), *map(_line, records), _line({"end": end})]))
            for part in _files(self.folder):
                if part != path:
                    part.unlink()
            self.finished = True
        return read_predictions(path)

    def _take(self, path: Path) -> None:
        """What an earlier run has left in a file."""
        with path.open("rb") as stream:
            first = stream.readline()
            if not first.endswith(b"\n"):  # killed before anything was asked
                return
            other = _parsed(first, path, 1).get("run")
            if other is None:
                raise PredictionsError(
                    f"{path} holds predictions, but not what was run: choose another folder for --out"
                )
            _same(self.run, other, path)
            for line in stream:
                if line.startswith(DONE) and line.endswith(b"\n"):
                    self.done.update(_parsed(line, path, 0)["done"])
                self.finished |= line.startswith(b'{"end": ') and line.endswith(b"\n")

    def _open(self, path: Path) -> Any:
        """To append to: what was whole in it stays."""
        try:
            file = path.open("a+b")
            file.seek(0)
            whole = here = 0
            for line in file:
                here += len(line)
                if line.endswith(b"\n") and (whole == 0 or line.startswith(DONE)):
                    whole = here
            file.truncate(whole)
            if not whole:
                file.write(_line({"run": self.run}))
                file.flush()
        except OSError as error:
            raise unwritable(path, error) from error
        return file


def read_predictions(path: str | Path) -> Predictions:
    """A file that a run has written to its end, or one that was made by hand: records alone, a line each.

    PredictionsError for a file that is not there, is no JSON lines, or is of a run that has not ended.
    """
    path = Path(path)
    path = path / NAME if path.is_dir() else path
    run: Mapping[str, Any] = {}
    end: Mapping[str, Any] = {}
    records = []
    try:
        with open_regular_file(path) as stream:
            for number, line in enumerate(stream, 1):
                if not line.strip():
                    continue
                content = _parsed(line, path, number)
                if "run" in content:
                    run = content["run"]
                elif "end" in content:
                    end = content["end"]
                elif "done" not in content:
                    records.append(content)
    except IrregularFileError as error:
        raise PredictionsError(str(error)) from error
    except OSError as error:
        raise PredictionsError(f"cannot read {path}: {error.strerror or error}") from error
    if run and not end:
        raise PredictionsError(
            f"{path} is of a run that has not ended: {len(records)} records so far. The same `sca evaluate` with the "
            "same --out goes on with it"
        )
    return Predictions(records, run, end)


def truth_hash(records: Iterable[Mapping[str, Any]]) -> str:
    """What tells this truth from any other, whatever the order: of regions, tasks and what is true of them."""
    total = 0
    for record in records:
        if record.get("control") is None:
            told = [record["image_id"], record["region_id"], record["task"], record["truth"]]
            total += int.from_bytes(hashlib.sha256(json.dumps(told, sort_keys=True).encode()).digest())
    return f"{total % 2**256:064x}"


def _end(records: Sequence[Mapping[str, Any]], unread: int) -> dict[str, Any]:
    asked = [record for record in records if record["control"] is None]
    return {
        "images": len({record["index"] for record in asked}),
        "records": len(records),
        "tasks": dict(sorted(Counter(record["task"] for record in asked).items())),
        "unread": unread,
        "truth": truth_hash(records),
    }


def _same(run: Mapping[str, Any], other: Mapping[str, Any], path: Path) -> None:
    run = json.loads(json.dumps(run))
    changed = [key for key in {**run, **other} if key not in LOOSE and run.get(key) != other.get(key)]
    if changed:
        told = "; ".join(f"{key}: {other.get(key)!r:.80} there, {run.get(key)!r:.80} now" for key in changed)
        raise PredictionsError(f"{path} holds the predictions of another run ({told}): choose another folder for --out")


def _whole(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The records above the last `done` of a part, and how many pictures could not be read."""
    records: list[dict[str, Any]] = []
    waiting: list[bytes] = []
    unread = 0
    with path.open("rb") as stream:
        for number, line in enumerate(stream):
            if line.startswith(DONE) and line.endswith(b"\n"):
                records += map(json.loads, waiting)
                unread += json.loads(line)["unread"]
                waiting = []
            elif number:
                waiting.append(line)
    return records, unread


def _files(folder: Path) -> list[Path]:
    """The file of every process, the first one's first."""
    return sorted(folder.glob("predictions*.jsonl"), key=lambda path: (path.name != NAME, path.name))


def _name(rank: int) -> str:
    return NAME if rank == 0 else f"predictions.{rank}.jsonl"


def _parsed(line: bytes, path: Path, number: int) -> dict[str, Any]:
    where = f"{path}, line {number}" if number else str(path)
    try:
        content = parse_json(line.decode(), surrogates=True)
    except ValueError as error:
        raise PredictionsError(f"{where} is not whole JSON ({error})") from error
    if not isinstance(content, dict):
        raise PredictionsError(f"{where} is {content!r:.40} and not a record")
    return content


def _line(content: Mapping[str, Any]) -> bytes:
    return f"{json.dumps(content)}\n".encode()
