"""Accuracy of answers to questions about regions."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

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
        answers = list_answers(require_records(records, self.required_fields, "questions"))
        is_correct = [_normalize_answer(each.text) == _normalize_answer(each.question["answer"]) for each in answers]
        return make_question_output("questions", answers, is_correct)


class QuestionAnswer(NamedTuple):
    """Answer to a question about a region."""

    record: Record  # of the region
    question: Mapping[str, str]  # text, kind and correct answer
    text: str


def list_answers(records: Sequence[Record]) -> list[QuestionAnswer]:
    """Return the answers of records of the task "question", in order."""
    return [
        QuestionAnswer(record, question, answer["text"])
        for record in records
        for question, answer in zip(record["truth"]["questions"], record["answers"], strict=True)
    ]


def make_question_output(prefix: str, answers: Sequence[QuestionAnswer], is_correct: Sequence[bool]) -> MetricOutput:
    """Build the output of a metric of answers.

    Args:
        prefix: Prefix of the scores.
        answers: Answers to questions.
        is_correct: Whether each answer is correct.

    Returns:
        The fraction of correct answers, in total and by kind of question, and the number of questions.
    """
    column = np.array(is_correct, dtype=float)
    kinds = np.array([each.question["kind"] for each in answers])
    per_record = {f"{prefix}/accuracy": column}
    for kind in np.unique(kinds):
        label = f'"{kind}"' if kind in SUMMARY_NAMES else kind
        per_record[f"{prefix}/{label}"] = np.where(kinds == kind, column, np.nan)
    values: dict[str, float] = {name: float(np.nanmean(each)) for name, each in per_record.items()}
    return MetricOutput(
        {**values, f"{prefix}/questions": len(answers)},
        per_record | collect_region_ids([each.record for each in answers]),
    )


def _normalize_answer(text: str) -> str:
    """Return a text without case, punctuation and articles; with articles, or unchanged, if nothing else is left."""
    words = PUNCTUATION_PATTERN.sub(" ", text.casefold())
    return normalize_text(ARTICLE_PATTERN.sub(" ", words)) or normalize_text(words) or normalize_text(text)
