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

from sca.evaluation.metrics.meteor import align_captions, compute_meteor
from sca.evaluation.records import Record, require_records
from sca.evaluation.tokenization import choose_default_tokenizer, find_java_problem, tokenize_texts

IOU_THRESHOLDS = (0.3, 0.4, 0.5, 0.6, 0.7)
CAPTION_THRESHOLDS = (0.0, 0.05, 0.1, 0.15, 0.2, 0.25)
MERGE_IOU = 0.7
NUM_RECALLS = 101

CaptionScorer = Callable[[Sequence[str], Sequence[Sequence[str]]], np.ndarray]


class MatchedProposals(NamedTuple):
    """Proposals of one image after each was given its true box, best score first."""

    scores: np.ndarray  # (P,)
    ious: np.ndarray  # (P,) with the true box it overlaps most, 0 where there is none
    is_first: np.ndarray  # (P,) bool: no better proposal was given the same box
    box_index: np.ndarray  # (P,) the place of that box among the merged ones, -1 where there is none


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
        image_records = require_records(records, self.needs, "densecap-map")
        matched, captions, references, num_true_boxes = [], [], [], 0
        for image_record in image_records:
            true_boxes, phrases = merge_true_boxes(
                np.array([region["box"] for region in image_record["truth"]["regions"]], float).reshape(-1, 4),
                [region["phrases"] for region in image_record["truth"]["regions"]],
            )
            num_true_boxes += len(true_boxes)
            proposals = sorted(image_record["proposals"], key=lambda each: -each["score"])
            image_matches = match_proposals(
                np.array([each["box"] for each in proposals], float).reshape(-1, 4),
                np.array([each["score"] for each in proposals], float),
                true_boxes,
            )
            matched.append(image_matches)
            captions += [each["caption"] for each in proposals]
            references += [phrases[box] if box >= 0 else [] for box in image_matches.box_index]
        scores, ious, is_first, box = (np.concatenate(values) for values in zip(*matched, strict=True))
        scored_indices = np.flatnonzero(is_first & (ious > IOU_THRESHOLDS[0]))  # the others are wrong whatever they say
        total: dict[str, float] = {}
        for name, score_captions in self._list_caption_scorers():
            caption_scores = np.full(len(scores), -1.0)
            caption_scores[scored_indices] = self._score_tokenized(score_captions, captions, references, scored_indices)
            total[name] = compute_mean_precision(scores, ious, is_first, caption_scores, num_true_boxes)
        box_caption_scores = np.where(box >= 0, 1.0, -1.0)
        total["densecap-map/boxes"] = compute_mean_precision(
            scores, ious, is_first, box_caption_scores, num_true_boxes, caption_thresholds=(0.0,)
        )
        return MetricOutput(total | {"densecap-map/proposals": len(scores), "densecap-map/true-boxes": num_true_boxes})

    def _list_caption_scorers(self) -> list[tuple[str, CaptionScorer]]:
        scorers: list[tuple[str, CaptionScorer]] = [("densecap-map/rouge-l", _compute_rouge_l)]
        if not find_java_problem():
            scorers.insert(
                0, ("densecap-map", lambda captions, references: compute_meteor(align_captions(captions, references)))
            )
        return scorers

    def _score_tokenized(
        self,
        score_captions: CaptionScorer,
        captions: Sequence[str],
        references: Sequence[Sequence[str]],
        indices: np.ndarray,
    ) -> np.ndarray:
        if not len(indices):
            return np.empty(0)
        counts = [len(references[row]) for row in indices]
        texts = [captions[row] for row in indices] + [phrase for row in indices for phrase in references[row]]
        tokenized = tokenize_texts(tuple(texts), self.tokenizer or choose_default_tokenizer())
        tokenized_phrases = iter(tokenized[len(indices) :])
        return score_captions(
            tokenized[: len(indices)], [[next(tokenized_phrases) for _ in range(count)] for count in counts]
        )


