"""N-gram precision with a brevity penalty (BLEU, ACL 2002)."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version

import numpy as np
from sca_registry.contracts import MetricOutput

from sca.evaluation.records import Record, collect_region_ids
from sca.evaluation.tokenization import CAPTION_NEEDS, tokenize_pairs

MAX_NGRAM = 4
DENOMINATOR_EPSILON, NUMERATOR_EPSILON = 1e-9, 1e-15  # avoid division by zero, as in pycocoevalcap


class Bleu:
    """Corpus-level BLEU-1 to BLEU-4 in [0, 1], with the closest reference length.

    The arrays of `per_record` are the scores of single captions, whose mean is not the corpus score.

    Args:
        references: "all" or only the "first" reference per region.
        tokenizer: One of `sca.evaluation.tokenization.TOKENIZERS`. Defaults to the best available.
    """

    required_fields = CAPTION_NEEDS

    def __init__(self, references: str = "all", tokenizer: str | None = None):
        self.references = references
        self.tokenizer = tokenizer

    @property
    def implementation(self) -> str:
        """Version of the implementation."""
        return f"pycocoevalcap {version('pycocoevalcap')}"

    def __call__(self, records: Sequence[Record]) -> MetricOutput:
        from pycocoevalcap.bleu.bleu_scorer import BleuScorer

        scored_records, captions, references = tokenize_pairs(records, "bleu", self.references, self.tokenizer)
        scorer = BleuScorer(n=MAX_NGRAM)
        for caption, each in zip(captions, references, strict=True):
            scorer += (caption, each)
        corpus_scores, caption_scores = scorer.compute_score(option="closest", verbose=0)
        rows = np.array([_flatten_counts(counts) for counts in scorer.ctest], float)  # (R, 2 + 2 * 4)
        total = {f"bleu-{n + 1}": float(value) for n, value in enumerate(corpus_scores)}
        per_record = {f"bleu-{n + 1}": np.array(values) for n, values in enumerate(caption_scores)}
        statistics = {f"bleu-{n + 1}": (rows, _make_bleu_function(n + 1)) for n in range(MAX_NGRAM)}
        return MetricOutput(total, per_record | collect_region_ids(scored_records), statistics)


def _flatten_counts(counts: dict) -> list[int]:
    length = counts["testlen"]
    closest_length = min((abs(other - length), other) for other in counts["reflen"])[1]
    return [length, closest_length, *counts["correct"], *counts["guess"]]


def _make_bleu_function(max_ngram: int):
    def compute_bleu(sums: np.ndarray) -> np.ndarray:
        length, closest_length = sums[..., 0], sums[..., 1]
        precision = (sums[..., 2 : 2 + max_ngram] + NUMERATOR_EPSILON) / (
            sums[..., 2 + MAX_NGRAM : 2 + MAX_NGRAM + max_ngram] + DENOMINATOR_EPSILON
        )
        ratio = (length + NUMERATOR_EPSILON) / (closest_length + DENOMINATOR_EPSILON)
        brevity_penalty = np.where(ratio < 1, np.exp(1 - 1 / np.minimum(ratio, 1)), 1.0)
        return precision.prod(-1) ** (1 / max_ngram) * brevity_penalty

    return compute_bleu
