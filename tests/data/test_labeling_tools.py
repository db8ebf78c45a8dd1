"""Exports of labeling tools as datasets."""

import base64
import io
import json

import numpy as np
import pytest
from PIL import Image
from sca_registry import datasets
from sca_registry.spec import ComponentSpec

from sca.data.custom import detect_data_source
from sca.data.labeling_tools import LabelingToolDataset
from sca.io.masks import decode_rle

WIDTH, HEIGHT = 40, 30
COMMON_FIELDS = {"original_width": WIDTH, "original_height": HEIGHT, "image_rotation": 0, "to_name": "image"}


def make_label_studio_box(region_id, label, *texts, x=25):
    value = {"x": x, "y": 50, "width": 50, "height": 20, "rotation": 0, "rectanglelabels": [label]}
    rectangle = {**COMMON_FIELDS, "id": region_id, "type": "rectanglelabels", "value": value}
    return [
        rectangle,
        *({**COMMON_FIELDS, "id": region_id, "type": "textarea", "value": {"text": [text]}} for text in texts),
    ]


def make_label_studio_polygon(region_id, label):
    value = {"points": [[25, 20], [75, 20], [75, 60]], "polygonlabels": [label]}
    return [{**COMMON_FIELDS, "id": region_id, "type": "polygonlabels", "value": value}]


def make_label_studio_task(name, *results):
    return {"data": {"image": name}, "annotations": [{"result": list(results)}]}


def make_labelme_shape(label, points, shape_type="rectangle", **fields):
    return {"label": label, "points": points, "shape_type": shape_type, **fields}


def write_labelme(folder, name, *shapes, **fields):
    content = {"imagePath": f"{name}.png", "imageWidth": WIDTH, "imageHeight": HEIGHT, "shapes": list(shapes), **fields}
    (folder / f"{name}.json").write_text(json.dumps(content))


