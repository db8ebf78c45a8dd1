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
from sca.io.annotations.label_studio import has_mask, is_task, read_tasks
from sca.io.errors import InputError

WIDTH, HEIGHT = 40, 20


def make_result(result_type, region_id="a", value=None, **fields):
    common_fields = {"original_width": WIDTH, "original_height": HEIGHT, "image_rotation": 0, "to_name": "image"}
    return {**common_fields, "id": region_id, "type": result_type, "from_name": "x", "value": value or {}, **fields}


def make_rectangle(region_id="a", label="cat", **value_fields):
    value = {"x": 25, "y": 50, "width": 50, "height": 25, "rotation": 0, **value_fields}
    return make_result("rectanglelabels", region_id, value | {"rectanglelabels": [label]})


def make_text(*texts, region_id="a"):
    return make_result("textarea", region_id, {"text": list(texts)})


def make_task(*results, data=None, **fields):
    return {"data": {"image": "a.png"} if data is None else data, "annotations": [{"result": list(results)}], **fields}


def read_images(*tasks):
    """Return the images of tasks and the counts."""
    skip_counter = SkipCounter()
    return list(read_tasks(list(tasks), "ls.json", skip_counter, measure_no_image)), dict(skip_counter.counts)


def measure_no_image(name):
    """Return no size, as for a missing image."""
    return None


def read_images_and_problems(*tasks, measure_image=measure_no_image):
    """Return the images of tasks and the rejected tasks."""
    problems = []
    images = list(
        read_tasks(list(tasks), "ls.json", pytest.fail, measure_image, lambda error: problems.append(str(error)))
    )
    return images, problems


def read_region(*results):
    """Return the only region of results."""
    ((image,), skipped_counts) = read_images(make_task(*results))
    assert skipped_counts == {}
    (region,) = image.annotations
    return region


def encode_png_data_url(mask, mode="RGBA"):
    content = io.BytesIO()
    pixels = np.zeros((*mask.shape, 4), np.uint8)
    pixels[mask] = 255
    Image.fromarray(pixels).convert(mode).save(content, "PNG")
    return "data:image/png;base64," + base64.b64encode(content.getvalue()).decode()


def test_label_studio_reader_reads_a_rectangle_as_a_box_with_its_texts():
    region = read_region(make_rectangle(), make_text("a cat", "asleep"))
    assert (region.box, region.mask, region.texts) == ((10, 10, 30, 15), None, ("a cat", "asleep"))
    assert read_region(make_rectangle()).texts == ("cat",)


def test_label_studio_reader_rotates_rectangles_clockwise_about_the_first_corner():
    region = read_region(make_rectangle(x=50, y=25, width=20, height=50, rotation=90))
    assert region.box == (10, 5, 20, 13)  # 8 wide and 10 high around (20, 5), turned to its left
    assert masks.decode_rle(region.mask)[5:13, 10:20].all()
    assert masks.compute_mask_area(region.mask) == 80


def test_label_studio_reader_reads_unrotated_and_fully_turned_rectangles_as_boxes():
    for rotation in (None, 0, 360, -360.0):
        assert read_region(make_rectangle(rotation=rotation)).mask is None


def test_label_studio_reader_reads_a_polygon_as_a_mask():
    region = read_region(make_result("polygonlabels", value={"points": [[25, 50], [75, 50], [75, 75], [25, 75]]}))
    assert region.box == (10, 10, 30, 15)
    assert masks.compute_mask_area(region.mask) == 100


def test_label_studio_reader_applies_radii_and_rotation_of_an_ellipse():
    value = {"x": 50, "y": 50, "radiusX": 25, "radiusY": 20}  # 10 and 4 pixels
    horizontal, vertical = (
        read_region(make_result("ellipselabels", value=value | {"rotation": degrees})) for degrees in (0, 90)
    )
    assert horizontal.box == (10, 6, 30, 14)
    assert vertical.box == (16, 0, 24, 20)
    assert masks.compute_mask_area(horizontal.mask) == pytest.approx(math.pi * 40, rel=0.05)


