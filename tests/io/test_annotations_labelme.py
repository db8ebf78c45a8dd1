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

SIZE = 40, 20
TRIANGLE = [[10, 2], [30, 2], [10, 18]]


def shape(kind="polygon", points=TRIANGLE, label="cat", **more):
    return {"label": label, "points": points, "shape_type": kind, "group_id": None, "flags": {}, **more}


def read(*records, size=SIZE):
    """The regions of shapes, and what was counted."""
    skip = SkipCounter()
    return read_annotations({"shapes": list(records)}, size, "a.json", skip), dict(skip.counts)


def region(*records):
    """The only region of shapes."""
    (found,), counted = read(*records)
    assert counted == {}
    return found


def png(array):
    content = io.BytesIO()
    Image.fromarray(array).save(content, "PNG")
    return base64.b64encode(content.getvalue()).decode()


def test_polygon_is_drawn_with_its_edge():
    found = region(shape(points=[[2, 3], [5, 3], [5, 6], [2, 6]]))
    assert found.box == (2, 3, 6, 7)  # as LabelMe draws it, the last pixel included
    assert masks.compute_mask_area(found.mask) == 16


@pytest.mark.parametrize("kind", [None, "oriented_rectangle", "rotation"])
def test_shapes_with_corners_are_polygons(kind):
    points = [[10, 2], [20, 7], [15, 17], [5, 12]]
    assert region(shape(kind, points)).mask == region(shape("polygon", points)).mask


def test_rectangle_is_a_box_between_its_corners():
    found = region(shape("rectangle", [[30.5, 15], [10, 2.25]]))
    assert (found.box, found.mask) == ((10, 2.25, 30.5, 15), None)


def test_circle_has_its_center_and_a_point_on_its_edge():
    found = region(shape("circle", [[20, 10], [23, 14]]))
    assert found.box == (15, 5, 26, 16)
    assert masks.compute_mask_area(found.mask) == pytest.approx(np.pi * 5.5**2, rel=0.1)


def test_mask_is_an_image_at_its_first_point():
    inside = np.array([[True, False, True], [False, True, False]])
    for values in (inside, inside.astype(np.uint8), inside.astype(np.uint8) * 255):
        found = region(shape("mask", [[4, 5], [6, 6]], mask=png(values)))
        whole = masks.decode_rle(found.mask)
        assert (whole[5:7, 4:7] == inside).all()
        assert whole.sum() == 3


def test_labelme_reader_reads_point():
    found = region(shape("point", [[4, 5]], description="a nose"))
    assert (found.box, found.mask, found.point, found.texts) == (None, None, (4, 5), ("a nose",))


def test_description_is_the_caption_and_else_the_label():
    assert region(shape(description=" a cat ")).texts == (" a cat ",)
    assert region(shape(description="")).texts == ("cat",)
    assert region(shape()).texts == ("cat",)


def test_labelme_reader_merges_group_id():
    left = shape(points=[[1, 1], [4, 1], [4, 4]], group_id=3, description="a cat")
    right = shape("rectangle", [[30, 10], [35, 15]], group_id=3, description="behind a fence")
    other = shape("rectangle", [[0, 0], [2, 2]], group_id=3, label="dog")
    (cat, dog), counted = read(left, other, right, shape("point", [[2, 2]], group_id=3))
    assert (cat.box, cat.texts) == ((1, 1, 36, 16), ("a cat", "behind a fence"))
    assert masks.compute_mask_area(cat.mask) == masks.compute_mask_area(region(left).mask) + 36
    assert (dog.box, dog.mask) == ((0, 0, 2, 2), None)
    assert counted == {"keypoint": 1}


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (shape(label="__ignore__"), "shape labeled __ignore__"),
        (shape(points=[[1, 1], [2, 2]]), "polygon of too few points"),
        (shape("rectangle", [[1, 1]]), "rectangle of too few points"),
        (shape("points", [[1, 1], [2, 2]]), "LabelMe shape 'points'"),
        (shape("line", [[1, 1], [9, 1]]), "LabelMe shape 'line'"),
        (shape("cuboid"), "LabelMe shape 'cuboid'"),
        (shape(points=[[50, 30], [60, 30], [60, 35]]), "shape covering no pixel"),
        (shape("mask", [[1, 1], [2, 2]], mask=png(np.zeros((2, 2), bool))), "shape covering no pixel"),
    ],
)
def test_what_is_no_region_is_counted_and_leaves_the_others(record, reason):
    (found,), counted = read(record, shape("rectangle", [[1, 2], [3, 4]]))
    assert found.box == (1, 2, 3, 4)
    assert counted == {reason: 1}


