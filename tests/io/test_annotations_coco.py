import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from pycocotools.coco import COCO

from sca.io import masks
from sca.io.annotations.annotation import SkipCounter
from sca.io.annotations.coco import compute_segmentation_box, parse_bbox, parse_segmentation, read_annotation
from sca.io.errors import InputError

SIZE = 40, 20
SQUARE = [5, 5, 9, 5, 9, 9, 5, 9]


def read(label="cat", **record):
    skip = SkipCounter()
    return read_annotation(record, "a.json, annotations[0]", SIZE, label, skip), dict(skip.counts)


def test_polygons_are_one_mask_with_the_annotations_words():
    found, counted = read(bbox=[5, 5, 20, 4], segmentation=[SQUARE, [20, 5, 25, 5, 25, 9]], caption=["a", "b"])
    assert (found.box, found.texts, counted) == ((5, 5, 25, 9), ("a", "b"), {})
    inside = masks.decode_rle(found.mask)
    assert inside[5:9, 5:9].all()
    assert inside[:, 20:].any()
    assert read(bbox=[5, 5, 20, 4])[0].texts == ("cat",)


def test_missing_bbox_is_that_of_the_segmentation():
    for bbox in (None, [], [0, 0, 0, 0]):
        assert read(bbox=bbox, segmentation=[SQUARE])[0].box == (5, 5, 9, 9)
    assert read()[0].box is None


def test_rle_of_either_kind_keeps_its_holes():
    inside = np.zeros(SIZE[::-1], bool)
    inside[5:15, 5:15] = True
    inside[8:12, 8:12] = False
    code = masks.encode_rle(inside)
    flat = inside.ravel(order="F")
    ends = np.flatnonzero(np.diff(np.concatenate(([0], flat, [1 - flat[-1]]))))
    runs = {"size": [20, 40], "counts": np.diff(ends, prepend=0).tolist()}
    assert read(segmentation=code)[0].mask == read(segmentation=runs)[0].mask == code


def test_coco_reader_ignores_segmentation_with_isbox():
    assert read(bbox=[5, 5, 4, 4], segmentation=[SQUARE], isbox=1)[0].mask is None


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"segmentation": [SQUARE, [1, 1, 2, 2]]}, "polygon with fewer than three points"),
        ({"segmentation": [SQUARE], "keypoints": [3, 3, 2, 0, 0, 0]}, "keypoints"),
        ({"segmentation": [SQUARE], "bbox": [5, 5, 0, 4]}, "empty box"),
    ],
)
def test_what_is_not_kept_is_counted(record, reason):
    found, counted = read(**record)
    assert (found.box, masks.compute_mask_area(found.mask), counted) == ((5, 5, 9, 9), 16, {reason: 1})


def test_thin_polygon_is_its_box_and_counted():
    found, counted = read(segmentation=[[5, 5.1, 9, 5.1, 9, 5.2]])
    assert (found.box, found.mask, counted) == ((5, 5.1, 9, 5.2), None, {"polygon covering no pixel": 1})


def test_keypoints_that_are_not_labeled_count_for_nothing():
    assert read(bbox=[1, 1, 2, 2], keypoints=[0, 0, 0] * 17)[1] == {}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"bbox": [1, 2, 3]}, "'bbox' is [1, 2, 3"),
        ({"bbox": [1, 2, 3, float("nan")]}, "'bbox' is [1, 2, 3"),
        ({"bbox": [1, 2, -3, 4]}, "'bbox' has width -3 and height 4; give values of at least 0"),
        ({"segmentation": [[1, 2, 3]]}, "'segmentation': must be lists of x, y"),
        ({"segmentation": [[1, 2, 3, 4, 1e9, 6]]}, "'segmentation': has a point far outside the image of 40 x 20"),
        ({"segmentation": 7}, "'segmentation': must be polygons, or RLE"),
        ({"segmentation": {"size": [4, 4], "counts": "1"}}, "'segmentation': has size [4, 4] in an image of [20, 40]"),
        ({"segmentation": {"size": [20, 40], "counts": [5]}}, "'segmentation': counts do not add up to the 800"),
        ({"caption": 3}, "'caption' is 3; give text, or a list of texts"),
    ],
)
def test_a_damaged_annotation_is_named(record, message):
    with pytest.raises(InputError) as raised:
        read(**record)
    assert str(raised.value).startswith(f"a.json, annotations[0], {message}")


coordinate = st.floats(-10, 50).map(lambda value: round(value, 2))
polygon = st.lists(coordinate, min_size=6, max_size=12).filter(lambda flat: len(flat) % 2 == 0)


@settings(deadline=None, max_examples=60)
@given(polygons=st.lists(polygon, min_size=1, max_size=4))
def test_polygons_are_filled_as_pycocotools_fills_them(polygons):
    coco = COCO()
    coco.imgs = {1: {"width": SIZE[0], "height": SIZE[1]}}
    expected = coco.annToMask({"image_id": 1, "segmentation": polygons}).astype(bool)
    assert (masks.decode_rle(parse_segmentation(polygons, SIZE, pytest.fail)) == expected).all()
    x1, y1, x2, y2 = compute_segmentation_box(polygons, pytest.fail)
    assert (min(x1, x2), min(y1, y2)) == (x1, y1)


@settings(deadline=None, max_examples=40)
@given(inside=arrays.arrays(bool, SIZE[::-1]))
def test_rle_is_read_exactly(inside):
    code = masks.encode_rle(inside)
    assert parse_segmentation(code, SIZE, pytest.fail) == code
    box = compute_segmentation_box(code, pytest.fail)
    assert box == masks.mask_to_box(inside)
    if box:
        assert parse_bbox([box[0], box[1], box[2] - box[0], box[3] - box[1]], "a.json, 'bbox'") == box