def test_label_studio_reader_reads_brush_bitmask_and_closed_vector_as_masks():
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[3:7, 5:9] = True
    vertices = [{"id": str(n), "x": x / WIDTH * 100, "y": y / HEIGHT * 100} for n, (x, y) in enumerate(SQUARE_CORNERS)]
    for shape_result in (
        make_result("brushlabels", value={"format": "rle", "rle": brush_rle.encode_brush_rle(mask)}),
        make_result("bitmasklabels", value={"imageDataURL": encode_png_data_url(mask)}),
        make_result("vectorlabels", value={"vertices": vertices, "closed": True}),
    ):
        region = read_region(shape_result)
        assert (masks.decode_rle(region.mask) == mask).all()
        assert region.box == (5, 3, 9, 7)


SQUARE_CORNERS = ((5, 3), (9, 3), (9, 7), (5, 7))


def test_label_studio_reader_reads_a_single_keypoint_as_a_point():
    region = read_region(make_result("keypointlabels", value={"x": 50, "y": 50, "width": 1}), make_text("a nose"))
    assert (region.box, region.mask, region.point, region.texts) == (None, None, (20, 10), ("a nose",))


def test_label_studio_reader_counts_a_keypoint_of_a_region_with_a_box():
    ((image,), skipped_counts) = read_images(
        make_task(make_result("keypointlabels", value={"x": 50, "y": 50, "width": 1}), make_rectangle())
    )
    (region,) = image.annotations
    assert (region.box, region.point) == ((10, 10, 30, 15), None)
    assert skipped_counts == {"keypoint": 1}


def test_label_studio_reader_merges_masks_of_a_region():
    first_mask, second_mask = np.zeros((2, HEIGHT, WIDTH), bool)
    first_mask[3:6, 5:8], second_mask[10:14, 20:24] = True, True
    brush_results = [
        make_result("brushlabels", value={"format": "rle", "rle": brush_rle.encode_brush_rle(mask)})
        for mask in (first_mask, second_mask)
    ]
    square_result = make_result("polygonlabels", value={"points": [[0, 0], [10, 0], [10, 20], [0, 20]]})
    region = read_region(*brush_results, square_result)
    assert masks.compute_mask_area(region.mask) == 9 + 16 + 16
    assert region.box == (0, 0, 24, 14)


def test_label_studio_reader_counts_further_shapes_of_a_region():
    keypoint_results = [make_result("keypointlabels", value={"x": x, "y": 50, "width": 1}) for x in (10, 20, 20)]
    ((image,), skipped_counts) = read_images(make_task(make_rectangle(), make_rectangle(x=0), make_rectangle()))
    assert [each.box for each in image.annotations] == [(10, 10, 30, 15)]
    assert skipped_counts == {"further box of a region": 1}
    ((image,), skipped_counts) = read_images(make_task(*keypoint_results))
    assert [each.point for each in image.annotations] == [(4, 10)]
    assert skipped_counts == {"keypoint": 1}


@pytest.mark.parametrize(
    ("invalid_result", "message"),
    [
        (
            make_rectangle("b") | {"original_width": "wide"},
            "region 'b': 'original_width' and 'original_height' are ('wide', 20); expected",
        ),
        (
            make_rectangle("b") | {"original_width": 7},
            "region 'b': the image size is 7 x 20, but an earlier result records 40 x 20",
        ),
        (3, "'result'[1] is 3; expected an object"),
        (make_rectangle("b", x="left"), "region 'b': cannot read the rectangle"),
    ],
)
def test_label_studio_reader_rejects_only_the_invalid_result(invalid_result, message):
    ((image,), problems) = read_images_and_problems(
        make_task(make_rectangle(), invalid_result, make_rectangle("c", x=0))
    )
    assert [each.box[0] for each in image.annotations] == [10, 0]
    (problem,) = problems
    assert message in problem


