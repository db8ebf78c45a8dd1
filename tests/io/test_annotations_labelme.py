import base64
import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from sca.io import masks
from sca.io.annotations import shapes
from sca.io.annotations.annotation import SkipCounter
from sca.io.annotations.labelme import find_image_size, open_annotated_image, read_annotations
from sca.io.errors import InputError

IMAGE_SIZE = 40, 20
TRIANGLE_POINTS = [[10, 2], [30, 2], [10, 18]]


def make_shape(shape_type="polygon", points=TRIANGLE_POINTS, label="cat", **fields):
    return {"label": label, "points": points, "shape_type": shape_type, "group_id": None, "flags": {}, **fields}


def read_shapes(*shapes, image_size=IMAGE_SIZE):
    """Return the regions of shapes and the counts."""
    skip_counter = SkipCounter()
    return read_annotations({"shapes": list(shapes)}, image_size, "a.json", skip_counter), dict(skip_counter.counts)


def read_region(*shapes):
    """Return the only region of shapes."""
    (region,), skipped_counts = read_shapes(*shapes)
    assert skipped_counts == {}
    return region


def encode_png(array):
    content = io.BytesIO()
    Image.fromarray(array).save(content, "PNG")
    return base64.b64encode(content.getvalue()).decode()


def test_labelme_reader_fills_polygons_including_their_edge():
    region = read_region(make_shape(points=[[2, 3], [5, 3], [5, 6], [2, 6]]))
    assert region.box == (2, 3, 6, 7)  # as LabelMe draws it, the last pixel included
    assert masks.compute_mask_area(region.mask) == 16


@pytest.mark.parametrize("shape_type", [None, "oriented_rectangle", "rotation"])
def test_labelme_reader_reads_shapes_with_corners_as_polygons(shape_type):
    points = [[10, 2], [20, 7], [15, 17], [5, 12]]
    assert read_region(make_shape(shape_type, points)).mask == read_region(make_shape("polygon", points)).mask


def test_labelme_reader_reads_a_rectangle_as_a_box_without_mask():
    region = read_region(make_shape("rectangle", [[30.5, 15], [10, 2.25]]))
    assert (region.box, region.mask) == ((10, 2.25, 30.5, 15), None)


def test_labelme_reader_reads_a_circle_from_center_and_edge_point():
    region = read_region(make_shape("circle", [[20, 10], [23, 14]]))
    assert region.box == (15, 5, 26, 16)
    assert masks.compute_mask_area(region.mask) == pytest.approx(np.pi * 5.5**2, rel=0.1)


def test_labelme_reader_places_a_mask_image_at_its_first_point():
    mask_array = np.array([[True, False, True], [False, True, False]])
    for values in (mask_array, mask_array.astype(np.uint8), mask_array.astype(np.uint8) * 255):
        region = read_region(make_shape("mask", [[4, 5], [6, 6]], mask=encode_png(values)))
        full_mask = masks.decode_rle(region.mask)
        assert (full_mask[5:7, 4:7] == mask_array).all()
        assert full_mask.sum() == 3


def test_labelme_reader_reads_a_point_with_its_description():
    region = read_region(make_shape("point", [[4, 5]], description="a nose"))
    assert (region.box, region.mask, region.point, region.texts) == (None, None, (4, 5), ("a nose",))


def test_labelme_reader_uses_description_as_caption_with_label_fallback():
    assert read_region(make_shape(description=" a cat ")).texts == (" a cat ",)
    assert read_region(make_shape(description="")).texts == ("cat",)
    assert read_region(make_shape()).texts == ("cat",)


