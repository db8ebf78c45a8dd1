"""Accuracy of answers to questions about regions, by the answers of a judge, as for the captions of GAR-Bench."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from sca_registry.contracts import MetricOutput

from sca.evaluation.metrics.question_accuracy import QuestionAnswer, list_answers, make_question_output
from sca.evaluation.option_orders import ChoiceQuestion, MultipleChoiceJudge
from sca.evaluation.records import Record, require_records

NAME = "judged-answers"
INSTRUCTION = (
    "The following text is a response to a request about regions of an image. Choose the option that fits. Respond "
    "with the letter of the option only."
)
QUESTION = (
    "Does the response convey the same facts as the correct answer? Synonyms, other wordings and further details are "
    "acceptable."
)
OPTIONS, OPTION_SCORES = ("Yes", "No"), (1.0, 0.0)


class JudgedAnswers:
    """Fraction of questions whose answer conveys the correct answer, according to a judge.

    The judge reads the question, the correct answer and the predicted one, without the image. Options are presented in
    both orders, see `sca.evaluation.option_orders`; `judged-answers/order-variance` is the variance of the choice over
    the orders, averaged over questions. `judged-answers/accuracy` weights all questions equally, and each kind of
    question has a score of its own. `judged-answers/questions` is the number of questions, and
    `judged-answers/unanswered` that of the responses of a server that choose no option.

    Args:
        model: The judge, see `MultipleChoiceJudge`.
        option_orders: Both "rotations" of the options, or only the "first" order.
        device: Device of a language model.
        batch_size: Sequences per batch of a language model.

    Raises:
        ValueError: No judge is specified, or it cannot be built.
    """

    required_fields: tuple[str, ...] = ("task=question",)

    def __init__(
        self, model: str | None = None, option_orders: str = "rotations", device: str = "cpu", batch_size: int = 8
    ):
        self.judge: MultipleChoiceJudge = MultipleChoiceJudge(NAME, model, option_orders, device, batch_size)
        self.implementation: str = self.judge.implementation
        self.details: Mapping[str, Any] = self.judge.judge.details

    def __call__(self, records: Sequence[Record]) -> MetricOutput:
        answers = list_answers(require_records(records, self.required_fields, NAME))
        choices = self.judge.choose_options([_make_choice_question(each) for each in answers])
        output = make_question_output(NAME, answers, [each.score == OPTION_SCORES[0] for each in choices])
        values = {**output.values, f"{NAME}/unanswered": sum(each.num_unanswered for each in choices)}
        per_record = dict(output.per_record or {})
        if self.judge.option_orders == "rotations":
            variances = np.array([each.order_variance for each in choices])
            values[f"{NAME}/order-variance"] = float(variances.mean())
            per_record[f"{NAME}/order-variance"] = variances
        return output._replace(values=values, per_record=per_record)


def _make_choice_question(answer: QuestionAnswer) -> ChoiceQuestion:
    lines = (
        f"Request: {answer.question['text']}",
        f"Correct answer: {answer.question['answer']}",
        f"Response: {answer.text}",
    )
    return ChoiceQuestion("\n".join((INSTRUCTION, "", *lines, "", f"Question: {QUESTION}")), OPTIONS, OPTION_SCORES)
