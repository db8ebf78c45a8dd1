"""Question answering: records of a model, accuracy by kind, and unusable models and records."""

import numpy as np
import pytest

import sca
from sca.data.scenes import Scenes
from sca.evaluation.evaluate import score_file
from sca.evaluation.metrics.question_accuracy import QuestionAccuracy
from sca.evaluation.predictions import PromptingOptions, predict_dataset
from sca.evaluation.predictions_file import Predictions
from sca.evaluation.question_answering import QuestionAnsweringOptions
from sca.evaluation.validation import fill_defaults
from sca.inference.engine import Engine
from sca.io.errors import InputError

LANGUAGE_MODEL = {"name": "tiny-gpt2", "hidden_size": 32, "depth": 1, "num_heads": 2, "max_positions": 96}
SCENES = {"num_images": 3, "image_size": 64, "questions": True}


@pytest.fixture
def model(build_small_model):
    return build_small_model(questions=True, language_model=LANGUAGE_MODEL)


def make_record(answers, questions, region_id=0):
    return {
        "index": 0,
        "image_id": 0,
        "region_id": region_id,
        "task": "question",
        "control": None,
        "answers": [{"text": text, "score": 1.0} for text in answers],
        "truth": {"questions": [{"text": "?", "kind": kind, "answer": answer} for kind, answer in questions]},
    }


def test_question_accuracy_by_kind_ignores_case_punctuation_and_articles():
    records = [
        make_record(["Red.", "a circle", "two"], [("color", "red"), ("shape", "circle"), ("count", "three")]),
        make_record([" blue", "one"], [("color", "green"), ("count", "one")], region_id=1),
    ]
    output = QuestionAccuracy()(records)
    assert output.values == {
        "questions/accuracy": pytest.approx(3 / 5),
        "questions/color": pytest.approx(1 / 2),
        "questions/shape": 1.0,
        "questions/count": pytest.approx(1 / 2),
        "questions/questions": 5,
    }
    assert np.nanmean(output.per_record["questions/color"]) == 0.5
    assert output.per_record["region_id"].tolist() == [0, 0, 0, 1, 1]


def test_question_accuracy_keeps_an_article_that_is_the_whole_answer():
    answers = ["A", "a.", "(A)", "B.", "a b"]
    output = QuestionAccuracy()([make_record(answers, [("letter", "A")] * 5)])
    assert output.per_record["questions/accuracy"].tolist() == [1, 1, 1, 0, 0]


@pytest.mark.parametrize("prompt_type", ["box", "mask-point"])
def test_question_records_contain_every_question_once_with_the_answer_about_its_regions(model, prompt_type):
    scenes, engine = Scenes("val", **SCENES), Engine(model)
    options = QuestionAnsweringOptions(PromptingOptions(prompt_type, ("question",), ("wrong-region",)))
    batches = list(predict_dataset(engine, scenes, options, batch_size=2))
    records = [record for batch in batches for record in batch.records]
    for index in range(3):
        sample = scenes[index]
        regular = [each for each in records if each["index"] == index and each["control"] is None]
        texts = [question["text"] for record in regular for question in record["truth"]["questions"]]
        assert sorted(texts) == sorted(question.text for question in sample.questions)
    sample, record = scenes[0], records[0]
    prompts = PromptingOptions(prompt_type)
    encoded = engine.encode([sample.image])
    (_, _, prompts_by_image), *_ = prompts.iter_encoded_controls(engine, [(0, sample)])
    relation = next(each for each in sample.questions if each.kind == "relation")
    relation_prompts = [prompts_by_image[0][region_id] for region_id in relation.region_ids]
    (expected,) = engine.caption_batch(encoded, [relation_prompts], question=relation.text)[0]
    position = [each["text"] for each in record["truth"]["questions"]].index(relation.text)
    assert record["answers"][position]["text"] == expected.text
    assert {each["control"] for each in records} == {None, "wrong-region"}


def test_evaluate_answers_questions_and_writes_predictions_that_can_be_scored_again(model, tmp_path):
    sca.save(model, tmp_path / "model")
    report = sca.evaluate(
        tmp_path / "model",
        {"name": "scenes", **SCENES},
        split="test",
        prompting=PromptingOptions(tasks=("question",)),
        metrics=["questions"],
        folder=tmp_path / "out",
    )
    assert report.scores["questions/questions"] > 0
    rescored = score_file(tmp_path / "out", metrics=["questions"])
    assert rescored.scores == report.scores


def test_evaluate_rejects_models_and_options_without_questions(build_small_model, model, tmp_path):
    prompting = PromptingOptions(tasks=("question",))
    with pytest.raises(ValueError, match="this captioner does not support questions"):
        sca.evaluate(build_small_model(), {"name": "scenes", **SCENES}, prompting=prompting, metrics=["questions"])
    with pytest.raises(ValueError, match="the dataset scenes has no questions"):
        sca.evaluate(
            model, {"name": "scenes", **SCENES, "questions": False}, prompting=prompting, metrics=["questions"]
        )
    with pytest.raises(ValueError, match="zoom auto has no effect on the task question"):
        PromptingOptions(tasks=("question",), zoom="auto")
    with pytest.raises(ValueError, match="task is 'question'"):
        PromptingOptions(tasks=("caption", "question"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answers": None}, "answers must be a list"),
        ({"answers": []}, "0 answers to 1 questions"),
        ({"truth": {}}, r"truth\.questions must be a list"),
    ],
)
def test_invalid_question_records_are_rejected_in_one_line(change, message):
    record = make_record(["red"], [("color", "red")]) | change
    with pytest.raises(InputError, match=message):
        fill_defaults(Predictions([record]), "predictions.jsonl")


def test_kinds_named_like_summaries_are_quoted_and_short_answers_are_compared_unchanged():
    output = QuestionAccuracy()(
        [make_record(["a", "5", "yes"], [("accuracy", "the"), ("count", "-5"), ("yes", "yes")])]
    )
    assert output.values["questions/accuracy"] == pytest.approx(1 / 3)
    assert output.values['questions/"accuracy"'] == 0
    assert output.values["questions/count"] == 0


def test_evaluate_generates_captions_of_a_length(build_small_model):
    model = build_small_model(lengths=True, language_model=LANGUAGE_MODEL)
    scenes = {"name": "scenes", **SCENES}
    prompting = PromptingOptions(tasks=("caption",), generation={"length": "short"})
    assert sca.evaluate(model, scenes, prompting=prompting, metrics=["attributes"]).scores
    with pytest.raises(ValueError, match="does not support a length"):
        sca.evaluate(build_small_model(), scenes, prompting=prompting, metrics=["attributes"])
