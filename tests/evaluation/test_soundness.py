"""Predictions whose scores would be wrong are refused with the place of what is wrong; what is odd is counted."""

import json

import pytest

from sca.data.scenes import Scenes
from sca.evaluation.evaluate import evaluate, make_run_image_loader, score_file
from sca.evaluation.predictions_file import PREDICTIONS_NAME
from sca.io.errors import InputError

GOOD = {"image_id": 1, "region_id": 1, "caption": "a dog", "references": ["a dog", "the dog"]}


@pytest.fixture
def made(tmp_path):
    """Writes records, a line each."""

    def write(*records):
        path = tmp_path / "made.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return path

    return write


@pytest.fixture
def run(teller, tmp_path):
    """A folder with the predictions of a run."""
    dataset = Scenes("val", num_images=3)
    evaluate(teller(dataset), dataset, folder=tmp_path, metrics=["class"])
    return tmp_path


def test_a_file_made_by_hand_needs_ids_captions_and_references(made):
    report = score_file(made(GOOD, GOOD | {"region_id": 2, "caption": "a cat"}), ["rouge-l"], {"tokenizer": "plain"})
    assert report.scores["rouge-l"] == pytest.approx(0.75)
    assert report.title == "predictions made by hand"


@pytest.mark.parametrize(
    ("records", "said"),
    [
        ((GOOD, GOOD), r"1 regions are there more than once: region 1 of image 1 \(caption\)"),
        (({"image_id": 1, "caption": ""},), "record 1 has no region_id"),
        ((GOOD | {"caption": None},), "record 1: caption must be text"),
        ((GOOD | {"task": "translation"},), "no task 'translation'"),
        ((GOOD | {"references": "a dog"},), "references must be a list of strings"),
        ((GOOD, GOOD | {"region_id": 2, "references": []}), r"1 of 2 captions have no references: region 2 of image 1"),
        (
            (GOOD | {"prompt": {"box": [0, 0, float("nan"), 1]}},),
            r"1 records have a box .* finite.*region 1 of image 1",
        ),
        ((GOOD | {"truth": {"box": [0, 0, 1]}},), "not four finite numbers"),
        ((GOOD | {"truth": {"box": [0, 0, 1, 10**400]}},), "not four finite numbers"),
        ((GOOD | {"proposals": [{"box": [0, 0, 1, 1], "score": 10**400}]},), "a proposal whose score is not a number"),
        ((GOOD | {"proposals": [{"box": [0, 0, 1, 1]}]},), "a proposal whose score is not a number"),
        ((), "has no records"),
    ],
    ids=str,
)
def test_what_cannot_be_scored_is_refused(made, records, said):
    with pytest.raises(InputError, match=said):
        score_file(made(*records))


@pytest.mark.slow
def test_what_is_odd_is_counted_and_scored(made):
    odd = [GOOD | {"region_id": 2, "caption": " "}, GOOD | {"region_id": 3, "caption": "a\ndog 😀"}]
    report = score_file(made(GOOD, *odd), ["rouge-l"])
    assert report.remarks == [
        *("1 captions are empty and scored as such", "1 captions have line breaks, which are read as spaces")
    ]
    assert 0.6 < report.scores["rouge-l"] < 1


def test_a_run_that_lost_or_gained_lines_or_whose_truth_was_changed_is_refused(run):
    path = run / PREDICTIONS_NAME
    lines = path.read_text().splitlines(keepends=True)
    whole = "".join(lines)
    path.write_text("".join(lines[:2] + lines[4:]))
    with pytest.raises(InputError, match="2 fewer records than the"):
        score_file(run)
    path.write_text(whole.replace('"name": "star"', '"name": "moon"').replace('"name": "circle"', '"name": "moon"'))
    with pytest.raises(InputError, match="what is true of them"):
        score_file(run)
    path.write_text(whole)
    assert score_file(run, ["class"]).scores["class/count"] == 1


def test_predictions_can_be_held_against_a_dataset(run, made):
    assert score_file(run, ["class"], dataset={"name": "scenes", "num_images": 3}).scores
    with pytest.raises(InputError, match=r"regions of the dataset were not asked for: region \d+ of image"):
        score_file(run, ["class"], dataset={"name": "scenes", "num_images": 4})
    with pytest.raises(InputError, match="regions are not in the dataset: region 1 of image 1"):
        score_file(made(GOOD), dataset={"name": "scenes", "num_images": 1})


def test_pictures_of_another_version_of_the_data_are_not_looked_at():
    with pytest.raises(InputError, match="is not the one that was asked about"):
        make_run_image_loader({"dataset": "scenes", "split": "val", "options": {"num_images": 1}, "data": "0123"})(
            {"index": 0}
        )
