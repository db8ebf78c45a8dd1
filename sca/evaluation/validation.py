"""Validate prediction records before scoring: errors name duplicate, missing, unknown or malformed records."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sca_registry.contracts import JUDGE_QUESTIONS, TASKS

from sca.evaluation.judgments import JUDGMENT_KINDS
from sca.evaluation.predictions import COMPREHENSION_TASK, DENSE_TASKS, EXCLUSIVE_TASKS, QUESTION_TASK
from sca.evaluation.predictions_file import Predictions, hash_truth
from sca.evaluation.records import meets_need
from sca.io.errors import InputError
from sca.io.validation import is_finite_number

MAX_LISTED = 3
JUDGE_NEED = f"truth.attributes.{JUDGE_QUESTIONS}"  # a caption that a judge scores needs no references


def fill_defaults(predictions: Predictions, location: str) -> Predictions:
    """Fill in the fields that a record made by hand may omit.

    The default task is "caption", and `references` become the ground-truth phrases.

    Args:
        predictions: Contents of a predictions file.
        location: File name for messages.

    Returns:
        The predictions with complete records.

    Raises:
        InputError: There are no records, or a record is malformed.
    """
    if not predictions.records:
        raise InputError(f"{location} has no records")
    return Predictions(
        [_fill_record_defaults(record, f"{location}, record {n}") for n, record in enumerate(predictions.records, 1)],
        predictions.run,
        predictions.summary,
    )


def check_predictions(predictions: Predictions, location: str) -> list[str]:
    """Check that records can be scored correctly.

    Args:
        predictions: Contents of a predictions file, after `fill_defaults`.
        location: File name for messages.

    Returns:
        Warnings about anomalies that do not prevent scoring.

    Raises:
        InputError: Regions are duplicated, records or references are missing, or a box or score is invalid.
    """
    records, summary = predictions.records, predictions.summary
    key_counts = Counter(map(_get_record_key, records))
    duplicates = [key for key, count in key_counts.items() if count > 1]
    if duplicates:
        raise InputError(
            f"{location}: {len(duplicates)} duplicate records; keep one of each: "
            f"{_join_first(map(_format_record_key, duplicates))}"
        )
    if summary and summary["num_records"] != len(records):
        comparison = "fewer" if len(records) < summary["num_records"] else "more"
        difference = abs(summary["num_records"] - len(records))
        raise InputError(
            f"{location}: {difference} {comparison} records than the {summary['num_records']} that the run wrote; "
            "restore the file, or evaluate again"
        )
    if summary and summary["ground_truth_hash"] != hash_truth(records):
        raise InputError(
            f"{location}: the regions or the ground truth were changed after the run; restore the file, or evaluate "
            "again"
        )
    with_invalid_boxes = [record for record in records if not all(map(_is_box, _collect_boxes(record)))]
    if with_invalid_boxes:
        raise InputError(
            f"{location}: {len(with_invalid_boxes)} records have a box that is not four finite numbers: "
            f"{_join_first(_format_record_key(_get_record_key(record)) for record in with_invalid_boxes)}"
        )
    with_invalid_scores = [record for record in records if not all(map(_is_score, _collect_proposal_scores(record)))]
    if with_invalid_scores:
        raise InputError(
            f"{location}: {len(with_invalid_scores)} records have a proposal whose score is not a number: "
            f"{_join_first(_format_record_key(_get_record_key(record)) for record in with_invalid_scores)}"
        )
    captions = [record for record in records if record["task"] == "caption" and not meets_need(record, JUDGE_NEED)]
    without_references = [record for record in captions if not record["truth"]["phrases"]]
    if not predictions.run.get("caption_all") and 0 < len(without_references) < len(captions):
        raise InputError(
            f"{location}: {len(without_references)} of {len(captions)} captions have no references: "
            f"{_join_first(_format_record_key(_get_record_key(record)) for record in without_references)}"
        )
    num_empty = sum(not record["caption"].strip() for record in records if record["task"] in TASKS)
    num_multiline = sum(len(record["caption"].splitlines()) > 1 for record in records if record["task"] in TASKS)
    warnings = [f"{num_empty} captions are empty and scored as such"] if num_empty else []
    return warnings + (
        [f"{num_multiline} captions have line breaks, which are read as spaces"] if num_multiline else []
    )


def check_dataset_regions(predictions: Predictions, expected_regions: Iterable[tuple[int, int]], location: str) -> None:
    """Check that the predicted regions are exactly those of a dataset.

    Args:
        predictions: Contents of a predictions file.
        expected_regions: (image_id, region_id) of the dataset's regions.
        location: File name for messages.

    Raises:
        InputError: Regions are missing or unknown.
    """
    predicted_regions = {(record["image_id"], record["region_id"]) for record in predictions.records}
    expected_regions = set(expected_regions)
    for problem, regions in (
        ("are not in the dataset", predicted_regions - expected_regions),
        ("of the dataset have no prediction", expected_regions - predicted_regions),
    ):
        if regions:
            listed = _join_first(f"region {region} of image {image}" for image, region in sorted(regions, key=str))
            raise InputError(f"{location}: {len(regions)} regions {problem}: {listed}")


def _fill_record_defaults(record: Mapping[str, Any], location: str) -> dict[str, Any]:
    for key in ("image_id", "region_id"):
        if key not in record:
            raise InputError(f"{location} has no {key}; its fields are {', '.join(record) or 'none'}")
        if not isinstance(record[key], int | str | None):
            raise InputError(f"{location}: {key} must be an integer or text, not {record[key]!r:.60}")
    if not isinstance(control := record.get("control"), str | None):
        raise InputError(f"{location}: control must be text, not {control!r:.60}")
    task = record.get("task", "caption")
    known_tasks = (*TASKS, *DENSE_TASKS, *EXCLUSIVE_TASKS)
    if task not in known_tasks:
        raise InputError(f"{location}: unknown task {task!r}; choose from {', '.join(known_tasks)}")
    if task in TASKS and not isinstance(record.get("caption"), str):
        raise InputError(f"{location}: caption must be text, not {record.get('caption')!r}")
    truth = record.get("truth", {})
    if not isinstance(truth, Mapping):
        raise InputError(f"{location}: truth must be an object, not {truth!r:.60}")
    if not isinstance(prompt := record.get("prompt", {}), Mapping):
        raise InputError(f"{location}: prompt must be an object, not {prompt!r:.60}")
    if task in DENSE_TASKS:
        _check_objects(record.get("proposals"), f"{location}: proposals", {"box": list, "caption": str})
        label, label_type = ("phrases", list) if DENSE_TASKS[task] == "caption" else ("name", str)
        _check_objects(truth.get("regions"), f"{location}: truth.regions", {"box": list, label: label_type})
    if task == COMPREHENSION_TASK:
        _check_objects(record.get("expressions"), f"{location}: expressions", {"text": str, "box": list | None})
    if task == QUESTION_TASK:
        _check_objects(record.get("answers"), f"{location}: answers", {"text": str})
        fields = {"text": str, "kind": str, "answer": str}
        _check_objects(truth.get("questions"), f"{location}: truth.questions", fields)
        if len(record["answers"]) != len(truth["questions"]):
            raise InputError(
                f"{location}: {len(record['answers'])} answers to {len(truth['questions'])} questions; predict the "
                "answers again"
            )
    if "judgments" in record:
        _check_objects(record["judgments"], f"{location}: judgments", {"kind": str, "score": int | float})
        for judgment in record["judgments"]:
            if judgment["kind"] not in JUDGMENT_KINDS:
                raise InputError(
                    f"{location}: unknown kind of a judgment {judgment['kind']!r:.60}; choose from "
                    f"{', '.join(JUDGMENT_KINDS)}"
                )
    references = record.get("references", truth.get("phrases", []))
    if not isinstance(references, list) or not all(isinstance(each, str) for each in references):
        raise InputError(f"{location}: references must be a list of strings, not {references!r:.60}")
    full_truth = {
        "name": None,
        "attributes": {},
        "mask": None,
        "box": None,
        "area": None,
        **truth,
        "phrases": references,
    }
    if task in DENSE_TASKS:
        full_truth = dict(truth)
    defaults: dict[str, Any] = {"control": None, "prompt": {}, "score": None, "mask": None, "predicted_iou": None}
    fields = {key: value for key, value in record.items() if key != "references"}
    return {**defaults, **fields, "task": task, "truth": full_truth}


def _check_objects(values: Any, subject: str, field_types: Mapping[str, Any]) -> None:
    """Raise InputError unless a value is a list of objects that have these fields."""

    def has_fields(value: Any) -> bool:
        return isinstance(value, Mapping) and all(
            name in value and isinstance(value[name], expected) for name, expected in field_types.items()
        )

    invalid = [value for value in values if not has_fields(value)] if isinstance(values, list) else [values]
    if invalid:
        raise InputError(
            f"{subject} must be a list of objects with {' and '.join(field_types)}, not {invalid[0]!r:.60}"
        )


def _get_record_key(record: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(record.get(key) for key in ("image_id", "region_id", "task", "control"))


def _format_record_key(key: Sequence[Any]) -> str:
    image, region, task, control = key
    subject = f"image {image}" if region is None else f"region {region} of image {image}"
    return f"{subject} ({task}{f', {control}' if control else ''})"


def _collect_boxes(record: Mapping[str, Any]) -> list[Any]:
    boxes = [record["prompt"].get("box"), record["truth"].get("box")]
    if record["task"] in DENSE_TASKS:
        boxes += [each["box"] for each in (*record["proposals"], *record["truth"]["regions"])]
    if record["task"] == COMPREHENSION_TASK:
        boxes += [each["box"] for each in record["expressions"]]
    return [box for box in boxes if box is not None]


def _collect_proposal_scores(record: Mapping[str, Any]) -> list[Any]:
    return [each.get("score") for each in record["proposals"]] if record["task"] in DENSE_TASKS else []


def _is_score(value: Any) -> bool:
    return isinstance(value, float) or is_finite_number(value)  # NaN: the model returned no score


def _is_box(box: Any) -> bool:
    return isinstance(box, list | tuple) and len(box) == 4 and all(map(is_finite_number, box))


def _join_first(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:MAX_LISTED]) + (f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else "")
