"""predictions.jsonl: the records of a run, written during the run and read without the model.

    {"run": {...}}     first line: settings of the run, see `sca.evaluation.evaluate`
    {...}              one record per line, see `sca.evaluation.predictions`
    {"done_indices": [...], "num_unreadable": 0}   only in unfinished files: dataset indices of the images whose records
                       precede this line, and the number of those images that could not be read
    {"summary": {...}}   last line of a finished file: counts, and a hash of the ground truth

An interrupted run resumes: records after the last `done_indices` are discarded and predicted again. A finished file is
rewritten in dataset order without these lines. With several processes, each writes its own file
(`predictions.1.jsonl` and so on), and the first process merges them.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sca.evaluation.lmms_eval_samples import is_sample, sample_to_record
from sca.evaluation.predictions import PredictedBatch
from sca.io import journal
from sca.io.atomic import write_file
from sca.io.errors import InputError
from sca.io.json import open_regular_file, parse_json_lines
from sca.io.output_patterns import find_outputs
from sca.io.run_folder import check_same_run
from sca.io.validation import check_encodable, check_object

PREDICTIONS_NAME = "predictions.jsonl"
PREDICTIONS_PATTERNS = (PREDICTIONS_NAME, "predictions.#.jsonl")  # of the first process and of the others
HEADER_PREFIX = b'{"run": {'  # first bytes of a file written by `sca evaluate`
TEXT_FIELDS = ("caption", "truth", "references", "proposals")  # record fields that contain text
RESUMABLE_KEYS = ("versions", "batch_size")  # settings that may change when a run resumes


@dataclass(frozen=True)
class Predictions:
    """Contents of a predictions file.

    Attributes:
        records: Prediction records.
        run: The run header; empty for a file made by hand.
        summary: The last line; empty for a file made by hand.
    """

    records: list[dict[str, Any]]
    run: Mapping[str, Any] = field(default_factory=dict)
    summary: Mapping[str, Any] = field(default_factory=dict)


class PredictionsJournal:
    """The predictions of one process of a run, written to disk batch by batch.

    Args:
        folder: Folder of the run; None keeps the predictions in memory.
        run: Contents of the first line.
        rank: Rank of this process.

    Raises:
        DifferentRunError: The folder contains the predictions of a different run.
    """

    def __init__(self, folder: Path | None, run: Mapping[str, Any], rank: int = 0):
        self.folder = folder
        self.run: dict[str, Any] = dict(run)
        self.rank = rank
        self.done_indices: set[int] = set()
        self.is_finished: bool = False
        self._records: list[dict[str, Any]] = []
        self._num_unreadable = 0
        self._file = None
        if folder is not None:
            check_same_runs(folder, run)
            for path in find_predictions_files(folder):
                self._read_earlier(path)
            if not self.is_finished:
                self._file = journal.Journal(folder / _get_file_name(rank), _completes_batch, HEADER_PREFIX)
                if self._file.is_empty:
                    self._file.append({"run": self.run})
            elif rank == 0:
                # drop lines that a crash left after the end
                journal.Journal(folder / PREDICTIONS_NAME, _completes_batch, HEADER_PREFIX).close()

    def add(self, batch: PredictedBatch) -> None:
        """Append a batch. It survives a killed process when this returns, and a power failure a few seconds later."""
        self.done_indices.update(batch.indices)
        if self._file is None:
            self._records += batch.records
            self._num_unreadable += batch.num_unreadable
            return
        self._file.append(*batch.records, {"done_indices": list(batch.indices), "num_unreadable": batch.num_unreadable})

    def close(self) -> None:
        """Sync the predictions of this process to disk. Nothing can be added afterwards."""
        if self._file is not None:
            self._file.close()

    def finish(self) -> Predictions:
        """Merge the predictions of all processes, after each has closed its journal."""
        if self.folder is None:
            records = sorted(self._records, key=lambda each: each["index"])
            return Predictions(records, self.run, _summarize_records(records, self._num_unreadable))
        path = self.folder / PREDICTIONS_NAME
        if not self.is_finished:
            parts = [_read_part(part) for part in find_predictions_files(self.folder)]
            records = sorted(
                (record for part_records, _ in parts for record in part_records), key=lambda each: each["index"]
            )
            summary = _summarize_records(records, sum(num_unreadable for _, num_unreadable in parts))
            write_file(path, journal.encode_lines([{"run": self.run}, *records, {"summary": summary}]))
            for part in find_predictions_files(self.folder):
                if part != path:
                    part.unlink()
            self.is_finished = True
        return read_predictions(path)

    def _read_earlier(self, path: Path) -> None:
        """Read the progress of an earlier run from a file."""
        if read_run(path) is None:  # killed before the first prediction
            return
        for entry in journal.read_journal(path, _completes_batch, HEADER_PREFIX):
            self.done_indices.update(entry.get("done_indices", ()))
            self.is_finished |= "summary" in entry


def read_predictions(path: str | Path) -> Predictions:
    """Read a finished predictions file, or a file that contains only records or samples of lmms-eval, one per line.

    Args:
        path: Predictions file or its folder.

    Returns:
        The contents of the file.

    Raises:
        InputError: The file does not exist, is not JSON Lines, or belongs to a run that has not ended.
    """
    path = Path(path)
    path = path / PREDICTIONS_NAME if path.is_dir() else path
    run: Mapping[str, Any] = {}
    summary: Mapping[str, Any] = {}
    records = []
    try:
        with open_regular_file(path, allow_pipe=True) as file:
            for place, content in parse_json_lines(file, str(path)):
                if "run" in check_object(content, place):
                    run = content["run"]
                elif "summary" in content:
                    summary = content["summary"]
                elif "done_indices" not in content:
                    content = sample_to_record(content, place) if is_sample(content) else content
                    for key in TEXT_FIELDS:  # image names may contain a lone surrogate
                        check_encodable(f"{place}, {key!r}", content.get(key))
                    records.append(content)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    if run and not summary:
        raise InputError(
            f"{path} belongs to an unfinished run with {len(records)} records; evaluate into the same folder to resume "
            "it"
        )
    return Predictions(records, run, summary)


def read_run(path: Path) -> Mapping[str, Any] | None:
    """Return the run header of a predictions file; None if the file does not exist or its first line is torn.

    Args:
        path: Predictions file.

    Returns:
        The run header.

    Raises:
        InputError: The file was not written by `sca evaluate`.
    """
    for entry in journal.read_journal(path, first_line_prefix=HEADER_PREFIX):
        if not isinstance(entry.get("run"), dict):
            raise InputError(f"{path} was not written by `sca evaluate`; choose a different output folder")
        return entry["run"]
    return None


def check_same_runs(folder: Path, run: Mapping[str, Any]) -> None:
    """Check that the predictions in a folder belong to this run, so that it can resume.

    Args:
        folder: Folder of the predictions.
        run: Run header of the new run.

    Raises:
        DifferentRunError: They belong to a different run.
        InputError: A file was made by hand.
    """
    runs = [(path, read_run(path)) for path in find_predictions_files(folder)]
    for path, earlier in runs:
        if earlier is not None:
            check_same_run(path, earlier, run, RESUMABLE_KEYS)


def hash_truth(records: Iterable[Mapping[str, Any]]) -> str:
    """Return a hash of the regions, tasks and ground truth that does not depend on their order."""
    total = 0
    for record in records:
        if record.get("control") is None:
            truth = [record["image_id"], record["region_id"], record["task"], record["truth"]]
            total += int.from_bytes(hashlib.sha256(json.dumps(truth, sort_keys=True).encode()).digest())
    return f"{total % 2**256:064x}"


def _summarize_records(records: Sequence[Mapping[str, Any]], num_unreadable: int) -> dict[str, Any]:
    prompted_records = [record for record in records if record["control"] is None]
    return {
        "num_images": len({record["index"] for record in prompted_records}),
        "num_records": len(records),
        "task_counts": dict(sorted(Counter(record["task"] for record in prompted_records).items())),
        "num_unreadable": num_unreadable,
        "ground_truth_hash": hash_truth(records),
    }


def _read_part(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Return the records before the last `done_indices` line of a file, and the number of unreadable images."""
    records: list[dict[str, Any]] = []
    num_unreadable = 0
    for entry in journal.read_journal(path, _completes_batch, HEADER_PREFIX):
        if "done_indices" in entry:
            num_unreadable += entry["num_unreadable"]
        elif "run" not in entry:
            records.append(entry)
    return records, num_unreadable


def _completes_batch(entry: Mapping[str, Any]) -> bool:
    return any(name in entry for name in ("run", "done_indices", "summary"))


def find_predictions_files(folder: Path) -> list[Path]:
    """Return the predictions file of every process, the first process first."""
    return sorted(
        find_outputs(folder, PREDICTIONS_PATTERNS), key=lambda path: (path.name != PREDICTIONS_NAME, path.name)
    )


def _get_file_name(rank: int) -> str:
    return PREDICTIONS_NAME if rank == 0 else f"predictions.{rank}.jsonl"
