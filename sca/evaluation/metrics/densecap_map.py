"""Mean average precision of dense captioning, by DenseCap's rule (arXiv 1511.07571).

True boxes that overlap by 0.7 or more are one, with the phrases of all. Proposals are taken by score; each is given to
the true box that it overlaps most, and each true box to one proposal. A proposal is right at a pair of thresholds if it
was given a free box and its overlap and the score of its caption are both above them. Average precision is read at 101
recalls; the mean is over overlaps 0.3 to 0.7 and caption scores 0 to 0.25. Boxes cover their last pixel, too (the +1
rule): they are whole pixels there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from sca_registry.contracts import MetricOutput

from sca.evaluation.metrics.meteor import alignments, meteor
from sca.evaluation.records import Record, require
from sca.evaluation.texts import default_tokenizer, lacks_java, tokenise

OVERLAPS = (0.3, 0.4, 0.5, 0.6, 0.7)
AGREEMENTS = (0.0, 0.05, 0.1, 0.15, 0.2, 0.25)
MERGED = 0.7
RECALLS = 101

Agree = Callable[[Sequence[str], Sequence[Sequence[str]]], np.ndarray]


class Given(NamedTuple):
    """Proposals of one image after each was given its true box, best score first."""

    scores: np.ndarray  # (P,)
    overlaps: np.ndarray  # (P,) with the true box it overlaps most, 0 where there is none
    first: np.ndarray  # (P,) bool: no better proposal was given the same box
    box: np.ndarray  # (P,) the place of that box among the merged ones, -1 where there is none


class DenseCapMap:
    """`densecap-map`: with METEOR as the score of captions, as published; left out where Java is absent.
    `densecap-map/rouge-l`: with ROUGE-L, which needs no Java. `densecap-map/boxes`: the boxes alone, whatever the
    captions say. All in 0..1; papers print percent.
    """

    needs = ("task=dense",)

    def __init__(self, tokenizer: str | None = None):
        self.tokenizer = tokenizer
        self.implementation = "sca, METEOR 1.5 of pycocoevalcap"

    def __call__(self, records: Sequence[Record]) -> MetricOutput:
        images = require(records, self.needs, "densecap-map")
        given, captions, references, boxes = [], [], [], 0
        for image in images:
            true, phrases = merge(
                np.array([region["box"] for region in image["truth"]["regions"]], float).reshape(-1, 4),
                [region["phrases"] for region in image["truth"]["regions"]],
            )
            boxes += len(true)
            proposals = sorted(image["proposals"], key=lambda each: -each["score"])
            found = give(
                np.array([each["box"] for each in proposals], float).reshape(-1, 4),
                np.array([each["score"] for each in proposals], float),
                true,
            )
            given.append(found)
            captions += [each["caption"] for each in proposals]
            references += [phrases[box] if box >= 0 else [] for box in found.box]
        scores, overlaps, first, box = (np.concatenate(values) for values in zip(*given, strict=True))
        judged = np.flatnonzero(first & (overlaps > OVERLAPS[0]))  # the others are wrong whatever they say
        total: dict[str, float] = {}
        for name, agree in self._agreements():
            agreement = np.full(len(scores), -1.0)
            agreement[judged] = self._judge(agree, captions, references, judged)
            total[name] = mean_precision(scores, overlaps, first, agreement, boxes)
        told = np.where(box >= 0, 1.0, -1.0)
        total["densecap-map/boxes"] = mean_precision(scores, overlaps, first, told, boxes, agreements=(0.0,))
        return MetricOutput(total | {"densecap-map/proposals": len(scores), "densecap-map/true-boxes": boxes})

    def _agreements(self) -> list[tuple[str, Agree]]:
        found: list[tuple[str, Agree]] = [("densecap-map/rouge-l", _rouge_l)]
        if not lacks_java():
            found.insert(0, ("densecap-map", lambda captions, references: meteor(alignments(captions, references))))
        return found

    def _judge(
        self, agree: Agree, captions: Sequence[str], references: Sequence[Sequence[str]], judged: np.ndarray
    ) -> np.ndarray:
        if not len(judged):
            return np.empty(0)
        counts = [len(references[row]) for row in judged]
        flat = [captions[row] for row in judged] + [phrase for row in judged for phrase in references[row]]
        cut = tokenise(tuple(flat), self.tokenizer or default_tokenizer())
        rest = iter(cut[len(judged) :])
        return agree(cut[: len(judged)], [[next(rest) for _ in range(count)] for count in counts])


def merge(boxes: np.ndarray, phrases: Sequence[Sequence[str]]) -> tuple[np.ndarray, list[list[str]]]:
    """True boxes (T, 4) and their phrases -> merged boxes (G, 4), the means of each group, and the phrases of all.

    Of the boxes that are left, the one with the most others overlapping it by `MERGED` is taken together with them.
    """
    close = overlap(boxes, boxes) >= MERGED
    groups = []
    left = np.ones(len(boxes), bool)
    while left.any():
        near = close & left & left[:, None]
        group = near[near.sum(1).argmax()]
        groups.append(np.flatnonzero(group))
        left &= ~group
    merged = np.array([boxes[group].mean(0) for group in groups]).reshape(-1, 4)
    return merged, [[phrase for member in group for phrase in phrases[member]] for group in groups]


def give(boxes: np.ndarray, scores: np.ndarray, true: np.ndarray) -> Given:
    """Proposals (P, 4), best first, to true boxes (G, 4)."""
    if not len(true) or not len(boxes):
        nothing = np.zeros(len(boxes))
        return Given(scores, nothing, nothing.astype(bool), np.full(len(boxes), -1))
    overlaps = overlap(boxes, true)  # (P, G)
    best = overlaps.argmax(1)
    first = np.zeros(len(boxes), bool)
    first[np.unique(best, return_index=True)[1]] = True
    return Given(scores, overlaps.max(1), first, best)


def overlap(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """(P, 4) and (G, 4) boxes x1 y1 x2 y2 with the last pixel inside -> (P, G) intersection over union."""
    low = np.maximum(first[:, None, :2], second[None, :, :2])
    high = np.minimum(first[:, None, 2:], second[None, :, 2:])
    common = np.maximum(0, high - low + 1).prod(2)
    areas = [(boxes[:, 2:] - boxes[:, :2] + 1).prod(1) for boxes in (first, second)]
    return common / (areas[0][:, None] + areas[1] - common)


def mean_precision(
    scores: np.ndarray,
    overlaps: np.ndarray,
    first: np.ndarray,
    agreement: np.ndarray,
    boxes: int,
    agreements: Sequence[float] = AGREEMENTS,
) -> float:
    """The mean over all pairs of thresholds of average precision over all proposals (P,). NaN without true boxes."""
    if not boxes:
        return float("nan")
    order = np.argsort(-scores, kind="stable")
    overlaps, first, agreement = overlaps[order], first[order], agreement[order]
    precisions = [
        _average_precision(first & (overlaps > least) & (agreement > agreed), boxes)
        for least in OVERLAPS
        for agreed in agreements
    ]
    return float(np.mean(precisions))


def _average_precision(right: np.ndarray, boxes: int) -> float:
    """Of (P,) verdicts, best score first: the greatest precision at each of 101 recalls or above, averaged."""
    hits = np.flatnonzero(right)
    if not len(hits):
        return 0.0
    found = np.arange(1, len(hits) + 1)
    best = np.maximum.accumulate((found / (hits + 1))[::-1])[::-1]  # precision is greatest where something was found
    place = np.searchsorted(found / boxes, np.linspace(0, 1, RECALLS), side="left")
    return float(np.append(best, 0.0)[place].mean())


def _rouge_l(captions: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    from pycocoevalcap.rouge.rouge import Rouge

    score = Rouge().calc_score
    return np.array([score([caption], list(each)) for caption, each in zip(captions, references, strict=True)])
