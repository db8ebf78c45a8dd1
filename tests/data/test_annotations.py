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
HEAD = {"original_width": WIDTH, "original_height": HEIGHT, "image_rotation": 0, "to_name": "image"}


def box(identity, label, *texts, x=25):
    value = {"x": x, "y": 50, "width": 50, "height": 20, "rotation": 0, "rectanglelabels": [label]}
    shape = {**HEAD, "id": identity, "type": "rectanglelabels", "value": value}
    return [shape, *({**HEAD, "id": identity, "type": "textarea", "value": {"text": [text]}} for text in texts)]


def polygon(identity, label):
    value = {"points": [[25, 20], [75, 20], [75, 60]], "polygonlabels": [label]}
    return [{**HEAD, "id": identity, "type": "polygonlabels", "value": value}]


def task(name, *results):
    return {"data": {"image": name}, "annotations": [{"result": list(results)}]}


def shape(label, points, kind="rectangle", **more):
    return {"label": label, "points": points, "shape_type": kind, **more}


def write_labelme(folder, name, *shapes, **more):
    content = {"imagePath": f"{name}.png", "imageWidth": WIDTH, "imageHeight": HEIGHT, "shapes": list(shapes), **more}
    (folder / f"{name}.json").write_text(json.dumps(content))


@pytest.fixture
def folder(tmp_path):
    for number in range(3):
        pixels = np.random.default_rng(number).integers(0, 255, (HEIGHT, WIDTH, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    return tmp_path


def test_label_studio_export_is_a_dataset(folder):
    relation = {"type": "relation", "from_id": "a", "to_id": "b"}
    first = task("0.png", *box("a", "cat", "a cat", "asleep"), *polygon("b", "dog"), relation)
    keypoint = {**HEAD, "id": "k", "type": "keypointlabels", "value": {"x": 5, "y": 5, "keypointlabels": ["eye"]}}
    second = task("1.png", keypoint, *box("c", "cat"))
    damaged = task("2.png", *box("d", "cat", x=None), *box("e", "cat", x=52))
    (folder / "export.json").write_text(
        json.dumps([first, second, damaged, task("empty.png"), task("none.png", *box("f", "cat"))])
    )
    dataset = LabelingToolDataset("train", file=folder / "export.json")
    one, two, three = dataset
    cat, dog = one.regions
    assert (cat.name, cat.phrases, cat.mask, cat.box) == ("cat", ("a cat", "asleep"), None, (10, 15, 30, 21))
    assert (dog.name, dog.phrases, decode_rle(dog.mask).shape) == ("dog", (), (HEIGHT, WIDTH))
    assert [region.id for region in (*two.regions, *three.regions)] == [3, 4]
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


def test_labelme_folder_is_a_dataset(folder):
    write_labelme(folder, "0", shape("cat", [[5, 5], [20, 20]], description=" a cat "), shape("x", [[1, 1]], "point"))
    write_labelme(folder, "1", shape("dog", [[5, 5], [20, 5], [20, 20]], "polygon"), {"label": 3})
    dataset = LabelingToolDataset("train", file=folder)
    one, two = dataset
    assert [(region.name, region.phrases, region.box) for region in one.regions] == [
        ("cat", ("a cat",), (5, 5, 20, 20))
    ]
    assert decode_rle(two.regions[0].mask)[10, 15]
    assert dataset.skipped == {"region without a box or mask": 1, "unusable region": 1}


def test_labelme_image_inside_the_file_is_used_where_the_image_is_missing(folder):
    write_labelme(folder, "0", shape("cat", [[5, 5], [20, 20]]))
    whole = LabelingToolDataset("train", file=folder)[0]
    content = io.BytesIO((folder / "0.png").read_bytes())
    (folder / "0.png").unlink()
    inside = base64.b64encode(content.getvalue()).decode()
    write_labelme(folder, "0", shape("cat", [[5, 5], [20, 20]]), imageData=inside)
    assert LabelingToolDataset("train", file=folder)[0].image.tobytes() == whole.image.tobytes()
    write_labelme(folder, "0", shape("cat", [[5, 5], [20, 20]]), imageData="QUJD")
    dataset = LabelingToolDataset("train", file=folder)
    assert list(dataset) == []
    assert dataset.skipped == {"image unreadable": 1}


def test_image_of_another_size_is_counted(folder):
    write_labelme(folder, "0", shape("cat", [[5, 5], [20, 20]]), imageWidth=HEIGHT, imageHeight=WIDTH)
    dataset = LabelingToolDataset("train", file=folder)
    assert list(dataset) == []
    assert dataset.skipped == {"image of another size": 1}


def as_label_studio(folder):
    (folder / "export.json").write_text(json.dumps([task(f"{n}.png", *box("a", "cat")) for n in range(20)]))
    return folder / "export.json"


def as_labelme(folder):
    for number in range(20):
        write_labelme(folder, number, shape("cat", [[5, 5], [20, 20]]))
    return folder


@pytest.mark.parametrize("write", [as_label_studio, as_labelme])
def test_files_of_labeling_tools_are_recognized_and_split(folder, write):
    for number in range(3, 20):
        Image.new("RGB", (WIDTH, HEIGHT)).save(folder / f"{number}.png")
    file = write(folder)
    for path in {file, folder}:
        table = detect_data_source(path)
        options = {key: value for key, value in table.items() if key not in ("names", "augment")}
        part = ComponentSpec.from_dict(options, "dataset")
        ids = {split: datasets.build(part.name, split, **part.options).image_ids for split in ("train", "val")}
        assert sorted(ids["train"] + ids["val"]) == list(range(20))
        assert ids["val"]


def test_single_labelme_file_and_single_task_are_recognized(folder):
    write_labelme(folder, "0", shape("cat", [[5, 5], [20, 20]]))
    assert detect_data_source(folder / "0.json")["name"] == "annotations"
    (folder / "task.json").write_text(json.dumps({"annotations": [], "data": {"image": "0.png"}}))
    assert detect_data_source(folder / "task.json")["name"] == "annotations"


@pytest.mark.parametrize("name", ["nothing.json", "."])
def test_missing_file_is_named(folder, name):
    with pytest.raises(ValueError, match=r"is neither a \.json file nor a folder of LabelMe files"):
        LabelingToolDataset("train", file=folder / name)


def test_annotations_dataset_passes_conformance(folder, conformance):
    write_labelme(folder, "0", shape("cat", [[5, 5], [20, 20]]), shape("dog", [[5, 5], [20, 5], [20, 20]], "polygon"))
    write_labelme(folder, "1", shape("dog", [[5, 5], [60, 20]]))
    conformance("dataset", LabelingToolDataset, file=str(folder))


def test_labelme_without_a_recorded_size_judges_boxes_by_the_present_image(folder):
    write_labelme(folder, "0", shape("cat", [[5, 5], [150, 29]]), imageWidth=None, imageHeight=None)
    for size in ((148, 60), (200, 100)):
        Image.new("RGB", size).save(folder / "0.png")
        (sample,) = LabelingToolDataset("train", file=folder)
        assert sample.image.size == size
    assert sample.regions[0].box == (5, 5, 150, 29)


def test_label_studio_without_a_recorded_size_measures_the_image(folder):
    results = [each | {"original_width": None} for each in box("a", "cat")]
    (folder / "export.json").write_text(json.dumps([task("0.png", *results)]))
    for scale in (1, 3):
        Image.new("RGB", (WIDTH * scale, HEIGHT * scale)).save(folder / "0.png")
        (sample,) = LabelingToolDataset("train", file=folder / "export.json")
        assert sample.regions[0].box == pytest.approx((10 * scale, 15 * scale, 30 * scale, 21 * scale))
