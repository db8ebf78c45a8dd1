"""Files of labeling tools on the command line: regions are read, and one line reports what is skipped."""

import base64
import io
import json

import pytest
from PIL import Image

RESULT_FIELDS = {"original_width": 64, "original_height": 48, "image_rotation": 0, "to_name": "image", "id": "a"}
BOX_RESULT = {
    **RESULT_FIELDS,
    "type": "rectanglelabels",
    "value": {"x": 36, "y": 30, "width": 20, "height": 10, "rotation": 0},
}
POLYGON_RESULT = {
    **RESULT_FIELDS,
    "type": "polygonlabels",
    "value": {"points": [[10, 10], [30, 10], [20, 30]], "closed": True},
}


def make_text_result(caption):
    return {**RESULT_FIELDS, "type": "textarea", "from_name": "caption", "value": {"text": [caption]}}


def make_task(*results, image="a.png", **annotation_fields):
    return {"data": {"image": image}, "annotations": [{"result": list(results), **annotation_fields}]}


COCO_FILE = {
    "images": [{"id": 1, "file_name": "a.png", "width": 64, "height": 48}],
    "annotations": [
        {"id": 1, "image_id": 1, "category_id": 0, "segmentation": [[10, 10, 30, 10, 30, 30], [40, 10, 50, 10, 50, 30]]}
    ],
    "categories": [{"id": 0, "name": "cat"}],
}
LABELME_FILE = {
    "shapes": [{"label": "cat", "points": [[10, 10], [30, 10], [30, 30]], "shape_type": "polygon"}],
    "imagePath": "a.png",
    "imageHeight": 48,
    "imageWidth": 64,
}


@pytest.fixture
def convert_to_jsonl(working_folder, run_sca):
    """`convert_to_jsonl(content)` converts a file to JSON Lines and returns the records and the messages."""

    def convert_content(content, *options):
        (working_folder / "in.json").write_text(json.dumps(content))
        result = run_sca("convert", "in.json", "out", "--format", "jsonl", "--overwrite", *options)
        assert result.status == 0, result
        return [
            json.loads(line) for line in (working_folder / "out/captions.jsonl").read_text().splitlines()
        ], result.err

    return convert_content


@pytest.mark.parametrize("content", [COCO_FILE, [make_task(POLYGON_RESULT, make_text_result("cat"))], LABELME_FILE])
def test_convert_keeps_polygons(convert_to_jsonl, content):
    (record,), err = convert_to_jsonl(content)
    assert err[-1] == "sca: 1 region"
    assert record["caption"] == "cat"
    assert record["mask"]["size"] == [48, 64]


def test_convert_and_view_report_damaged_region_and_exit_with_status_1(working_folder, run_sca, write_image):
    write_image("a.png")
    valid_annotation, damaged_annotation = COCO_FILE["annotations"][0], {"id": 2, "image_id": 1, "bbox": [1, 2, "x", 3]}
    (working_folder / "in.json").write_text(
        json.dumps(COCO_FILE | {"annotations": [damaged_annotation, valid_annotation]})
    )
    for arguments in (("convert", "in.json", "out", "--format", "jsonl"), ("view", "in.json")):
        result = run_sca(*arguments)
        assert result.status == 1
        assert any("in.json, annotations[0], 'bbox' is " in line for line in result.err)
        assert result.err[-1] == "sca: skipped 1 record that cannot be used; correct the file"
    assert len((working_folder / "out/captions.jsonl").read_text().splitlines()) == 1


def test_convert_skips_cancelled_annotations_and_reports_them(convert_to_jsonl):
    cancelled = {"was_cancelled": True, "result": [BOX_RESULT, make_text_result("wrong")]}
    ground_truth = {"ground_truth": True, "result": [BOX_RESULT, make_text_result("right")]}
    other_annotation = {"result": [BOX_RESULT, make_text_result("wrong")]}
    (record,), err = convert_to_jsonl(
        [{"data": {"image": "a.png"}, "annotations": [cancelled, other_annotation, ground_truth]}]
    )
    assert record["caption"] == "right"
    assert (
        "sca: changed or skipped: cancelled annotation: 1 (first: in.json, task 0); "
        "task with several annotations, of which one is read: 1 (first: in.json, task 0)"
    ) in err


