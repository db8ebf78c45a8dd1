"""Captions of any tool are read region by region: a damaged one is named and leaves the others."""

import json
from pathlib import Path

import pytest
from PIL import Image
from viewer_page import ViewerPage

from sca.io.annotations.annotation import SkipCounter
from sca.output.reader import read_captions
from sca.output.viewer import write_viewer

SIZE = {"width": 60, "height": 40}
HEAD = {"original_width": 60, "original_height": 40, "type": "rectanglelabels", "to_name": "image"}


def coco(*boxes, names=("a.png",), **more):
    images = [{"id": number, "file_name": name, **SIZE} for number, name in enumerate(names)]
    annotations = [
        {"id": n, "image_id": n % len(names), "bbox": box, "caption": f"caption {n}"} | more
        for n, box in enumerate(boxes)
    ]
    return {"images": images, "annotations": annotations}


def label_studio(*boxes, names=("a.png",), **more):
    results = []
    for number, (x, y, width, height) in enumerate(boxes):
        sides = {"x": (x, 60), "y": (y, 40), "width": (width, 60), "height": (height, 40)}
        value = {
            key: part / whole * 100 if isinstance(part, int | float) else part for key, (part, whole) in sides.items()
        }
        results.append({**HEAD, "id": str(number), "value": {**value, "rectanglelabels": ["cat"]}, **more})
    tasks = [{"data": {"image": name}} for name in names]
    for number, task in enumerate(tasks):
        task["annotations"] = [{"result": results[number :: len(names)]}]
    return tasks


def labelme(*boxes, **more):
    shapes = []
    for x, y, width, height in boxes:
        ends = [x + width, y + height] if isinstance(width, int | float) else width
        shapes.append({"label": "cat", "shape_type": "rectangle", "points": [[x, y], ends], **more})
    return {"imagePath": "a.png", "imageWidth": 60, "imageHeight": 40, "shapes": shapes}


def lines(*boxes, names=("a.png",)):
    records = []
    for n, (x, y, width, height) in enumerate(boxes):
        ends = [x + width, y + height] if isinstance(width, int | float) else [width, height]
        records.append({"image": names[n % len(names)], **SIZE, "box": [x, y, *ends], "caption": f"caption {n}"})
    return sorted(records, key=lambda record: record["image"])


TOOLS = {"coco": coco, "label-studio": label_studio, "labelme": labelme, "jsonl": lines}


def write(folder, content, name="captions"):
    is_lines = isinstance(content, list) and "caption" in content[0]
    path = Path(folder, f"{name}.{'jsonl' if is_lines else 'json'}")
    path.write_text("\n".join(map(json.dumps, content)) if is_lines else json.dumps(content))
    return path


def read(path):
    """The captions of each image, what was counted, and what was rejected."""
    skip, problems = SkipCounter(), []
    images = list(read_captions(path, skip, [path.parent], lambda error: problems.append(str(error))))
    return images, dict(skip.counts), problems


@pytest.mark.parametrize("tool", TOOLS)
def test_reader_rejects_only_the_damaged_region(tmp_path, tool):
    path = write(tmp_path, TOOLS[tool]([1, 2, 8, 9], [1, 2, "x", 3], [5, 5, 6, 6]))
    ((image,), _, problems) = read(path)
    assert [caption.box for caption in image.captions] == [
        pytest.approx((1, 2, 9, 11)),
        pytest.approx((5, 5, 11, 11)),
    ]
    (problem,) = problems
    assert problem.startswith(str(path))
    with pytest.raises(ValueError, match="captions"):
        list(read_captions(path))


@pytest.mark.parametrize("tool", TOOLS)
def test_reader_clips_and_counts_boxes_as_datasets_do(tmp_path, tool):
    path = write(tmp_path, TOOLS[tool]([50, 2, 12, 9], [0.1, 0.1, 0.4, 0.4], [0, 0, 301, 20], [70, 1, 5, 5]))
    ((image,), counted, problems) = read(path)
    assert [caption.box for caption in image.captions] == [pytest.approx((50, 2, 60, 11))]
    assert counted == {"box clipped": 1, "normalized box": 2, "empty box": 1}
    assert not problems


@pytest.mark.parametrize(
    ("content", "key", "read_key"),
    [
        (coco([1, 2, 8, 9], caption=None, description="a dog"), "description", "caption"),
        (labelme([1, 2, 8, 9], caption="a dog"), "caption", "description"),
        (label_studio([1, 2, 8, 9], meta={"text": ["a dog"]}), "text", "textarea"),
    ],
)
def test_reader_counts_captions_under_keys_that_are_not_read(tmp_path, content, key, read_key):
    _, counted, _ = read(write(tmp_path, content))
    assert counted[f"caption under {key!r}, which is not read (the key is {read_key!r})"] == 1


def test_reader_rejects_a_line_that_is_not_json(tmp_path):
    path = write(tmp_path, lines([1, 2, 8, 9], [5, 5, 6, 6]))
    path.write_text("{\n" + path.read_text() + '\n{"image": 3}\n')
    ((image,), _, problems) = read(path)
    assert len(image.captions) == 2
    assert [problem.partition(", line ")[2][0] for problem in problems] == ["1", "4"]


def test_reader_rejects_a_damaged_file_of_a_folder(tmp_path):
    for name in ("a", "b", "c"):
        write(tmp_path, labelme([1, 2, 8, 9]), name)
    (tmp_path / "b.json").write_text("{")
    (tmp_path / "c.json").rename(tmp_path / "c.JSON")
    images, _, problems = read(tmp_path)
    assert len(images) == 2
    assert "b.json is not valid JSON" in problems[0]


@pytest.mark.parametrize("alternatives", [3, [3], [{"caption": 3}], [{"score": 1}]])
def test_jsonl_reader_rejects_damaged_alternatives(tmp_path, alternatives):
    good, bad = lines([1, 2, 8, 9], [5, 5, 6, 6])
    ((image,), _, problems) = read(write(tmp_path, [good, bad | {"alternatives": alternatives}]))
    assert len(image.captions) == len(problems) == 1
    assert "line 2, 'alternatives'" in problems[0]


NAMES = ("v/1.png", "v\\1.png")


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "v").mkdir()
    Image.new("RGB", (60, 40)).save(tmp_path / "v/1.png")
    return tmp_path


@pytest.mark.parametrize("names", [NAMES, NAMES[:1] * 2])
@pytest.mark.parametrize("make", [coco, label_studio])
def test_reader_merges_the_records_of_one_image_file(folder, make, names):
    ((image,), _, _) = read(write(folder, make([1, 2, 8, 9], [5, 5, 6, 6], names=names)))
    assert [caption.region_id for caption in image.captions] == [0, 1]


@pytest.mark.parametrize("make", [coco, label_studio, lines])
def test_view_pairs_images_by_their_file_and_keeps_all_regions(folder, make):
    first = write(folder, make([1, 2, 8, 9], [5, 5, 6, 6], names=NAMES), "first")
    second = write(folder, make([1, 2, 8, 9], [5, 5, 6, 6], [9, 9, 9, 9], names=NAMES[::-1]), "second")
    files = [read_captions(path, SkipCounter(), [folder]) for path in (first, second)]
    regions, problems = write_viewer(folder / "view.html", *files, roots=[folder])
    assert (regions, problems) == (5, [])
    (image,) = ViewerPage((folder / "view.html").read_text()).images
    assert (len(image["regions"]), len(image["other_regions"])) == (2, 3)
