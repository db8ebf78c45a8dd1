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

IMAGE_SIZE = 40, 20
SQUARE_POLYGON = [5, 5, 9, 5, 9, 9, 5, 9]


def read_record(label="cat", **record):
    skip_counter = SkipCounter()
    return read_annotation(record, "a.json, annotations[0]", IMAGE_SIZE, label, skip_counter), dict(skip_counter.counts)


def test_coco_reader_merges_polygons_into_one_mask_with_all_captions():
    annotation, skipped_counts = read_record(
        bbox=[5, 5, 20, 4], segmentation=[SQUARE_POLYGON, [20, 5, 25, 5, 25, 9]], caption=["a", "b"]
    )
    assert (annotation.box, annotation.texts, skipped_counts) == ((5, 5, 25, 9), ("a", "b"), {})
    mask = masks.decode_rle(annotation.mask)
    assert mask[5:9, 5:9].all()
    assert mask[:, 20:].any()
    assert read_record(bbox=[5, 5, 20, 4])[0].texts == ("cat",)


def test_coco_reader_computes_a_missing_bbox_from_the_segmentation():
    for bbox in (None, [], [0, 0, 0, 0]):
        assert read_record(bbox=bbox, segmentation=[SQUARE_POLYGON])[0].box == (5, 5, 9, 9)
    assert read_record()[0].box is None


def test_coco_reader_keeps_holes_of_compressed_and_uncompressed_rle():
    mask = np.zeros(IMAGE_SIZE[::-1], bool)
    mask[5:15, 5:15] = True
    mask[8:12, 8:12] = False
    compressed_rle = masks.encode_rle(mask)
    flat_mask = mask.ravel(order="F")
    run_ends = np.flatnonzero(np.diff(np.concatenate(([0], flat_mask, [1 - flat_mask[-1]]))))
    uncompressed_rle = {"size": [20, 40], "counts": np.diff(run_ends, prepend=0).tolist()}
    assert (
        read_record(segmentation=compressed_rle)[0].mask
        == read_record(segmentation=uncompressed_rle)[0].mask
        == compressed_rle
    )


def test_coco_reader_ignores_segmentation_with_isbox():
    assert read_record(bbox=[5, 5, 4, 4], segmentation=[SQUARE_POLYGON], isbox=1)[0].mask is None


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"segmentation": [SQUARE_POLYGON, [1, 1, 2, 2]]}, "polygon with fewer than three points"),
        ({"segmentation": [SQUARE_POLYGON], "keypoints": [3, 3, 2, 0, 0, 0]}, "keypoints"),
        ({"segmentation": [SQUARE_POLYGON], "bbox": [5, 5, 0, 4]}, "empty box"),
    ],
)
def test_coco_reader_counts_dropped_parts_of_an_annotation(record, reason):
    annotation, skipped_counts = read_record(**record)
    assert (annotation.box, masks.compute_mask_area(annotation.mask), skipped_counts) == ((5, 5, 9, 9), 16, {reason: 1})


def test_coco_reader_reads_a_thin_polygon_as_its_box_and_counts_it():
    annotation, skipped_counts = read_record(segmentation=[[5, 5.1, 9, 5.1, 9, 5.2]])
    assert (annotation.box, annotation.mask, skipped_counts) == (
        (5, 5.1, 9, 5.2),
        None,
        {"polygon covering no pixel": 1},
    )


def test_coco_reader_does_not_count_unlabeled_keypoints():
    assert read_record(bbox=[1, 1, 2, 2], keypoints=[0, 0, 0] * 17)[1] == {}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"bbox": [1, 2, 3]}, "'bbox' is [1, 2, 3"),
        ({"bbox": [1, 2, 3, float("nan")]}, "'bbox' is [1, 2, 3"),
        ({"bbox": [1, 2, -3, 4]}, "'bbox' has width -3 and height 4; expected values of at least 0"),
        ({"segmentation": [[1, 2, 3]]}, "'segmentation' must contain lists of x, y"),
        ({"segmentation": [[1, 2, 3, 4, 1e9, 6]]}, "'segmentation' has a point far outside the image of 40 x 20"),
        ({"segmentation": 7}, "'segmentation' must be polygons, or an RLE"),
        (
            {"segmentation": {"size": [4, 4], "counts": "1"}},
            "'segmentation' has size [4, 4], but the image is [20, 40]",
        ),
        (
            {"segmentation": {"size": [20, 40], "counts": [5]}},
            "'segmentation' is not a valid RLE of 40 x 20 pixels: the runs",
        ),
        ({"caption": 3}, "'caption' is 3; expected a string, or a list of strings"),
    ],
)
def test_coco_reader_error_names_the_damaged_annotation(record, message):
    with pytest.raises(InputError) as error_info:
        read_record(**record)
    assert str(error_info.value).startswith(f"a.json, annotations[0], {message}")


COORDINATES = st.floats(-10, 50).map(lambda value: round(value, 2))
POLYGONS = st.lists(COORDINATES, min_size=6, max_size=12).filter(lambda flat: len(flat) % 2 == 0)


@settings(deadline=None, max_examples=60)
@given(polygons=st.lists(POLYGONS, min_size=1, max_size=4))
def test_parse_segmentation_fills_polygons_as_pycocotools_does(polygons):
    coco = COCO()
    coco.imgs = {1: {"width": IMAGE_SIZE[0], "height": IMAGE_SIZE[1]}}
    expected = coco.annToMask({"image_id": 1, "segmentation": polygons}).astype(bool)
    assert (masks.decode_rle(parse_segmentation(polygons, IMAGE_SIZE, pytest.fail)) == expected).all()
    x1, y1, x2, y2 = compute_segmentation_box(polygons, pytest.fail)
    assert (min(x1, x2), min(y1, y2)) == (x1, y1)


@settings(deadline=None, max_examples=40)
@given(inside=arrays.arrays(bool, IMAGE_SIZE[::-1]))
def test_parse_segmentation_returns_rle_unchanged(inside):
    rle = masks.encode_rle(inside)
    assert parse_segmentation(rle, IMAGE_SIZE, pytest.fail) == rle
    box = compute_segmentation_box(rle, pytest.fail)
    assert box == masks.mask_to_box(inside)
    if box:
        assert parse_bbox([box[0], box[1], box[2] - box[0], box[3] - box[1]], "a.json, 'bbox'") == box
