"""Names and scores of proposed regions in the output formats."""

import json

import numpy as np
import pytest
from PIL import Image
from sca_registry.contracts import Caption, Prompt

from sca.io.masks import encode_rle
from sca.output.formats import MultiFormatWriter
from sca.output.reader import read_captions

FORMATS = ("jsonl", "coco", "parquet", "geojson", "label-studio", "labelme")
BOX = (2.0, 3.0, 9.0, 8.0)


@pytest.fixture
def named_captions():
    mask = np.zeros((12, 16), bool)
    mask[3:8, 2:9] = True
    return [
        Caption("a red car", 0.5, BOX, None, 0.75, Prompt(box=BOX), 0, name="red car", proposal_score=0.25),
        Caption("a region", 0.5, BOX, None, 0.75, Prompt(box=BOX), 1),
        Caption("a dog", 0.5, BOX, encode_rle(mask), 0.75, Prompt(mask=mask), 2, name="dog", proposal_score=0.5),
    ]


@pytest.fixture
def write_named(named_captions, tmp_path):
    """Function that writes the captions in a format and returns the output path."""

    def write(format_name):
        with MultiFormatWriter(tmp_path, (format_name,), model="m") as writers:
            writers.add("a.png", Image.new("RGB", (16, 12)), named_captions)
        return writers.paths[format_name]

    return write


@pytest.mark.parametrize("format_name", FORMATS)
def test_formats_keep_the_names_and_scores_of_proposals(format_name, write_named):
    if format_name == "parquet":
        pytest.importorskip("pyarrow")
    (image,) = read_captions(write_named(format_name))
    assert [caption.name for caption in image.captions] == ["red car", None, "dog"]
    scores = [None] * 3 if format_name == "label-studio" else [0.25, None, 0.5]
    assert [caption.proposal_score for caption in image.captions] == scores
    assert [caption.text for caption in image.captions] == ["a red car", "a region", "a dog"]


def test_coco_names_are_categories(write_named):
    content = json.loads(write_named("coco").read_text())
    assert [(each["id"], each["name"]) for each in content["categories"]] == [
        (1, "region"),
        (2, "red car"),
        (3, "dog"),
    ]
    assert [each["category_id"] for each in content["annotations"]] == [2, 1, 3]


def test_jsonl_omits_the_fields_of_proposals_for_other_regions(write_named):
    first, second, _ = map(json.loads, write_named("jsonl").read_text().splitlines())
    assert (first["name"], first["proposal_score"]) == ("red car", 0.25)
    assert not {"name", "proposal_score"} & second.keys()


def test_html_page_contains_the_names(write_named):
    page = write_named("html").read_text()
    assert page.count('"name": "red car"') == 1
    assert page.count('"name":') == 2
