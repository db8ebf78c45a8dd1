"""Whether the answer follows the prompt when nothing but the prompt moves."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from sca_registry.contracts import TASKS, Scores

from sca.data.scenes import Statement, parse
from sca.evaluation.metrics.attributes import FACTS
from sca.evaluation.records import Record, by_image, normalised, places, require, share


class RegionSensitivity:
    """The share of ordered pairs (i, j) of regions of one image in which the answer for i is about i and not about j.

    A pair counts if its two truths differ. It is followed if the answer for i agrees with i's truth on more of the
    facts in which the two differ than it agrees with j's; a tie is not. So an answer that is the same for the whole
    image follows at most half of the pairs. For captions the facts are colour, form, size and texture (read by
    `sca.data.scenes.parse`), for recognition the class name. `pairs` says how many were compared.
    """

    needs = (
        "caption",
        "truth.name or task=caption",
        *(f"truth.attributes.{fact} or task=recognition" for fact in FACTS),
    )

    def __call__(self, records: Sequence[Record]) -> Scores:
        answers = require(records, self.needs, "region-sensitivity")
        asked = [task for task in reversed(TASKS) if any(record["task"] == task for record in answers)]
        first: list[Record] = []  # i of each pair
        followed: list[bool] = []
        for task in asked:
            for regions in by_image(record for record in answers if record["task"] == task).values():
                for i, own in _pairs(regions):
                    first.append(regions[i])
                    followed.append(own)
        tasks = np.array([record["task"] for record in first], dtype=str)
        each = {f"region-sensitivity/{task}": np.where(tasks == task, followed, np.nan) for task in asked}
        total: dict[str, float] = {}
        for task, (name, values) in zip(asked, each.items(), strict=True):
            total |= {name: share(values), f"{name}/pairs": int((tasks == task).sum())}
        return Scores(total, each | places(first))


def _pairs(regions: Sequence[Record]) -> list[tuple[int, bool]]:
    """For each pair whose truths differ, the place of i and whether its answer is about i."""
    truth = np.array([_truth(record) for record in regions])  # (R, F) text
    answer = np.array([_answer(record) for record in regions])  # (R, F) text, empty where nothing is said
    differ = truth[:, None] != truth[None]  # (R, R, F)
    own = (differ & (answer == truth)[:, None]).sum(2)  # (R, R) facts of i that the answer for i has right
    others = (differ & (answer[:, None] == truth[None])).sum(2)  # (R, R) facts of j in the answer for i
    i, j = np.nonzero(differ.any(2))
    return list(zip(i.tolist(), (own > others)[i, j].tolist(), strict=True))


def _truth(record: Record) -> tuple[str, ...]:
    if record["task"] == "recognition":
        return (normalised(record["truth"]["name"]),)
    return tuple(record["truth"]["attributes"][fact] for fact in FACTS)


def _answer(record: Record) -> tuple[str, ...]:
    if record["task"] == "recognition":
        return (normalised(record["caption"]),)
    statement = parse(record["caption"]) or Statement()
    return tuple(getattr(statement, fact) or "" for fact in FACTS)
