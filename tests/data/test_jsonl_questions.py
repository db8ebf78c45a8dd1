"""Questions in JSON Lines: their fields, references to other lines, statistics, export, and invalid lines."""

import json

import pytest
from PIL import Image
from sca_registry.contracts import Question

from sca.data.export import export_dataset
from sca.data.jsonl import Jsonl
from sca.data.scenes import Scenes
from sca.data.stats import compute_dataset_stats
from sca.io.errors import InputError

pytest.importorskip("datasets", reason="requires the extra data")

BOX = [1, 1, 9, 9]


@pytest.fixture
def write_lines(tmp_path):
    """Function that writes lines about one image and opens them as a dataset."""

    def write(*lines, **options):
        Image.new("RGB", (16, 16), (200, 30, 30)).save(tmp_path / "a.png")
        records = [{"image": "a.png", "box": BOX, **line} for line in lines]
        (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, records)))
        return Jsonl("train", tmp_path / "mine.jsonl", **options)

    return write


def test_jsonl_reads_questions_about_one_region_or_several(write_lines):
    dataset = write_lines(
        {"id": 4, "question": " what color is it? ", "answer": "red", "kind": "color"},
        {
            "id": 7,
            "caption": "a dog",
            "questions": [
                {"question": "is <region 1> left of <region 2>?", "answer": "yes", "regions": [7, 4]},
                {"question": "what is it?", "answer": "a dog"},
            ],
        },
    )
    (sample,) = dataset
    assert [region.phrases for region in sample.regions] == [(), ("a dog",)]
    assert sample.questions == (
        Question("what color is it?", "red", (4,), "color"),
        Question("is <region 1> left of <region 2>?", "yes", (7, 4)),
        Question("what is it?", "a dog", (7,)),
    )
    assert list(dataset.iter_questions()) == [sample.questions]
    stats = compute_dataset_stats(dataset)
    assert stats["num_questions"] == 3
    assert stats["questions_by_kind"] == {"question": 2, "color": 1}
    assert stats["most_common_answers"] == {"red": 1, "yes": 1, "a dog": 1}


def test_questions_about_regions_that_are_skipped_are_dropped_and_counted(write_lines):
    dataset = write_lines(
        {
            "id": 1,
            "caption": "a dog",
            "questions": [{"question": "is it <region 2>?", "answer": "no", "regions": [1, 2]}],
        },
        {"id": 2, "caption": "a cat", "box": [20, 20, 30, 30]},
    )
    (sample,) = dataset
    assert sample.questions == ()
    assert dataset.skipped["question about a missing region"] == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"question": "what is it?"}, "answer"),
        ({"answer": "red"}, "question"),
        ({"question": "what is it?", "answer": " "}, "a question or its answer is empty"),
        ({"question": "is it <region 2>?", "answer": "no"}, "refers to <region 2>, but the number of its regions is 1"),
        ({"question": "is it <region 0>?", "answer": "no"}, "refers to <region 0>"),
        ({"question": "what is it?", "answer": "red", "regions": []}, "has no regions"),
        ({"question": "what is it?", "answer": "red", "regions": ["a"]}, "regions is"),
        ({"questions": ["what is it?"]}, "expected objects with question and answer"),
        ({}, "no text; set name, caption, phrases, or question and answer"),
        ({"caption": "a", "phrases": ["b"]}, "caption and phrases are mutually exclusive"),
    ],
)
def test_jsonl_rejects_invalid_questions(write_lines, line, message):
    with pytest.raises(InputError, match=message):
        write_lines(line, max_bad_records=0)


def test_jsonl_export_keeps_questions(tmp_path):
    scenes = Scenes("train", num_images=2, image_size=64, questions=True)
    folder = export_dataset({"train": scenes}, tmp_path / "out", "jsonl")
    dataset = Jsonl("train", folder / "{split}.jsonl")
    for index, sample in enumerate(dataset):
        assert set(sample.questions) == set(scenes[index].questions)
    assert dataset.metadata["questions"] == sum(len(scenes[index].questions) for index in range(2))
    assert dataset.metadata["images_with_questions_only"] == 0


def test_jsonl_reads_the_output_of_a_question_as_its_answer(write_lines):
    (sample,) = write_lines({"question": "what color is it?", "caption": "red", "score": 0.9})
    assert sample.regions[0].phrases == ()
    assert sample.questions == (Question("what color is it?", "red", (0,)),)


def test_regions_of_dropped_questions_are_dropped_and_their_images_are_not_counted(write_lines):
    dataset = write_lines(
        {"id": 1, "question": "is it <region 2>?", "answer": "no", "regions": [1, 9]},
        {"id": 2, "caption": "a cat"},
    )
    (sample,) = dataset
    assert [region.id for region in sample.regions] == [2]
    assert dataset.metadata["images_with_questions_only"] == 0


def test_export_reports_questions_that_a_format_cannot_contain(tmp_path, caplog):
    scenes = Scenes("train", num_images=1, image_size=64, questions=True)
    export_dataset({"train": scenes}, tmp_path / "coco", "coco")
    assert f"{len(scenes[0].questions)} questions of the dataset are not exported" in caplog.text
    caplog.clear()
    export_dataset({"train": scenes}, tmp_path / "jsonl", "jsonl")
    assert not caplog.text
