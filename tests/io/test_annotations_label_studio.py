import base64
import io
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sca.io import masks
from sca.io.annotations import brush_rle
from sca.io.annotations.annotation import SkipCounter
from sca.io.annotations.label_studio import is_task, read_tasks
from sca.io.errors import InputError

WIDTH, HEIGHT = 40, 20


def result(kind, identity="a", value=None, **more):
    head = {"original_width": WIDTH, "original_height": HEIGHT, "image_rotation": 0, "to_name": "image"}
    return {**head, "id": identity, "type": kind, "from_name": "x", "value": value or {}, **more}


def rectangle(identity="a", label="cat", **more):
    value = {"x": 25, "y": 50, "width": 50, "height": 25, "rotation": 0, **more}
    return result("rectanglelabels", identity, value | {"rectanglelabels": [label]})


def text(*texts, identity="a"):
    return result("textarea", identity, {"text": list(texts)})


def task(*results, data=None, **more):
    return {"data": {"image": "a.png"} if data is None else data, "annotations": [{"result": list(results)}], **more}


def read(*tasks):
    """The images of tasks, and what was counted."""
    skip = SkipCounter()
    return list(read_tasks(list(tasks), "ls.json", skip, unmeasured)), dict(skip.counts)


def unmeasured(name):
    """The size of an image that does not exist."""
    return None


def read_rejecting(*tasks, measure=unmeasured):
    """The images of tasks, and what was rejected."""
    problems = []
    images = list(read_tasks(list(tasks), "ls.json", pytest.fail, measure, lambda error: problems.append(str(error))))
    return images, problems


def region(*results):
    """The only region of results."""
    ((image,), counted) = read(task(*results))
    assert counted == {}
    (found,) = image.annotations
    return found


def png(inside, mode="RGBA"):
    content = io.BytesIO()
    pixels = np.zeros((*inside.shape, 4), np.uint8)
    pixels[inside] = 255
    Image.fromarray(pixels).convert(mode).save(content, "PNG")
    return "data:image/png;base64," + base64.b64encode(content.getvalue()).decode()


def test_rectangle_is_a_box_with_its_texts():
    found = region(rectangle(), text("a cat", "asleep"))
    assert (found.box, found.mask, found.texts) == ((10, 10, 30, 15), None, ("a cat", "asleep"))
    assert region(rectangle()).texts == ("cat",)


def test_rotated_rectangle_turns_clockwise_about_its_first_corner():
    found = region(rectangle(x=50, y=25, width=20, height=50, rotation=90))
    assert found.box == (10, 5, 20, 13)  # 8 wide and 10 high around (20, 5), turned to its left
    assert masks.decode_rle(found.mask)[5:13, 10:20].all()
    assert masks.compute_mask_area(found.mask) == 80


def test_rectangle_without_rotation_or_with_a_full_turn_stays_a_box():
    for rotation in (None, 0, 360, -360.0):
        assert region(rectangle(rotation=rotation)).mask is None


def test_polygon_is_a_mask():
    found = region(result("polygonlabels", value={"points": [[25, 50], [75, 50], [75, 75], [25, 75]]}))
    assert found.box == (10, 10, 30, 15)
    assert masks.compute_mask_area(found.mask) == 100


def test_ellipse_has_its_radii_and_rotation():
    value = {"x": 50, "y": 50, "radiusX": 25, "radiusY": 20}  # 10 and 4 pixels
    flat, upright = (region(result("ellipselabels", value=value | {"rotation": degrees})) for degrees in (0, 90))
    assert flat.box == (10, 6, 30, 14)
    assert upright.box == (16, 0, 24, 20)
    assert masks.compute_mask_area(flat.mask) == pytest.approx(math.pi * 40, rel=0.05)


def test_brush_bitmask_and_closed_vector_are_masks():
    inside = np.zeros((HEIGHT, WIDTH), bool)
    inside[3:7, 5:9] = True
    corners = [{"id": str(n), "x": x / WIDTH * 100, "y": y / HEIGHT * 100} for n, (x, y) in enumerate(CORNERS)]
    for shape in (
        result("brushlabels", value={"format": "rle", "rle": brush_rle.encode_brush_rle(inside)}),
        result("bitmasklabels", value={"imageDataURL": png(inside)}),
        result("vectorlabels", value={"vertices": corners, "closed": True}),
    ):
        found = region(shape)
        assert (masks.decode_rle(found.mask) == inside).all()
        assert found.box == (5, 3, 9, 7)


CORNERS = ((5, 3), (9, 3), (9, 7), (5, 7))


def test_keypoint_alone_is_a_point():
    found = region(result("keypointlabels", value={"x": 50, "y": 50, "width": 1}), text("a nose"))
    assert (found.box, found.mask, found.point, found.texts) == (None, None, (20, 10), ("a nose",))