def merge_true_boxes(boxes: np.ndarray, phrases: Sequence[Sequence[str]]) -> tuple[np.ndarray, list[list[str]]]:
    """True boxes (T, 4) and their phrases -> merged boxes (G, 4), the means of each group, and the phrases of all.

    Of the boxes that are left, the one with the most others overlapping it by `MERGE_IOU` is taken together with them.
    """
    is_close = compute_pixel_ious(boxes, boxes) >= MERGE_IOU
    groups = []
    is_left = np.ones(len(boxes), bool)
    while is_left.any():
        neighbors = is_close & is_left & is_left[:, None]
        group = neighbors[neighbors.sum(1).argmax()]
        groups.append(np.flatnonzero(group))
        is_left &= ~group
    merged = np.array([boxes[group].mean(0) for group in groups]).reshape(-1, 4)
    return merged, [[phrase for member in group for phrase in phrases[member]] for group in groups]


def match_proposals(boxes: np.ndarray, scores: np.ndarray, true_boxes: np.ndarray) -> MatchedProposals:
    """Proposals (P, 4), best first, to true boxes (G, 4)."""
    if not len(true_boxes) or not len(boxes):
        zeros = np.zeros(len(boxes))
        return MatchedProposals(scores, zeros, zeros.astype(bool), np.full(len(boxes), -1))
    ious = compute_pixel_ious(boxes, true_boxes)  # (P, G)
    best_box = ious.argmax(1)
    is_first = np.zeros(len(boxes), bool)
    is_first[np.unique(best_box, return_index=True)[1]] = True
    return MatchedProposals(scores, ious.max(1), is_first, best_box)


def compute_pixel_ious(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """(P, 4) and (G, 4) boxes x1 y1 x2 y2 with the last pixel inside -> (P, G) intersection over union."""
    low = np.maximum(first[:, None, :2], second[None, :, :2])
    high = np.minimum(first[:, None, 2:], second[None, :, 2:])
    intersection = np.maximum(0, high - low + 1).prod(2)
    areas = [(boxes[:, 2:] - boxes[:, :2] + 1).prod(1) for boxes in (first, second)]
    return intersection / (areas[0][:, None] + areas[1] - intersection)


def compute_mean_precision(
    scores: np.ndarray,
    ious: np.ndarray,
    is_first: np.ndarray,
    caption_scores: np.ndarray,
    num_true_boxes: int,
    caption_thresholds: Sequence[float] = CAPTION_THRESHOLDS,
) -> float:
    """The mean over all pairs of thresholds of average precision over all proposals (P,). NaN without true boxes."""
    if not num_true_boxes:
        return float("nan")
    order = np.argsort(-scores, kind="stable")
    ious, is_first, caption_scores = ious[order], is_first[order], caption_scores[order]
    precisions = [
        _compute_average_precision(
            is_first & (ious > iou_threshold) & (caption_scores > caption_threshold), num_true_boxes
        )
        for iou_threshold in IOU_THRESHOLDS
        for caption_threshold in caption_thresholds
    ]
    return float(np.mean(precisions))


def _compute_average_precision(is_correct: np.ndarray, num_true_boxes: int) -> float:
    """Of (P,) verdicts, best score first: the greatest precision at each of 101 recalls or above, averaged."""
    hits = np.flatnonzero(is_correct)
    if not len(hits):
        return 0.0
    num_found = np.arange(1, len(hits) + 1)
    best_precision = np.maximum.accumulate((num_found / (hits + 1))[::-1])[
        ::-1
    ]  # precision is greatest where something was found
    recall_index = np.searchsorted(num_found / num_true_boxes, np.linspace(0, 1, NUM_RECALLS), side="left")
    return float(np.append(best_precision, 0.0)[recall_index].mean())


def _compute_rouge_l(captions: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    from pycocoevalcap.rouge.rouge import Rouge

    calc_score = Rouge().calc_score
    return np.array([calc_score([caption], list(each)) for caption, each in zip(captions, references, strict=True)])