def test_label_studio_reader_takes_a_missing_size_from_other_results_or_the_image():
    result_without_size = make_rectangle("b", x=0) | {"original_width": None}
    ((image,), problems) = read_images_and_problems(make_task(result_without_size, make_rectangle()))
    assert ([each.box[2] for each in image.annotations], image.is_size_recorded, problems) == ([20, 30], True, [])
    ((image,), problems) = read_images_and_problems(
        make_task(result_without_size), measure_image={"a.png": (80, 40)}.get
    )
    assert ([each.box for each in image.annotations], image.is_size_recorded) == ([(0, 20, 40, 30)], False)
    ((image,), problems) = read_images_and_problems(make_task(result_without_size))
    assert (image.annotations, image.size) == ([], None)
    assert "no 'original_width' and 'original_height', and its image was not found" in problems[0]


def test_label_studio_reader_reads_transparent_bitmask_pixels_as_outside():
    pixels = np.full((HEIGHT, WIDTH, 4), 255, np.uint8)
    pixels[:, 7:, 3] = 0
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG")
    base64_png = base64.b64encode(content.getvalue()).decode()
    assert read_region(make_result("bitmasklabels", value={"imageDataURL": base64_png})).box == (0, 0, 7, HEIGHT)


def test_label_studio_reader_ignores_jpeg_ringing_in_bitmasks():
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[3:17, 5:30] = True
    content = io.BytesIO()
    Image.fromarray(mask * np.uint8(120)).save(content, "JPEG", quality=60)
    assert (np.asarray(Image.open(content)) != 0).sum() > mask.sum() * 1.1
    base64_jpeg = base64.b64encode(content.getvalue()).decode()
    region = read_region(make_result("bitmasklabels", value={"imageDataURL": base64_jpeg}))
    assert (masks.decode_rle(region.mask) != mask).mean() < 0.02


def test_decode_brush_rle_reads_runs_of_distinct_values():
    values = "00000000" * 4 + "11111111" * 4 + "00000000" * 3 + "00000001"
    bits = f"{12:032b}{7:05b}" + "0010" + "0011" + "0111" + "1111" + "0" + "01" + f"{11:04b}" + values
    bits += "0" * (-len(bits) % 8)
    rle_bytes = [int(bits[offset : offset + 8], 2) for offset in range(0, len(bits), 8)]
    assert brush_rle.decode_brush_rle(rle_bytes, 3, 1).tolist() == [[False, True, True]]


def test_label_studio_reader_joins_labels_of_a_plain_shape():
    box_fields = {"x": 25, "y": 50, "width": 50, "height": 25}
    for results in (
        [
            make_result("rectangle", value=box_fields),
            make_result("labels", value=box_fields | {"labels": ["cat", "pet"]}),
        ],
        [make_result("labels", value=box_fields | {"labels": ["cat", "pet"]})],
    ):
        region = read_region(*results)
        assert (region.box, region.label) == ((10, 10, 30, 15), "cat, pet")


def test_label_studio_reader_reads_results_without_id_as_separate_regions():
    ((image,), _) = read_images(make_task(make_rectangle(None), make_rectangle(None, x=0)))
    assert [each.box[0] for each in image.annotations] == [10, 0]


