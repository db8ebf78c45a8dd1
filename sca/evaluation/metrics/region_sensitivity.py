"""Measure whether captions follow the prompt when only the prompt changes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain

import numpy as np
from sca_registry.contracts import TASKS, MetricOutput

from sca.data.scenes import Statement, parse_statement
from sca.evaluation.metrics.attribute_accuracy import ATTRIBUTES
from sca.evaluation.records import (
    Record,
    collect_region_ids,
    compute_nanmean,
    filter_records,
    group_by_image,
    normalize_text,
    require_records,
)
from sca.evaluation.tokenization import WORD_PATTERN

PROMPT_CONTROLS = ("wrong-region", "shuffled-mask")  # controls that change the prompt but not the ground truth


class RegionSensitivity:
    """Fraction of ordered pairs (i, j) of regions of an image whose prediction for i matches i better than j.

    A pair is compared if the ground truths of i and j differ. The prediction for i must agree better with the ground
    truth of i than with that of j; a tie counts as a failure. A prediction that is the same for the whole image
    therefore succeeds on at most half of the pairs. `pairs` is the number of compared pairs.

    For predictions with moved prompts (the controls wrong-region and shuffled-mask), the score named after the control
    is the fraction of regions whose own prompt leads to better agreement with the ground truth than the moved prompt.

    Agreement depends on the task and the data:

    - Recognition: whether the name is correct.
    - Captions of generated scenes: the number of correct values among color, shape, size and texture (parsed by
      `sca.data.scenes.parse_statement`), counting only those that differ between the two ground truths.
    - Other captions: F-measure of the words with those of the closest phrase.
    """

    required_fields: tuple[str, ...] = (
        "caption",
        "truth.name or task=caption",
        "truth.phrases or truth.attributes.color or task=recognition",
    )
    includes_controls = True

    def __call__(self, records: Sequence[Record]) -> MetricOutput:
        scored_records = require_records(records, self.required_fields, "region-sensitivity")
        uncontrolled_records = [record for record in scored_records if record.get("control") is None]
        compared_records: list[Record] = []  # region i of each pair, and each region with a moved prompt
        comparison_names: list[str] = []
        is_followed: list[bool] = []
        for task in reversed(TASKS):
            for regions in group_by_image(record for record in uncontrolled_records if record["task"] == task).values():
                for i, is_better in _compare_pairs(regions, task):
                    compared_records.append(regions[i])
                    comparison_names.append(task)
                    is_followed.append(is_better)
            for control in PROMPT_CONTROLS:
                control_records = {
                    _get_region_key(per_record): per_record
                    for per_record in scored_records
                    if per_record.get("control") == control and per_record["task"] == task
                }
                for record in uncontrolled_records:
                    if record["task"] == task and _get_region_key(record) in control_records:
                        compared_records.append(record)
                        comparison_names.append(f"{task}/{control}")
                        is_followed.append(_agrees_better(record, control_records[_get_region_key(record)]))
        name_per_row, followed_per_row = np.array(comparison_names, dtype=str), np.array(is_followed, dtype=float)
        names = [
            f"{task}{suffix}"
            for task in reversed(TASKS)
            for suffix in ("", *(f"/{control}" for control in PROMPT_CONTROLS))
        ]
        tasks = {record["task"] for record in uncontrolled_records}
        per_record = {
            f"region-sensitivity/{name}": np.where(name_per_row == name, followed_per_row, np.nan)
            for name in names
            if (name_per_row == name).any() or name in tasks
        }
        total: dict[str, float] = {}
        for name, values in per_record.items():
            total[name] = compute_nanmean(values)
            if name.count("/") == 1:
                total[f"{name}/pairs"] = int((~np.isnan(values)).sum())
        return MetricOutput(total, per_record | collect_region_ids(compared_records))


def _get_region_key(record: Record) -> tuple[int, int]:
    return record["image_id"], record["region_id"]


def _compare_pairs(regions: Sequence[Record], task: str) -> Iterable[tuple[int, bool]]:
    """Yield, for each pair with different ground truths, the index of i and whether its prediction matches i better."""
    if _has_true_attributes(regions, task):
        truth = np.array([_get_true_attributes(record, task) for record in regions])  # (R, F) text
        # (R, F) text, empty if not stated
        stated = np.array([_parse_stated_attributes(record, task) for record in regions])
        different = truth[:, None] != truth[None]  # (R, R, F)
        # (R, R) facts of i that its prediction states
        own_agreement = (different & (stated == truth)[:, None]).sum(2)
        # (R, R) facts of j in the prediction for i
        other_agreement = (different & (stated[:, None] == truth[None])).sum(2)
        is_different_pair = different.any(2)
    else:
        phrase_sets = [frozenset(map(normalize_text, record["truth"]["phrases"])) for record in regions]
        other_agreement = _compute_word_overlap(
            [record["caption"] for record in regions], [record["truth"]["phrases"] for record in regions]
        )
        own_agreement = np.repeat(other_agreement.diagonal()[:, None], len(regions), axis=1)
        is_different_pair = np.array([[one != other for other in phrase_sets] for one in phrase_sets])
    i, j = np.nonzero(is_different_pair)
    return zip(i.tolist(), (own_agreement > other_agreement)[i, j].tolist(), strict=True)


def _agrees_better(record: Record, control_record: Record) -> bool:
    """Return whether a prediction agrees better with the ground truth than the prediction for a moved prompt."""
    task = record["task"]
    if _has_true_attributes([record], task):
        truth = np.array(_get_true_attributes(record, task))
        agreement, control_agreement = (
            int((np.array(_parse_stated_attributes(each, task)) == truth).sum()) for each in (record, control_record)
        )
    else:
        phrases = record["truth"]["phrases"]
        agreement, control_agreement = _compute_word_overlap([record["caption"], control_record["caption"]], [phrases])[
            :, 0
        ].tolist()
    return agreement > control_agreement


def _has_true_attributes(regions: Sequence[Record], task: str) -> bool:
    needs = [f"truth.attributes.{fact}" for fact in ATTRIBUTES]
    return task == "recognition" or len(filter_records(regions, needs)) == len(regions)


def _get_true_attributes(record: Record, task: str) -> tuple[str, ...]:
    if task == "recognition":
        return (normalize_text(record["truth"]["name"]),)
    return tuple(record["truth"]["attributes"][fact] for fact in ATTRIBUTES)


def _parse_stated_attributes(record: Record, task: str) -> tuple[str, ...]:
    if task == "recognition":
        return (normalize_text(record["caption"]),)
    statement = parse_statement(record["caption"]) or Statement()
    return tuple(getattr(statement, fact) or "" for fact in ATTRIBUTES)


def _compute_word_overlap(captions: Sequence[str], phrases: Sequence[Sequence[str]]) -> np.ndarray:
    """Return (A, T) word F-measures of A captions with the closest phrase of each of T regions."""
    caption_words = [frozenset(WORD_PATTERN.findall(caption.lower())) for caption in captions]
    phrase_words = [[frozenset(WORD_PATTERN.findall(phrase.lower())) for phrase in each] for each in phrases]
    word_index = {
        word: index
        for index, word in enumerate({word for each in chain(caption_words, *phrase_words) for word in each})
    }
    caption_vectors = _make_word_vectors(caption_words, word_index)  # (A, V)
    f_measures = np.zeros((len(captions), len(phrases)))
    for column, each in enumerate(phrase_words):
        phrase_vectors = _make_word_vectors(each, word_index)  # (P, V)
        sizes = caption_vectors.sum(1)[:, None] + phrase_vectors.sum(1)
        f_measures[:, column] = (2 * caption_vectors @ phrase_vectors.T / np.maximum(sizes, 1)).max(1)
    return f_measures


def _make_word_vectors(word_sets: Sequence[frozenset[str]], word_index: dict[str, int]) -> np.ndarray:
    vectors = np.zeros((len(word_sets), len(word_index)))
    for row, each in enumerate(word_sets):
        vectors[row, [word_index[word] for word in each]] = 1
    return vectors
