"""Answer the questions of a dataset about its regions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sca_registry.contracts import (
    REGION_PATTERN,
    Caption,
    Dataset,
    Prompt,
    Question,
    Sample,
    list_region_references,
)

from sca.evaluation.predictions import QUESTION_TASK, PromptingOptions, make_truth
from sca.inference.engine import EncodedImages, Engine, MaskEngine, RegionQuestion
from sca.inference.generation_options import resolve_generation_options
from sca.output.jsonl import replace_non_finite


@dataclass(frozen=True)
class QuestionAnsweringOptions:
    """Options of question answering.

    Args:
        prompting: Prompt type, controls, seed and generation options.
    """

    prompting: PromptingOptions

    def predict_records(self, captioner: Any, samples: Sequence[tuple[int, Sample]]) -> list[dict[str, Any]]:
        """Predict one record per control and region that has questions.

        Args:
            captioner: Captioner that supports questions. Questions that refer to regions by number are omitted for
                captioners that describe one region at a time, such as vision-language models.
            samples: Dataset index and sample of each image.

        Returns:
            The records, grouped by image in the order of `samples`. `answers` contains the `text` and `score` of the
            answer to each question in `truth.questions`.

        Raises:
            ValueError: The captioner does not support questions.
        """
        engine = check_can_answer(captioner)
        allows_references = supports_references(engine)
        records: list[list[dict[str, Any]]] = [[] for _ in samples]
        for control, encoded, prompts_by_image in self.prompting.iter_encoded_controls(engine, samples):
            inputs = list(zip(samples, prompts_by_image, strict=True))
            questions = [_select_questions(sample, prompts, allows_references) for (_, sample), prompts in inputs]
            prompts_by_image = [
                _select_prompts(prompts, image_questions)
                for prompts, image_questions in zip(prompts_by_image, questions, strict=True)
            ]
            requests = [list(prompts.values()) for prompts in prompts_by_image]
            region_questions = [
                [_refer_to_prompts(question, prompts) for question in image_questions]
                for image_questions, prompts in zip(questions, prompts_by_image, strict=True)
            ]
            answers = _answer_questions(engine, encoded, requests, region_questions, self.prompting.generation)
            for position, (index, sample) in enumerate(samples):
                pairs = list(zip(questions[position], answers[position], strict=True))
                records[position] += _make_records(index, sample, control, pairs)
        return [record for image_records in records for record in image_records]


def _make_records(
    index: int, sample: Sample, control: str | None, pairs: Sequence[tuple[Question, Caption]]
) -> list[dict[str, Any]]:
    """Return one record per region with questions."""
    records = []
    for region in sample.regions:
        if region_pairs := [each for each in pairs if each[0].region_ids[0] == region.id]:
            questions = [{"text": each.text, "kind": each.kind, "answer": each.answer} for each, _ in region_pairs]
            records.append(
                {
                    "index": index,
                    "image_id": sample.image_id,
                    "region_id": region.id,
                    "task": QUESTION_TASK,
                    "control": control,
                    "answers": [
                        {"text": answer.text, "score": replace_non_finite(answer.score)} for _, answer in region_pairs
                    ],
                    "truth": {**make_truth(region), "questions": questions},
                }
            )
    return records


def _answer_questions(
    engine: MaskEngine,
    encoded: EncodedImages,
    requests: Sequence[Sequence[Prompt]],
    questions: Sequence[Sequence[RegionQuestion]],
    generation: Mapping[str, Any],
) -> list[list[Caption]]:
    """Return the answers to the questions of each image, in order."""
    if isinstance(engine, Engine):
        return engine.answer_batch(encoded, requests, questions, return_masks=False, **generation)
    answers: list[dict[int, Caption]] = [{} for _ in questions]
    for text in dict.fromkeys(question.text for image_questions in questions for question in image_questions):
        rows = [[row for row, question in enumerate(each) if question.text == text] for each in questions]
        prompts = [
            [request[image_questions[row].region_index] for row in image_rows]
            for request, image_questions, image_rows in zip(requests, questions, rows, strict=True)
        ]
        captions = engine.caption_batch(encoded, prompts, return_masks=False, question=text, **generation)
        for image_answers, image_rows, image_captions in zip(answers, rows, captions, strict=True):
            image_answers |= zip(image_rows, image_captions, strict=True)
    return [[image_answers[row] for row in range(len(image_answers))] for image_answers in answers]


def check_can_answer(captioner: Any) -> MaskEngine:
    """Check that a captioner can answer questions.

    Args:
        captioner: Any captioner.

    Returns:
        The captioner.

    Raises:
        ValueError: It does not support questions.
    """
    resolve_generation_options(captioner, question="?")
    if not isinstance(captioner, MaskEngine):
        raise ValueError(
            f"{type(captioner).__name__} cannot be evaluated on questions; use a model that is trained with "
            "train.question_prob, or a vision-language model"
        )
    return captioner


def supports_references(captioner: Any) -> bool:
    """Return whether the questions of a captioner can refer to several regions, such as "<region 2>"."""
    return isinstance(captioner, Engine)


def check_has_questions(dataset: Dataset, name: str) -> None:
    """Check that a dataset has questions, as far as that is known without opening images.

    Args:
        dataset: Any dataset.
        name: Name of the dataset in the message.

    Raises:
        ValueError: It has none.
    """
    metadata = getattr(dataset, "metadata", {})
    if metadata.get("questions") == 0 or getattr(dataset, "has_questions", True) is False:
        raise ValueError(f"the dataset {name} has no questions; scenes has them with the option questions=true")


def _select_questions(sample: Sample, prompts: Mapping[int, Prompt], allows_references: bool) -> list[Question]:
    """Return the questions about regions that have a prompt, with references to them only if these are allowed."""
    return [
        question
        for question in sample.questions
        if prompts.keys() >= set(question.region_ids)
        and (allows_references or not list_region_references(question.text))
    ]


def _select_prompts(prompts: Mapping[int, Prompt], questions: Sequence[Question]) -> dict[int, Prompt]:
    """Return the prompts of regions that a question is about."""
    used_ids = {region_id for question in questions for region_id in question.region_ids}
    return {region_id: prompt for region_id, prompt in prompts.items() if region_id in used_ids}


def _refer_to_prompts(question: Question, prompts: Mapping[int, Prompt]) -> RegionQuestion:
    """Return a question whose references count the prompts of the image instead of the regions of the question."""
    index_by_id = {region_id: index for index, region_id in enumerate(prompts)}
    indices = [index_by_id[region_id] for region_id in question.region_ids]
    text = REGION_PATTERN.sub(lambda match: f"<region {indices[int(match[1]) - 1] + 1}>", question.text)
    return RegionQuestion(text, indices[0])