@pytest.mark.parametrize(
    ("skipped_result", "reason"),
    [
        ({"type": "relation", "from_id": "a", "to_id": "b"}, "relation"),
        (make_result("choices", "c", {"choices": ["good"]}), "choices"),
        (make_result("rating", "c", {"rating": 3}), "rating"),
        (make_result("choices", "a", {"choices": ["hidden"]}), "choices"),
        (make_text("a street", region_id="c"), "text without a region"),
        (make_result("keypointlabels", "k", {"x": 1, "y": 1}, parentID="a"), "keypoint"),
        (make_result("polygonlabels", "p", {"points": [[1, 1], [2, 2]]}), "polygon with fewer than three points"),
        (make_result("vectorlabels", "v", {"vertices": [], "closed": False}), "open or curved vector"),
        (
            make_result("rectanglelabels", "t", {"x": 1, "y": 1, "width": 1, "height": 1}, image_rotation=90),
            "region on an image that was turned in Label Studio",
        ),
    ],
)
def test_label_studio_reader_counts_skipped_results_and_keeps_the_others(skipped_result, reason):
    ((image,), skipped_counts) = read_images(make_task(skipped_result, make_rectangle()))
    assert [each.box for each in image.annotations] == [(10, 10, 30, 15)]
    assert skipped_counts == {reason: 1}


def test_label_studio_reader_skips_cancelled_annotations_and_prefers_ground_truth():
    first_result, second_result, third_result = (make_rectangle(label=name) for name in ("one", "two", "three"))

    def read_label(*annotations, **task_fields):
        ((image,), skipped_counts) = read_images(
            {"data": {"image": "a.png"}, "annotations": list(annotations), **task_fields}
        )
        return image.annotations[0].label if image.annotations else None, skipped_counts

    cancelled_annotation = {"was_cancelled": True, "result": [first_result]}
    several_counts = {"task with several annotations, of which one is read": 1}
    assert read_label(cancelled_annotation, {"result": [second_result]}) == ("two", {"cancelled annotation": 1})
    assert read_label({"result": [first_result]}, {"result": [second_result], "ground_truth": True}) == (
        "two",
        several_counts,
    )
    assert read_label({"result": [first_result]}, {"result": [second_result]}) == ("one", several_counts)
    assert read_label(
        {"result": [first_result]}, drafts=[{"result": [second_result]}], predictions=[{"result": [third_result]}]
    ) == ("one", {})
    assert read_label(drafts=[{"result": [second_result]}], predictions=[{"result": [third_result]}]) == ("two", {})
    assert read_label(drafts=[7], predictions=[{"result": [third_result]}]) == ("three", {})
    assert read_label(cancelled_annotation, drafts=[{"result": [second_result]}]) == (None, {"cancelled annotation": 1})
    assert read_label({"result": []}, predictions=[{"result": [third_result]}]) == (None, {})
    several_counts = {"task with several predictions, of which one is read": 1}
    assert read_label(predictions=[{"result": [first_result]}, {"result": [second_result]}]) == ("one", several_counts)


@pytest.mark.parametrize(
    ("data", "to_name", "expected_name"),
    [
        ({"image": "a.png", "url": "b.png"}, "image", "a.png"),
        ({"image": "a.png", "img": "b.png"}, "img", "b.png"),
        ({"photo": "https://x.org/b.JPG?size=3", "text": "hello"}, "image", "https://x.org/b.JPG?size=3"),
        ({"photo": "/data/local-files/?d=b/c.png"}, "image", "/data/local-files/?d=b/c.png"),
        ({"image": "no suffix"}, "img", "no suffix"),
        ({"pages": ["a.png"]}, "image", "a.png"),
    ],
)
def test_label_studio_reader_finds_the_data_value_that_names_the_image(data, to_name, expected_name):
    ((image,), _) = read_images(make_task(make_rectangle() | {"to_name": to_name}, data=data))
    assert (image.name, len(image.annotations)) == (expected_name, 1)


def test_label_studio_reader_assigns_regions_to_each_image_of_a_task():
    left_result, right_result = (
        make_rectangle("l", "left") | {"to_name": "one"},
        make_rectangle("r", "right") | {"to_name": "two"},
    )
    images, _ = read_images(make_task(left_result, right_result, data={"one": "1.png", "two": "2.png"}))
    assert [(each.name, each.annotations[0].label) for each in images] == [("1.png", "left"), ("2.png", "right")]
    page_results = [make_rectangle("a", "first") | {"item_index": 0}, make_rectangle("b", "second") | {"item_index": 1}]
    images, _ = read_images(make_task(*page_results, data={"image": ["1.png", "2.png"]}))
    assert [(each.name, each.annotations[0].label) for each in images] == [("1.png", "first"), ("2.png", "second")]


