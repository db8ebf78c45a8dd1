"""Accuracy of answers to questions about regions."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from sca_registry.contracts import MetricOutput

from sca.evaluation.records import Record, collect_region_ids, normalize_text, require_records

SUMMARY_NAMES = ("accuracy", "questions")
PUNCTUATION_PATTERN = re.compile(r"[^\w\s-]|-(?!\d)")  # keeps the sign of numbers
ARTICLE_PATTERN = re.compile(r"\b(?:a|an|the)\b")


class QuestionAccuracy:
    """Fraction of questions with the correct answer, ignoring case, spacing, punctuation and articles.

    `questions/accuracy` weights all questions equally, and `questions/questions` is their number. Each kind of question
    also has its own score; a kind named like one of `SUMMARY_NAMES` is quoted.
    """

    required_fields: tuple[str, ...] = ("task=question",)

    def __call__(self, records: Sequence[Record]) -> MetricOutput:
        scored_records = require_records(records, self.required_fields, "questions")
        rows = [
            (record, question, answer)
            for record in scored_records
            for question, answer in zip(record["truth"]["questions"], record["answers"], strict=True)
        ]
        is_correct = np.array(
            [
                _normalize_answer(answer["text"]) == _normalize_answer(question["answer"])
                for _, question, answer in rows
            ],
            dtype=float,
        )
        kinds = np.array([question["kind"] for _, question, _ in rows])
        per_record = {"questions/accuracy": is_correct}
        for kind in np.unique(kinds):
            label = f'"{kind}"' if kind in SUMMARY_NAMES else kind
            per_record[f"questions/{label}"] = np.where(kinds == kind, is_correct, np.nan)
        values: dict[str, float] = {name: float(np.nanmean(column)) for name, column in per_record.items()}
        return MetricOutput(
            {**values, "questions/questions": len(rows)},
            per_record | collect_region_ids([record for record, *_ in rows]),
        )


def _normalize_answer(text: str) -> str:
    """Return a text without case, punctuation and articles; with articles, or unchanged, if nothing else is left."""
    words = PUNCTUATION_PATTERN.sub(" ", text.casefold())
    return normalize_text(ARTICLE_PATTERN.sub(" ", words)) or normalize_text(words) or normalize_text(text)
