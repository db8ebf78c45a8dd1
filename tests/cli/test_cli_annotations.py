"""Files of labeling tools on the command line: regions are read, and what is left out is one line."""

import base64
import io
import json

import pytest
from PIL import Image

HEAD = {"original_width": 64, "original_height": 48, "image_rotation": 0, "to_name": "image", "id": "a"}
BOX = {**HEAD, "type": "rectanglelabels", "value": {"x": 36, "y": 30, "width": 20, "height": 10, "rotation": 0}}
POLYGON = {**HEAD, "type": "polygonlabels", "value": {"points": [[10, 10], [30, 10], [20, 30]], "closed": True}}


def text(words):
    return {**HEAD, "type": "textarea", "from_name": "caption", "value": {"text": [words]}}


def task(*results, image="a.png", **more):
    return {"data": {"image": image}, "annotations": [{"result": list(results), **more}]}


COCO = {
    "images": [{"id": 1, "file_name": "a.png", "width": 64, "height": 48}],
    "annotations": [
        {"id": 1, "image_id": 1, "category_id": 0, "segmentation": [[10, 10, 30, 10, 30, 30], [40, 10, 50, 10, 50, 30]]}
    ],
    "categories": [{"id": 0, "name": "cat"}],
}
LABELME = {
    "shapes": [{"label": "cat", "points": [[10, 10], [30, 10], [30, 30]], "shape_type": "polygon"}],
    "imagePath": "a.png",
    "imageHeight": 48,
    "imageWidth": 64,
}


@pytest.fixture
def converted(here, shell):
    """`converted(content)` converts a file to JSON lines: its records and what was said."""

    def call(content, *options):
        (here / "in.json").write_text(json.dumps(content))
        result = shell("convert", "in.json", "out", "--format", "jsonl", "--overwrite", *options)
        assert result.status == 0, result
        return [json.loads(line) for line in (here / "out/captions.jsonl").read_text().splitlines()], result.err

    return call


@pytest.mark.parametrize("content", [COCO, [task(POLYGON, text("cat"))], LABELME])
def test_convert_keeps_polygons(converted, content):
    (record,), reported = converted(content)
    assert reported[-1] == "sca: 1 region"
    assert record["caption"] == "cat"
    assert record["mask"]["size"] == [48, 64]


def test_convert_and_view_name_a_damaged_region_and_end_with_status_1(here, shell, picture):
    picture("a.png")
    good, bad = COCO["annotations"][0], {"id": 2, "image_id": 1, "bbox": [1, 2, "x", 3]}
    (here / "in.json").write_text(json.dumps(COCO | {"annotations": [bad, good]}))
    for arguments in (("convert", "in.json", "out", "--format", "jsonl"), ("view", "in.json")):
        result = shell(*arguments)
        assert result.status == 1
        assert any("in.json, annotations[0], 'bbox' is " in line for line in result.err)
        assert result.err[-1] == "sca: skipped 1 record that cannot be used; correct the file"
    assert len((here / "out/captions.jsonl").read_text().splitlines()) == 1


def test_convert_passes_over_cancelled_annotations(converted):
    cancelled = {"was_cancelled": True, "result": [BOX, text("wrong")]}
    right = {"ground_truth": True, "result": [BOX, text("right")]}
    first = {"result": [BOX, text("wrong")]}
    (record,), err = converted([{"data": {"image": "a.png"}, "annotations": [cancelled, first, right]}])
    assert record["caption"] == "right"
    assert (
        "sca: changed or skipped: cancelled annotation: 1 (first: in.json, task 0); "
        "task with several annotations, of which one is read: 1 (first: in.json, task 0)"
    ) in err


def test_convert_passes_over_other_results_and_says_so_in_one_line(converted):
    relation = {"type": "relation", "from_id": "a", "to_id": "b", "direction": "right"}
    choices = {"id": "c", "type": "choices", "to_name": "image", "value": {"choices": ["good"]}}
    label = {**BOX, "value": {**BOX["value"], "rectanglelabels": ["cat"]}}
    records, err = converted([task(label, relation, choices)])
    assert [record["caption"] for record in records] == ["cat"]
    (line,) = [line for line in err if "changed or skipped" in line]
    assert "relation: 1 (first: in.json, task 0, result 1); choices: 1 (first: in.json, task 0, region 'c')" in line


def test_convert_keeps_a_task_without_regions(here, converted, picture):
    (here / "folder").mkdir()
    picture("folder/b.png")
    tasks = [task(BOX, text("a cat")), task(image="b.png")]
    _, err = converted(tasks)
    assert any(
        "image without regions, whose size is unknown: 1 (first: in.json, task 1, b.png)" in line for line in err
    )
    _, err = converted(tasks, "--image-root", "folder")
    assert not any("changed or skipped" in line for line in err)


def test_caption_reads_a_folder_of_labelme_files(here, shell, checkpoint, picture):
    for name in ("a", "b", "c"):
        picture(f"photos/{name}.png")
        (here / "photos" / f"{name}.json").write_text(json.dumps(LABELME | {"imagePath": f"{name}.png"}))
    (here / "photos/c.json").write_text(json.dumps(COCO))
    asked = ("caption", "photos", "--prompts", "photos", "--model", checkpoint, "--out", "out")
    result = shell(*asked)
    assert result.status == 2
    assert "sca: photos/c.json is not a LabelMe file (no 'shapes'); name it by itself, or move it" in result.err
    assert any("c.png: photos has no regions for it" in line for line in result.err)
    lines = [json.loads(line) for line in (here / "out/captions.jsonl").read_text().splitlines()]
    assert [(line["image"], line["prompt"]["box"]) for line in lines] == [
        (f"photos/{name}.png", [10, 10, 31, 31]) for name in "ab"
    ]
    (here / "photos/c.json").write_text(json.dumps(LABELME | {"imagePath": "c.png"}))
    assert "contains another run" in shell(*asked).err[-1]
    (here / "labels").mkdir()
    empty = shell("caption", "photos", "--prompts", "labels", "--model", checkpoint)
    assert empty.err == ["sca: no .json files in labels; a folder of prompts contains LabelMe files"]


def test_convert_and_view_draw_the_image_inside_a_labelme_file(here, shell):
    image = io.BytesIO()
    Image.new("RGB", (64, 48), "red").save(image, "PNG")
    content = LABELME | {"imageData": base64.b64encode(image.getvalue()).decode()}
    (here / "in.json").write_text(json.dumps(content))
    assert shell("convert", "in.json", "out", "--format", "png").status == 0
    assert len(list((here / "out").glob("*.png"))) == 1
    result = shell("view", "in.json")
    assert result.status == 0
    assert result.err == ["sca: wrote view.html, 1 region"]


@pytest.mark.parametrize("content", [[task(POLYGON, text("cat"), {"type": "relation"})], LABELME])
def test_caption_takes_regions_from_labeling_tools(here, shell, picture, checkpoint, content):
    picture("a.png")
    (here / "in.json").write_text(json.dumps(content))
    result = shell(
        "caption", "a.png", "--prompts", "in.json", "--model", checkpoint, "--out", "out", "--format", "jsonl"
    )
    assert result.status == 0, result
    (record,) = [json.loads(line) for line in (here / "out/captions.jsonl").read_text().splitlines()]
    x1, y1, x2, y2 = record["prompt"]["box"]
    assert x1 < x2 <= 32
    assert y1 < y2 <= 32
    assert any("relation: 1" in line for line in result.err) == isinstance(content, list)