def test_convert_skips_unsupported_results_and_reports_them_in_one_line(convert_to_jsonl):
    relation = {"type": "relation", "from_id": "a", "to_id": "b", "direction": "right"}
    choices = {"id": "c", "type": "choices", "to_name": "image", "value": {"choices": ["good"]}}
    label = {**BOX_RESULT, "value": {**BOX_RESULT["value"], "rectanglelabels": ["cat"]}}
    records, err = convert_to_jsonl([make_task(label, relation, choices)])
    assert [record["caption"] for record in records] == ["cat"]
    (line,) = [line for line in err if "changed or skipped" in line]
    assert "relation: 1 (first: in.json, task 0, result 1); choices: 1 (first: in.json, task 0, region 'c')" in line


def test_convert_with_image_root_keeps_task_without_regions(working_folder, convert_to_jsonl, write_image):
    (working_folder / "folder").mkdir()
    write_image("folder/b.png")
    tasks = [make_task(BOX_RESULT, make_text_result("a cat")), make_task(image="b.png")]
    _, err = convert_to_jsonl(tasks)
    assert any(
        "image without regions, whose size is unknown: 1 (first: in.json, task 1, b.png)" in line for line in err
    )
    _, err = convert_to_jsonl(tasks, "--image-root", "folder")
    assert not any("changed or skipped" in line for line in err)


def test_caption_reads_prompts_from_folder_of_labelme_files(working_folder, run_sca, checkpoint, write_image):
    for name in ("a", "b", "c"):
        write_image(f"photos/{name}.png")
        (working_folder / "photos" / f"{name}.json").write_text(json.dumps(LABELME_FILE | {"imagePath": f"{name}.png"}))
    (working_folder / "photos/c.json").write_text(json.dumps(COCO_FILE))
    arguments = ("caption", "photos", "--prompts", "photos", "--model", checkpoint, "--out", "out")
    result = run_sca(*arguments)
    assert result.status == 2
    assert (
        "sca: photos/c.json is not a LabelMe file (it has no 'shapes'); move it out of the folder, or pass it to "
        "--prompts by itself" in result.err
    )
    assert any("c.png: photos has no regions for it" in line for line in result.err)
    lines = [json.loads(line) for line in (working_folder / "out/captions.jsonl").read_text().splitlines()]
    assert [(line["image"], line["prompt"]["box"]) for line in lines] == [
        (f"photos/{name}.png", [10, 10, 31, 31]) for name in "ab"
    ]
    (working_folder / "photos/c.json").write_text(json.dumps(LABELME_FILE | {"imagePath": "c.png"}))
    assert "contains a different run" in run_sca(*arguments).err[-1]
    (working_folder / "labels").mkdir()
    result_without_files = run_sca("caption", "photos", "--prompts", "labels", "--model", checkpoint)
    assert result_without_files.err == ["sca: no .json files in labels; a folder of prompts contains LabelMe files"]


def test_convert_and_view_draw_image_embedded_in_labelme_file(working_folder, run_sca):
    png_file = io.BytesIO()
    Image.new("RGB", (64, 48), "red").save(png_file, "PNG")
    content = LABELME_FILE | {"imageData": base64.b64encode(png_file.getvalue()).decode()}
    (working_folder / "in.json").write_text(json.dumps(content))
    assert run_sca("convert", "in.json", "out", "--format", "png").status == 0
    assert len(list((working_folder / "out").glob("*.png"))) == 1
    result = run_sca("view", "in.json")
    assert result.status == 0
    assert result.err == ["sca: wrote view.html, 1 region"]


@pytest.mark.parametrize(
    "content", [[make_task(POLYGON_RESULT, make_text_result("cat"), {"type": "relation"})], LABELME_FILE]
)
def test_caption_reads_prompts_from_label_studio_and_labelme_files(
    working_folder, run_sca, write_image, checkpoint, content
):
    write_image("a.png")
    (working_folder / "in.json").write_text(json.dumps(content))
    result = run_sca(
        "caption", "a.png", "--prompts", "in.json", "--model", checkpoint, "--out", "out", "--format", "jsonl"
    )
    assert result.status == 0, result
    (record,) = [json.loads(line) for line in (working_folder / "out/captions.jsonl").read_text().splitlines()]
    x1, y1, x2, y2 = record["prompt"]["box"]
    assert x1 < x2 <= 32
    assert y1 < y2 <= 32
    assert any("relation: 1" in line for line in result.err) == isinstance(content, list)