def test_line_is_its_box_and_counted():
    (found,), counted = read(shape("linestrip", [[1, 1], [9, 5], [4, 8]]))
    assert (found.box, found.mask, counted) == ((1, 1, 9, 8), None, {"line, read as its box": 1})


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (3, "shapes[0] is 3; give an object"),
        ({"points": TRIANGLE}, "shapes[0], 'label' is None; give text"),
        (shape(points=[]), "shapes[0], 'points' is empty; give a list of [x, y]"),
        (shape(points=[[1, 2], [3]]), "shapes[0], 'points'"),
        (shape(3), "shapes[0], 'shape_type' is 3; give text"),
        (shape(description=["a"]), "shapes[0], 'description' is ['a']; give text"),
        (shape(points=[[0, 0], [9, 9], [1e9, 0]]), "a polygon that cannot be read: has a point far outside"),
        (shape("mask", [[1, 1], [2, 2]]), "a mask that cannot be read: 'mask': base64 text, not None"),
        (shape("mask", [[1, 1], [2, 2]], mask="!"), "'mask' is not base64"),
        (shape("mask", [[1, 1], [2, 2]], mask="QUJD"), "'mask' is not an image"),
        (shape("mask", [[39, 1], [41, 2]], mask=png(np.ones((2, 3), bool))), "reaches outside the image of 40 x 20"),
        (shape("mask", [[-2, 1], [0, 2]], mask=png(np.ones((2, 3), bool))), "reaches outside the image of 40 x 20"),
        (shape("mask", [[0, 0], [1, 1]], mask=png(np.ones((90, 90), bool))), "is 90 x 90, larger than the image"),
    ],
)
def test_a_damaged_shape_is_named(record, message):
    with pytest.raises(InputError) as raised:
        read(record)
    assert message in str(raised.value)
    assert str(raised.value).startswith("a.json, shapes[0]")


def test_size_is_that_of_the_file_the_image_or_the_image_inside(tmp_path):
    image = Image.new("RGB", (7, 5))
    data = io.BytesIO()
    image.save(data, "PNG")
    inside = {"imageData": base64.b64encode(data.getvalue()).decode()}
    path = tmp_path / "a.png"
    assert find_image_size({"imageWidth": 3, "imageHeight": 4}, path, "a.json") == (3, 4)
    assert find_image_size(inside | {"imageWidth": 3, "imageHeight": None}, path, "a.json") == (7, 5)
    with pytest.raises(InputError, match="no 'imageWidth' and 'imageHeight', and cannot open"):
        find_image_size({}, path, "a.json")
    Image.new("RGB", (6, 8)).save(path)
    assert find_image_size(inside, path, "a.json") == (6, 8)
    for wrong in (0, -1, "7", 10**9, True):
        with pytest.raises(InputError, match=r"^a\.json: "):
            find_image_size({"imageWidth": wrong, "imageHeight": 10**9}, path, "a.json")


def test_image_inside_is_opened_where_the_file_is_missing_within_limits(tmp_path, monkeypatch):
    data = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (7, 5), "red").save(data, "PNG", exif=exif)
    content = {"imageData": base64.b64encode(data.getvalue()).decode()}
    path = tmp_path / "a.png"
    assert open_annotated_image(content, path, "a.json").size == (5, 7)
    for broken in ("", "!", "QUJD", 3):
        with pytest.raises(InputError, match=r"^a\.json, 'imageData'"):
            open_annotated_image({"imageData": broken}, path, "a.json")
    monkeypatch.setattr(masks, "PIXEL_LIMIT", 34)
    with pytest.raises(InputError, match="35 pixels"):
        open_annotated_image(content, path, "a.json")
    monkeypatch.setattr(shapes, "MAX_EMBEDDED_BYTES", 10)
    with pytest.raises(InputError, match="larger than 10 bytes"):
        open_annotated_image(content, path, "a.json")


coordinate = st.floats(-10, 50).map(lambda value: round(value, 2))
corner = st.tuples(coordinate, coordinate).map(list)


@settings(deadline=None, max_examples=60)
@given(points=st.lists(corner, min_size=3, max_size=7))
def test_polygon_is_drawn_as_pillow_draws_it(points):
    found, counted = read(shape(points=points))
    drawn = Image.new("L", SIZE)
    ImageDraw.Draw(drawn).polygon([tuple(point) for point in points], fill=1, outline=1)
    expected = np.array(drawn, bool)
    if expected.any():
        assert (masks.decode_rle(found[0].mask) == expected).all()
        assert found[0].box == masks.mask_to_box(expected)
    else:
        assert (found, counted) == ([], {"shape covering no pixel": 1})


@settings(deadline=None, max_examples=40)
@given(groups=st.lists(st.tuples(st.lists(corner, min_size=3, max_size=5), st.sampled_from([None, 1, 2])), max_size=5))
def test_groups_are_unions_and_no_shape_is_lost(groups):
    records = [shape(points=points, group_id=group) for points, group in groups]
    found, _ = read(*records)
    alone = [masks.decode_rle(each.mask) for record in records for each in read(record | {"group_id": None})[0]]
    together = [masks.decode_rle(each.mask) for each in found]
    union = np.zeros(SIZE[::-1], bool)
    assert (np.logical_or.reduce([*alone, union]) == np.logical_or.reduce([*together, union])).all()
    assert len(found) <= sum(group is None for _, group in groups) + len({group for _, group in groups} - {None})
