"""Scores of captions by the answers of a judge to multiple-choice questions about them, as in DLC-Bench."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from string import ascii_uppercase
from typing import Any, NamedTuple

import numpy as np
from sca_registry.contracts import JUDGE_QUESTIONS, JudgeQuestion, MetricOutput

from sca.evaluation.judges import Judge, JudgePrompt, build_judge
from sca.evaluation.judgments import RECOGNITION_KIND, Judgment, make_judgment_output
from sca.evaluation.records import Record, require_records
from sca.io.errors import InputError
from sca.io.validation import check_choice, check_type

OPTION_ORDERS = {"rotations": "all rotations of the options", "first": "the first order of the options"}
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


class _Answer(NamedTuple):
    """Judgment of a question, and what its option orders differ in."""

    judgment: Judgment
    order_variance: float  # variance of the score over the orders of the options
    num_unanswered: int  # orders without a chosen option


class JudgeScore:
    """Scores of captions by a judge, see `sca.evaluation.judgments`.

    The judge reads a caption and the questions in the attribute `judge_questions` of its region. If the region has a
    name, the judge first answers whether the caption describes such an object. Because judges prefer some letters,
    every question is presented once per rotation of its options: each option has each letter once. The option with the
    highest mean probability is chosen, the first one of several. `judge/order-variance` is the variance of the score of
    a question over the orders, averaged over the questions of a region and over regions.

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
        check_choice("option_orders", option_orders, OPTION_ORDERS)
        if model is None:
            raise ValueError(
                "needs a judge; set judge.model=NAME with an instruction-tuned language model, such as phi-4-mini, or "
                "judge.model=openai for a server"
            )
        self.judge: Judge = build_judge(model, device, batch_size)
        self.option_orders = option_orders
        self.implementation: str = f"sca, judged by {self.judge.description}, {OPTION_ORDERS[option_orders]}"
        self.details: Mapping[str, Any] = self.judge.details

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
        pairs = [
            (record, question) for record, each in zip(scored_records, questions, strict=True) for question in each
        ]
        orders = [self._list_orders(len(question.options)) for _, question in pairs]
        prompts = [
            _make_prompt(record["caption"], question, order)
            for (record, question), question_orders in zip(pairs, orders, strict=True)
            for order in question_orders
        ]
        probabilities = iter(self.judge.compute_probabilities(prompts))
        answers = [
            _combine_orders(question, question_orders, [next(probabilities) for _ in question_orders])
            for (_, question), question_orders in zip(pairs, orders, strict=True)
        ]
        remaining_answers = iter(answers)
        answers_by_record = [[next(remaining_answers) for _ in each] for each in questions]
        output = make_judgment_output(scored_records, [[each.judgment for each in row] for row in answers_by_record])
        values = {
            **output.values,
            "judge/questions": len(pairs),
            "judge/unanswered": sum(each.num_unanswered for each in answers),
        }
        per_record = dict(output.per_record or {})
        if self.option_orders == "rotations":
            variances = np.array([np.mean([each.order_variance for each in row]) for row in answers_by_record])
            values["judge/order-variance"] = float(variances.mean())
            per_record["judge/order-variance"] = variances
        return output._replace(values=values, per_record=per_record)

    def _list_orders(self, num_options: int) -> list[list[int]]:
        """Return the orders in which the options are presented, as indices of options."""
        num_orders = num_options if self.option_orders == "rotations" else 1
        return [[(start + position) % num_options for position in range(num_options)] for start in range(num_orders)]


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


def _make_prompt(caption: str, question: _Question, order: Sequence[int]) -> JudgePrompt:
    options = [question.options[index] for index in order]
    lines = [f"{letter}. {option}" for letter, option in zip(ascii_uppercase[: len(options)], options, strict=True)]
    text = "\n".join((INSTRUCTION, "", f"Text: {caption}", "", f"Question: {question.text}", *lines))
    return JudgePrompt(text, options)


def _combine_orders(
    question: _Question, orders: Sequence[Sequence[int]], probabilities: Sequence[np.ndarray]
) -> _Answer:
    """Return the answer with the highest mean probability over the orders of the options."""
    by_option = np.zeros((len(orders), len(question.options)))
    for row, (order, values) in enumerate(zip(orders, probabilities, strict=True)):
        by_option[row, list(order)] = values
    scores = [_get_score(question, row) for row in by_option]
    return _Answer(
        Judgment(question.kind, _get_score(question, by_option.mean(0))),
        float(np.var(scores)),
        int((by_option.sum(1) == 0).sum()),
    )


def _get_score(question: _Question, probabilities: np.ndarray) -> float:
    """Return the score of the most probable option; 0 if no option was chosen."""
    return float(question.scores[int(probabilities.argmax())]) if probabilities.any() else 0.0
