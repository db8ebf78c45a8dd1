"""Every layout: what was written is read, and what is wrong with it is named or counted, never passed over."""

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
LAYOUTS = {  # by the name of the reader: the format, and the file that messages name
    "coco": ("coco", "train.json"),
    "coco-captions": ("coco-captions", "annotations/captions_train2017.json"),
    "coco-panoptic": ("coco-panoptic", "annotations/panoptic_train2017.json"),
    "objects365": ("objects365", "annotations/zhiyuan_objv2_train.json"),
    "v3det": ("v3det", "annotations/v3det_2023_v1_train.json"),
    "visual-genome-grit": ("vg-grit", "train.json"),
    "sa1b": ("sa1b", "sa_{first}.json"),
}
every_layout = pytest.mark.parametrize("name", LAYOUTS)


@pytest.fixture
def written(tmp_path, name):
    """A folder in the layout, and its file."""
    format, file = LAYOUTS[name]
    root = export_dataset(SPLITS, tmp_path / "root", format)
    first = sorted(int(path.stem[3:]) for path in root.glob("sa_*.jpg")) or [""]
    return root, root / file.format(first=first[0])


def changed(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def annotations(content):
    first = content["annotations"][0]
    return first["segments_info"] if "segments_info" in first else content["annotations"]


@every_layout
def test_what_was_written_is_read(written, name):
    root, _ = written
    found = datasets.build(name, "train", root=root)
    assert len(found) == 5
    assert not found.skipped
    for sample, truth in zip(found, SPLITS["train"], strict=True):
        assert sample.image_id == truth.image_id
        told = {phrase.lower() for region in sample.regions for phrase in region.phrases}
        names = {region.name for region in sample.regions}
        true_names = {region.name for region in truth.regions}
        true_phrases = {phrase.lower() for region in truth.regions for phrase in region.phrases}
        assert told == (set() if name in ("coco-panoptic", "objects365", "v3det") else true_phrases)
        assert names == ({None} if name in ("coco-captions", "visual-genome-grit", "sa1b") else true_names)
        boxes = {tuple(map(round, region.box)) for region in truth.regions}
        if name == "coco-captions":
            assert [region.box for region in sample.regions] == [(0, 0, 64, 64)]
        else:
            ours = {tuple(map(round, region.box)) for region in sample.regions}
            assert ours == boxes or name == "coco-panoptic"
        if name in ("coco", "coco-panoptic", "sa1b"):
            assert all(region.mask for region in sample.regions)


@pytest.mark.parametrize("name", ["coco", "coco-panoptic", "objects365", "v3det"])
def test_underscores_in_names_are_read_as_spaces(written, name):
    root, file = written
    changed(file, lambda content: content["categories"][0].update(name="aerosol_can"))
    assert "aerosol can" in datasets.build(name, "train", root=root).attributes["name"]


@pytest.mark.parametrize("name", ["sa1b"])
def test_masks_without_words_and_captions_without_masks_are_counted(written, name):
    root, file = written
    captions = file.with_suffix(".captions.json")
    first = next(iter(json.loads(captions.read_text())))
    changed(captions, lambda content: content.update({"777": ["a thing"], first: "  "}))
    found = datasets.build(name, "train", root=root)
    assert found.skipped == {"region without text": 1, "caption of no mask": 1}
    (root / "sa_888.captions.json").write_text("{}")
    found = datasets.build(name, "train", root=root)
    assert found.skipped["captions of no picture"] == 1
    assert found.examples["captions of no picture"] == [str(root / "sa_888.captions.json")]
    with pytest.raises(ValueError, match="SA-1B has one split, train, and 'val' was asked for"):
        datasets.build(name, "val", root=root)


def a_mask(root, across, down, **given):
    """SA-1B with one picture of 30 x 20 pixels and one mask that fills these of them; its box as it is published."""
    mask = np.zeros((20, 30), bool)
    mask[down, across] = True
    x1, y1, x2, y2 = mask_to_box(encode_rle(mask))
    annotation = {
        "id": 7,
        "bbox": [x1, y1, x2 - 1 - x1, y2 - 1 - y1],
        "segmentation": encode_rle(mask),
        "caption": "a pole",
    }
    image = {"image_id": 3, "width": 30, "height": 20, "file_name": "sa_3.jpg"}
    root.mkdir()
    (root / "sa_3.json").write_text(json.dumps({"image": image, "annotations": [annotation | given]}))
    Image.new("RGB", (30, 20)).save(root / "sa_3.jpg")
    return datasets.build("sa1b", "train", root=root)


@pytest.mark.parametrize("across", [slice(4, 5), slice(2, 9), slice(0, 30)])
def test_a_published_box_ends_on_the_last_pixel_and_ours_behind_it(tmp_path, across):
    dataset = a_mask(tmp_path / "sa", across, slice(3, 10))
    (region,) = dataset[0].regions
    assert region.box == mask_to_box(region.mask) == (across.start, 3, across.stop, 10)
    assert not dataset.skipped
    root = export_dataset({"train": dataset}, tmp_path / "again", "sa1b")
    content = json.loads((root / "sa_3.json").read_text())
    assert content["annotations"][0]["bbox"] == [across.start, 3, across.stop - across.start - 1, 6]


def test_a_mask_of_sa1b_without_a_pixel_is_counted(tmp_path):
    empty = encode_rle(np.zeros((20, 30), bool))
    assert a_mask(tmp_path / "sa", slice(2, 9), slice(3, 10), segmentation=empty).skipped == {
        "empty mask": 1,
        "image without regions": 1,
    }


@pytest.mark.parametrize("name", ["sa1b"])
def test_an_image_id_that_is_not_that_of_its_file_is_named(written, name):
    root, file = written  # so that none is given twice
    other = next(path for path in root.glob("sa_*.jpg") if path.stem != file.stem)
    number = int(other.stem.removeprefix("sa_"))
    changed(file, lambda content: content["image"].update(image_id=number))
    with pytest.raises(ValueError, match=rf"{file.name}: image: image_id {number} is not that in the name of the file"):
        datasets.build(name, "train", root=root, max_bad=0)


@pytest.mark.parametrize("name", ["sa1b"])
def test_a_picture_in_two_folders_is_refused(written, name):
    root, file = written
    (root / "again").mkdir()
    shutil.copy(file, root / "again")
    with pytest.raises(ValueError, match=rf"{file.name} is the same picture as .*{file.name}"):
        datasets.build(name, "train", root=root)
