"""Whether records can be scored: what is doubled, missing, unknown or broken is named, and what is odd is counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sca_registry.contracts import TASKS

from sca.evaluation.journal import Predictions, truth_hash
from sca.io.errors import InputError
from sca.io.validation import is_finite_number

SHOWN = 3


def completed(predictions: Predictions, where: str) -> Predictions:
    """With what a record that was made by hand may leave out: the task is "caption", and `references` are the phrases
    that are true. InputError for records that nothing can be made of, naming the first ones.
    """
    if not predictions.records:
        raise InputError(f"{where} has no records")
    return Predictions(
        [_complete(record, f"{where}, record {n}") for n, record in enumerate(predictions.records, 1)],
        predictions.run,
        predictions.end,
    )


def check(predictions: Predictions, where: str) -> list[str]:
    """Remarks on what is odd but can be scored. InputError where a score would be wrong."""
    records, end = predictions.records, predictions.end
    counted = Counter(map(_key, records))
    doubled = [key for key, count in counted.items() if count > 1]
    if doubled:
        raise InputError(f"{where}: {len(doubled)} regions are there more than once: {_some(map(_said, doubled))}")
    if end and end["records"] != len(records):
        kind = "fewer" if len(records) < end["records"] else "more"
        number = abs(end["records"] - len(records))
        raise InputError(f"{where}: {number} {kind} records than the {end['records']} that the run wrote")
    if end and end["truth"] != truth_hash(records):
        raise InputError(f"{where}: regions, or what is true of them, are not those that the run was asked about")
    broken = [record for record in records if not all(map(_sound, _boxes(record)))]
    if broken:
        raise InputError(
            f"{where}: {len(broken)} records have a box that is not four finite numbers: "
            f"{_some(_said(_key(record)) for record in broken)}"
        )
    unscored = [record for record in records if not all(map(_is_score, _proposal_scores(record)))]
    if unscored:
        raise InputError(
            f"{where}: {len(unscored)} records have a proposal whose score is not a number: "
            f"{_some(_said(_key(record)) for record in unscored)}"
        )
    captions = [record for record in records if record["task"] == "caption"]
    without = [record for record in captions if not record["truth"]["phrases"]]
    if without and len(without) < len(captions):
        raise InputError(
            f"{where}: {len(without)} of {len(captions)} captions have no references: "
            f"{_some(_said(_key(record)) for record in without)}"
        )
    empty = sum(not record["caption"].strip() for record in records if record["task"] in TASKS)
    lines = sum(len(record["caption"].splitlines()) > 1 for record in records if record["task"] in TASKS)
    remarks = [f"{empty} captions are empty and scored as such"] if empty else []
    return remarks + ([f"{lines} captions have line breaks, which are read as spaces"] if lines else [])


def check_against(predictions: Predictions, known: Iterable[tuple[int, int]], where: str) -> None:
    """InputError unless the regions asked for are those of the dataset, as (image_id, region_id)."""
    asked = {(record["image_id"], record["region_id"]) for record in predictions.records}
    known = set(known)
    for problem, which in (
        ("are not in the dataset", asked - known),
        ("of the dataset were not asked for", known - asked),
    ):
        if which:
            told = _some(f"region {region} of image {image}" for image, region in sorted(which, key=str))
            raise InputError(f"{where}: {len(which)} regions {problem}: {told}")


def _complete(record: Mapping[str, Any], where: str) -> dict[str, Any]:
    for key in ("image_id", "region_id"):
        if key not in record:
            raise InputError(f"{where} has no {key}; it has {', '.join(record) or 'nothing'}")
    task = record.get("task", "caption")
    if task not in (*TASKS, "dense"):
        raise InputError(f"{where}: no task {task!r}: there are {', '.join(TASKS)}, dense")
    if task != "dense" and not isinstance(record.get("caption"), str):
        raise InputError(f"{where}: caption must be text, not {record.get('caption')!r}")
    truth = record.get("truth", {})
    references = record.get("references", truth.get("phrases", []) if isinstance(truth, Mapping) else None)
    if not isinstance(references, list) or not all(isinstance(each, str) for each in references):
        raise InputError(f"{where}: references must be a list of strings, not {references!r:.60}")
    told = {"name": None, "attributes": {}, "mask": None, "box": None, "area": None, **truth, "phrases": references}
    if task == "dense":
        told = dict(truth)
    defaults = {"control": None, "prompt": {}, "score": None, "mask": None, "iou": None}
    kept = {key: value for key, value in record.items() if key != "references"}
    return {**defaults, **kept, "task": task, "truth": told}


def _key(record: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(record.get(key) for key in ("image_id", "region_id", "task", "control"))


def _said(key: Sequence[Any]) -> str:
    image, region, task, control = key
    words = f"image {image}" if region is None else f"region {region} of image {image}"
    return f"{words} ({task}{f', {control}' if control else ''})"


def _boxes(record: Mapping[str, Any]) -> list[Any]:
    found = [record.get("prompt", {}).get("box"), record["truth"].get("box")]
    found += [each.get("box") for each in record.get("proposals", ())]
    found += [each.get("box") for each in record["truth"].get("regions", ())]
    return [box for box in found if box is not None]


def _proposal_scores(record: Mapping[str, Any]) -> list[Any]:
    return [each.get("score") for each in record.get("proposals", ())]


def _is_score(value: Any) -> bool:
    return isinstance(value, float) or is_finite_number(value)  # NaN is a score that a model did not return


def _sound(box: Any) -> bool:
    return isinstance(box, list | tuple) and len(box) == 4 and all(map(is_finite_number, box))


def _some(words: Iterable[str]) -> str:
    words = list(words)
    return ", ".join(words[:SHOWN]) + (f" and {len(words) - SHOWN} more" if len(words) > SHOWN else "")
