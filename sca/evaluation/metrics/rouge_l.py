"""Longest common subsequence of words (ROUGE-L, ACL 2004)."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version

import numpy as np
from sca_registry.contracts import MetricOutput

from sca.evaluation.metric_output import make_mean_output
from sca.evaluation.records import Record
from sca.evaluation.tokenization import CAPTION_NEEDS, tokenize_pairs


class RougeL:
    """F-measure (beta 1.2) in [0, 1] of the best precision and the best recall over the references.

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
        from pycocoevalcap.rouge.rouge import Rouge

        scored_records, captions, references = tokenize_pairs(records, "rouge-l", self.references, self.tokenizer)
        score = Rouge().calc_score
        values = [score([caption], each) for caption, each in zip(captions, references, strict=True)]
        return make_mean_output({"rouge-l": np.array(values)}, scored_records)
