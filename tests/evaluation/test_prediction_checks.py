"""Predictions that would score incorrectly are rejected with the location of the error; warnings are counted."""

import json

import pytest

from sca.data.scenes import Scenes
from sca.evaluation.evaluate import evaluate, make_run_image_loader, score_file
from sca.evaluation.predictions_file import PREDICTIONS_NAME
from sca.io.errors import InputError

VALID_RECORD = {"image_id": 1, "region_id": 1, "caption": "a dog", "references": ["a dog", "the dog"]}

COMPREHENSION_RECORD = {
    "image_id": 1,
    "region_id": 1,
    "task": "comprehension",
    "expressions": [{"text": "a dog", "box": None}],
    "truth": {"box": [0, 0, 1, 1]},
}
DENSE_RECORD = {
    "image_id": 1,
    "region_id": None,
    "task": "dense",
    "proposals": [{"box": [0, 0, 1, 1], "score": 1.0, "caption": "a dog"}],
    "truth": {"regions": [{"box": [0, 0, 1, 1], "phrases": ["a dog"]}]},
}


@pytest.fixture
def write_predictions(tmp_path):
    """Return a function that writes records, one per line."""

    def write(*records):
        path = tmp_path / "made.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return path

    return write


@pytest.fixture
def run_folder(make_oracle_captioner, tmp_path):
    """Return a run folder with predictions."""
    dataset = Scenes("val", num_images=3)
    evaluate(make_oracle_captioner(dataset), dataset, folder=tmp_path, metrics=["class"])
    return tmp_path


def test_score_file_accepts_handmade_predictions(write_predictions):
    report = score_file(
        write_predictions(VALID_RECORD, VALID_RECORD | {"region_id": 2, "caption": "a cat"}),
        ["rouge-l"],
        {"tokenizer": "plain"},
    )
    assert report.scores["rouge-l"] == pytest.approx(0.75)
    assert report.title == "hand-written predictions"


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ((VALID_RECORD, VALID_RECORD), r"1 duplicate records; keep one of each: region 1 of image 1 \(caption\)"),
        (({"image_id": 1, "caption": ""},), "record 1 has no region_id"),
        ((VALID_RECORD | {"image_id": [1]},), r"record 1: image_id must be an integer or text, not \[1\]"),
        ((VALID_RECORD | {"control": {}},), "record 1: control must be text, not {}"),
        ((VALID_RECORD | {"caption": None},), "record 1: caption must be text"),
        ((VALID_RECORD | {"task": "translation"},), "unknown task 'translation'; choose from"),
        ((VALID_RECORD | {"references": "a dog"},), "references must be a list of strings"),
        (
            (VALID_RECORD, VALID_RECORD | {"region_id": 2, "references": []}),
            r"1 of 2 captions have no references: region 2 of image 1",
        ),
        (
            (VALID_RECORD | {"prompt": {"box": [0, 0, float("nan"), 1]}},),
            r"1 records have a box .* finite.*region 1 of image 1",
        ),
        ((VALID_RECORD | {"truth": {"box": [0, 0, 1]}},), "not four finite numbers"),
        ((VALID_RECORD | {"truth": {"box": [0, 0, 1, 10**400]}},), "not four finite numbers"),
        (
            (DENSE_RECORD | {"proposals": [DENSE_RECORD["proposals"][0] | {"score": 10**400}]},),
            "a proposal whose score is not a number",
        ),
        (
            (DENSE_RECORD | {"proposals": [{"box": [0, 0, 1, 1], "caption": "a dog"}]},),
            "a proposal whose score is not a number",
        ),
        ((), "has no records"),
        ((VALID_RECORD | {"truth": 3},), "truth must be an object, not 3"),
        ((VALID_RECORD | {"prompt": None},), "prompt must be an object, not None"),
        ((COMPREHENSION_RECORD | {"expressions": None},), "expressions must be a list of objects with text and box"),
        (
            (COMPREHENSION_RECORD | {"expressions": [{"text": "a dog"}]},),
            "expressions must be .*, not {'text': 'a dog'}",
        ),
        ((COMPREHENSION_RECORD | {"expressions": [{"text": "a", "box": [0, 0, 1]}]},), "not four finite numbers"),
        ((DENSE_RECORD | {"proposals": [{"box": [0, 0, 1, 1], "score": 1}]},), "proposals must be .* box and caption"),
        ((DENSE_RECORD | {"truth": {}},), "truth.regions must be a list of objects with box and phrases, not None"),
        (
            (DENSE_RECORD | {"task": "dense-recognition"},),
            "truth.regions must be a list of objects with box and name",
        ),
        ((VALID_RECORD | {"judgments": [{"kind": "positive"}]},), "judgments must be a list of objects with kind and"),
        ((VALID_RECORD | {"judgments": [{"kind": "neutral", "score": 1}]},), "kind of a judgment .*'neutral'"),
    ],
    ids=[
        "repeated record",
        "no region_id",
        "image_id is a list",
        "control is an object",
        "caption is null",
        "unknown task",
        "references not a list",
        "no references",
        "box is nan",
        "box of 3 numbers",
        "box out of range",
        "score out of range",
        "no score",
        "no records",
        "truth is a number",
        "prompt is null",
        "no expressions",
        "expression without box",
        "box of expression of 3 numbers",
        "proposal without caption",
        "no regions",
        "region without name",
        "judgment without score",
        "judgment of unknown kind",
    ],
)
def test_score_file_rejects_invalid_records(write_predictions, records, message):
    with pytest.raises(InputError, match=message):
        score_file(write_predictions(*records))


