"""Multiple-choice questions for a judge, presented in several orders of their options.

Because judges prefer some letters, a question is presented once per rotation of its options: each option has each
letter once. The option with the highest mean probability is chosen, the first one of several.
"""

from __future__ import annotations

from collections.abc import Sequence
from string import ascii_uppercase
from typing import NamedTuple

import numpy as np

from sca.evaluation.judges import Judge, JudgePrompt, build_judge
from sca.io.errors import InputError
from sca.io.validation import check_choice

OPTION_ORDERS = {"rotations": "all rotations of the options", "first": "the first order of the options"}


class ChoiceQuestion(NamedTuple):
    """Question for a judge.

    Attributes:
        text: Instruction and question, without the options.
        options: Texts of the options.
        scores: Score of each option.
    """

    text: str
    options: Sequence[str]
    scores: Sequence[float]


class Choice(NamedTuple):
    """Answer of a judge to a question.

    Attributes:
        score: Score of the chosen option; 0 if no option was chosen.
        order_variance: Variance of the score over the orders of the options.
        num_unanswered: Orders without a chosen option.
    """

    score: float
    order_variance: float
    num_unanswered: int


class MultipleChoiceJudge:
    """Judge of multiple-choice questions.

    Args:
        metric: Name of the metric, for error messages.
        model: The judge: "NAME [key=value]...", an instruction-tuned language model of the registry, or "openai" for a
            server; see `sca.evaluation.judges.build_judge`.
        option_orders: All "rotations" of the options, or only the "first" order.
        device: Device of a language model.
        batch_size: Sequences per batch of a language model.

    Attributes:
        implementation: Judge and orders of the options; scores are comparable if it is the same.

    Raises:
        InputError: No judge is specified, or it cannot be built.
    """

    def __init__(self, metric: str, model: str | None, option_orders: str, device: str, batch_size: int):
        check_choice("option_orders", option_orders, OPTION_ORDERS)
        if model is None:
            raise InputError(
                f"needs a judge; set {metric}.model=NAME with an instruction-tuned language model, such as phi-4-mini, "
                f"or {metric}.model=openai for a server"
            )
        self.judge: Judge = build_judge(model, device, batch_size)
        self.option_orders = option_orders
        self.implementation: str = f"sca, judged by {self.judge.description}, {OPTION_ORDERS[option_orders]}"

    def choose_options(self, questions: Sequence[ChoiceQuestion]) -> list[Choice]:
        """Choose an option of each question.

        Args:
            questions: Questions.

        Returns:
            The choice of each question.
        """
        orders = [_list_orders(len(question.options), self.option_orders) for question in questions]
        prompts = [
            _make_prompt(question, order)
            for question, question_orders in zip(questions, orders, strict=True)
            for order in question_orders
        ]
        probabilities = iter(self.judge.compute_probabilities(prompts))
        return [
            _combine_orders(question, question_orders, [next(probabilities) for _ in question_orders])
            for question, question_orders in zip(questions, orders, strict=True)
        ]


def _list_orders(num_options: int, option_orders: str) -> list[list[int]]:
    """Return the orders in which the options are presented, as indices of options."""
    num_orders = num_options if option_orders == "rotations" else 1
    return [[(start + position) % num_options for position in range(num_options)] for start in range(num_orders)]


def _make_prompt(question: ChoiceQuestion, order: Sequence[int]) -> JudgePrompt:
    options = [question.options[index] for index in order]
    lines = [f"{letter}. {option}" for letter, option in zip(ascii_uppercase[: len(options)], options, strict=True)]
    return JudgePrompt("\n".join((question.text, *lines)), options)


def _combine_orders(
    question: ChoiceQuestion, orders: Sequence[Sequence[int]], probabilities: Sequence[np.ndarray]
) -> Choice:
    """Return the choice with the highest mean probability over the orders of the options."""
    by_option = np.zeros((len(orders), len(question.options)))
    for row, (order, values) in enumerate(zip(orders, probabilities, strict=True)):
        by_option[row, list(order)] = values
    scores = [_get_score(question, row) for row in by_option]
    return Choice(_get_score(question, by_option.mean(0)), float(np.var(scores)), int((by_option.sum(1) == 0).sum()))


def _get_score(question: ChoiceQuestion, probabilities: np.ndarray) -> float:
    """Return the score of the most probable option; 0 if no option was chosen."""
    return float(question.scores[int(probabilities.argmax())]) if probabilities.any() else 0.0
