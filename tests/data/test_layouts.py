"""Every layout reads back unchanged, and every error in it is reported or counted."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image
from sca_registry import datasets

from sca.data.export import export_dataset
from sca.data.scenes import Scenes
from sca.io.masks import encode_rle, mask_to_box

SPLITS = {"train": Scenes("train", num_images=5, image_size=64)}
LAYOUTS = {  # reader name -> (format, file in error messages)
    "coco": ("coco", "train.json"),
    "coco-captions": ("coco-captions", "annotations/captions_train2017.json"),
    "coco-panoptic": ("coco-panoptic", "annotations/panoptic_train2017.json"),
    "objects365": ("objects365", "annotations/zhiyuan_objv2_train.json"),
    "v3det": ("v3det", "annotations/v3det_2023_v1_train.json"),
    "visual-genome-grit": ("vg-grit", "train.json"),
    "sa1b": ("sa1b", "sa_{first}.json"),
}
parametrize_layouts = pytest.mark.parametrize("name", LAYOUTS)


@pytest.fixture
def written_layout(tmp_path, name):
    """Return a folder in the layout and its annotation file."""
    format, file = LAYOUTS[name]
    root = export_dataset(SPLITS, tmp_path / "root", format)
    first_id = sorted(int(path.stem[3:]) for path in root.glob("sa_*.jpg")) or [""]
    return root, root / file.format(first=first_id[0])


def edit_json(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@parametrize_layouts
def test_layout_reads_back_exported_scenes(written_layout, name):
    root, _ = written_layout
    dataset = datasets.build(name, "train", root=root)
    assert len(dataset) == 5
    assert not dataset.skipped
    for sample, scene in zip(dataset, SPLITS["train"], strict=True):
        assert sample.image_id == scene.image_id
        phrases = {phrase.lower() for region in sample.regions for phrase in region.phrases}
        names = {region.name for region in sample.regions}
        true_names = {region.name for region in scene.regions}
        true_phrases = {phrase.lower() for region in scene.regions for phrase in region.phrases}
        assert phrases == (set() if name in ("coco-panoptic", "objects365", "v3det") else true_phrases)
        assert names == ({None} if name in ("coco-captions", "visual-genome-grit", "sa1b") else true_names)
        true_boxes = {tuple(map(round, region.box)) for region in scene.regions}
        if name == "coco-captions":
            assert [region.box for region in sample.regions] == [(0, 0, 64, 64)]
        else:
            read_boxes = {tuple(map(round, region.box)) for region in sample.regions}
            assert read_boxes == true_boxes or name == "coco-panoptic"
        if name in ("coco", "coco-panoptic", "sa1b"):
            assert all(region.mask for region in sample.regions)


@pytest.mark.parametrize("name", ["coco", "coco-panoptic", "objects365", "v3det"])
def test_layout_reads_underscores_in_names_as_spaces(written_layout, name):
    root, file = written_layout
    edit_json(file, lambda content: content["categories"][0].update(name="aerosol_can"))
    assert "aerosol can" in datasets.build(name, "train", root=root).attribute_values["name"]


@pytest.mark.parametrize("name", ["sa1b"])
def test_sa1b_counts_masks_without_text_and_captions_without_masks(written_layout, name):
    root, file = written_layout
    captions = file.with_suffix(".captions.json")
    first_id = next(iter(json.loads(captions.read_text())))
    edit_json(captions, lambda content: content.update({"777": ["a thing"], first_id: "  "}))
    dataset = datasets.build(name, "train", root=root)
    assert dataset.skipped == {"region without text": 1, "caption without mask": 1}
    (root / "sa_888.captions.json").write_text("{}")
    dataset = datasets.build(name, "train", root=root)
    assert dataset.skipped["captions without image"] == 1
    assert dataset.examples["captions without image"] == [str(root / "sa_888.captions.json")]
    with pytest.raises(ValueError, match="no split 'val' in SA-1B; its only split is train"):
        datasets.build(name, "val", root=root)


def open_sa1b_with_one_mask(root, columns, rows, **fields):
    """Write SA-1B with one image of 30 x 20 pixels and one mask of the given pixels, with its published box."""
    mask = np.zeros((20, 30), bool)
    mask[rows, columns] = True
    x1, y1, x2, y2 = mask_to_box(encode_rle(mask))
    annotation = {
        "id": 7,
        "bbox": [x1, y1, x2 - 1 - x1, y2 - 1 - y1],
        "segmentation": encode_rle(mask),
        "caption": "a pole",
    }
    image = {"image_id": 3, "width": 30, "height": 20, "file_name": "sa_3.jpg"}
    root.mkdir()
    (root / "sa_3.json").write_text(json.dumps({"image": image, "annotations": [annotation | fields]}))
    Image.new("RGB", (30, 20)).save(root / "sa_3.jpg")
    return datasets.build("sa1b", "train", root=root)


@pytest.mark.parametrize("columns", [slice(4, 5), slice(2, 9), slice(0, 30)])
def test_sa1b_converts_between_inclusive_and_exclusive_boxes(tmp_path, columns):
    dataset = open_sa1b_with_one_mask(tmp_path / "sa", columns, slice(3, 10))
    (region,) = dataset[0].regions
    assert region.box == mask_to_box(region.mask) == (columns.start, 3, columns.stop, 10)
    assert not dataset.skipped
    root = export_dataset({"train": dataset}, tmp_path / "again", "sa1b")
    content = json.loads((root / "sa_3.json").read_text())
    assert content["annotations"][0]["bbox"] == [columns.start, 3, columns.stop - columns.start - 1, 6]


def test_sa1b_counts_empty_masks(tmp_path):
    empty = encode_rle(np.zeros((20, 30), bool))
    assert open_sa1b_with_one_mask(tmp_path / "sa", slice(2, 9), slice(3, 10), segmentation=empty).skipped == {
        "empty mask": 1,
        "image without regions": 1,
    }


@pytest.mark.parametrize("name", ["sa1b"])
def test_sa1b_reports_image_id_that_differs_from_file_name(written_layout, name):
    root, file = written_layout  # so that no image id occurs twice
    other_image = next(path for path in root.glob("sa_*.jpg") if path.stem != file.stem)
    other_id = int(other_image.stem.removeprefix("sa_"))
    edit_json(file, lambda content: content["image"].update(image_id=other_id))
    with pytest.raises(ValueError, match=rf"{file.name}: image: image_id {other_id} does not match the file name"):
        datasets.build(name, "train", root=root, max_bad_records=0)


@pytest.mark.parametrize("name", ["sa1b"])
def test_sa1b_rejects_image_in_two_folders(written_layout, name):
    root, file = written_layout
    (root / "again").mkdir()
    shutil.copy(file, root / "again")
    with pytest.raises(ValueError, match=rf"{file.name} and .*{file.name} are the same image"):
        datasets.build(name, "train", root=root)
