"""ms-swift's grounding data: questions, captions and phrases of boxes, and records that cannot be used."""

import json

import pytest
from PIL import Image
from sca_registry.contracts import Question

from sca.data.swift_json import SwiftJson
from sca.io.errors import InputError

pytest.importorskip("datasets", reason="requires the extra data")

FIRST, SECOND = [2, 2, 12, 12], [20, 2, 30, 12]


def make_record(*turns, boxes=(FIRST,), names=(), images=("a.png",), **objects):
    roles = ("user", "assistant")
    return {
        "messages": [{"role": roles[index % 2], "content": text} for index, text in enumerate(turns)],
        "images": list(images),
        "objects": {"ref": list(names), "bbox": list(boxes)} | objects,
    }


@pytest.fixture
def open_records(tmp_path):
    """Function that writes records, one per line, and opens them as a dataset."""

    def write_and_open(*records, **options):
        Image.new("RGB", (32, 24), (200, 30, 30)).save(tmp_path / "a.png")
        (tmp_path / "swift.jsonl").write_text("\n".join(map(json.dumps, records)))
        return SwiftJson("train", tmp_path / "swift.jsonl", **options)

    return write_and_open


def get_phrases(sample):
    return [(region.box, region.phrases) for region in sample.regions]


def test_swift_json_reads_prompts_with_boxes_as_questions(open_records):
    record = make_record(
        "<image>Which is larger, <bbox> or <bbox>?", "the first", "Why?", "it is near", boxes=(FIRST, SECOND)
    )
    record["messages"].insert(0, {"role": "system", "content": "You are a helpful assistant."})
    dataset = open_records(record)
    (sample,) = dataset
    assert [(region.id, region.box) for region in sample.regions] == [(0, (2, 2, 12, 12)), (1, (20, 2, 30, 12))]
    assert sample.questions == (Question("Which is larger, <region 1> or <region 2>?", "the first", (0, 1)),)
    assert dataset.skipped == {"turn without a box": 1}


def test_swift_json_reads_responses_to_the_caption_prompt_as_phrases(open_records):
    records = (make_record("<image> Describe  <bbox>.", "a red cup"), make_record("What is <bbox>?", "a cup"))
    (sample,) = open_records(*records, caption_prompt="Describe <bbox>.")
    assert get_phrases(sample) == [((2, 2, 12, 12), ("a red cup",)), ((2, 2, 12, 12), ())]
    assert sample.questions == (Question("What is <region 1>?", "a cup", (1,)),)
    (sample,) = open_records(*records)
    assert [region.phrases for region in sample.regions] == [(), ()]


@pytest.mark.parametrize(
    ("turns", "names", "phrases"),
    [
        (("Find the <ref-object> in the image", "<bbox> and <bbox>"), ["sheep"], [["sheep"], ["sheep"]]),
        (("Describe it.", "<ref-object><bbox> and <ref-object><bbox> play"), ["dog", "cat"], [["dog"], ["cat"]]),
        (("Describe it.", "a <ref-object> <bbox>, <bbox> play"), ["dog"], [["dog"], ["dog"]]),
        (("Describe it.", "<ref-object><bbox> play near <bbox>"), ["dog"], [["dog"], []]),
    ],
)
def test_swift_json_reads_texts_before_boxes_as_phrases(open_records, turns, names, phrases):
    dataset = open_records(make_record(*turns, boxes=(FIRST, SECOND), names=names))
    (sample,) = dataset
    boxes = [tuple(box) for box, box_phrases in zip((FIRST, SECOND), phrases, strict=True) if box_phrases]
    assert get_phrases(sample) == [(box, tuple(each)) for box, each in zip(boxes, filter(None, phrases), strict=True)]
    assert dataset.skipped.get("region without text", 0) == phrases.count([])


def test_swift_json_inserts_texts_into_prompts_and_answers(open_records):
    (sample,) = open_records(
        make_record("What is <ref-object><bbox> doing?", "The <ref-object> sleeps", names=["dog", "dog"]),
        make_record("Describe <bbox>.", "a <ref-object> asleep", names=["cat"]),
        caption_prompt="Describe <bbox>.",
    )
    assert sample.questions == (Question("What is dog <region 1> doing?", "The dog sleeps", (0,)),)
    assert [region.phrases for region in sample.regions] == [("dog",), ("a cat asleep",)]


def test_swift_json_skips_only_the_turns_that_it_cannot_use(open_records):
    dataset = open_records(
        make_record("Is <bbox> red?", "yes", "Like <bbox>?", "<bbox>", "And <bbox>?", " ", boxes=(FIRST,) * 4)
    )
    (sample,) = dataset
    assert [each.answer for each in sample.questions] == ["yes"]
    assert dataset.skipped == {
        "answer with boxes to a question about boxes": 1,
        "unusable region": 1,
        "region without text": 3,
    }


def test_swift_json_scales_boxes_of_type_norm1(open_records):
    turns = ("What is <bbox>?", "a cup")
    (sample,) = open_records(make_record(*turns, boxes=([0.25, 0.5, 0.75, 1],), bbox_type="norm1"))
    assert sample.regions[0].box == (8, 12, 24, 24)


def test_swift_json_counts_records_that_it_does_not_use(open_records):
    turns = ("What is <bbox>?", "a cup")
    dataset = open_records(
        make_record(*turns),
        make_record(*turns, images=("a.png", "a.png")),
        make_record(*turns, images=()),
        make_record("What is <bbox> or <bbox>?", "a cup"),
        make_record("Find the <ref-object>", "<bbox>"),
        make_record(*turns, boxes=([9, 9, 2, 2],)),
        make_record(*turns, bbox_type="norm1000"),
        make_record(*turns[:1]),
        make_record("click", "<bbox>", boxes=([6, 2],)),
        make_record(*turns, boxes=([6, 2],)),
        7,
    )
    assert [[region.id for region in sample.regions] for sample in dataset] == [[0]]
    assert dataset.skipped == {
        "record without exactly one image": 2,
        "unusable region": 6,
        "point instead of a box": 2,
        "question about a missing region": 1,
    }
    assert any("line 4: more <bbox> than boxes in bbox" in each for each in dataset.examples["unusable region"])
    assert any("bbox_type is 'norm1000'" in each for each in dataset.examples["unusable region"])


def test_swift_json_rejects_a_caption_prompt_without_a_box(open_records):
    with pytest.raises(InputError, match="caption_prompt is 'Describe it'; expected a prompt with one <bbox>"):
        open_records(make_record("a", "b"), caption_prompt="Describe it")
