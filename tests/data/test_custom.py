"""Custom datasets are detected, and a part of them is held out for validation."""

import json

import pytest
from PIL import Image
from sca_registry import datasets
from sca_registry.spec import ComponentSpec

from sca.data.custom import detect_data_source


@pytest.fixture
def image_folder(tmp_path):
    (tmp_path / "images").mkdir()
    for number in range(40):
        Image.new("RGB", (8, 8)).save(tmp_path / f"images/{number}.png")
    return tmp_path


def write_jsonl(folder):
    lines = [{"image": f"{n}.png", "box": [0, 0, 4, 4], "caption": "a thing"} for n in range(40)]
    (folder / "mine.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_coco(folder):
    content = {
        "images": [{"id": n, "file_name": f"{n}.png", "width": 8, "height": 8} for n in range(40)],
        "annotations": [{"id": n, "image_id": n, "category_id": 1, "bbox": [0, 0, 4, 4]} for n in range(40)],
        "categories": [{"id": 1, "name": "thing"}],
    }
    (folder / "mine.json").write_text(json.dumps(content))


@pytest.mark.parametrize("write_annotations", [write_jsonl, write_coco])
def test_detect_data_source_assigns_each_image_to_one_split(image_folder, write_annotations):
    write_annotations(image_folder)
    for source in (image_folder, next(image_folder.glob("mine.*"))):
        table = detect_data_source(source)
        table = {key: value for key, value in table.items() if key not in ("class_name_task", "augment")}
        part = ComponentSpec.from_dict(table, "dataset")
        image_ids = {split: datasets.build(part.name, split, **part.options).image_ids for split in ("train", "val")}
        assert not set(image_ids["train"]) & set(image_ids["val"])
        assert sorted(image_ids["train"] + image_ids["val"]) == list(range(40))
        assert 1 <= len(image_ids["val"]) <= 10
        with pytest.raises(ValueError, match="no split 'test' with val_fraction="):
            datasets.build(part.name, "test", **part.options)


@pytest.mark.parametrize("write_annotations", [write_jsonl, write_coco])
def test_split_counts_skipped_records_of_its_own_images(image_folder, write_annotations):
    write_annotations(image_folder)
    (file,) = image_folder.glob("mine.*")
    file.write_text(file.read_text().replace("[0, 0, 4, 4]", "[-1, 0, 4, 4]"))
    table = {key: value for key, value in detect_data_source(file).items() if key not in ("class_name_task", "augment")}
    part = ComponentSpec.from_dict(table, "dataset")
    for split in ("train", "val"):
        dataset = datasets.build(part.name, split, **part.options)
        assert dataset.skipped == {"box clipped": len(dataset)}


def test_detect_data_source_uses_existing_splits(tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "train.json").touch()
    assert detect_data_source(tmp_path)["root"] == str(tmp_path)


def test_detect_data_source_recognizes_coco_2017_as_published(tmp_path):
    for split in ("train", "val"):
        (tmp_path / f"{split}2017").mkdir()
    (tmp_path / "annotations").mkdir()
    for file in ("instances_train2017.json", "instances_val2017.json", "captions_train2017.json"):
        (tmp_path / "annotations" / file).touch()
    table = detect_data_source(tmp_path)
    assert (table["name"], table["root"]) == ("coco", str(tmp_path))


def test_detect_data_source_reports_unrecognized_paths(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        detect_data_source(tmp_path / "nothing")
    with pytest.raises(ValueError, match="it contains none"):
        detect_data_source(tmp_path)
    for name in ("a.json", "b.json"):
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match=r"it contains a\.json, b\.json"):
        detect_data_source(tmp_path)
    (tmp_path / "a.csv").touch()
    with pytest.raises(ValueError, match="or a folder with one"):
        detect_data_source(tmp_path / "a.csv")


def _write_coco_export(folder, layout):
    """Write a small export: annotation file -> (image folder, prefix of image names)."""
    for number, (file, (images, prefix)) in enumerate(layout.items()):
        (folder / images).mkdir(parents=True, exist_ok=True)
        names = [f"{number}-{each}.png" for each in range(20)]
        for name in names:
            Image.new("RGB", (8, 8)).save(folder / images / name)
        content = {
            "images": [{"id": n, "file_name": prefix + name, "width": 8, "height": 8} for n, name in enumerate(names)],
            "annotations": [{"id": n, "image_id": n, "category_id": 1, "bbox": [0, 0, 4, 4]} for n in range(20)],
            "categories": [{"id": 1, "name": "thing"}],
        }
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(json.dumps(content))


@pytest.mark.parametrize(
    "layout",
    [
        {"result.json": ("images", "images/")},
        {"result.json": ("images", "images\\")},
        {"result.json": ("images", "../../label-studio/data/media/upload/1/")},
        {"annotations/instances_default.json": ("images", "")},
        {"annotations/instances_default.json": ("images/default", "")},
        {
            "annotations/instances_Train.json": ("images/Train", ""),
            "annotations/instances_Validation.json": ("images/Validation", ""),
        },
        {
            "train/_annotations.coco.json": ("train", ""),
            "valid/_annotations.coco.json": ("valid", ""),
            "test/_annotations.coco.json": ("test", ""),
        },
        {"train/_annotations.coco.json": ("train", ""), "test/_annotations.coco.json": ("test", "")},
        {"train/_annotations.coco.json": ("train", "")},
    ],
    ids=[
        "label-studio",
        "label-studio-backslash",
        "label-studio-media-path",
        "cvat",
        "cvat-default-folder",
        "cvat-train-validation",
        "roboflow",
        "roboflow-without-valid",
        "roboflow-train-only",
    ],
)
def test_detect_data_source_recognizes_coco_exports_of_labeling_tools(tmp_path, layout):
    _write_coco_export(tmp_path, layout)
    table = {
        key: value for key, value in detect_data_source(tmp_path).items() if key not in ("class_name_task", "augment")
    }
    part = ComponentSpec.from_dict(table, "dataset")
    train, val = (datasets.build(part.name, split, **part.options) for split in ("train", "val"))
    assert (train.skipped, val.skipped) == ({}, {})
    has_splits = any("al" in file for file in list(layout)[1:])
    assert has_splits == ("val_fraction" not in table)
    assert len(val) if not has_splits else len(val) == 20
    assert len(train) + len(val) == (40 if has_splits else 20)
    if has_splits and len(layout) == 3:
        assert len(datasets.build(part.name, "test", **part.options)) == 20


def test_detect_data_source_expands_home_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    _write_coco_export(tmp_path / "mine", {"result.json": ("images", "images/")})
    assert detect_data_source("~/mine")["annotations"] == str(tmp_path / "mine/result.json")


@pytest.mark.parametrize("name", ["mine.ndjson", "mine.JSONL", "mine.JSON"])
def test_detect_data_source_accepts_suffixes_of_other_readers(image_folder, name):
    is_lines = not name.endswith(".JSON")
    (write_jsonl if is_lines else write_coco)(image_folder)
    (file,) = image_folder.glob("mine.*")
    file.rename(image_folder / name)
    for source in (image_folder / name, image_folder):
        table = detect_data_source(source)
        assert table["name"] == ("jsonl" if is_lines else "coco-json")
        assert table["file" if is_lines else "annotations"] == str(image_folder / name)
