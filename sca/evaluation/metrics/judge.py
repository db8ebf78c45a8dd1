"""Scores of captions by the answers of a judge to multiple-choice questions about them, as in DLC-Bench."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from sca_registry.contracts import JUDGE_QUESTIONS, JudgeQuestion, MetricOutput

from sca.evaluation.judgments import RECOGNITION_KIND, Judgment, make_judgment_output
from sca.evaluation.option_orders import ChoiceQuestion, MultipleChoiceJudge
from sca.evaluation.records import Record, require_records
from sca.io.errors import InputError
from sca.io.validation import check_type

INSTRUCTION = (
    "The following text describes one object in an image. Choose the option that fits the text best. The wording does "
    "not have to match. Respond with the letter of the option only."
)
RECOGNITION_OPTIONS = ("Yes", "No")


class _Question(NamedTuple):
    """Question about a caption, and the score of each of its options."""

    kind: str
    text: str
    options: tuple[str, ...]
    scores: tuple[float, ...]


class JudgeScore:
    """Scores of captions by a judge, see `sca.evaluation.judgments`.

    The judge reads a caption and the questions in the attribute `judge_questions` of its region. If the region has a
    name, the judge first answers whether the caption describes such an object. Options are presented in several orders,
    see `sca.evaluation.option_orders`. `judge/order-variance` is the variance of the score of a question over the
    orders, averaged over the questions of a region and over regions.

    `judge/questions` is the number of questions. `judge/unanswered` is the number of responses of a server without a
    valid letter; a question without any is scored 0, and a class without any is not recognized.

    Args:
        model: The judge: "NAME [key=value]...", an instruction-tuned language model of the registry, or "openai" for a
            server; see `sca.evaluation.judges.build_judge`.
        option_orders: All "rotations" of the options, or only the "first" order, that of the benchmark.
        device: Device of a language model.
        batch_size: Sequences per batch of a language model.

    Raises:
        ValueError: No judge is specified, or it cannot be built.
    """

    required_fields: tuple[str, ...] = ("task=caption", "caption", f"truth.attributes.{JUDGE_QUESTIONS}")

    def __init__(
        self, model: str | None = None, option_orders: str = "rotations", device: str = "cpu", batch_size: int = 8
    ):
        self.judge: MultipleChoiceJudge = MultipleChoiceJudge("judge", model, option_orders, device, batch_size)
        self.implementation: str = self.judge.implementation
        self.details: Mapping[str, Any] = self.judge.judge.details

    @staticmethod
    def check_truth(record: Record) -> None:
        """Check the questions about a region.

        Args:
            record: Record with the ground truth of the region.

        Raises:
            InputError: A question is invalid.
        """
        _read_questions(record)

    def __call__(self, records: Sequence[Record]) -> MetricOutput:
        scored_records = require_records(records, self.required_fields, "judge")
        questions = [_read_questions(record) for record in scored_records]
        choice_questions = [
            _make_choice_question(record["caption"], question)
            for record, record_questions in zip(scored_records, questions, strict=True)
            for question in record_questions
        ]
        choices = self.judge.choose_options(choice_questions)
        remaining_choices = iter(choices)
        choices_by_record = [[next(remaining_choices) for _ in each] for each in questions]
        judgments = [
            [Judgment(question.kind, choice.score) for question, choice in zip(*each, strict=True)]
            for each in zip(questions, choices_by_record, strict=True)
        ]
        output = make_judgment_output(scored_records, judgments)
        values = {
            **output.values,
            "judge/questions": len(choices),
            "judge/unanswered": sum(each.num_unanswered for each in choices),
        }
        per_record = dict(output.per_record or {})
        if self.judge.option_orders == "rotations":
            variances = np.array([np.mean([each.order_variance for each in row]) for row in choices_by_record])
            values["judge/order-variance"] = float(variances.mean())
            per_record["judge/order-variance"] = variances
        return output._replace(values=values, per_record=per_record)


def _read_questions(record: Record) -> list[_Question]:
    """Return the questions about a record, recognition first. Raises InputError for an invalid question."""
    questions = []
    if record["truth"].get("name"):
        questions.append(_make_recognition_question(record["truth"]["name"]))
    image = f" of image {record['image_id']}" if "image_id" in record else ""
    location = f"region {record['region_id']}{image}: {JUDGE_QUESTIONS}"
    contents = record["truth"]["attributes"][JUDGE_QUESTIONS]
    check_type(location, contents, list, InputError)
    for index, content in enumerate(contents):
        question = _parse_question(content, f"{location}[{index}]")
        questions.append(_Question(question.kind, question.text, tuple(question.options), tuple(question.scores)))
    return questions


def _parse_question(content: Any, location: str) -> JudgeQuestion:
    try:
        return JudgeQuestion(**content)
    except TypeError as error:
        raise InputError(
            f"{location} is {content!r:.60}; expected an object with text, options, scores and kind"
        ) from error
    except ValueError as error:
        raise InputError(f"{location}: {error}") from error


def _make_recognition_question(name: str) -> _Question:
    text = f"Can the described object be of the class {name!r}, or of a similar class?"
    return _Question(RECOGNITION_KIND, text, RECOGNITION_OPTIONS, (1.0, 0.0))


def _make_choice_question(caption: str, question: _Question) -> ChoiceQuestion:
    text = "\n".join((INSTRUCTION, "", f"Text: {caption}", "", f"Question: {question.text}"))
    return ChoiceQuestion(text, question.options, question.scores)