@pytest.fixture
def folder(tmp_path):
    for number in range(3):
        pixels = np.random.default_rng(number).integers(0, 255, (HEIGHT, WIDTH, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    return tmp_path


def test_label_studio_export_is_read_as_dataset(folder):
    relation = {"type": "relation", "from_id": "a", "to_id": "b"}
    first_task = make_label_studio_task(
        "0.png", *make_label_studio_box("a", "cat", "a cat", "asleep"), *make_label_studio_polygon("b", "dog"), relation
    )
    keypoint = {
        **COMMON_FIELDS,
        "id": "k",
        "type": "keypointlabels",
        "value": {"x": 5, "y": 5, "keypointlabels": ["eye"]},
    }
    second_task = make_label_studio_task("1.png", keypoint, *make_label_studio_box("c", "cat"))
    damaged_task = make_label_studio_task(
        "2.png", *make_label_studio_box("d", "cat", x=None), *make_label_studio_box("e", "cat", x=52)
    )
    (folder / "export.json").write_text(
        json.dumps(
            [
                first_task,
                second_task,
                damaged_task,
                make_label_studio_task("empty.png"),
                make_label_studio_task("none.png", *make_label_studio_box("f", "cat")),
            ]
        )
    )
    dataset = LabelingToolDataset("train", file=folder / "export.json")
    first_sample, second_sample, third_sample = dataset
    cat, dog = first_sample.regions
    assert (cat.name, cat.phrases, cat.mask, cat.box) == ("cat", ("a cat", "asleep"), None, (10, 15, 30, 21))
    assert (dog.name, dog.phrases, decode_rle(dog.mask).shape) == ("dog", (), (HEIGHT, WIDTH))
    assert [region.id for region in (*second_sample.regions, *third_sample.regions)] == [3, 4]
    assert dataset.attribute_values == {"name": ("cat", "dog", "eye")}
    assert dataset.skipped == {
        "relation": 1,
        "region without a box or mask": 1,
        "unusable region": 1,
        "box clipped": 1,
        "image without regions": 1,
        "image missing": 1,
    }
    assert "task 2, region 'd'" in dataset.examples["unusable region"][0]


def test_labelme_folder_is_read_as_dataset(folder):
    write_labelme(
        folder,
        "0",
        make_labelme_shape("cat", [[5, 5], [20, 20]], description=" a cat "),
        make_labelme_shape("x", [[1, 1]], "point"),
    )
    write_labelme(folder, "1", make_labelme_shape("dog", [[5, 5], [20, 5], [20, 20]], "polygon"), {"label": 3})
    dataset = LabelingToolDataset("train", file=folder)
    first_sample, second_sample = dataset
    assert [(region.name, region.phrases, region.box) for region in first_sample.regions] == [
        ("cat", ("a cat",), (5, 5, 20, 20))
    ]
    assert decode_rle(second_sample.regions[0].mask)[10, 15]
    assert dataset.skipped == {"region without a box or mask": 1, "unusable region": 1}


def test_labelme_embedded_image_replaces_missing_file(folder):
    write_labelme(folder, "0", make_labelme_shape("cat", [[5, 5], [20, 20]]))
    original_sample = LabelingToolDataset("train", file=folder)[0]
    content = io.BytesIO((folder / "0.png").read_bytes())
    (folder / "0.png").unlink()
    embedded_image = base64.b64encode(content.getvalue()).decode()
    write_labelme(folder, "0", make_labelme_shape("cat", [[5, 5], [20, 20]]), imageData=embedded_image)
    assert LabelingToolDataset("train", file=folder)[0].image.tobytes() == original_sample.image.tobytes()
    write_labelme(folder, "0", make_labelme_shape("cat", [[5, 5], [20, 20]]), imageData="QUJD")
    dataset = LabelingToolDataset("train", file=folder)
    assert list(dataset) == []
    assert dataset.skipped == {"image unreadable": 1}


def test_labelme_image_of_different_size_is_counted(folder):
    write_labelme(folder, "0", make_labelme_shape("cat", [[5, 5], [20, 20]]), imageWidth=HEIGHT, imageHeight=WIDTH)
    dataset = LabelingToolDataset("train", file=folder)
    assert list(dataset) == []
    assert dataset.skipped == {"image of a different size": 1}


def write_label_studio_export(folder):
    (folder / "export.json").write_text(
        json.dumps([make_label_studio_task(f"{n}.png", *make_label_studio_box("a", "cat")) for n in range(20)])
    )
    return folder / "export.json"


def write_labelme_export(folder):
    for number in range(20):
        write_labelme(folder, number, make_labelme_shape("cat", [[5, 5], [20, 20]]))
    return folder


@pytest.mark.parametrize("write_export", [write_label_studio_export, write_labelme_export])
def test_detect_data_source_recognizes_and_splits_labeling_tool_files(folder, write_export):
    for number in range(3, 20):
        Image.new("RGB", (WIDTH, HEIGHT)).save(folder / f"{number}.png")
    file = write_export(folder)
    for path in {file, folder}:
        table = detect_data_source(path)
        options = {key: value for key, value in table.items() if key not in ("class_name_task", "augment")}
        part = ComponentSpec.from_dict(options, "dataset")
        image_ids = {split: datasets.build(part.name, split, **part.options).image_ids for split in ("train", "val")}
        assert sorted(image_ids["train"] + image_ids["val"]) == list(range(20))
        assert image_ids["val"]


def test_detect_data_source_recognizes_single_labelme_file_and_single_task(folder):
    write_labelme(folder, "0", make_labelme_shape("cat", [[5, 5], [20, 20]]))
    assert detect_data_source(folder / "0.json")["name"] == "annotations"
    (folder / "task.json").write_text(json.dumps({"annotations": [], "data": {"image": "0.png"}}))
    assert detect_data_source(folder / "task.json")["name"] == "annotations"


@pytest.mark.parametrize("name", ["nothing.json", "."])
def test_labeling_tool_dataset_reports_missing_file(folder, name):
    with pytest.raises(ValueError, match=r"is neither a \.json file nor a folder of LabelMe files"):
        LabelingToolDataset("train", file=folder / name)


def test_annotations_dataset_passes_conformance(folder, conformance):
    write_labelme(
        folder,
        "0",
        make_labelme_shape("cat", [[5, 5], [20, 20]]),
        make_labelme_shape("dog", [[5, 5], [20, 5], [20, 20]], "polygon"),
    )
    write_labelme(folder, "1", make_labelme_shape("dog", [[5, 5], [60, 20]]))
    conformance("dataset", LabelingToolDataset, file=str(folder))


def test_labelme_without_recorded_size_checks_boxes_against_current_image(folder):
    write_labelme(folder, "0", make_labelme_shape("cat", [[5, 5], [150, 29]]), imageWidth=None, imageHeight=None)
    for size in ((148, 60), (200, 100)):
        Image.new("RGB", size).save(folder / "0.png")
        (sample,) = LabelingToolDataset("train", file=folder)
        assert sample.image.size == size
    assert sample.regions[0].box == (5, 5, 150, 29)


def test_label_studio_without_recorded_size_uses_size_of_image(folder):
    results = [each | {"original_width": None} for each in make_label_studio_box("a", "cat")]
    (folder / "export.json").write_text(json.dumps([make_label_studio_task("0.png", *results)]))
    for scale in (1, 3):
        Image.new("RGB", (WIDTH * scale, HEIGHT * scale)).save(folder / "0.png")
        (sample,) = LabelingToolDataset("train", file=folder / "export.json")
        assert sample.regions[0].box == pytest.approx((10 * scale, 15 * scale, 30 * scale, 21 * scale))