def test_labelme_reader_merges_shapes_of_one_group_and_label():
    polygon_shape = make_shape(points=[[1, 1], [4, 1], [4, 4]], group_id=3, description="a cat")
    rectangle_shape = make_shape("rectangle", [[30, 10], [35, 15]], group_id=3, description="behind a fence")
    dog_shape = make_shape("rectangle", [[0, 0], [2, 2]], group_id=3, label="dog")
    (cat, dog), skipped_counts = read_shapes(
        polygon_shape, dog_shape, rectangle_shape, make_shape("point", [[2, 2]], group_id=3)
    )
    assert (cat.box, cat.texts) == ((1, 1, 36, 16), ("a cat", "behind a fence"))
    assert masks.compute_mask_area(cat.mask) == masks.compute_mask_area(read_region(polygon_shape).mask) + 36
    assert (dog.box, dog.mask) == ((0, 0, 2, 2), None)
    assert skipped_counts == {"keypoint": 1}


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (make_shape(label="__ignore__"), "shape labeled __ignore__"),
        (make_shape(points=[[1, 1], [2, 2]]), "polygon of too few points"),
        (make_shape("rectangle", [[1, 1]]), "rectangle of too few points"),
        (make_shape("points", [[1, 1], [2, 2]]), "LabelMe shape 'points'"),
        (make_shape("line", [[1, 1], [9, 1]]), "LabelMe shape 'line'"),
        (make_shape("cuboid"), "LabelMe shape 'cuboid'"),
        (make_shape(points=[[50, 30], [60, 30], [60, 35]]), "shape covering no pixel"),
        (make_shape("mask", [[1, 1], [2, 2]], mask=encode_png(np.zeros((2, 2), bool))), "shape covering no pixel"),
    ],
)
def test_labelme_reader_counts_skipped_shapes_and_keeps_the_others(record, reason):
    (region,), skipped_counts = read_shapes(record, make_shape("rectangle", [[1, 2], [3, 4]]))
    assert region.box == (1, 2, 3, 4)
    assert skipped_counts == {reason: 1}


def test_labelme_reader_reads_a_linestrip_as_its_box_and_counts_it():
    (region,), skipped_counts = read_shapes(make_shape("linestrip", [[1, 1], [9, 5], [4, 8]]))
    assert (region.box, region.mask, skipped_counts) == ((1, 1, 9, 8), None, {"line, read as its box": 1})


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (3, "shapes[0] is 3; expected an object"),
        ({"points": TRIANGLE_POINTS}, "shapes[0], 'label' is None; expected a string"),
        (make_shape(points=[]), "shapes[0], 'points' is empty; expected a list of [x, y]"),
        (make_shape(points=[[1, 2], [3]]), "shapes[0], 'points'"),
        (make_shape(3), "shapes[0], 'shape_type' is 3; expected a string"),
        (make_shape(description=["a"]), "shapes[0], 'description' is ['a']; expected a string"),
        (make_shape(points=[[0, 0], [9, 9], [1e9, 0]]), "cannot read the polygon: has a point far outside"),
        (make_shape("mask", [[1, 1], [2, 2]]), "cannot read the mask: 'mask' must be a base64 string, not None"),
        (make_shape("mask", [[1, 1], [2, 2]], mask="!"), "'mask' is not valid base64"),
        (make_shape("mask", [[1, 1], [2, 2]], mask="QUJD"), "'mask' is not a readable image; convert it"),
        (
            make_shape("mask", [[39, 1], [41, 2]], mask=encode_png(np.ones((2, 3), bool))),
            "reaches outside the image of 40 x 20",
        ),
        (
            make_shape("mask", [[-2, 1], [0, 2]], mask=encode_png(np.ones((2, 3), bool))),
            "reaches outside the image of 40 x 20",
        ),
        (
            make_shape("mask", [[0, 0], [1, 1]], mask=encode_png(np.ones((90, 90), bool))),
            "is 90 x 90, larger than the image",
        ),
    ],
)
def test_labelme_reader_error_names_the_damaged_shape(record, message):
    with pytest.raises(InputError) as error_info:
        read_shapes(record)
    assert message in str(error_info.value)
    assert str(error_info.value).startswith("a.json, shapes[0]")


