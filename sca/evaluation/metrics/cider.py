"""Consensus with what people say, by n-grams weighted by how rare they are (CIDEr, arXiv 1411.5726)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from importlib.metadata import version

import numpy as np
from sca_registry.contracts import MetricOutput

from sca.evaluation.records import Record
from sca.evaluation.scores import from_means
from sca.evaluation.texts import NEEDS, pairs

LONGEST = 4
ALONE = "not a number for a single region: how rare an n-gram is takes the references of at least two"


class CiderD:
    """CIDEr-D, the variant with clipped counts and a penalty for another length (sigma 6), times 10 by its definition:
    a perfect caption has at most 10, and papers print that times 10 once more.

    How rare an n-gram is comes from the references that are evaluated: of a single region the score is NaN. For
    intervals it is held fixed.
    """

    needs = NEEDS

    def __init__(self, references: str = "all", tokenizer: str | None = None):
        self.references, self.tokenizer = references, tokenizer

    @property
    def implementation(self) -> str:
        return f"pycocoevalcap {version('pycocoevalcap')}"

    def __call__(self, records: Sequence[Record]) -> MetricOutput:
        from pycocoevalcap.cider.cider_scorer import CiderScorer

        about, captions, references = pairs(records, "cider-d", self.references, self.tokenizer)
        if len(about) < 2:
            return _undefined("cider-d", about)
        scorer = CiderScorer()
        for caption, each in zip(captions, references, strict=True):
            scorer += (caption, each)
        _, values = scorer.compute_score()
        return from_means({"cider-d": np.asarray(values)}, about)


class Cider:
    """CIDEr as first defined: cosines of n-grams of each length from 1 to 4, averaged over lengths and references,
    times 10; without stemming. Nearly every published "CIDEr" is CIDEr-D: see `cider-d`.
    """

    needs = NEEDS
    implementation = "sca"

    def __init__(self, references: str = "all", tokenizer: str | None = None):
        self.references, self.tokenizer = references, tokenizer

    def __call__(self, records: Sequence[Record]) -> MetricOutput:
        about, captions, references = pairs(records, "cider", self.references, self.tokenizer)
        if len(about) < 2:
            return _undefined("cider", about)
        counted = [[_ngrams(text) for text in each] for each in references]
        found_in = Counter(ngram for each in counted for ngram in {ngram for counts in each for ngram in counts})
        everything = np.log(len(about))
        values = np.empty(len(about))
        for row, (caption, each) in enumerate(zip(captions, counted, strict=True)):
            own = _weighted(_ngrams(caption), found_in, everything)
            others = [_weighted(counts, found_in, everything) for counts in each]
            values[row] = 10 * np.mean([_cosine(a, b) for other in others for a, b in zip(own, other, strict=True)])
        return from_means({"cider": values}, about)


def _undefined(name: str, about: Sequence[Record]) -> MetricOutput:
    """NaN, with the reason: the logarithm of one region is 0, and so would be the weight of every n-gram."""
    return from_means({name: np.full(len(about), np.nan)}, about)._replace(notes={name: ALONE})


def _ngrams(text: str) -> Counter[tuple[str, ...]]:
    words = text.split()
    return Counter(
        tuple(words[start : start + length])
        for length in range(1, LONGEST + 1)
        for start in range(len(words) - length + 1)
    )


def _weighted(counts: Counter, found_in: Counter, everything: float) -> list[dict[tuple[str, ...], float]]:
    """Counts of n-grams by length, each times the log of the share of regions that it is not found in."""
    vectors: list[dict[tuple[str, ...], float]] = [{} for _ in range(LONGEST)]
    for ngram, count in counts.items():
        vectors[len(ngram) - 1][ngram] = count * (everything - np.log(max(1, found_in[ngram])))
    return vectors


def _cosine(first: dict, second: dict) -> float:
    norms = np.sqrt(sum(v * v for v in first.values())) * np.sqrt(sum(v * v for v in second.values()))
    return sum(value * second.get(ngram, 0.0) for ngram, value in first.items()) / norms if norms else 0.0
