"""A folder of LabelMe's is a dataset that keeps its promises, and labels are found in captions."""

import json

import numpy as np
import pytest
from PIL import Image
from sca_labelme import LabelMe, LabelRecall

from sca.masks import decode


@pytest.fixture
def folder(tmp_path):
    for number in range(2):
        Image.new("RGB", (40, 30), "grey").save(tmp_path / f"{number}.png")
        shapes = [
            {
                "label": "roof",
                "points": [[2, 2], [20, 2], [2, 20]],
                "shape_type": "polygon",
                "description": "a red roof",
            },
            {"label": "door", "points": [[30, 25], [22, 10]], "shape_type": "rectangle"},
            {"label": "sun", "points": [[30, 6], [33, 6]], "shape_type": "circle"},
            {"label": "wire", "points": [[0, 0], [9, 9]], "shape_type": "line"},
        ]
        content = {"imagePath": f"{number}.png", "shapes": shapes}
        (tmp_path / f"{number}.json").write_text(json.dumps(content))
    return tmp_path


def test_shapes_are_regions_with_masks(folder):
    roof, door, sun = LabelMe("train", str(folder))[1].regions
    assert (roof.name, roof.phrases, door.name, door.phrases) == ("roof", ("a red roof",), "door", ())
    assert door.box == (22, 10, 31, 26)
    assert decode(sun.mask).sum() == pytest.approx(np.pi * 3.5**2, rel=0.1)


def test_the_dataset_keeps_its_promises(folder, conformance):
    conformance("dataset", LabelMe, root=str(folder))


@pytest.mark.parametrize("name", ["..\\1.png", "C:\\photos\\1.png", "./1.png", "file:///photos/1.png"])
def test_labelme_finds_the_image_of_another_system(folder, name):
    content = json.loads((folder / "1.json").read_text()) | {"imagePath": name}
    (folder / "1.json").write_text(json.dumps(content))
    assert LabelMe("train", str(folder))[1].image.size == (40, 30)


def test_labelme_names_the_file_of_a_url(folder):
    content = json.loads((folder / "1.json").read_text()) | {"imagePath": "https://host/1.png"}
    (folder / "1.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"1\.json.*is a URL, not a file"):
        LabelMe("train", str(folder))[1]


@pytest.mark.parametrize(
    ("text", "told"),
    [("{", "not JSON"), ("{}", "no imagePath"), ('{"imagePath": "0.png", "shapes": [{}]}', "shapes is not")],
)
def test_a_broken_file_is_named(folder, text, told):
    (folder / "1.json").write_text(text)
    with pytest.raises(ValueError, match=rf"1\.json.*{told}"):
        LabelMe("train", str(folder))


def test_a_label_is_found_in_a_caption_or_not():
    records = [
        {"task": "caption", "caption": "A red Roof", "truth": {"name": "roof"}},
        {"task": "caption", "caption": "a wall", "truth": {"name": "roof"}},
        {"task": "recognition", "caption": "roof", "truth": {"name": "roof"}},
    ]
    assert LabelRecall()(records).total == {"label-recall/mean": 0.5, "label-recall/captions": 2}
    with pytest.raises(ValueError, match="no record has"):
        LabelRecall()([])