def test_find_image_size_reads_json_size_image_file_or_embedded_image(tmp_path):
    image = Image.new("RGB", (7, 5))
    png_buffer = io.BytesIO()
    image.save(png_buffer, "PNG")
    embedded_image = {"imageData": base64.b64encode(png_buffer.getvalue()).decode()}
    path = tmp_path / "a.png"
    assert find_image_size({"imageWidth": 3, "imageHeight": 4}, path, "a.json") == (3, 4)
    assert find_image_size(embedded_image | {"imageWidth": 3, "imageHeight": None}, path, "a.json") == (7, 5)
    with pytest.raises(InputError, match="no 'imageWidth' and 'imageHeight', and cannot open"):
        find_image_size({}, path, "a.json")
    Image.new("RGB", (6, 8)).save(path)
    assert find_image_size(embedded_image, path, "a.json") == (6, 8)
    for invalid_width in (0, -1, "7", 10**9, True):
        with pytest.raises(InputError, match=r"^a\.json: "):
            find_image_size({"imageWidth": invalid_width, "imageHeight": 10**9}, path, "a.json")


def test_open_annotated_image_reads_embedded_image_within_limits(tmp_path, monkeypatch):
    png_buffer = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (7, 5), "red").save(png_buffer, "PNG", exif=exif)
    content = {"imageData": base64.b64encode(png_buffer.getvalue()).decode()}
    path = tmp_path / "a.png"
    assert open_annotated_image(content, path, "a.json").size == (5, 7)
    for invalid_data in ("", "!", "QUJD", 3):
        with pytest.raises(InputError, match=r"^a\.json, 'imageData'"):
            open_annotated_image({"imageData": invalid_data}, path, "a.json")
    monkeypatch.setattr(masks, "PIXEL_LIMIT", 34)
    with pytest.raises(InputError, match="35 pixels"):
        open_annotated_image(content, path, "a.json")
    monkeypatch.setattr(shapes, "MAX_EMBEDDED_BYTES", 10)
    with pytest.raises(InputError, match="larger than 10 bytes"):
        open_annotated_image(content, path, "a.json")


COORDINATES = st.floats(-10, 50).map(lambda value: round(value, 2))
POINTS = st.tuples(COORDINATES, COORDINATES).map(list)


@settings(deadline=None, max_examples=60)
@given(points=st.lists(POINTS, min_size=3, max_size=7))
def test_labelme_reader_fills_polygons_as_pillow_does(points):
    regions, skipped_counts = read_shapes(make_shape(points=points))
    pillow_mask = Image.new("L", IMAGE_SIZE)
    ImageDraw.Draw(pillow_mask).polygon([tuple(point) for point in points], fill=1, outline=1)
    expected = np.array(pillow_mask, bool)
    if expected.any():
        assert (masks.decode_rle(regions[0].mask) == expected).all()
        assert regions[0].box == masks.mask_to_box(expected)
    else:
        assert (regions, skipped_counts) == ([], {"shape covering no pixel": 1})


@settings(deadline=None, max_examples=40)
@given(groups=st.lists(st.tuples(st.lists(POINTS, min_size=3, max_size=5), st.sampled_from([None, 1, 2])), max_size=5))
def test_labelme_reader_group_masks_are_unions_of_their_shapes(groups):
    shapes = [make_shape(points=points, group_id=group) for points, group in groups]
    regions, _ = read_shapes(*shapes)
    ungrouped_masks = [
        masks.decode_rle(each.mask) for record in shapes for each in read_shapes(record | {"group_id": None})[0]
    ]
    grouped_masks = [masks.decode_rle(each.mask) for each in regions]
    empty_mask = np.zeros(IMAGE_SIZE[::-1], bool)
    assert (
        np.logical_or.reduce([*ungrouped_masks, empty_mask]) == np.logical_or.reduce([*grouped_masks, empty_mask])
    ).all()
    assert len(regions) <= sum(group is None for _, group in groups) + len({group for _, group in groups} - {None})
