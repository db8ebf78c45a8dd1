"""PAM's training data: names, phrases and questions of a conversation, and records that cannot be used."""

import json

import pytest
from PIL import Image
from sca_registry.contracts import Question

from sca.data.pam_json import PamJson
from sca.io.errors import InputError
from sca.language_models.pam_prompts import TASK_PROMPTS

pytest.importorskip("datasets", reason="requires the extra data")


def make_record(*turns, image="a.png", bbox=(2, 3, 10, 5), **fields):
    speakers = ("human", "gpt")
    conversations = [{"from": speakers[index % 2], "value": text} for index, text in enumerate(turns)]
    return {"type": "image", "image": image, "bbox": bbox, "conversations": conversations} | fields


@pytest.fixture
def open_records(tmp_path):
    """Function that writes records and opens them as a dataset."""

    def write_and_open(*records, **options):
        for name in ("a.png", "b.png"):
            Image.new("RGB", (32, 24), (200, 30, 30)).save(tmp_path / name)
        (tmp_path / "pam.json").write_text(json.dumps(records))
        return PamJson("train", tmp_path / "pam.json", **options)

    return write_and_open


def test_pam_json_reads_names_phrases_and_questions(open_records):
    dataset = open_records(
        make_record(f"<image>\n{TASK_PROMPTS['recognition']}", "dog"),
        make_record(f"<image>\n{TASK_PROMPTS['caption']}", " a brown dog ", image="b.png"),
        make_record(f"<image>\n{TASK_PROMPTS['explain']}", "dog: an animal", "what color is it?", "brown"),
    )
    first, second = dataset
    assert [(region.id, region.box, region.name, region.phrases) for region in first.regions] == [
        (0, (2.0, 3.0, 12.0, 8.0), "dog", ()),
        (2, (2.0, 3.0, 12.0, 8.0), None, ()),
    ]
    assert first.questions == (
        Question(TASK_PROMPTS["explain"], "dog: an animal", (2,), "explain"),
        Question("what color is it?", "brown", (2,)),
    )
    assert [region.phrases for region in second.regions] == [("a brown dog",)]
    assert not dataset.skipped


def test_pam_json_counts_records_that_it_does_not_use(open_records):
    turns = ("<image>\nwhat is it?", "a dog")
    dataset = open_records(
        make_record(*turns),
        make_record(*turns, type="video"),
        make_record(*turns, bbox=None),
        make_record(turns[0]),
        make_record(conversations=[{"from": "gpt", "value": "a dog"}, {"from": "human", "value": "what is it?"}]),
        make_record("<image>", "a dog"),
        make_record(),
        make_record(*turns, bbox=[1, 2]),
        make_record(*turns, image="missing.png"),
        "text",
    )
    assert [len(sample.regions) for sample in dataset] == [1]
    assert dataset.skipped["record of type 'video'"] == 1
    assert dataset.skipped["record without a box"] == 1
    assert dataset.skipped["image missing"] == 1
    assert sum(dataset.skipped.values()) == 9


def test_pam_json_holds_out_images(open_records, tmp_path):
    turns = ("<image>\nwhat is it?", "a dog")
    records = [make_record(*turns), make_record(*turns, image="b.png")]
    train = open_records(*records, val_fraction=0.3)
    val = PamJson("val", tmp_path / "pam.json", val_fraction=0.3)
    names = [{row["file"] for row in dataset._table} for dataset in (train, val)]
    assert not names[0] & names[1]


def test_pam_json_rejects_a_missing_file(tmp_path):
    with pytest.raises(InputError, match=r"pam\.json does not exist; set file=FILE"):
        PamJson("train", tmp_path / "pam.json")
