"""Prompts: parsed as intended, or rejected in one line with the location."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sca_registry.contracts import Prompt

from sca.io import masks
from sca.io.errors import InputError
from sca.io.prompt_files import read_region_prompts
from sca.io.prompts import check_prompt, parse_box, parse_point, parse_region, read_mask_file


def get_error_message(function, *arguments) -> str:
    with pytest.raises(InputError) as error_info:
        function(*arguments)
    assert "\n" not in str(error_info.value)
    return str(error_info.value)


def make_mask(width=20, height=10) -> np.ndarray:
    mask = np.zeros((height, width), bool)
    mask[2:6, 3:9] = True
    return mask


# --- on a command line


def test_parse_box_and_parse_point_accept_valid_text():
    assert parse_box("1, 2,3.5,4") == (1, 2, 3.5, 4)
    assert parse_point("1,2") == (1, 2, 1)
    assert parse_point("1,2,0") == (1, 2, 0)


@pytest.mark.parametrize("text", ["", "1,2,3", "1,2,3,4,5", "1,2,3,x", "nan,1,2,3", "1,2,3,inf", "1;2;3;4", "1 2 3 4"])
def test_parse_box_rejects_invalid_text_and_states_the_format(text):
    message = get_error_message(parse_box, text)
    assert repr(text) in message
    assert "x1,y1,x2,y2" in message


@pytest.mark.parametrize("text", ["", "1", "1,2,3", "1,2,-1", "1,2,0.5", "1,2,in", "x,2", "nan,2", "1,2,1,1"])
def test_parse_point_rejects_invalid_text_and_states_the_format(text):
    assert "x,y,label" in get_error_message(parse_point, text)


def test_parse_region_combines_box_points_and_mask(tmp_path):
    Image.fromarray(make_mask()).save(tmp_path / "mask.png")
    prompt = parse_region(f"box=1,2,3,4; point=5,6;point=7,8,0;mask={tmp_path / 'mask.png'};")
    assert prompt.box == (1, 2, 3, 4)
    assert prompt.points == ((5, 6, 1), (7, 8, 0))
    assert (prompt.mask == make_mask()).all()


@pytest.mark.parametrize("text", ["", ";", "box", "bux=1,2,3,4", "box=1,2,3,4;box=1,2,3,4", "mask=", "1,2,3,4"])
def test_parse_region_rejects_invalid_text(text):
    get_error_message(parse_region, text)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "LA", "RGBA", "I;16", "npy", "npy float"])
def test_parse_region_reads_nonzero_mask_pixels_as_inside(tmp_path, mode):
    path = tmp_path / ("mask.npy" if "npy" in mode else "mask.png")
    if "npy" in mode:
        np.save(path, make_mask().astype(float) * 0.3 if "float" in mode else make_mask())
    elif mode == "I;16":
        Image.fromarray(make_mask().astype(np.uint16)).save(path)
    elif mode == "P":
        image = Image.fromarray(make_mask().astype(np.uint8)).convert("P")
        image.putpalette([0, 0, 0, 0, 0, 0] + [9] * 762)  # inside is black too: the index counts
        image.putdata(make_mask().astype(np.uint8).ravel().tolist())
        image.save(path)
    else:
        Image.fromarray(make_mask()).convert(mode).save(path)
    assert (parse_region(f"mask={path}").mask == make_mask()).all()


@pytest.mark.parametrize(
    "make_values",
    [
        pytest.param(lambda inside: np.where(inside, 0.99, 0.01), id="probabilities"),
        pytest.param(lambda inside: np.where(inside, 0.99, 0.01).astype(np.float16), id="half-precision"),
        pytest.param(lambda inside: np.where(inside, 7.5, -9.0)[None], id="logits-of-SAM"),
        pytest.param(lambda inside: np.where(inside, np.inf, -np.inf), id="infinite-logits"),
        pytest.param(lambda inside: inside * 255.0, id="floats-of-two-values"),
        pytest.param(lambda inside: inside * 3, id="labels"),
    ],
)
def test_mask_array_threshold_follows_the_value_range(tmp_path, make_values):
    np.save(tmp_path / "mask.npy", make_values(make_mask()))
    assert (read_mask_file(tmp_path / "mask.npy") == make_mask()).all()
    assert (check_prompt(Prompt(mask=make_values(make_mask())), 20, 10).mask == make_mask()).all()


def make_soft_mask(template, low=3, high=253):
    """Return a mask of 8-bit probabilities that decrease from the center."""
    y, x = np.mgrid[: template.shape[0], : template.shape[1]]
    distance = np.hypot(x - template.shape[1] / 2, y - template.shape[0] / 2)
    return np.rint(low + (high - low) * np.exp(-((distance / 20) ** 2))).astype(np.uint8)


@pytest.mark.parametrize("file_kind", ["png", "npy", "alpha"])
def test_read_mask_file_thresholds_8_bit_probabilities_at_half(tmp_path, file_kind):
    values = make_soft_mask(np.zeros((100, 120), bool))
    if file_kind == "npy":
        np.save(tmp_path / "mask.npy", values)
    else:
        image = Image.fromarray(values)
        if file_kind == "alpha":
            image = Image.merge("LA", (Image.new("L", image.size, 255), image))
        image.save(tmp_path / "mask.png")
    mask = read_mask_file(tmp_path / f"mask.{'npy' if file_kind == 'npy' else 'png'}")
    assert (mask == (values >= 128)).all()
    assert 0.02 < mask.mean() < 0.1


def test_check_prompt_thresholds_masks_with_smooth_edges_at_half():
    values = np.zeros((64, 64), np.uint8)
    values[10:50, 10:50] = 255
    values[10, 10:50], values[49, 10:50] = 100, 200
    mask = check_prompt(Prompt(mask=values), 64, 64).mask
    assert (mask == (values >= 128)).all()


@pytest.mark.parametrize("labels", [(0, 1, 2), (1, 2), (0, 15, 255), (0, 1, 300), (-1, 0, 1), (0, 128, 255)])
def test_mask_of_several_labels_is_rejected_with_a_fix(tmp_path, labels):
    values = np.resize(np.repeat(labels, 7), (10, 20))
    assert "values == LABEL" in get_error_message(check_prompt, Prompt(mask=values), 20, 10)
    np.save(tmp_path / "mask.npy", values)
    assert "different integers" in get_error_message(read_mask_file, tmp_path / "mask.npy")


def test_fit_prompts_keeps_edge_points_inside_a_resized_image(tmp_path):
    points = [[99.9, 0, 1], [0, 99.9, 1], [math.nextafter(100, 0), 50, 1]]
    record = {"image": "a", "points": points, "width": 100, "height": 100}
    prompts = read_region_prompts(write_lines(tmp_path / "r.jsonl", record))
    for side in (200, 301, 50, 33):
        (prompt,), problems = prompts.fit_prompts("a", side, side)
        assert not problems
        assert prompt.points[0] == pytest.approx((99.9 * side / 100, 0, 1))
    record["points"] = [[100, 50, 1]]
    _, problems = read_region_prompts(write_lines(tmp_path / "s.jsonl", record)).fit_prompts("a", 200, 200)
    assert "the point 200,100,1 is outside" in problems[0]


@pytest.mark.parametrize("value", [np.nan, 17.5])
def test_mask_array_of_ambiguous_values_is_rejected(tmp_path, value):
    values = np.where(make_mask(), value, 0.25)
    np.save(tmp_path / "mask.npy", values)
    message = "NaN" if np.isnan(value) else "neither probabilities"
    assert message in get_error_message(check_prompt, Prompt(mask=values), 20, 10)
    assert message in get_error_message(read_mask_file, tmp_path / "mask.npy")


def test_read_mask_file_ignores_jpeg_ringing(tmp_path):
    mask = np.zeros((64, 64), bool)
    mask[19:45, 13:50] = True
    Image.fromarray(mask).convert("L").save(tmp_path / "mask.jpg", quality=70)
    assert (np.asarray(Image.open(tmp_path / "mask.jpg")) != 0).sum() > mask.sum() * 1.2
    assert (read_mask_file(tmp_path / "mask.jpg") != mask).mean() < 0.01


def test_check_prompt_warns_about_a_mask_of_the_whole_image(caplog, monkeypatch):
    monkeypatch.setattr("sca.io.warnings_once._warned_keys", set())
    check_prompt(Prompt(mask=np.ones((10, 20), bool)), 20, 10)
    assert "covers the full 20 x 10 image" in caplog.text


@pytest.mark.parametrize(
    ("box", "width", "height", "suggested_box"),
    [
        ((0.72, 0.85, 0.87, 0.99), 512, 512, "368.6,435.2,445.4,506.9"),
        ((0, 0, 1, 1), 640, 480, "0,0,640,480"),
        ((720, 850, 870, 990), 512, 512, "368.6,435.2,445.4,506.9"),
        ((400, 400, 700, 700), 512, 512, "204.8,204.8,358.4,358.4"),
        ((10, 20, 90, 95), 64, 48, "6.4,9.6,57.6,45.6"),
    ],
)
def test_check_prompt_rejects_a_normalized_box_and_suggests_pixels(box, width, height, suggested_box):
    assert f"write {suggested_box}" in get_error_message(check_prompt, Prompt(box=box), width, height)


@pytest.mark.parametrize(
    ("box", "clipped_box"),
    [
        ((500, 500, 515, 513), (500, 500, 512, 512)),
        ((-3, -4, 100, 100), (0, 0, 100, 100)),
        ((-600, 10, 700, 100), (0, 10, 512, 100)),
        ((100, 100, 4000, 3000), (100, 100, 512, 512)),
        ((0, 0, 1.5, 1.5), (0, 0, 1.5, 1.5)),
    ],
)
def test_check_prompt_clips_a_box_to_the_image(box, clipped_box):
    assert check_prompt(Prompt(box=box), 512, 512).box == clipped_box


@settings(max_examples=200, deadline=None)
@given(st.data(), st.integers(2, 3000), st.integers(2, 3000))
def test_check_prompt_keeps_pixel_boxes_and_rejects_normalized_boxes(data, width, height):
    x1, y1 = data.draw(st.integers(0, width - 1)), data.draw(st.integers(0, height - 1))
    x2, y2 = data.draw(st.integers(x1 + 1, width)), data.draw(st.integers(y1 + 1, height))
    box = (float(x1), float(y1), float(x2), float(y2))
    if max(box) > 1:
        assert check_prompt(Prompt(box=box), width, height).box == box
    normalized_box = x1 / width, y1 / height, x2 / width, y2 / height
    assert "looks normalized to [0, 1]" in get_error_message(check_prompt, Prompt(box=normalized_box), width, height)


def test_check_prompt_rejects_a_normalized_point_and_suggests_pixels():
    assert "write 320,120" in get_error_message(check_prompt, Prompt(points=((0.5, 0.25, 1),)), 640, 480)
    assert check_prompt(Prompt(points=((0, 1, 1),)), 640, 480)
    assert check_prompt(Prompt(points=((0.5, 0.5, 1), (7.5, 3, 0))), 640, 480)


def test_check_prompt_rejects_a_prompt_of_negative_points_only():
    assert "label 0" in get_error_message(check_prompt, Prompt(points=((3, 4, 0), (5, 6, 0))), 20, 10)
    assert check_prompt(Prompt(box=(1, 1, 9, 9), points=((3, 4, 0),)), 20, 10)
    assert check_prompt(Prompt(points=((3, 4, 0), (5, 6, 1))), 20, 10)


def test_parse_region_rejects_unreadable_mask_files(tmp_path):
    (tmp_path / "a.png").write_text("text")
    np.save(tmp_path / "cube.npy", np.zeros((2, 2, 2)))
    np.save(tmp_path / "objects.npy", np.array([{}], object))
    for name in ("missing.png", "a.png", "cube.npy", "objects.npy", "missing.npy"):
        assert name in get_error_message(parse_region, f"mask={tmp_path / name}")


# --- against an image


@pytest.mark.parametrize(
    ("box", "expected_text"),
    [
        ((5, 1, 2, 4), "reversed"),
        ((1, 5, 2, 4), "reversed"),
        ((5, 1, 5, 4), "empty"),
        ((20, 0, 25, 5), "outside"),
        ((-5, 0, 0, 5), "outside"),
        ((0, -9, 5, -1), "outside"),
        ((float("nan"), 0, 1, 1), "finite"),
        ((0, 0, float("inf"), 1), "finite"),
        (("1", "2", "3", "4"), "finite"),
        ((True, 0, 5, 5), "finite"),
        ((1, 2, 3), "4 numbers"),
        ("1,2,3,4", "4 numbers"),
        (7, "4 numbers"),
    ],
)
def test_check_prompt_rejects_invalid_boxes(box, expected_text):
    assert expected_text in get_error_message(check_prompt, Prompt(box=box), 20, 10)


def test_check_prompt_hint_reads_a_reversed_box_as_width_and_height():
    assert "10,20,15,60" in get_error_message(check_prompt, Prompt(box=(10, 20, 5, 40)), 100, 100)


def test_check_prompt_clips_only_boxes_over_the_edge():
    assert check_prompt(Prompt(box=(-1, -1, 20.5, 11)), 20, 10).box == (0, 0, 20, 10)
    inside_prompt = Prompt(box=(1.5, 2, 3, 4))
    assert check_prompt(inside_prompt, 20, 10) == inside_prompt


def test_check_prompt_converts_numpy_numbers_to_python():
    prompt = check_prompt(Prompt(box=np.array([1, 2, 3, 4], np.float32), points=[np.array([1, 2, 1])]), 20, 10)
    assert prompt == Prompt(box=(1.0, 2.0, 3.0, 4.0), points=((1.0, 2.0, 1),))
    json.dumps([prompt.box, prompt.points])


@pytest.mark.parametrize("point", [(20, 1, 1), (1, 10, 1), (-0.1, 1, 0), (1, float("nan"), 1), (1, 2, 2), (1, "2", 1)])
def test_check_prompt_rejects_invalid_points(point):
    get_error_message(check_prompt, Prompt(points=((1, 1, 1), point)), 20, 10)


def test_check_prompt_accepts_points_in_the_last_pixel():
    assert check_prompt(Prompt(points=((0, 0, 0), (19.9, 9.9, 1))), 20, 10).points[1] == (19.9, 9.9, 1)


def test_check_prompt_rejects_masks_of_wrong_size_and_empty_masks():
    assert (check_prompt(Prompt(mask=make_mask().astype(np.uint8) * 255), 20, 10).mask == make_mask()).all()
    assert check_prompt(Prompt(mask=make_mask().astype(int)), 20, 10).mask.dtype == bool
    assert "20 x 10, but the image is 10 x 20" in get_error_message(check_prompt, Prompt(mask=make_mask()), 10, 20)
    assert "empty" in get_error_message(check_prompt, Prompt(mask=np.zeros((10, 20), bool)), 20, 10)
    assert "shape" in get_error_message(check_prompt, Prompt(mask=np.zeros((2, 10, 20), bool)), 20, 10)


def test_check_prompt_rejects_an_empty_prompt():
    assert "empty" in get_error_message(check_prompt, Prompt(), 20, 10)


# --- in files


def write_lines(path, *records):
    path.write_text("\n".join(record if isinstance(record, str) else json.dumps(record) for record in records), "utf-8")
    return path


def test_read_region_prompts_reads_json_lines(tmp_path):
    Image.fromarray(make_mask()).save(tmp_path / "m.png")
    rle_counts = [22, 4, 6, 4, 6, 4, 6, 4, 6, 4, 6, 4, 124]
    path = write_lines(
        tmp_path / "regions.jsonl",
        {"image": "b.jpg", "box": [1, 2, 3, 4]},
        "",
        {"image": "a.jpg", "points": [[1, 2, 0], [3, 4]], "box": None},
        {"image": "b.jpg", "mask": "m.png"},
        {"image": "b.jpg", "mask": masks.encode_rle(make_mask())},
        {"image": "b.jpg", "mask": {"size": [10, 20], "counts": [32, *rle_counts[1:-1], 114]}},
        {"image": "b.jpg", "prompt": {"box": [5, 6, 7, 8]}, "box": [0, 0, 1, 1], "caption": "written by us"},
    )
    prompts = read_region_prompts(path)
    assert list(prompts) == ["b.jpg", "a.jpg"]
    assert prompts["a.jpg"] == [Prompt(points=((1, 2, 0), (3, 4, 1)))]
    box_prompt, *mask_prompts, nested_prompt = prompts["b.jpg"]
    assert (box_prompt.box, nested_prompt.box) == ((1, 2, 3, 4), (5, 6, 7, 8))
    assert prompts.count_regions("b.jpg") == 5
    assert all((prompt.mask == make_mask()).all() for prompt in mask_prompts)


@pytest.mark.parametrize(
    ("record", "expected_text"),
    [
        ("{", "not valid JSON"),
        ("[" * 100_000, "deeper than 100"),
        ("[1]", "object"),
        ({"box": [1, 2, 3, 4]}, "'image'"),
        ({"image": 3, "box": [1, 2, 3, 4]}, "'image'"),
        ({"image": "a"}, "no 'box', 'points' or 'mask'"),
        ({"image": "a", "bbox": [1, 2, 3, 4]}, "only 'image', 'bbox'"),
        ({"image": "a", "box": [1, 2, 3]}, "'box'"),
        ({"image": "a", "box": [1, 2, 3, "4"]}, "'box'"),
        ({"image": "a", "box": "1,2,3,4"}, "'box'"),
        ('{"image": "a", "box": [1, 2, 3, NaN]}', "'box'"),
        ('{"image": "a", "box": [1, 2, 3, 1' + "0" * 400 + "]}", "'box'"),
        ({"image": "a", "points": [1, 2, 1]}, "'points'"),
        ({"image": "a", "points": {"x": 1}}, "'points'"),
        ({"image": "a", "points": [[1, 2, 3]]}, "'points'"),
        ({"image": "a", "mask": "missing.png"}, "'mask'"),
        ({"image": "a", "mask": 3}, "'mask'"),
        ({"image": "a", "mask": {"size": [3, 4], "counts": ""}}, "do not fill"),
        ({"image": "a", "mask": {"size": [3, 4], "counts": "4"}}, "do not fill"),
        ({"image": "a", "mask": {"size": [3, 4], "counts": [5, 6]}}, "do not fill"),
        ({"image": "a", "mask": {"size": [3, 4], "counts": [13, -1]}}, "do not fill"),
        ({"image": "a", "mask": {"size": [3, 4], "counts": "\x01é"}}, "'mask'"),
        ({"image": "a", "mask": {"size": [3, 4], "counts": "PPP"}}, "'mask'"),
        ({"image": "a", "mask": {"size": [10**6, 10**6], "counts": [10**12]}}, "exceeds the limit"),
        ({"image": "a", "mask": {"size": [3], "counts": "4"}}, "'size'"),
        ({"image": "a", "prompt": [1, 2, 3, 4]}, "'prompt'"),
    ],
)
def test_read_region_prompts_reports_an_invalid_line_and_keeps_the_others(tmp_path, record, expected_text):
    path = write_lines(tmp_path / "regions.jsonl", {"image": "a", "box": [1, 2, 3, 4]}, record)
    prompts = read_region_prompts(path)
    (message,) = prompts.problems
    assert prompts["a"] == [Prompt(box=(1, 2, 3, 4))]
    assert f"{path}, line 2" in message
    assert expected_text in message
    assert len(message) < 400 + len(str(path))


def make_coco(**changes):
    return {
        "images": [{"id": 1, "file_name": "a.jpg"}, {"id": 2, "file_name": "b.jpg"}, {"id": 3, "file_name": "c.jpg"}],
        "annotations": [
            {"image_id": 2, "bbox": [1, 2, 3, 4], "segmentation": [[0, 0, 9, 0, 9, 9]]},
            {"image_id": 1, "segmentation": [[5, 1, 9, 1, 9, 8], [4, 2, 6, 2, 6, 3]]},
            {"image_id": 1, "segmentation": masks.encode_rle(make_mask())},
            {"image_id": 1, "segmentation": {"size": [4, 4], "counts": [5, 2, 9]}},
        ],
    } | changes


def test_read_region_prompts_reads_coco_as_boxes(tmp_path):
    path = write_lines(tmp_path / "instances.json", make_coco())
    prompts = read_region_prompts(path)
    assert [prompt.box for prompt in prompts["a.jpg"]] == [(4, 1, 9, 8), (3, 2, 9, 6), (1, 1, 2, 3)]
    assert prompts["b.jpg"] == [Prompt(box=(1, 2, 4, 6))]
    assert prompts["c.jpg"] == []


@pytest.mark.parametrize(
    ("content", "expected_text"),
    [
        ([], "'images'"),
        ({"images": []}, "'annotations'"),
        (make_coco(images=[{"id": 1}]), "images[0]: no 'file_name'"),
        (make_coco(images=[{"file_name": "a"}]), "images[0]: no 'id'"),
        (make_coco(images=[{"id": 1, "file_name": "a"}, {"id": 1, "file_name": "b"}]), "images[1], 'id'"),
        (make_coco(images=[{"id": 1, "file_name": "a"}, {"id": 2, "file_name": "a"}]), "images[1], 'file_name'"),
        (make_coco(annotations=[{"image_id": 9, "bbox": [1, 2, 3, 4]}]), "annotations[0], 'image_id'"),
        (make_coco(annotations=[{"image_id": [], "bbox": [1, 2, 3, 4]}]), "annotations[0], 'image_id'"),
        (make_coco(annotations=[7]), "annotations[0] is 7; expected an object"),
        (make_coco(annotations=[{"image_id": 1}]), "annotations[0]"),
        (make_coco(annotations=[{"image_id": 1, "bbox": [1, 2, 3]}]), "annotations[0], 'bbox'"),
        (make_coco(annotations=[{"image_id": 1, "segmentation": [[1, 2]]}]), "annotations[0], 'segmentation'"),
        (make_coco(annotations=[{"image_id": 1, "segmentation": "x"}]), "annotations[0], 'segmentation'"),
        (
            make_coco(annotations=[{"image_id": 1, "segmentation": {"size": [2, 2], "counts": [4]}}]),
            "empty",
        ),
    ],
)
def test_read_region_prompts_names_an_invalid_coco_record(tmp_path, content, expected_text):
    path = write_lines(tmp_path / "instances.json", content)
    try:
        message = read_region_prompts(path).problems[0]
    except InputError as error:  # nothing is left
        message = str(error)
    assert str(path) in message
    assert expected_text in message


def test_read_region_prompts_keeps_valid_coco_annotations(tmp_path):
    valid_annotation = {"image_id": 1, "bbox": [1, 2, 3, 4]}
    invalid_annotations = [
        {"image_id": 1, "bbox": [1, 2, 0, 4]},
        {"image_id": 1},
        7,
        {"image_id": 9, "bbox": [1, 2, 3, 4]},
    ]
    outside_annotation = {"image_id": 1, "bbox": [90, 90, 5, 5]}
    path = write_lines(
        tmp_path / "instances.json",
        make_coco(annotations=[valid_annotation, *invalid_annotations, outside_annotation, valid_annotation]),
    )
    prompts = read_region_prompts(path)
    assert len(prompts.problems) == len(invalid_annotations)
    for index, problem in enumerate(prompts.problems, 1):
        assert f"annotations[{index}]" in problem
    fitting_prompts, problems = prompts.fit_prompts("a.jpg", 20, 10)
    assert fitting_prompts == [Prompt(box=(1, 2, 4, 6))] * 2
    (problem,) = problems
    assert "annotations[5]" in problem
    assert "is outside the 20 x 10 image" in problem


def test_read_region_prompts_rejects_files_without_prompts(tmp_path):
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "empty.json").touch()
    for name in ("missing.jsonl", "bytes.json", "empty.json", "."):
        get_error_message(read_region_prompts, tmp_path / name)


def test_prompts_with_an_unreadable_mask_file_name_the_line(tmp_path):
    (tmp_path / "m.png").write_text("text")
    prompts = read_region_prompts(write_lines(tmp_path / "regions.jsonl", {"image": "a", "mask": "m.png"}))
    assert "line 1, 'mask'" in get_error_message(prompts.__getitem__, "a")


def read_box_prompts(path, *image_keys):
    return read_region_prompts(write_lines(path, *({"image": key, "box": [0, 0, 1, 1]} for key in image_keys)))


def test_match_images_uses_path_first_and_file_name_otherwise(tmp_path, monkeypatch):
    (tmp_path / "lists").mkdir()
    (tmp_path / "pics").mkdir()
    monkeypatch.chdir(tmp_path)
    keys = ["../pics/a.jpg", "b.jpg", "pics/c.jpg", "C:\\old\\d.jpg", "e.jpg"]
    prompts = read_box_prompts(tmp_path / "lists" / "r.jsonl", *keys)
    image_paths = [tmp_path / "pics" / name for name in ("a.jpg", "b.jpg", "c.jpg", "d.jpg", "other.jpg")]
    assert prompts.match_images(image_paths) == dict(zip(image_paths[:4], keys[:4], strict=True))


def test_match_images_uses_the_path_for_equal_file_names(tmp_path):
    prompts = read_box_prompts(tmp_path / "r.jsonl", "x/a.jpg", "y/a.jpg")
    image_paths = [tmp_path / "x" / "a.jpg", tmp_path / "y" / "a.jpg"]
    assert list(prompts.match_images(image_paths).values()) == ["x/a.jpg", "y/a.jpg"]


def test_match_images_rejects_ambiguous_file_names(tmp_path):
    prompts_of_two_keys = read_box_prompts(tmp_path / "r.jsonl", "x/a.jpg", "y/a.jpg")
    assert "'x/a.jpg', 'y/a.jpg'" in get_error_message(prompts_of_two_keys.match_images, [tmp_path / "z" / "a.jpg"])
    prompts_of_one_key = read_box_prompts(tmp_path / "s.jsonl", "a.jpg")
    assert "2 images" in get_error_message(
        prompts_of_one_key.match_images, [tmp_path / "x" / "a.jpg", tmp_path / "y" / "a.jpg"]
    )


@pytest.mark.parametrize(
    "key",
    [
        "pics\\\u00e9 1.png",
        "pics/e\u0301 1.png",
        "pics/%C3%A9%201.png",
        "/data/local-files/?d=pics/%C3%A9%201.png",
        "/data/upload/3/1a2b3c4d-\u00e9 1.png",
        "https://host/pics/%C3%A9%201.png?v=2",
        "file:///old/\u00e9%201.png",
        "~/\u00e9 1.png",
    ],
)
@pytest.mark.parametrize("image_exists", [True, False])
def test_match_images_accepts_every_spelling_of_a_name(tmp_path, key, image_exists):
    image = tmp_path / "pics" / "\u00e9 1.png"
    image.parent.mkdir()
    if image_exists:
        image.touch()
    assert read_box_prompts(tmp_path / "r.jsonl", key).match_images([image]) == {image: key}


def test_match_images_distinguishes_symlinks_to_one_image(tmp_path):
    (tmp_path / "blank.png").touch()
    images = [tmp_path / name for name in ("a.png", "b.png", "c.png")]
    for image in images:
        image.symlink_to(tmp_path / "blank.png")
    prompts = read_box_prompts(tmp_path / "r.jsonl", "b.png", "a.png")
    assert prompts.match_images(images[:2]) == {images[0]: "a.png", images[1]: "b.png"}
    assert "'b.png', 'a.png'" in get_error_message(prompts.match_images, images[2:])


@pytest.mark.parametrize("keys", [("im/1.png", "im\\1.png"), ("im\\1.png", "im/1.png"), ("./im/1.png", "im/%31.png")])
def test_match_images_merges_prompts_of_all_spellings_of_a_path(tmp_path, keys):
    image = tmp_path / "im/1.png"
    image.parent.mkdir()
    image.touch()
    prompts = read_box_prompts(tmp_path / "r.jsonl", *keys, "im/2.png", "other/1.png", "/data/val/1.png")
    assert prompts.match_images([image]) == {image: keys[0]}
    assert prompts.count_regions(keys[0]) == 2
    assert list(prompts) == [keys[0], "im/2.png", "other/1.png", "/data/val/1.png"]


def test_read_region_prompts_keeps_symlinks_of_equal_file_name_separate(tmp_path):
    (tmp_path / "blank.png").touch()
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.png").symlink_to(tmp_path / "blank.png")
    assert list(read_box_prompts(tmp_path / "r.jsonl", "x/a.png", "y/a.png")) == ["x/a.png", "y/a.png"]


def test_match_images_finds_an_image_in_a_symlinked_folder(tmp_path):
    (tmp_path / "store").mkdir()
    (tmp_path / "store/a.png").touch()
    (tmp_path / "link").symlink_to(tmp_path / "store")
    assert read_box_prompts(tmp_path / "r.jsonl", "store/a.png").match_images([tmp_path / "link/a.png"])


def test_read_region_prompts_finds_mask_files_in_every_spelling(tmp_path):
    (tmp_path / "masks").mkdir()
    np.save(tmp_path / "masks/a b.npy", np.eye(4))
    for name in ("masks\\a b.npy", "masks/a%20b.npy"):
        prompts = read_region_prompts(write_lines(tmp_path / "r.jsonl", {"image": "a.png", "mask": name}))
        assert prompts["a.png"][0].mask.sum() == 4


@pytest.mark.parametrize("factor", [0.5, 3])
def test_fit_prompts_scales_prompts_to_a_resized_image(tmp_path, factor):
    recorded_size = {"width": 20, "height": 10}
    records = (
        {"image": "a.png", "box": [2, 4, 10, 8], **recorded_size},
        {"image": "a.png", "points": [[3, 5, 1]], **recorded_size},
        {"image": "a.png", "mask": masks.encode_rle(make_mask()), **recorded_size},
    )
    prompts = read_region_prompts(write_lines(tmp_path / "regions.jsonl", *records))
    width, height = round(20 * factor), round(10 * factor)
    (box, point, mask), problems = prompts.fit_prompts("a.png", width, height)
    assert not problems
    assert box.box == tuple(value * factor for value in (2, 4, 10, 8))
    assert point.points[0] == (3 * factor, 5 * factor, 1)
    assert mask.mask.shape == (height, width)
    assert masks.mask_to_box(mask.mask) == pytest.approx([value * factor for value in (3, 2, 9, 6)], abs=0.5)


@pytest.mark.parametrize("file_kind", ["jsonl", "coco"])
def test_fit_prompts_rejects_another_aspect_ratio_with_both_sizes(tmp_path, file_kind):
    if file_kind == "jsonl":
        path = write_lines(tmp_path / "p.jsonl", {"image": "a", "box": [1, 1, 3, 3], "width": 20, "height": 10})
    else:
        path = tmp_path / "p.json"
        image = {"id": 1, "file_name": "a", "width": 20, "height": 10}
        path.write_text(json.dumps({"images": [image], "annotations": [{"image_id": 1, "bbox": [1, 1, 2, 2]}]}))
    prompts, (problem,) = read_region_prompts(path).fit_prompts("a", 10, 20)
    assert not prompts
    assert "records 20 x 10 (width x height), but the image is 10 x 20" in problem
    assert "rotated" in problem


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 4000), st.integers(1, 4000), st.floats(0.05, 20))
def test_compute_resize_factors_accepts_any_rounding_of_a_resized_image(width, height, factor):
    from sca.io.coordinates import compute_resize_factors

    actual_size = max(1, round(width * factor)), max(1, round(height * factor))
    width_factor, height_factor = compute_resize_factors((width, height), actual_size)
    assert (round(width * width_factor), round(height * height_factor)) == actual_size


@pytest.mark.parametrize(
    ("recorded_size", "actual_size"), [((20, 10), (10, 20)), ((640, 480), (640, 640)), ((512, 512), (512, 400))]
)
def test_compute_resize_factors_rejects_another_aspect_ratio(recorded_size, actual_size):
    from sca.io.coordinates import compute_resize_factors

    with pytest.raises(ValueError, match="the annotation file records"):
        compute_resize_factors(recorded_size, actual_size)
