"""Tests of the LabelMe dataset and the label recall metric."""

import base64
import json

import numpy as np
import pytest
from PIL import Image
from sca_labelme import LabelMe, LabelRecall

from sca.io.masks import decode_rle

pytest_plugins = ["sca.testing.pytest"]  # provides the fixture `conformance`


@pytest.fixture
def folder(tmp_path):
    for number in range(2):
        Image.new("RGB", (40, 30), "gray").save(tmp_path / f"{number}.png")
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


def test_labelme_converts_shapes_to_regions_with_masks(folder):
    roof, door, sun, wire = LabelMe("train", str(folder))[1].regions
    assert (roof.name, roof.phrases, door.name, door.phrases) == ("roof", ("a red roof",), "door", ())
    assert (door.box, door.mask) == ((22, 10, 30, 25), None)
    assert decode_rle(sun.mask).sum() == pytest.approx(np.pi * 3.5**2, rel=0.1)
    assert (wire.box, wire.mask) == ((0, 0, 9, 9), None)


def test_labelme_counts_skipped_shapes(folder):
    point = {"label": "eye", "points": [[3, 3]], "shape_type": "point"}
    ignored = {"label": "__ignore__", "points": [[2, 2], [20, 2], [2, 20]], "shape_type": "polygon"}
    cuboid = {"label": "box", "points": [[2, 2], [20, 2], [2, 20]], "shape_type": "cuboid"}
    outside = {"label": "door", "points": [[50, 2], [60, 20]], "shape_type": "rectangle"}
    content = {"imagePath": "0.png", "shapes": [point, ignored, cuboid, outside]}
    (folder / "0.json").write_text(json.dumps(content))
    dataset = LabelMe("train", str(folder))
    assert dataset.skipped == {
        "keypoint": 1,
        "shape labeled __ignore__": 1,
        "LabelMe shape 'cuboid'": 1,
        "empty box": 1,
        "line, read as its box": 1,
    }
    assert dataset.examples["keypoint"] == [f"{folder / '0.json'}, shapes[0]"]
    assert [len(regions) for regions in dataset.iter_annotations()] == [0, 4]


def make_rotated_dataset(folder, **changes):
    """Create a dataset with an image that EXIF rotates by 90 degrees, annotated as displayed: 40 x 30."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (30, 40), "gray").save(folder / "0.png", exif=exif)
    door = {"label": "door", "points": [[32, 10], [39, 25]], "shape_type": "rectangle"}
    content = {"imagePath": "0.png", "shapes": [door], "imageWidth": 40, "imageHeight": 30} | changes
    (folder / "0.json").write_text(json.dumps(content))
    return LabelMe("train", str(folder))


def test_labelme_applies_exif_orientation(folder):
    for changes in ({}, {"imageWidth": None, "imageHeight": None}):
        sample = make_rotated_dataset(folder, **changes)[0]
        assert sample.image.size == (40, 30)
        assert [region.box for region in sample.regions] == [(32, 10, 39, 25)]


def test_labelme_rejects_a_rotated_image(folder):
    with pytest.raises(ValueError, match=r"records 30 x 40 .*, but the image is 40 x 30: the image was rotated"):
        make_rotated_dataset(folder, imageWidth=30, imageHeight=40)[0]


def test_labelme_uses_image_data_if_the_image_is_missing(folder):
    data = base64.b64encode((folder / "0.png").read_bytes()).decode()
    for path in folder.glob("*.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"imageData": data}))
    original = LabelMe("train", str(folder))[0]
    (folder / "0.png").unlink()
    sample = LabelMe("train", str(folder))[0]
    assert sample.image.tobytes() == original.image.tobytes()
    assert sample.regions == original.regions


def test_labelme_counts_a_bad_shape_and_keeps_the_others(folder):
    door = {"label": "door", "points": [[22, 10], [30, 25]], "shape_type": "rectangle"}
    shapes = [{}, door, door | {"points": [["x", 1], [2, 3]]}, door | {"points": [[0.1, 0.1], [0.5, 0.5]]}]
    shapes.append(door | {"points": [[22, 10], [41, 25]], "caption": "a door"})
    (folder / "0.json").write_text(json.dumps({"imagePath": "0.png", "shapes": shapes}))
    dataset = LabelMe("train", str(folder))
    assert [region.box for region in dataset[0].regions] == [(22, 10, 30, 25), (22, 10, 40, 25)]
    unread = "caption under 'caption', which is not read (the key is 'description')"
    counted = {"unusable region": 2, "normalized box": 1, "box clipped": 1, unread: 1}
    assert {reason: dataset.skipped[reason] for reason in counted} == counted
    assert "0.json, shapes[0]" in dataset.examples["unusable region"][0]


def test_labelme_scales_regions_to_a_resized_image(folder):
    content = json.loads((folder / "0.json").read_text()) | {"imageWidth": 40, "imageHeight": 30}
    (folder / "0.json").write_text(json.dumps(content))
    Image.new("RGB", (80, 60)).save(folder / "0.png")
    sample = LabelMe("train", str(folder))[0]
    roof, door, *_ = sample.regions
    assert (sample.image.size, door.box) == ((80, 60), (44, 20, 60, 50))
    assert decode_rle(roof.mask).shape == (60, 80)


def test_labelme_passes_conformance(folder, conformance):
    conformance("dataset", LabelMe, root=str(folder))


@pytest.mark.parametrize("name", [".\\1.png", "C:\\photos\\1.png", "./1.png", "file:///photos/1.png"])
def test_labelme_resolves_image_paths_of_any_system(folder, name):
    content = json.loads((folder / "1.json").read_text()) | {"imagePath": name}
    (folder / "1.json").write_text(json.dumps(content))
    assert LabelMe("train", str(folder))[1].image.size == (40, 30)


def test_labelme_rejects_image_urls(folder):
    content = json.loads((folder / "1.json").read_text()) | {"imagePath": "https://host/1.png"}
    (folder / "1.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"1\.json.*is a URL, not a file"):
        LabelMe("train", str(folder))[1]


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "not valid JSON"), ("{}", "no imagePath"), ('{"imagePath": "0.png", "shapes": {}}', "shapes")],
)
def test_labelme_rejects_an_invalid_file(folder, text, message):
    (folder / "1.json").write_text(text)
    with pytest.raises(ValueError, match=rf"1\.json.*{message}"):
        LabelMe("train", str(folder))


def test_label_recall_counts_captions_with_the_label():
    records = [
        {"task": "caption", "caption": "A red Roof", "truth": {"name": "roof"}},
        {"task": "caption", "caption": "a wall", "truth": {"name": "roof"}},
        {"task": "recognition", "caption": "roof", "truth": {"name": "roof"}},
    ]
    assert LabelRecall()(records).values == {"label-recall/mean": 0.5, "label-recall/captions": 2}
    with pytest.raises(ValueError, match="no record has"):
        LabelRecall()([])
