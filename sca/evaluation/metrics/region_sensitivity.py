"""Whether the answer follows the prompt when nothing but the prompt moves."""

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

PROMPT_CONTROLS = ("wrong-region", "shuffled-mask")  # controls in which the prompt is another and the truth stays


class RegionSensitivity:
    """The share of ordered pairs (i, j) of regions of one image in which the answer for i is about i and not about j.

    A pair counts if its two truths differ, and is followed if the answer for i agrees better with i's truth than with
    j's; a tie is not. So an answer that is the same for the whole image follows at most half of the pairs. `pairs` says
    how many were compared. Where the predictions have rows with moved prompts (the controls wrong-region and
    shuffled-mask), the share of regions is given, by the control's name, whose own prompt had an answer that agrees
    better with the truth than the answer to the moved one.

    Agreement: for recognition, whether the name is right. For captions of drawn scenes, how many of color, form, size
    and texture are right (read by
    `sca.data.scenes.parse_statement`), of those in which the two truths differ. For other
    captions, the F-measure of the words with those of the closest phrase.
    """

    needs = (
        "caption",
        "truth.name or task=caption",
        "truth.phrases or truth.attributes.color or task=recognition",
    )
    whole = True  # controls, too

    def __call__(self, records: Sequence[Record]) -> MetricOutput:
        scored_records = require_records(records, self.needs, "region-sensitivity")
        uncontrolled_records = [record for record in scored_records if record.get("control") is None]
        compared_records: list[Record] = []  # i of each pair, and of each region that was asked otherwise
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
    """For each pair whose truths differ, the place of i and whether its answer is about i."""
    if _has_true_attributes(regions, task):
        truth = np.array([_get_true_attributes(record, task) for record in regions])  # (R, F) text
        stated = np.array(
            [_parse_stated_attributes(record, task) for record in regions]
        )  # (R, F) text, empty where nothing is said
        different = truth[:, None] != truth[None]  # (R, R, F)
        own_agreement = (different & (stated == truth)[:, None]).sum(
            2
        )  # (R, R) facts of i that the answer for i has right
        other_agreement = (different & (stated[:, None] == truth[None])).sum(2)  # (R, R) facts of j in the answer for i
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
    """Whether an answer agrees better with the truth than one that was given to another prompt."""
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
    """(A, T) F-measures of the words of A captions with those of the closest of T regions' phrases."""
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
