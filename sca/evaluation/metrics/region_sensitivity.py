"""Whether the answer follows the prompt when nothing but the prompt moves."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain

import numpy as np
from sca_registry.contracts import TASKS, MetricOutput

from sca.data.scenes import Statement, parse
from sca.evaluation.metrics.attributes import FACTS
from sca.evaluation.records import Record, by_image, meeting, normalised, places, require, share
from sca.evaluation.texts import WORD

MOVED = ("wrong-region", "shuffled-mask")  # controls in which the prompt is another and the truth stays


class RegionSensitivity:
    """The share of ordered pairs (i, j) of regions of one image in which the answer for i is about i and not about j.

    A pair counts if its two truths differ, and is followed if the answer for i agrees better with i's truth than with
    j's; a tie is not. So an answer that is the same for the whole image follows at most half of the pairs. `pairs` says
    how many were compared. Where the predictions have rows with moved prompts (the controls wrong-region and
    shuffled-mask), the share of regions is given, by the control's name, whose own prompt had an answer that agrees
    better with the truth than the answer to the moved one.

    Agreement: for recognition, whether the name is right. For captions of drawn scenes, how many of colour, form, size
    and texture are right (read by `sca.data.scenes.parse`), of those in which the two truths differ. For other
    captions, the F-measure of the words with those of the closest phrase.
    """

    needs = (
        "caption",
        "truth.name or task=caption",
        "truth.phrases or truth.attributes.colour or task=recognition",
    )
    whole = True  # controls, too

    def __call__(self, records: Sequence[Record]) -> MetricOutput:
        answers = require(records, self.needs, "region-sensitivity")
        own = [record for record in answers if record.get("control") is None]
        first: list[Record] = []  # i of each pair, and of each region that was asked otherwise
        kind: list[str] = []
        followed: list[bool] = []
        for task in reversed(TASKS):
            for regions in by_image(record for record in own if record["task"] == task).values():
                for i, better in _pairs(regions, task):
                    first.append(regions[i])
                    kind.append(task)
                    followed.append(better)
            for control in MOVED:
                moved = {
                    _key(each): each for each in answers if each.get("control") == control and each["task"] == task
                }
                for record in own:
                    if record["task"] == task and _key(record) in moved:
                        first.append(record)
                        kind.append(f"{task}/{control}")
                        followed.append(_better(record, moved[_key(record)]))
        kinds, right = np.array(kind, dtype=str), np.array(followed, dtype=float)
        names = [f"{task}{rest}" for task in reversed(TASKS) for rest in ("", *(f"/{control}" for control in MOVED))]
        asked = {record["task"] for record in own}
        each = {
            f"region-sensitivity/{name}": np.where(kinds == name, right, np.nan)
            for name in names
            if (kinds == name).any() or name in asked
        }
        total: dict[str, float] = {}
        for name, values in each.items():
            total[name] = share(values)
            if name.count("/") == 1:
                total[f"{name}/pairs"] = int((~np.isnan(values)).sum())
        return MetricOutput(total, each | places(first))


def _key(record: Record) -> tuple[int, int]:
    return record["image_id"], record["region_id"]


def _pairs(regions: Sequence[Record], task: str) -> Iterable[tuple[int, bool]]:
    """For each pair whose truths differ, the place of i and whether its answer is about i."""
    if _has_facts(regions, task):
        truth = np.array([_facts(record, task) for record in regions])  # (R, F) text
        answer = np.array([_said(record, task) for record in regions])  # (R, F) text, empty where nothing is said
        different = truth[:, None] != truth[None]  # (R, R, F)
        own = (different & (answer == truth)[:, None]).sum(2)  # (R, R) facts of i that the answer for i has right
        others = (different & (answer[:, None] == truth[None])).sum(2)  # (R, R) facts of j in the answer for i
        differ = different.any(2)
    else:
        told = [frozenset(map(normalised, record["truth"]["phrases"])) for record in regions]
        others = _closeness(
            [record["caption"] for record in regions], [record["truth"]["phrases"] for record in regions]
        )
        own = np.repeat(others.diagonal()[:, None], len(regions), axis=1)
        differ = np.array([[one != other for other in told] for one in told])
    i, j = np.nonzero(differ)
    return zip(i.tolist(), (own > others)[i, j].tolist(), strict=True)


def _better(record: Record, moved: Record) -> bool:
    """Whether an answer agrees better with the truth than one that was given to another prompt."""
    task = record["task"]
    if _has_facts([record], task):
        truth = np.array(_facts(record, task))
        own, other = (int((np.array(_said(each, task)) == truth).sum()) for each in (record, moved))
    else:
        phrases = record["truth"]["phrases"]
        own, other = _closeness([record["caption"], moved["caption"]], [phrases])[:, 0].tolist()
    return own > other


def _has_facts(regions: Sequence[Record], task: str) -> bool:
    needs = [f"truth.attributes.{fact}" for fact in FACTS]
    return task == "recognition" or len(meeting(regions, needs)) == len(regions)


def _facts(record: Record, task: str) -> tuple[str, ...]:
    if task == "recognition":
        return (normalised(record["truth"]["name"]),)
    return tuple(record["truth"]["attributes"][fact] for fact in FACTS)


def _said(record: Record, task: str) -> tuple[str, ...]:
    if task == "recognition":
        return (normalised(record["caption"]),)
    statement = parse(record["caption"]) or Statement()
    return tuple(getattr(statement, fact) or "" for fact in FACTS)


def _closeness(captions: Sequence[str], phrases: Sequence[Sequence[str]]) -> np.ndarray:
    """(A, T) F-measures of the words of A captions with those of the closest of T regions' phrases."""
    said = [frozenset(WORD.findall(caption.lower())) for caption in captions]
    true = [[frozenset(WORD.findall(phrase.lower())) for phrase in each] for each in phrases]
    words = {word: place for place, word in enumerate({word for each in chain(said, *true) for word in each})}
    rows = _marked(said, words)  # (A, V)
    found = np.zeros((len(captions), len(phrases)))
    for column, each in enumerate(true):
        marks = _marked(each, words)  # (P, V)
        sizes = rows.sum(1)[:, None] + marks.sum(1)
        found[:, column] = (2 * rows @ marks.T / np.maximum(sizes, 1)).max(1)
    return found


def _marked(sets: Sequence[frozenset[str]], words: dict[str, int]) -> np.ndarray:
    marks = np.zeros((len(sets), len(words)))
    for row, each in enumerate(sets):
        marks[row, [words[word] for word in each]] = 1
    return marks