def test_keypoint_of_a_region_with_a_box_is_not_its_place():
    ((image,), counted) = read(task(result("keypointlabels", value={"x": 50, "y": 50, "width": 1}), rectangle()))
    (found,) = image.annotations
    assert (found.box, found.point) == ((10, 10, 30, 15), None)
    assert counted == {"keypoint": 1}


def test_label_studio_reader_merges_masks_of_a_region():
    first, second = np.zeros((2, HEIGHT, WIDTH), bool)
    first[3:6, 5:8], second[10:14, 20:24] = True, True
    shapes = [
        result("brushlabels", value={"format": "rle", "rle": brush_rle.encode_brush_rle(inside)})
        for inside in (first, second)
    ]
    square = result("polygonlabels", value={"points": [[0, 0], [10, 0], [10, 20], [0, 20]]})
    found = region(*shapes, square)
    assert masks.compute_mask_area(found.mask) == 9 + 16 + 16
    assert found.box == (0, 0, 24, 14)


def test_label_studio_reader_counts_further_shapes_of_a_region():
    points = [result("keypointlabels", value={"x": x, "y": 50, "width": 1}) for x in (10, 20, 20)]
    ((image,), counted) = read(task(rectangle(), rectangle(x=0), rectangle()))
    assert [each.box for each in image.annotations] == [(10, 10, 30, 15)]
    assert counted == {"further box of a region": 1}
    ((image,), counted) = read(task(*points))
    assert [each.point for each in image.annotations] == [(4, 10)]
    assert counted == {"keypoint": 1}


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (
            rectangle("b") | {"original_width": "wide"},
            "region 'b': 'original_width' and 'original_height' are ('wide', 20); give",
        ),
        (rectangle("b") | {"original_width": 7}, "region 'b': an image of 7 x 20, and 40 x 20 in a result before"),
        (3, "'result'[1] is 3; give an object"),
        (rectangle("b", x="left"), "region 'b': a rectangle that cannot be read"),
    ],
)
def test_label_studio_reader_rejects_only_the_bad_result(bad, message):
    ((image,), problems) = read_rejecting(task(rectangle(), bad, rectangle("c", x=0)))
    assert [each.box[0] for each in image.annotations] == [10, 0]
    (problem,) = problems
    assert message in problem


def test_label_studio_reader_takes_a_missing_size_from_other_results_or_the_image():
    unsized = rectangle("b", x=0) | {"original_width": None}
    ((image,), problems) = read_rejecting(task(unsized, rectangle()))
    assert ([each.box[2] for each in image.annotations], image.is_size_recorded, problems) == ([20, 30], True, [])
    ((image,), problems) = read_rejecting(task(unsized), measure={"a.png": (80, 40)}.get)
    assert ([each.box for each in image.annotations], image.is_size_recorded) == ([(0, 20, 40, 30)], False)
    ((image,), problems) = read_rejecting(task(unsized))
    assert (image.annotations, image.size) == ([], None)
    assert "no 'original_width' and 'original_height', and no image to measure" in problems[0]


def test_bitmask_is_empty_where_it_is_transparent():
    pixels = np.full((HEIGHT, WIDTH, 4), 255, np.uint8)
    pixels[:, 7:, 3] = 0
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG")
    data = base64.b64encode(content.getvalue()).decode()
    assert region(result("bitmasklabels", value={"imageDataURL": data})).box == (0, 0, 7, HEIGHT)


def test_bitmask_of_a_lossy_image_has_no_ringing():
    inside = np.zeros((HEIGHT, WIDTH), bool)
    inside[3:17, 5:30] = True
    content = io.BytesIO()
    Image.fromarray(inside * np.uint8(120)).save(content, "JPEG", quality=60)
    assert (np.asarray(Image.open(content)) != 0).sum() > inside.sum() * 1.1
    data = base64.b64encode(content.getvalue()).decode()
    found = region(result("bitmasklabels", value={"imageDataURL": data}))
    assert (masks.decode_rle(found.mask) != inside).mean() < 0.02


def test_brush_is_read_with_runs_that_do_not_repeat():
    values = "00000000" * 4 + "11111111" * 4 + "00000000" * 3 + "00000001"
    bits = f"{12:032b}{7:05b}" + "0010" + "0011" + "0111" + "1111" + "0" + "01" + f"{11:04b}" + values
    bits += "0" * (-len(bits) % 8)
    code = [int(bits[at : at + 8], 2) for at in range(0, len(bits), 8)]
    assert brush_rle.decode_brush_rle(code, 3, 1).tolist() == [[False, True, True]]


def test_labels_of_a_plain_shape_are_its_labels():
    place = {"x": 25, "y": 50, "width": 50, "height": 25}
    for shapes in (
        [result("rectangle", value=place), result("labels", value=place | {"labels": ["cat", "pet"]})],
        [result("labels", value=place | {"labels": ["cat", "pet"]})],
    ):
        found = region(*shapes)
        assert (found.box, found.label) == ((10, 10, 30, 15), "cat, pet")


