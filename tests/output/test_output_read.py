"""Reading captions: a damaged region is reported, and the others are read."""

import json
from pathlib import Path

import pytest
from PIL import Image
from viewer_page import ViewerPage

from sca.io.annotations.annotation import SkipCounter
from sca.output.reader import read_captions
from sca.output.viewer import write_viewer

SIZE_FIELDS = {"width": 60, "height": 40}
LABEL_STUDIO_RESULT_FIELDS = {
    "original_width": 60,
    "original_height": 40,
    "type": "rectanglelabels",
    "to_name": "image",
}


def make_coco(*boxes, names=("a.png",), **fields):
    images = [{"id": number, "file_name": name, **SIZE_FIELDS} for number, name in enumerate(names)]
    annotations = [
        {"id": n, "image_id": n % len(names), "bbox": box, "caption": f"caption {n}"} | fields
        for n, box in enumerate(boxes)
    ]
    return {"images": images, "annotations": annotations}


def make_label_studio(*boxes, names=("a.png",), **fields):
    results = []
    for number, (x, y, width, height) in enumerate(boxes):
        value_and_total = {"x": (x, 60), "y": (y, 40), "width": (width, 60), "height": (height, 40)}
        value = {
            key: side / image_side * 100 if isinstance(side, int | float) else side
            for key, (side, image_side) in value_and_total.items()
        }
        results.append(
            {**LABEL_STUDIO_RESULT_FIELDS, "id": str(number), "value": {**value, "rectanglelabels": ["cat"]}, **fields}
        )
    tasks = [{"data": {"image": name}} for name in names]
    for number, task in enumerate(tasks):
        task["annotations"] = [{"result": results[number :: len(names)]}]
    return tasks


def make_labelme(*boxes, **fields):
    shapes = []
    for x, y, width, height in boxes:
        second_corner = [x + width, y + height] if isinstance(width, int | float) else width
        shapes.append({"label": "cat", "shape_type": "rectangle", "points": [[x, y], second_corner], **fields})
    return {"imagePath": "a.png", "imageWidth": 60, "imageHeight": 40, "shapes": shapes}


def make_jsonl_records(*boxes, names=("a.png",)):
    records = []
    for n, (x, y, width, height) in enumerate(boxes):
        second_corner = [x + width, y + height] if isinstance(width, int | float) else [width, height]
        records.append(
            {"image": names[n % len(names)], **SIZE_FIELDS, "box": [x, y, *second_corner], "caption": f"caption {n}"}
        )
    return sorted(records, key=lambda record: record["image"])


CONTENT_BUILDERS = {
    "coco": make_coco,
    "label-studio": make_label_studio,
    "labelme": make_labelme,
    "jsonl": make_jsonl_records,
}


def write_content(folder, content, name="captions"):
    is_lines = isinstance(content, list) and "caption" in content[0]
    path = Path(folder, f"{name}.{'jsonl' if is_lines else 'json'}")
    path.write_text("\n".join(map(json.dumps, content)) if is_lines else json.dumps(content))
    return path


def read_images(path):
    """Return the captions of each image, the counts and the rejected records."""
    skip_counter, problems = SkipCounter(), []
    images = list(read_captions(path, skip_counter, [path.parent], lambda error: problems.append(str(error))))
    return images, dict(skip_counter.counts), problems


@pytest.mark.parametrize("tool", CONTENT_BUILDERS)
def test_read_captions_rejects_only_the_damaged_region(tmp_path, tool):
    path = write_content(tmp_path, CONTENT_BUILDERS[tool]([1, 2, 8, 9], [1, 2, "x", 3], [5, 5, 6, 6]))
    ((image,), _, problems) = read_images(path)
    assert [caption.box for caption in image.captions] == [
        pytest.approx((1, 2, 9, 11)),
        pytest.approx((5, 5, 11, 11)),
    ]
    (problem,) = problems
    assert problem.startswith(str(path))
    with pytest.raises(ValueError, match="captions"):
        list(read_captions(path))


