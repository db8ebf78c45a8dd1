"""Mean average precision of dense captioning (DenseCap, arXiv 1511.07571).

- Ground-truth boxes with an IoU of 0.7 or more are merged, with the phrases of all.
- Each proposal, best score first, is assigned to the ground-truth box that it overlaps most; each box accepts one
  proposal.
- A proposal is correct at a pair of thresholds if its box was unassigned and both its IoU and its caption score are
  above the thresholds.
- Average precision is sampled at 101 recalls and averaged over IoU thresholds 0.3 to 0.7 and caption thresholds 0 to
  0.25.
- Boxes are in whole pixels and include their last pixel (the +1 rule).
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
    """Proposals of one image and the ground-truth boxes assigned to them, best score first."""

    scores: np.ndarray  # (P,)
    ious: np.ndarray  # (P,) IoU with the ground-truth box that overlaps most, else 0
    is_first: np.ndarray  # (P,) bool: no better proposal was assigned to the same box
    box_index: np.ndarray  # (P,) index of that box among the merged boxes, else -1


class DenseCapMap:
    """Mean average precision of dense captioning in [0, 1]; papers print percent.

    - `densecap-map`: METEOR as the caption score, as published; omitted without Java.
    - `densecap-map/rouge-l`: ROUGE-L as the caption score, which requires no Java.
    - `densecap-map/boxes`: boxes only; captions are ignored.

    Args:
        tokenizer: One of `sca.evaluation.tokenization.TOKENIZERS`. Defaults to the best available.
    """

    required_fields: tuple[str, ...] = ("task=dense",)

    def __init__(self, tokenizer: str | None = None):
        self.tokenizer = tokenizer
        self.implementation = "sca, METEOR 1.5 of pycocoevalcap"

    def __call__(self, records: Sequence[Record]) -> MetricOutput:
        image_records = require_records(records, self.required_fields, "densecap-map")
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
        scored_indices = np.flatnonzero(is_first & (ious > IOU_THRESHOLDS[0]))  # the others are wrong for any caption
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
    """Merge ground-truth boxes that overlap by `MERGE_IOU` or more.

    Of the remaining boxes, the one with the most such neighbors is merged with them, until no box is left.

    Args:
        boxes: (T, 4) ground-truth boxes x1 y1 x2 y2.
        phrases: Phrases of each box.

    Returns:
        (G, 4) merged boxes, each the mean of its group, and the phrases of each group.
    """
    is_close = compute_pixel_ious(boxes, boxes) >= MERGE_IOU
    groups: list[np.ndarray] = []
    is_left = np.ones(len(boxes), bool)
    while is_left.any():
        neighbors = is_close & is_left & is_left[:, None]
        group = neighbors[neighbors.sum(1).argmax()]
        groups.append(np.flatnonzero(group))
        is_left &= ~group
    merged = np.array([boxes[group].mean(0) for group in groups]).reshape(-1, 4)
    return merged, [[phrase for member in group.tolist() for phrase in phrases[member]] for group in groups]


def match_proposals(boxes: np.ndarray, scores: np.ndarray, true_boxes: np.ndarray) -> MatchedProposals:
    """Assign proposals to the ground-truth boxes that they overlap most.

    Args:
        boxes: (P, 4) proposed boxes x1 y1 x2 y2, best score first.
        scores: (P,) scores.
        true_boxes: (G, 4) merged ground-truth boxes.

    Returns:
        The assignment of the proposals.
    """
    if not len(true_boxes) or not len(boxes):
        zeros = np.zeros(len(boxes))
        return MatchedProposals(scores, zeros, zeros.astype(bool), np.full(len(boxes), -1))
    ious = compute_pixel_ious(boxes, true_boxes)  # (P, G)
    best_box = ious.argmax(1)
    is_first = np.zeros(len(boxes), bool)
    is_first[np.unique(best_box, return_index=True)[1]] = True
    return MatchedProposals(scores, ious.max(1), is_first, best_box)


def compute_pixel_ious(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Compute IoUs of boxes x1 y1 x2 y2 that include their last pixel: (P, 4) and (G, 4) -> (P, G)."""
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
    """Compute the mean average precision over all pairs of thresholds.

    Args:
        scores: (P,) scores of all proposals.
        ious: (P,) IoU with the assigned ground-truth box.
        is_first: (P,) bool: no better proposal has the same box.
        caption_scores: (P,) scores of the captions.
        num_true_boxes: Merged ground-truth boxes of all images.
        caption_thresholds: Thresholds of the caption scores.

    Returns:
        The mean average precision in [0, 1]; NaN without ground-truth boxes.
    """
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
    """Average the greatest precision at or above each of 101 recalls, from (P,) bools, best score first."""
    hits = np.flatnonzero(is_correct)
    if not len(hits):
        return 0.0
    num_found = np.arange(1, len(hits) + 1)
    best_precision = np.maximum.accumulate((num_found / (hits + 1))[::-1])[::-1]  # precision peaks at the hits
    recall_index = np.searchsorted(num_found / num_true_boxes, np.linspace(0, 1, NUM_RECALLS), side="left")
    return float(np.append(best_precision, 0.0)[recall_index].mean())


def _compute_rouge_l(captions: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    from pycocoevalcap.rouge.rouge import Rouge

    calc_score = Rouge().calc_score
    return np.array([calc_score([caption], list(each)) for caption, each in zip(captions, references, strict=True)])