@pytest.mark.parametrize(
    "fields",
    [{"expressions": [{"text": "a"}]}, {"expressions": None}, {"proposals": None}, {"proposals": [{}]}],
    ids=str,
)
def test_score_file_ignores_fields_of_other_tasks(write_predictions, fields):
    report = score_file(write_predictions(VALID_RECORD | fields), ["rouge-l"], {"tokenizer": "plain"})
    assert report.scores["rouge-l"] == pytest.approx(1)


@pytest.mark.slow
def test_score_file_remarks_on_empty_and_multiline_captions(write_predictions):
    odd_records = [
        VALID_RECORD | {"region_id": 2, "caption": " "},
        VALID_RECORD | {"region_id": 3, "caption": "a\ndog 😀"},
    ]
    report = score_file(write_predictions(VALID_RECORD, *odd_records), ["rouge-l"])
    assert report.warnings == [
        *("1 captions are empty and scored as such", "1 captions have line breaks, which are read as spaces")
    ]
    assert 0.6 < report.scores["rouge-l"] < 1


def test_score_file_rejects_run_with_missing_records_or_changed_truth(run_folder):
    path = run_folder / PREDICTIONS_NAME
    lines = path.read_text().splitlines(keepends=True)
    original_text = "".join(lines)
    path.write_text("".join(lines[:2] + lines[4:]))
    with pytest.raises(InputError, match="2 fewer records than the"):
        score_file(run_folder)
    path.write_text(
        original_text.replace('"name": "star"', '"name": "moon"').replace('"name": "circle"', '"name": "moon"')
    )
    with pytest.raises(InputError, match="the ground truth were changed after the run"):
        score_file(run_folder)
    path.write_text(original_text)
    assert score_file(run_folder, ["class"]).scores["class/accuracy"] == 1


def test_score_file_accepts_handmade_comprehension_and_dense_records(write_predictions):
    scores = score_file(write_predictions(COMPREHENSION_RECORD), ["comprehension"]).scores
    assert scores["comprehension/accuracy"] == 0
    named = DENSE_RECORD | {"task": "dense-recognition", "truth": {"regions": [{"box": [0, 0, 1, 1], "name": "a dog"}]}}
    assert score_file(write_predictions(named), ["detection-map"]).scores["detection-map"] == pytest.approx(1)


def test_score_file_checks_predictions_against_dataset(run_folder, write_predictions):
    assert score_file(run_folder, ["class"], dataset={"name": "scenes", "num_images": 3}).scores
    with pytest.raises(InputError, match=r"regions of the dataset have no prediction: region \d+ of image"):
        score_file(run_folder, ["class"], dataset={"name": "scenes", "num_images": 4})
    with pytest.raises(InputError, match="regions are not in the dataset: region 1 of image 1"):
        score_file(write_predictions(VALID_RECORD), dataset={"name": "scenes", "num_images": 1})


def test_run_image_loader_rejects_other_version_of_the_data():
    with pytest.raises(InputError, match="the contents of the dataset scenes val have changed"):
        make_run_image_loader(
            {"dataset": "scenes", "split": "val", "dataset_options": {"num_images": 1}, "dataset_hash": "0123"}
        )({"index": 0})
