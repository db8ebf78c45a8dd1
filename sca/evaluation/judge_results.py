"""Read the results of DLC-Bench's and ParaDLC-Bench's judges, and score them again.

A file is an object with one entry per region, of which the following is read:

    "2391781": {"pred": "the caption",
                "details_recognition": [{"eval_result": "correct", ...}],
                "details_positives": [{"eval_result": 0.5, ...}, ...],
                "details_negatives": [{"eval_result": 1, ...}, ...],
                "score_pos": 0.6, "score_neg": 1.0}

The publishers store the positive score 0 for a region without positive questions. Here, such a region is omitted from
the mean.

The key is the id of the annotation, or that of the image and the index of the region ("1592437_0"). Values that are no
objects and have other keys, such as the averages "avg_pos" and "avg_neg", are not read. A detail may also be a list of
the index of the question, the index of the chosen option and the `eval_result`, and a file may contain several runs by
name: `{"RUN": {"images": {...}}}`.

Source: `evaluation/DLC-Bench` in https://github.com/Haochen-Wang409/Grasp-Any-Region, which is that of
https://github.com/NVlabs/describe-anything, and `evaluation/ParaDLC-Bench` in
https://github.com/MSALab-PKU/PerceptionDLM.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sca.evaluation.evaluate import EvaluationReport, score_stored_records
from sca.evaluation.judgments import RECOGNITION_KIND, Judgment, score_judgments
from sca.io.errors import InputError
from sca.io.json import read_json
from sca.io.validation import check_object, is_finite_number, read_field

FILE_SUFFIX = ".json"
DETAIL_KINDS = {
    "details_recognition": RECOGNITION_KIND,
    "details_positives": "positive",
    "details_negatives": "negative",
}
RECOGNITION_SCORES = {"correct": 1.0, "incorrect": 0.0}
STORED_SCORES = {"score_pos": "positive", "score_neg": "negative"}
REGION_KEY_PATTERN = re.compile(r"\d+(?:_\d+)?")
PAIRED_KEY_PATTERN = re.compile(r"(\d+)_(\d+)")  # image id and index of the region
RESULTS_START_PATTERN = re.compile(r'\s*\{\s*"[^"]*"\s*:\s*\{')  # the first value is an object
MAX_START_BYTES = 2**20  # contain a first entry
SCORE_TOLERANCE = 1e-6


def score_judge_results(
    path: Path, metrics: Sequence[str] | None = None, metric_options: Mapping[str, Any] | None = None
) -> list[EvaluationReport] | None:
    """Score a file of judge results.

    Args:
        path: Any file or folder.
        metrics: Registered names. Defaults to "judgments".
        metric_options: See `sca.evaluation.scoring.score_records`.

    Returns:
        One report per run of the file; None if the file does not contain judge results.

    Raises:
        InputError: An entry is malformed, or its stored scores are not those of its details.
    """
    runs = read_judge_results(path)
    if runs is None:
        return None
    metrics = metrics or ["judgments"]
    return [
        replace(score_stored_records(records, metrics, metric_options), path=path, label=name or path.stem)
        for name, records in runs.items()
    ]


def read_judge_results(path: Path) -> dict[str, list[dict[str, Any]]] | None:
    """Read a file of judge results as prediction records with the field `judgments`.

    Args:
        path: Any file or folder.

    Returns:
        The records of each run by its name, which is "" in a file of one run. None if the file does not contain judge
        results.

    Raises:
        InputError: An entry is malformed, or its stored scores are not those of its details.
    """
    if path.suffix != FILE_SUFFIX or not path.is_file():
        return None
    try:
        content = read_json(path)
    except InputError:
        if _looks_like_results(path):
            raise
        return None  # JSON Lines, whose reader names the invalid line
    if not isinstance(content, dict):
        return None
    runs = {name: run["images"] for name, run in content.items() if isinstance(run, dict) and "images" in run}
    if not runs:
        runs = {"": content}
    if not any(_has_details(entry) for entries in runs.values() for entry in _iter_entries(entries)):
        return None
    return {name: _read_entries(entries, f"{path}: {name}".rstrip(": ")) for name, entries in runs.items()}


def _looks_like_results(path: Path) -> bool:
    """Return whether a file that is not valid JSON begins like judge results, whose first entry is an object."""
    with path.open("rb") as file:
        text = file.read(MAX_START_BYTES).decode("utf-8-sig", errors="replace")
    return "details_positives" in text and RESULTS_START_PATTERN.match(text) is not None


def _iter_entries(entries: Any) -> Sequence[Any]:
    return list(entries.values()) if isinstance(entries, dict) else []


def _has_details(entry: Any) -> bool:
    return isinstance(entry, dict) and "details_positives" in entry


def _read_entries(entries: Any, location: str) -> list[dict[str, Any]]:
    return [
        _read_entry(key, check_object(entry, f"{location}: {key}"), f"{location}: {key}")
        for key, entry in check_object(entries, location).items()
        if isinstance(entry, dict) or REGION_KEY_PATTERN.fullmatch(key)
    ]


def _read_entry(key: str, entry: dict[str, Any], location: str) -> dict[str, Any]:
    judgments = [
        Judgment(kind, _read_result(detail, kind, f"{location}: {name}[{index}]"))
        for name, kind in DETAIL_KINDS.items()
        for index, detail in enumerate(read_field(entry, name, list, location))
    ]
    _check_stored_scores(entry, judgments, location)
    image_and_region = PAIRED_KEY_PATTERN.fullmatch(key)
    image_id, region_id = (int(image_and_region[1]), int(image_and_region[2])) if image_and_region else (key, key)
    return {
        "image_id": image_id,
        "region_id": region_id,
        "task": "caption",
        "control": None,
        "caption": read_field(entry, "pred", str, location) if "pred" in entry else "",
        "judgments": [each._asdict() for each in judgments],
    }


def _read_result(detail: Any, kind: str, location: str) -> float:
    """Return the score of a detail. Raises InputError for a result of another form."""
    result = detail[-1] if isinstance(detail, list) and detail else check_object(detail, location).get("eval_result")
    if kind == RECOGNITION_KIND and isinstance(result, str) and result in RECOGNITION_SCORES:
        return RECOGNITION_SCORES[result]
    if kind != RECOGNITION_KIND and is_finite_number(result):
        return float(result)
    expected = " or ".join(RECOGNITION_SCORES) if kind == RECOGNITION_KIND else "a number"
    raise InputError(f"{location}: eval_result is {result!r:.60}; expected {expected}")


def _check_stored_scores(entry: Mapping[str, Any], judgments: Sequence[Judgment], location: str) -> None:
    """Raise InputError if a score of an entry is not the mean of its details."""
    scores = score_judgments(judgments)
    for name, kind in STORED_SCORES.items():
        stored = entry.get(name)
        if stored is not None and not is_finite_number(stored):
            raise InputError(f"{location}: {name} is {stored!r:.60}; expected a number")
        expected = getattr(scores, kind)
        has_questions = not math.isnan(expected)
        if stored is not None and not math.isclose(stored, expected if has_questions else 0, abs_tol=SCORE_TOLERANCE):
            details = f"its details average to {expected:g}" if has_questions else f"it has no {kind} questions"
            raise InputError(f"{location}: {name} is {stored:g}, and {details}; judge the caption again")
