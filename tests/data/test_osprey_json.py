"""Osprey-724K: descriptions, conversations about regions, and records that cannot be used."""

import json

import pytest
from PIL import Image
from sca_registry.contracts import Question

from sca.data.osprey_json import OspreyJson
from sca.io.errors import InputError

pytest.importorskip("datasets", reason="requires the extra data")

LEFT, RIGHT = ([[x, 2, x + 10, 2, x + 10, 12, x, 12]] for x in (2, 20))  # polygons


def make_record(*turns, segmentations=(LEFT, RIGHT), file_name="a.png", **fields):
    speakers = ("human", "gpt")
    record = {
        "file_name": file_name,
        "width": 32,
        "height": 24,
        "annotation": [{"segmentation": each} for each in segmentations],
    }
    conversations = [{"from": speakers[index % 2], "value": text} for index, text in enumerate(turns)]
    return record | ({"conversations": conversations} if turns else {}) | fields


@pytest.fixture
def open_records(tmp_path):
    """Function that writes records and opens them as a dataset."""

    def write_and_open(*records, **options):
        for name in ("a.png", "000000000009.jpg"):
            Image.new("RGB", (32, 24), (200, 30, 30)).save(tmp_path / name)
        (tmp_path / "osprey.json").write_text(json.dumps(records))
        return OspreyJson("train", tmp_path / "osprey.json", **options)

    return write_and_open


def test_osprey_json_reads_descriptions_as_phrases(open_records):
    (sample,) = open_records(make_record(description=["<region1>: a red chair. It is old.", "<region2>: a table"]))
    assert [(region.id, region.box, region.phrases) for region in sample.regions] == [
        (0, (2.0, 2.0, 12.0, 12.0), ("a red chair. It is old.",)),
        (1, (20.0, 2.0, 30.0, 12.0), ("a table",)),
    ]
    assert all(region.mask["size"] == [24, 32] for region in sample.regions)


def test_osprey_json_reads_turns_as_questions_about_the_regions_of_the_record(open_records):
    dataset = open_records(
        make_record("what is it?", "a cup", segmentations=[LEFT]),
        make_record("is <region1> left of <region2>?", "yes, <region1> is", "and its color?", "red"),
    )
    (sample,) = dataset
    assert [region.id for region in sample.regions] == [0, 1, 2]
    assert sample.questions == (
        Question("what is it?", "a cup", (0,)),
        Question("is <region 1> left of <region 2>?", "yes, region 1 is", (1, 2)),
    )
    assert dict(dataset.skipped) == {"question that refers to none of several regions": 1}


def test_osprey_json_skips_only_the_turns_that_it_cannot_use(open_records):
    dataset = open_records(make_record("what is <region1>?", "a cup", "and <region5>?", "a table"))
    (sample,) = dataset
    assert [each.answer for each in sample.questions] == ["a cup"]
    assert dataset.skipped == {"unusable region": 1}


def test_osprey_json_finds_images_of_coco_2014_under_their_names_in_coco_2017(open_records):
    record = make_record("what is it?", "a cup", segmentations=[LEFT], file_name="COCO_train2014_000000000009.jpg")
    dataset = open_records(record)
    assert len(dataset) == 1
    assert dataset[0].image.size == (32, 24)


def test_osprey_json_counts_records_that_it_cannot_use(open_records):
    turns = ("what is it?", "a cup")
    dataset = open_records(
        make_record(*turns, segmentations=[LEFT]),
        make_record(*turns, segmentations=[LEFT], width=99),
        make_record(*turns, segmentations=[None]),
        make_record(*turns[:1], segmentations=[LEFT]),
        make_record(description=["one"]),
        make_record(),
        make_record(*turns, annotation=None),
        make_record(*turns, segmentations=[LEFT], file_name="missing.png"),
        7,
    )
    assert [[region.id for region in sample.regions] for sample in dataset] == [[0]]
    assert dataset.skipped == {
        "unusable region": 6,
        "region without text": 2,
        "question about a missing region": 1,
        "image missing": 1,
    }
    assert any(
        "osprey.json[1]: the image size is (99, 24), but" in each for each in dataset.examples["unusable region"]
    )
    assert any(
        "[2]: annotation[0]: no segmentation and no bbox" in each for each in dataset.examples["unusable region"]
    )


def test_osprey_json_rejects_a_file_that_is_not_a_list(tmp_path):
    (tmp_path / "osprey.json").write_text(json.dumps({"images": 1}))
    with pytest.raises(InputError, match=r"osprey\.json.*must be a list of objects"):
        OspreyJson("train", tmp_path / "osprey.json")