def test_results_without_an_id_are_regions_of_their_own():
    ((image,), _) = read(task(rectangle(None), rectangle(None, x=0)))
    assert [each.box[0] for each in image.annotations] == [10, 0]


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"type": "relation", "from_id": "a", "to_id": "b"}, "relation"),
        (result("choices", "c", {"choices": ["good"]}), "choices"),
        (result("rating", "c", {"rating": 3}), "rating"),
        (result("choices", "a", {"choices": ["hidden"]}), "choices"),
        (text("a street", identity="c"), "text without a region"),
        (result("keypointlabels", "k", {"x": 1, "y": 1}, parentID="a"), "keypoint"),
        (result("polygonlabels", "p", {"points": [[1, 1], [2, 2]]}), "polygon with fewer than three points"),
        (result("vectorlabels", "v", {"vertices": [], "closed": False}), "open or curved vector"),
        (
            result("rectanglelabels", "t", {"x": 1, "y": 1, "width": 1, "height": 1}, image_rotation=90),
            "region on an image that was turned in Label Studio",
        ),
    ],
)
def test_what_is_no_region_is_counted_and_leaves_the_others(more, reason):
    ((image,), counted) = read(task(more, rectangle()))
    assert [each.box for each in image.annotations] == [(10, 10, 30, 15)]
    assert counted == {reason: 1}


def test_cancelled_annotations_are_passed_over_and_ground_truth_counts():
    one, two, three = (rectangle(label=name) for name in ("one", "two", "three"))

    def label(*annotations, **more):
        ((image,), counted) = read({"data": {"image": "a.png"}, "annotations": list(annotations), **more})
        return image.annotations[0].label if image.annotations else None, counted

    cancelled = {"was_cancelled": True, "result": [one]}
    several = {"task with several annotations, of which one is read": 1}
    assert label(cancelled, {"result": [two]}) == ("two", {"cancelled annotation": 1})
    assert label({"result": [one]}, {"result": [two], "ground_truth": True}) == ("two", several)
    assert label({"result": [one]}, {"result": [two]}) == ("one", several)
    assert label({"result": [one]}, drafts=[{"result": [two]}], predictions=[{"result": [three]}]) == ("one", {})
    assert label(drafts=[{"result": [two]}], predictions=[{"result": [three]}]) == ("two", {})
    assert label(drafts=[7], predictions=[{"result": [three]}]) == ("three", {})
    assert label(cancelled, drafts=[{"result": [two]}]) == (None, {"cancelled annotation": 1})
    assert label({"result": []}, predictions=[{"result": [three]}]) == (None, {})
    several = {"task with several predictions, of which one is read": 1}
    assert label(predictions=[{"result": [one]}, {"result": [two]}]) == ("one", several)


@pytest.mark.parametrize(
    ("data", "to_name", "name"),
    [
        ({"image": "a.png", "url": "b.png"}, "image", "a.png"),
        ({"image": "a.png", "img": "b.png"}, "img", "b.png"),
        ({"picture": "https://x.org/b.JPG?size=3", "text": "hello"}, "image", "https://x.org/b.JPG?size=3"),
        ({"picture": "/data/local-files/?d=b/c.png"}, "image", "/data/local-files/?d=b/c.png"),
        ({"image": "no suffix"}, "img", "no suffix"),
        ({"pages": ["a.png"]}, "image", "a.png"),
    ],
)
def test_image_is_the_value_that_names_one(data, to_name, name):
    ((image,), _) = read(task(rectangle() | {"to_name": to_name}, data=data))
    assert (image.name, len(image.annotations)) == (name, 1)


def test_images_of_one_task_have_their_own_regions():
    left, right = rectangle("l", "left") | {"to_name": "one"}, rectangle("r", "right") | {"to_name": "two"}
    images, _ = read(task(left, right, data={"one": "1.png", "two": "2.png"}))
    assert [(each.name, each.annotations[0].label) for each in images] == [("1.png", "left"), ("2.png", "right")]
    pages = [rectangle("a", "first") | {"item_index": 0}, rectangle("b", "second") | {"item_index": 1}]
    images, _ = read(task(*pages, data={"image": ["1.png", "2.png"]}))
    assert [(each.name, each.annotations[0].label) for each in images] == [("1.png", "first"), ("2.png", "second")]