@pytest.mark.parametrize("tool", CONTENT_BUILDERS)
def test_read_captions_clips_boxes_and_counts_changes(tmp_path, tool):
    path = write_content(
        tmp_path, CONTENT_BUILDERS[tool]([50, 2, 12, 9], [0.1, 0.1, 0.4, 0.4], [0, 0, 301, 20], [70, 1, 5, 5])
    )
    ((image,), skipped_counts, problems) = read_images(path)
    assert [caption.box for caption in image.captions] == [pytest.approx((50, 2, 60, 11))]
    assert skipped_counts == {"box clipped": 1, "normalized box": 2, "empty box": 1}
    assert not problems


@pytest.mark.parametrize(
    ("content", "key", "read_key"),
    [
        (make_coco([1, 2, 8, 9], caption=None, description="a dog"), "description", "caption"),
        (make_labelme([1, 2, 8, 9], caption="a dog"), "caption", "description"),
        (make_label_studio([1, 2, 8, 9], meta={"text": ["a dog"]}), "text", "textarea"),
    ],
)
def test_read_captions_counts_captions_under_other_keys(tmp_path, content, key, read_key):
    _, skipped_counts, _ = read_images(write_content(tmp_path, content))
    assert skipped_counts[f"caption under {key!r}, which is not read (the key is {read_key!r})"] == 1


def test_read_captions_rejects_only_lines_that_are_not_json(tmp_path):
    path = write_content(tmp_path, make_jsonl_records([1, 2, 8, 9], [5, 5, 6, 6]))
    path.write_text("{\n" + path.read_text() + '\n{"image": 3}\n')
    ((image,), _, problems) = read_images(path)
    assert len(image.captions) == 2
    assert [problem.partition(", line ")[2][0] for problem in problems] == ["1", "4"]


def test_read_captions_rejects_only_the_damaged_file_of_a_folder(tmp_path):
    for name in ("a", "b", "c"):
        write_content(tmp_path, make_labelme([1, 2, 8, 9]), name)
    (tmp_path / "b.json").write_text("{")
    (tmp_path / "c.json").rename(tmp_path / "c.JSON")
    images, _, problems = read_images(tmp_path)
    assert len(images) == 2
    assert "b.json is not valid JSON" in problems[0]


@pytest.mark.parametrize("alternatives", [3, [3], [{"caption": 3}], [{"score": 1}]])
def test_read_captions_rejects_damaged_alternatives(tmp_path, alternatives):
    valid_record, other_record = make_jsonl_records([1, 2, 8, 9], [5, 5, 6, 6])
    ((image,), _, problems) = read_images(
        write_content(tmp_path, [valid_record, other_record | {"alternatives": alternatives}])
    )
    assert len(image.captions) == len(problems) == 1
    assert "line 2, 'alternatives'" in problems[0]


EQUIVALENT_NAMES = ("v/1.png", "v\\1.png")


@pytest.fixture
def image_folder(tmp_path):
    (tmp_path / "v").mkdir()
    Image.new("RGB", (60, 40)).save(tmp_path / "v/1.png")
    return tmp_path


@pytest.mark.parametrize("names", [EQUIVALENT_NAMES, EQUIVALENT_NAMES[:1] * 2])
@pytest.mark.parametrize("build_content", [make_coco, make_label_studio])
def test_read_captions_merges_records_of_one_image_file(image_folder, build_content, names):
    ((image,), _, _) = read_images(write_content(image_folder, build_content([1, 2, 8, 9], [5, 5, 6, 6], names=names)))
    assert [caption.region_id for caption in image.captions] == [0, 1]


@pytest.mark.parametrize("build_content", [make_coco, make_label_studio, make_jsonl_records])
def test_write_viewer_pairs_images_by_file_and_keeps_all_regions(image_folder, build_content):
    first_path = write_content(image_folder, build_content([1, 2, 8, 9], [5, 5, 6, 6], names=EQUIVALENT_NAMES), "first")
    second_path = write_content(
        image_folder, build_content([1, 2, 8, 9], [5, 5, 6, 6], [9, 9, 9, 9], names=EQUIVALENT_NAMES[::-1]), "second"
    )
    image_iterators = [read_captions(path, SkipCounter(), [image_folder]) for path in (first_path, second_path)]
    num_regions, problems = write_viewer(image_folder / "view.html", *image_iterators, roots=[image_folder])
    assert (num_regions, problems) == (5, [])
    (image,) = ViewerPage((image_folder / "view.html").read_text()).images
    assert (len(image["regions"]), len(image["other_regions"])) == (2, 3)
