"""Precision of n-grams, with a penalty for captions that are too short (BLEU, ACL 2002)."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version

import numpy as np
from sca_registry.contracts import MetricOutput

from sca.evaluation.records import Record, places
from sca.evaluation.texts import NEEDS, pairs

LONGEST = 4
SMALL, TINY = 1e-9, 1e-15  # as pycocoevalcap keeps from dividing by zero


class Bleu:
    """BLEU-1 to BLEU-4 of all captions together, with the length of the closest reference. In 0..1.

    The arrays of `each` are those of single captions, whose mean is not the score of all.
    """

    needs = NEEDS

    def __init__(self, references: str = "all", tokenizer: str | None = None):
        self.references, self.tokenizer = references, tokenizer

    @property
    def implementation(self) -> str:
        return f"pycocoevalcap {version('pycocoevalcap')}"

    def __call__(self, records: Sequence[Record]) -> MetricOutput:
        from pycocoevalcap.bleu.bleu_scorer import BleuScorer

        about, captions, references = pairs(records, "bleu", self.references, self.tokenizer)
        scorer = BleuScorer(n=LONGEST)
        for caption, each in zip(captions, references, strict=True):
            scorer += (caption, each)
        whole, single = scorer.compute_score(option="closest", verbose=0)
        rows = np.array([_counts(counts) for counts in scorer.ctest], float)  # (R, 2 + 2 * 4)
        total = {f"bleu-{n + 1}": float(value) for n, value in enumerate(whole)}
        each = {f"bleu-{n + 1}": np.array(values) for n, values in enumerate(single)}
        sums = {f"bleu-{n + 1}": (rows, _score(n + 1)) for n in range(LONGEST)}
        return MetricOutput(total, each | places(about), sums)


def _counts(counts: dict) -> list[int]:
    length = counts["testlen"]
    closest = min((abs(other - length), other) for other in counts["reflen"])[1]
    return [length, closest, *counts["correct"], *counts["guess"]]


def _score(longest: int):
    def bleu(sums: np.ndarray) -> np.ndarray:
        length, closest = sums[..., 0], sums[..., 1]
        precision = (sums[..., 2 : 2 + longest] + TINY) / (sums[..., 2 + LONGEST : 2 + LONGEST + longest] + SMALL)
        ratio = (length + TINY) / (closest + SMALL)
        short = np.where(ratio < 1, np.exp(1 - 1 / np.minimum(ratio, 1)), 1.0)
        return precision.prod(-1) ** (1 / longest) * short

    return bleu