def test_task_without_regions_is_an_image_without_regions():
    images, counted = read(task(), task(data={"image": "b.png", "width": 7, "height": 5}))
    assert [(each.name, each.size, each.annotations) for each in images] == [("a.png", None, []), ("b.png", (7, 5), [])]
    assert counted == {}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([3], "task 0 is 3; give an object"),
        ([{"image": "a.png", "label": []}], "task 0: no 'data'; export the tasks as JSON"),
        ([{"data": {"a": "x.png", "b": "y.png"}}], "task 0, 'data': several values name an image; name it 'image'"),
        ([{"data": {"text": "hello"}}], "task 0, 'data': no value names an image"),
        ([task(data={"image": 3})], "task 0, 'data', 'image' is 3; give the file name of an image"),
        ([task(rectangle(x=None))], "region 'a': a rectangle that cannot be read: 'value', 'x' is None; give a number"),
        ([task(result("polygonlabels"))], "a polygon that cannot be read: no 'points'"),
        ([task(result("polygonlabels", value={"points": [[1]]}))], "a point is [1]; give 2 numbers (x, y)"),
        ([task(result("polygonlabels", value={"points": [[1, 1], [2, 2], [1e9, 3]]}))], "a point far outside"),
        (
            [task(result("brushlabels", value={"rle": 10**9}))],
            "a brush that cannot be read: 'value', 'rle' is 1000000000; give a list",
        ),
        ([task(result("brushlabels", value={"rle": [1, 2]}))], "is truncated"),
        ([task(result("bitmasklabels", value={"imageDataURL": "é"}))], "'imageDataURL' is not base64"),
        ([task(rectangle() | {"original_width": 10**9})], "at most 178,956,970 pixels are allowed"),
        (
            [task(rectangle(), rectangle("b") | {"original_width": 9})],
            "region 'b': an image of 9 x 20, and 40 x 20 in a result before",
        ),
        ([task(rectangle(), result("textarea", value={"text": 3}))], "'text' is 3; give text, or a list of texts"),
        ([{"data": {"image": "a.png"}, "annotations": 3}], "'annotations' is 3; give a list"),
    ],
)
def test_a_damaged_record_is_named(content, message):
    with pytest.raises(InputError) as raised:
        list(read_tasks(content, "ls.json", SkipCounter(), unmeasured))
    assert message in str(raised.value)
    assert str(raised.value).startswith("ls.json, task 0")


def test_a_single_task_is_read():
    assert is_task(task())
    assert not is_task({"images": [], "annotations": []})
    assert [each.name for each in read_tasks(task(), "ls.json", SkipCounter(), unmeasured)] == ["a.png"]


percent = st.floats(-50, 150).map(lambda value: round(value, 3))
sizes = st.floats(0.5, 60).map(lambda value: round(value, 3))
degrees = st.floats(-720, 720).map(lambda value: round(value, 2))


def centers(width, height):
    """x and y of the center of each pixel, in pixels."""
    y, x = np.mgrid[:height, :width]
    return x + 0.5, y + 0.5


@settings(deadline=None, max_examples=60)
@given(x=percent, y=percent, width=sizes, height=sizes, rotation=degrees)
def test_rotated_rectangle_covers_the_pixels_inside(x, y, width, height, rotation):
    ((image,), _) = read(task(rectangle(x=x, y=y, width=width, height=height, rotation=rotation)))
    (found,) = image.annotations
    if not found.mask:
        return
    angle = math.radians(rotation)
    right, down = (c - o for c, o in zip(centers(WIDTH, HEIGHT), (x * 0.4, y * 0.2), strict=True))
    along, across = right * math.cos(angle) + down * math.sin(angle), down * math.cos(angle) - right * math.sin(angle)
    reach = np.minimum(np.minimum(along, width * 0.4 - along), np.minimum(across, height * 0.2 - across))
    check_filled(found, reach)


@settings(deadline=None, max_examples=60)
@given(x=percent, y=percent, radius_x=sizes, radius_y=sizes, rotation=degrees)
def test_rotated_ellipse_covers_the_pixels_inside(x, y, radius_x, radius_y, rotation):
    value = {"x": x, "y": y, "radiusX": radius_x, "radiusY": radius_y, "rotation": rotation}
    ((image,), _) = read(task(result("ellipselabels", value=value)))
    (found,) = image.annotations
    if not found.mask:
        return
    angle = math.radians(rotation)
    right, down = (c - o for c, o in zip(centers(WIDTH, HEIGHT), (x * 0.4, y * 0.2), strict=True))
    along, across = right * math.cos(angle) + down * math.sin(angle), down * math.cos(angle) - right * math.sin(angle)
    a, b = radius_x * 0.4, radius_y * 0.2
    reach = (1 - np.hypot(along / a, across / b)) * min(a, b)
    check_filled(found, reach)


def check_filled(found, reach):
    """Pixels more than one pixel inside are in the mask, those more than one outside are not."""
    inside = masks.decode_rle(found.mask)
    assert inside[reach > 1].all()
    assert not inside[reach < -1].any()
    assert found.box == masks.mask_to_box(inside)
