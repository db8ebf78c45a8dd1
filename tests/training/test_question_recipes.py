"""Recipes with questions: the trained model supports them, and unusable data or options are errors before training."""

import json

import pytest
from PIL import Image
from sca_registry import RegistryError
from sca_registry.contracts import JUDGE_QUESTIONS

from sca.training.recipe import Recipe
from sca.training.train import prepare_training

LANGUAGE_MODEL = {"name": "tiny-gpt2", "hidden_size": 32, "depth": 1, "num_heads": 2, "max_positions": 96}


@pytest.fixture
def make_recipe(small_model_table):
    """Function that returns a recipe for scenes with questions, with changes."""

    def make(*assignments):
        table = {
            "model": {**small_model_table, "language_model": LANGUAGE_MODEL},
            "data": {"scenes": {"name": "scenes", "num_images": 4, "image_size": 64, "questions": True}},
            "train": {"steps": 2, "warmup_steps": 1, "question_prob": 0.5},
        }
        return Recipe.from_dict("mine", table, assignments)

    return make


def test_training_sets_what_the_model_supports(make_recipe):
    model = prepare_training(make_recipe())[0]
    assert (model.spec.questions, model.spec.lengths) == (True, False)
    model = prepare_training(make_recipe("train.question_prob=0", "train.length_prob=0.5"))[0]
    assert (model.spec.questions, model.spec.lengths) == (False, True)


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("data.scenes.questions=false", "no dataset has questions"),
        ("train.max_tokens=90", r"shorten the question, or reduce train\.max_tokens"),
        ("train.question_prob=2", "question_prob"),
    ],
)
def test_unusable_questions_are_rejected_before_training(make_recipe, assignment, message):
    with pytest.raises((RegistryError, ValueError), match=message):
        prepare_training(make_recipe(assignment))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"attributes": {JUDGE_QUESTIONS: [{}]}}, "has no captions, names or questions with answers"),
        (
            {"question": "what color is it?", "answer": "red"},
            r"has questions, but .*; set train\.question_prob above 0",
        ),
    ],
)
def test_data_without_texts_to_train_on_is_rejected(small_model_table, tmp_path, line, message):
    pytest.importorskip("datasets", reason="requires the extra data")
    Image.new("RGB", (64, 48)).save(tmp_path / "a.png")
    (tmp_path / "mine.jsonl").write_text(json.dumps({"image": "a.png", "box": [4, 4, 20, 16], **line}))
    table = {"model": small_model_table, "data": {"mine": {"name": "jsonl", "file": str(tmp_path / "mine.jsonl")}}}
    with pytest.raises(RegistryError, match=message):
        prepare_training(Recipe.from_dict("mine", {**table, "train": {"steps": 2, "warmup_steps": 1}}, []))