def test_label_studio_reader_reads_a_task_without_regions_as_an_empty_image():
    images, skipped_counts = read_images(make_task(), make_task(data={"image": "b.png", "width": 7, "height": 5}))
    assert [(each.name, each.size, each.annotations) for each in images] == [("a.png", None, []), ("b.png", (7, 5), [])]
    assert skipped_counts == {}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([3], "task 0 is 3; expected an object"),
        ([{"image": "a.png", "label": []}], "task 0: 'data' is missing; export from Label Studio as JSON"),
        ([{"data": {"a": "x.png", "b": "y.png"}}], "task 0, 'data': several values name an image; name it 'image'"),
        ([{"data": {"text": "hello"}}], "task 0, 'data': no value names an image"),
        ([make_task(data={"image": 3})], "task 0, 'data', 'image' is 3; expected the file name of an image"),
        (
            [make_task(make_rectangle(x=None))],
            "region 'a': cannot read the rectangle: 'value', 'x' is None; expected a number",
        ),
        ([make_task(make_result("polygonlabels"))], "cannot read the polygon: no 'points'"),
        (
            [make_task(make_result("polygonlabels", value={"points": [[1]]}))],
            "a point is [1]; expected 2 numbers (x, y)",
        ),
        (
            [make_task(make_result("polygonlabels", value={"points": [[1, 1], [2, 2], [1e9, 3]]}))],
            "a point far outside",
        ),
        (
            [make_task(make_result("brushlabels", value={"rle": 10**9}))],
            "cannot read the brush: 'value', 'rle' is 1000000000; expected a list",
        ),
        ([make_task(make_result("brushlabels", value={"rle": [1, 2]}))], "is truncated"),
        ([make_task(make_result("bitmasklabels", value={"imageDataURL": "é"}))], "'imageDataURL' is not valid base64"),
        ([make_task(make_rectangle() | {"original_width": 10**9})], "at most 178,956,970 pixels are allowed"),
        (
            [make_task(make_rectangle(), make_rectangle("b") | {"original_width": 9})],
            "region 'b': the image size is 9 x 20, but an earlier result records 40 x 20",
        ),
        (
            [make_task(make_rectangle(), make_result("textarea", value={"text": 3}))],
            "'text' is 3; expected a string, or a list of strings",
        ),
        ([{"data": {"image": "a.png"}, "annotations": 3}], "'annotations' is 3; expected a list"),
    ],
)
def test_label_studio_reader_error_names_the_damaged_record(content, message):
    with pytest.raises(InputError) as error_info:
        list(read_tasks(content, "ls.json", SkipCounter(), measure_no_image))
    assert message in str(error_info.value)
    assert str(error_info.value).startswith("ls.json, task 0")


def test_read_tasks_accepts_a_single_task():
    assert is_task(make_task())
    assert not is_task({"images": [], "annotations": []})
    assert [each.name for each in read_tasks(make_task(), "ls.json", SkipCounter(), measure_no_image)] == ["a.png"]


PERCENTAGES = st.floats(-50, 150).map(lambda value: round(value, 3))
SIZE_PERCENTAGES = st.floats(0.5, 60).map(lambda value: round(value, 3))
ROTATIONS = st.floats(-720, 720).map(lambda value: round(value, 2))


def compute_pixel_centers(width, height):
    """Return x and y of each pixel center in pixels."""
    y, x = np.mgrid[:height, :width]
    return x + 0.5, y + 0.5


