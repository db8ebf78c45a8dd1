"""Judgments of captions: how a judge answered multiple-choice questions about a caption, and the scores of DLC-Bench.

A judge reads a caption without its image. It first answers whether the caption describes an object of the true class.
It then chooses an option of each question, and every option has a score: 1 if it is correct, 0 or 0.5 if the caption
does not mention the fact, -1 if it contradicts it. Positive questions are about what the region shows, negative ones
about what it does not show. A caption of a wrong class scores at most 0 on every question.

The score of a region is the mean over its positive questions, and the mean over its negative ones; both are then
averaged over regions. A region without negative questions is omitted from their mean. Source: Describe Anything, arXiv
2504.16072, and the evaluation in https://github.com/Haochen-Wang409/Grasp-Any-Region.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from sca_registry.contracts import MetricOutput

from sca.evaluation.bootstrap import make_mean_statistics
from sca.evaluation.records import Record, collect_region_ids, compute_nanmean

RECOGNITION_KIND = "recognition"
QUESTION_KINDS = ("positive", "negative")
JUDGMENT_KINDS = (RECOGNITION_KIND, *QUESTION_KINDS)


class Judgment(NamedTuple):
    """Answer of a judge to one question about a caption.

    Attributes:
        kind: One of `JUDGMENT_KINDS`.
        score: Score of the chosen option; 1 or 0 for recognition.
    """

    kind: str
    score: float


class RegionScores(NamedTuple):
    """Scores of one caption; NaN without a question of the kind."""

    positive: float
    negative: float
    recognition: float


def score_judgments(judgments: Sequence[Judgment]) -> RegionScores:
    """Compute the scores of a caption from the judgments of its questions.

    Args:
        judgments: Judgments of one caption in any order.

    Returns:
        The mean scores by kind. If recognition failed, no question scores more than 0.
    """
    recognition = _compute_mean_score(judgments, RECOGNITION_KIND)
    limit = 0.0 if recognition < 1 else math.inf
    positive, negative = (
        _compute_mean_score([each._replace(score=min(each.score, limit)) for each in judgments], kind)
        for kind in QUESTION_KINDS
    )
    return RegionScores(positive, negative, recognition)


def make_judgment_output(records: Sequence[Record], judgments: Sequence[Sequence[Judgment]]) -> MetricOutput:
    """Build the output of a metric from the judgments of captions.

    Args:
        records: R records.
        judgments: Judgments of each record.

    Returns:
        `judge/positive`, `judge/negative`, their mean `judge/mean`, and `judge/recognition`, the fraction of captions
        whose class was recognized.
    """
    scores = [score_judgments(each) for each in judgments]
    per_record = {f"judge/{name}": np.array([getattr(each, name) for each in scores]) for name in RegionScores._fields}
    values = {name: compute_nanmean(column) for name, column in per_record.items()}
    mean = (values["judge/positive"] + values["judge/negative"]) / 2
    rows = [make_mean_statistics(per_record[f"judge/{kind}"]).rows for kind in QUESTION_KINDS]  # (R, 2) each
    notes = {f"judge/{kind}": f"no {kind} questions" for kind in QUESTION_KINDS if math.isnan(values[f"judge/{kind}"])}
    return MetricOutput(
        {"judge/mean": mean, **values},
        per_record | collect_region_ids(records),
        {"judge/mean": (np.concatenate(rows, axis=1), _compute_kind_mean)},
        notes,
    )


def _compute_mean_score(judgments: Sequence[Judgment], kind: str) -> float:
    scores = [each.score for each in judgments if each.kind == kind]
    return sum(scores) / len(scores) if scores else math.nan


def _compute_kind_mean(sums: np.ndarray) -> np.ndarray:
    """Return the mean of both kinds from the sum and the count of each, (..., 4) -> (...)."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return (sums[..., 0] / sums[..., 1] + sums[..., 2] / sums[..., 3]) / 2
