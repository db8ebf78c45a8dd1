"""COCO panoptic: a segment consists of the pixels of its color in the mask image; mismatches are counted."""

import json

import numpy as np
import pytest
from PIL import Image
from sca_registry import datasets

from sca.io.masks import decode_rle

WIDTH, HEIGHT = 40, 30
PUBLISHED_CLASS_NAMES = ["person", "wall-other-merged", "floor-wood", "door-stuff", "tree-merged", "traffic light"]


@pytest.fixture
def write_dataset(tmp_path, monkeypatch):
    """Return a function that writes a mask image with a left and a right color and opens the dataset."""
    monkeypatch.setenv("SCA_CACHE", str(tmp_path / "cache"))
    root = tmp_path / "coco"

    def write(*segments, colors=((1, 2, 3), (200, 0, 0)), size=(WIDTH, HEIGHT), images=1, max_bad_records=100):
        (root / "annotations" / "panoptic_val2017").mkdir(parents=True, exist_ok=True)
        (root / "val2017").mkdir(exist_ok=True)
        Image.new("RGB", (WIDTH, HEIGHT)).save(root / "val2017" / "1.jpg")
        pixels = np.zeros((size[1], size[0], 3), np.uint8)
        pixels[:, : size[0] // 2], pixels[:, size[0] // 2 :] = colors
        Image.fromarray(pixels).save(root / "annotations" / "panoptic_val2017" / "1.png")
        content = {
            "images": [
                {"id": number, "file_name": "1.jpg", "width": WIDTH, "height": HEIGHT}
                for number in range(1, images + 1)
            ],
            "annotations": [{"image_id": 1, "file_name": "1.png", "segments_info": list(segments)}],
            "categories": [
                {"id": number, "name": name, "isthing": int(number in (0, 5))}
                for number, name in enumerate(PUBLISHED_CLASS_NAMES)
            ],
        }
        (root / "annotations" / "panoptic_val2017.json").write_text(json.dumps(content))
        return datasets.build("coco-panoptic", "val", root=str(root), max_bad_records=max_bad_records)

    write.root = root
    return write


def make_segment(segment_id, category=0, **changes):
    return {"id": segment_id, "category_id": category, "iscrowd": 0, "bbox": [0, 0, 1, 1], "area": 1} | changes


LEFT_ID, RIGHT_ID = 1 + 2 * 256 + 3 * 65536, 200


def test_panoptic_decodes_segments_by_color(write_dataset):
    dataset = write_dataset(make_segment(LEFT_ID), make_segment(RIGHT_ID, 1))
    thing, stuff = dataset[0].regions
    assert (thing.id, thing.name, thing.attributes) == (1, "person", {"kind": "thing"})
    assert (stuff.id, stuff.name, stuff.attributes) == (2, "wall", {"kind": "stuff"})
    assert (thing.box, stuff.box) == ((0, 0, 20, HEIGHT), (20, 0, WIDTH, HEIGHT))
    assert decode_rle(thing.mask)[:, :20].all()
    assert (decode_rle(thing.mask) ^ decode_rle(stuff.mask)).all()
    assert not dataset.skipped


def test_panoptic_strips_suffixes_of_class_names(write_dataset):
    names = write_dataset(make_segment(LEFT_ID)).attribute_values["name"]
    assert names == ("person", "wall", "floor-wood", "door", "tree", "traffic light")


def test_panoptic_counts_skipped_segments_and_images(write_dataset):
    dataset = write_dataset(make_segment(LEFT_ID), make_segment(RIGHT_ID, iscrowd=1), make_segment(7), images=2)
    assert [region.name for region in dataset[0].regions] == ["person"]
    assert dataset.skipped == {"crowd": 1, "segment without a pixel": 1, "image without annotation": 1}
    dataset = write_dataset(make_segment(LEFT_ID))
    assert dataset.skipped == {"pixels without a segment": 1}
    assert ": 200" in dataset.examples["pixels without a segment"][0]
    assert not write_dataset(make_segment(LEFT_ID), colors=((1, 2, 3), (0, 0, 0))).skipped  # black: no segment


def test_panoptic_counts_unusable_segment_images_as_bad(write_dataset):
    assert write_dataset(make_segment(LEFT_ID), size=(20, 15)).skipped == {"segments of a different size": 1}
    write_dataset(make_segment(LEFT_ID), make_segment(RIGHT_ID))
    path = write_dataset.root / "annotations" / "panoptic_val2017" / "1.png"
    original_bytes = path.read_bytes()
    for damage in (lambda: path.write_bytes(original_bytes[:60]), path.unlink):
        damage()
        (write_dataset.root / "annotations" / "panoptic_val2017.json").touch()
        dataset = datasets.build("coco-panoptic", "val", root=str(write_dataset.root))
        assert (len(dataset), dataset.skipped) == (0, {"segments unreadable": 1})
        with pytest.raises(ValueError, match=r"more than max_bad_records=0; segments unreadable: 1, such as .*1\.png"):
            datasets.build("coco-panoptic", "val", root=str(write_dataset.root), max_bad_records=0)
    path.write_bytes(original_bytes)
    assert len(datasets.build("coco-panoptic", "val", root=str(write_dataset.root))) == 1


@pytest.mark.parametrize(
    ("segments", "message"),
    [
        ([make_segment("x")], r"segments_info\[0\], 'id' is 'x'; expected an integer"),
        ([make_segment(LEFT_ID), make_segment(LEFT_ID)], rf"segments_info\[1\] \(id {LEFT_ID}\): duplicate id"),
        (
            [make_segment(LEFT_ID, 9)],
            rf"annotations\[0\] \(image_id 1\): segments_info\[0\] \(id {LEFT_ID}\): category_id 9 has no",
        ),
        ([4], r"segments_info\[0\] is 4; expected an object"),
    ],
)
def test_panoptic_reports_broken_segment(write_dataset, segments, message):
    with pytest.raises(ValueError, match=message):
        write_dataset(*segments, max_bad_records=0)