@settings(deadline=None, max_examples=60)
@given(x=PERCENTAGES, y=PERCENTAGES, width=SIZE_PERCENTAGES, height=SIZE_PERCENTAGES, rotation=ROTATIONS)
def test_label_studio_reader_fills_pixels_inside_a_rotated_rectangle(x, y, width, height, rotation):
    ((image,), _) = read_images(make_task(make_rectangle(x=x, y=y, width=width, height=height, rotation=rotation)))
    (region,) = image.annotations
    if not region.mask:
        return
    angle = math.radians(rotation)
    offset_x, offset_y = (c - o for c, o in zip(compute_pixel_centers(WIDTH, HEIGHT), (x * 0.4, y * 0.2), strict=True))
    local_x, local_y = (
        offset_x * math.cos(angle) + offset_y * math.sin(angle),
        offset_y * math.cos(angle) - offset_x * math.sin(angle),
    )
    inside_distance = np.minimum(
        np.minimum(local_x, width * 0.4 - local_x), np.minimum(local_y, height * 0.2 - local_y)
    )
    assert_mask_is_filled(region, inside_distance)


@settings(deadline=None, max_examples=60)
@given(x=PERCENTAGES, y=PERCENTAGES, radius_x=SIZE_PERCENTAGES, radius_y=SIZE_PERCENTAGES, rotation=ROTATIONS)
def test_label_studio_reader_fills_pixels_inside_a_rotated_ellipse(x, y, radius_x, radius_y, rotation):
    value = {"x": x, "y": y, "radiusX": radius_x, "radiusY": radius_y, "rotation": rotation}
    ((image,), _) = read_images(make_task(make_result("ellipselabels", value=value)))
    (region,) = image.annotations
    if not region.mask:
        return
    angle = math.radians(rotation)
    offset_x, offset_y = (c - o for c, o in zip(compute_pixel_centers(WIDTH, HEIGHT), (x * 0.4, y * 0.2), strict=True))
    local_x, local_y = (
        offset_x * math.cos(angle) + offset_y * math.sin(angle),
        offset_y * math.cos(angle) - offset_x * math.sin(angle),
    )
    half_width, half_height = radius_x * 0.4, radius_y * 0.2
    inside_distance = (1 - np.hypot(local_x / half_width, local_y / half_height)) * min(half_width, half_height)
    assert_mask_is_filled(region, inside_distance)


def assert_mask_is_filled(region, inside_distance):
    """Pixels more than one pixel inside are in the mask; those more than one pixel outside are not."""
    mask = masks.decode_rle(region.mask)
    assert mask[inside_distance > 1].all()
    assert not mask[inside_distance < -1].any()
    assert region.box == masks.mask_to_box(mask)


def test_region_has_separate_labels():
    result = make_rectangle()
    result["value"]["rectanglelabels"] = ["cat", "thing"]
    region = read_region(result)
    assert (region.label, region.separate_labels) == ("cat, thing", ("cat", "thing"))


@pytest.mark.parametrize(
    ("result", "expected"),
    [
        (make_rectangle(), False),
        (make_rectangle(rotation=None), False),
        (make_rectangle(rotation=360), False),
        (make_rectangle(rotation="x"), False),
        (make_rectangle(rotation=30), True),
        (make_result("labels", value={"x": 1, "y": 1, "width": 9, "height": 9, "rotation": 5}), True),
        (make_result("polygonlabels", value={"points": []}), True),
        (make_result("brushlabels", value={"rle": []}), True),
        (make_result("keypointlabels", value={"x": 1, "y": 1}), False),
        (make_text("a cat"), False),
    ],
)
def test_has_mask_is_true_for_shapes_read_as_masks(result, expected):
    assert has_mask(result) is expected


def test_long_region_ids_are_shortened_in_messages():
    _, problems = read_images_and_problems(make_task(make_rectangle("a" * 1000, x="b")))
    assert len(problems) == 1
    assert len(problems[0]) < 200, problems
