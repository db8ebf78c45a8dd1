"""Similarity of predicted class names and true ones, for open vocabularies, as in Osprey (arXiv 2312.10032).

Osprey, Describe Anything and Perceive Anything report both scores for the names of LVIS and PACO: the cosine similarity
of sentence embeddings of all-MiniLM-L6-v2, and the "semantic IoU", the number of words that both names have divided by
the number of words of either. Source: `osprey/eval/lvis_paco_eval.py` in https://github.com/CircleRadon/Osprey. As
there, only the text after the first colon of a prediction up to the next one is read, periods, commas and colons are
spaces, and so are the underscores and colons of true names; case is ignored for the IoU.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from sca_registry.contracts import MetricOutput

from sca.evaluation.metric_output import make_mean_output
from sca.evaluation.metrics.semantic_similarity import SentenceEncoder
from sca.evaluation.records import Record, require_records

NAME_NEEDS = ("task=recognition", "caption", "truth.name")
PREDICTION_PUNCTUATION = re.compile(r"[.:,]")
NAME_PUNCTUATION = re.compile(r"[_:]")


class NameIou:
    """Words that the predicted and the true name share, divided by the words of either; averaged over regions."""

    required_fields: tuple[str, ...] = NAME_NEEDS

    def __call__(self, records: Sequence[Record]) -> MetricOutput:
        scored_records = require_records(records, self.required_fields, "name-iou")
        values = [_compute_word_iou(*_clean_names(record)) for record in scored_records]
        return make_mean_output({"name-iou": np.array(values)}, scored_records)


class NameSimilarity:
    """Cosine similarity of the embeddings of the predicted and the true name, averaged over regions.

    Args:
        model: Folder of a sentence encoder, see `SentenceEncoder`.
        batch_size: Texts per batch.
        device: A torch device.

    Raises:
        ValueError: No sentence encoder was found.
    """

    required_fields: tuple[str, ...] = NAME_NEEDS

    def __init__(self, model: str | None = None, batch_size: int = 256, device: str = "cpu"):
        self.encoder: SentenceEncoder = SentenceEncoder(model, "name-similarity.model", batch_size, device)
        self.implementation: str = f"sca, {self.encoder.description}"

    def __call__(self, records: Sequence[Record]) -> MetricOutput:
        scored_records = require_records(records, self.required_fields, "name-similarity")
        pairs = [_clean_names(record) for record in scored_records]
        texts = list(dict.fromkeys(text for pair in pairs for text in pair))
        embeddings = dict(zip(texts, self.encoder.embed_texts(texts), strict=True))
        values = [float(embeddings[prediction] @ embeddings[name]) for prediction, name in pairs]
        return make_mean_output({"name-similarity": np.array(values)}, scored_records)


def _clean_names(record: Record) -> tuple[str, str]:
    """Return the predicted and the true name as Osprey compares them."""
    prediction = record["caption"].strip()
    if ":" in prediction:
        prediction = prediction.split(":")[1]
    return PREDICTION_PUNCTUATION.sub(" ", prediction), NAME_PUNCTUATION.sub(" ", record["truth"]["name"])


def _compute_word_iou(prediction: str, name: str) -> float:
    words, true_words = set(prediction.lower().split()), set(name.lower().split())
    union = words | true_words
    return len(words & true_words) / len(union) if union else 0.0
