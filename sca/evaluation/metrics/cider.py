"""Consensus with references by n-grams weighted by rarity (CIDEr, arXiv 1411.5726)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from importlib.metadata import version

import numpy as np
from sca_registry.contracts import MetricOutput

from sca.evaluation.metric_output import make_mean_output
from sca.evaluation.records import Record
from sca.evaluation.tokenization import CAPTION_NEEDS, tokenize_pairs

MAX_NGRAM = 4
SINGLE_REGION_NOTE = "undefined for a single region: n-gram weights need the references of at least two regions"


class CiderD:
    """CIDEr-D: CIDEr with clipped counts and a length penalty (sigma 6), times 10 as defined.

    A perfect caption scores at most 10. Papers print this value times 100, such as 149.8 for 1.498. Document
    frequencies come from the evaluated references, so the score of a single region is NaN. The bootstrap keeps them
    fixed.

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
        from pycocoevalcap.cider.cider_scorer import CiderScorer

        scored_records, captions, references = tokenize_pairs(records, "cider-d", self.references, self.tokenizer)
        if len(scored_records) < 2:
            return _make_undefined_output("cider-d", scored_records)
        scorer = CiderScorer()
        for caption, each in zip(captions, references, strict=True):
            scorer += (caption, each)
        _, values = scorer.compute_score()
        return make_mean_output({"cider-d": np.asarray(values)}, scored_records)


class Cider:
    """Original CIDEr: cosine similarity of 1- to 4-grams, averaged over n and references, times 10, without stemming.

    Nearly every published "CIDEr" is CIDEr-D, see `cider-d`.

    Args:
        references: "all" or only the "first" reference per region.
        tokenizer: One of `sca.evaluation.tokenization.TOKENIZERS`. Defaults to the best available.
    """

    required_fields = CAPTION_NEEDS
    implementation = "sca"

    def __init__(self, references: str = "all", tokenizer: str | None = None):
        self.references = references
        self.tokenizer = tokenizer

    def __call__(self, records: Sequence[Record]) -> MetricOutput:
        scored_records, captions, references = tokenize_pairs(records, "cider", self.references, self.tokenizer)
        if len(scored_records) < 2:
            return _make_undefined_output("cider", scored_records)
        reference_counts = [[_count_ngrams(text) for text in each] for each in references]
        document_frequency = Counter(
            ngram for each in reference_counts for ngram in {ngram for counts in each for ngram in counts}
        )
        log_num_regions = np.log(len(scored_records))
        values = np.empty(len(scored_records))
        for row, (caption, each) in enumerate(zip(captions, reference_counts, strict=True)):
            caption_vectors = _weight_ngrams(_count_ngrams(caption), document_frequency, log_num_regions)
            reference_vectors = [_weight_ngrams(counts, document_frequency, log_num_regions) for counts in each]
            values[row] = 10 * np.mean(
                [
                    _compute_cosine(a, b)
                    for other in reference_vectors
                    for a, b in zip(caption_vectors, other, strict=True)
                ]
            )
        return make_mean_output({"cider": values}, scored_records)


def _make_undefined_output(name: str, scored_records: Sequence[Record]) -> MetricOutput:
    """Return NaN with the reason: with a single region, every n-gram weight would be log 1 = 0."""
    return make_mean_output({name: np.full(len(scored_records), np.nan)}, scored_records)._replace(
        notes={name: SINGLE_REGION_NOTE}
    )


def _count_ngrams(text: str) -> Counter[tuple[str, ...]]:
    words = text.split()
    return Counter(
        tuple(words[start : start + length])
        for length in range(1, MAX_NGRAM + 1)
        for start in range(len(words) - length + 1)
    )


def _weight_ngrams(
    counts: Counter, document_frequency: Counter, log_num_regions: float
) -> list[dict[tuple[str, ...], float]]:
    """Return TF-IDF weights of n-grams, one dict per n."""
    vectors: list[dict[tuple[str, ...], float]] = [{} for _ in range(MAX_NGRAM)]
    for ngram, count in counts.items():
        vectors[len(ngram) - 1][ngram] = count * (log_num_regions - np.log(max(1, document_frequency[ngram])))
    return vectors


def _compute_cosine(first: dict, second: dict) -> float:
    norms = np.sqrt(sum(v * v for v in first.values())) * np.sqrt(sum(v * v for v in second.values()))
    return sum(value * second.get(ngram, 0.0) for ngram, value in first.items()) / norms if norms else 0.0
