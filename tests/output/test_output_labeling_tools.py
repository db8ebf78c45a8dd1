"""Outputs for labeling tools, read by the packages of these tools in a separate environment."""

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
from sca_registry.contracts import Caption, Prompt
from tool_environment import create_tool_environment

from sca.io import masks
from sca.io.annotations import coco, label_studio, labelme
from sca.io.annotations.annotation import SkipCounter
from sca.io.annotations.brush_rle import decode_brush_rle
from sca.output.formats import MultiFormatWriter
from sca.output.label_studio import LABELING_CONFIG

PACKAGES = ("label-studio-sdk", "labelme", "shapely", "pycocotools")


@pytest.fixture(scope="module")
def tools_python(tmp_path_factory):
    """Interpreter of an environment with the packages of the tools."""
    return create_tool_environment(tmp_path_factory.mktemp("tools"), *PACKAGES)


@pytest.mark.all
def test_output_writers_are_read_by_the_packages_of_labeling_tools(
    tmp_path, monkeypatch, noise_image, captions, tools_python
):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    with MultiFormatWriter("out", ("jsonl", "label-studio", "labelme", "geojson"), model="m") as writers:
        for name, size in (("a.png", (40, 30)), ("deep/b.png", (301, 177)), ("c d é.png", (33, 9))):
            path = Path(name)
            path.parent.mkdir(exist_ok=True)
            resized = noise_image.resize(size)
            resized.save(path)
            width, height = size
            noise_masks = [rng.random((height, width)) < density for density in (0.02, 0.5, 0.98)]
            full_mask = np.ones((height, width), bool)
            image_captions = [
                Caption(
                    f"{n} of {name}", 0.5, masks.mask_to_box(mask), masks.encode_rle(mask), 0.5, Prompt(mask=mask), n
                )
                for n, mask in enumerate((*noise_masks, full_mask))
            ]
            writers.add(name, resized, captions if name == "a.png" else image_captions)
        writers.add("none.png", noise_image, [])
    noise_image.save("none.png")
    script = Path(__file__).with_name("labeling_tool_readers.py")
    process = subprocess.run([tools_python, script, "out", ".", LABELING_CONFIG], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-2000:]
    assert json.loads(process.stdout) == {"label-studio": 12, "labelme": 12, "geojson": 12}


def make_labelme_shapes(rng, count):
    """Return random shapes of LabelMe's types; corners may be outside the 40 x 30 image."""
    num_points_range = {"polygon": (3, 8), "oriented_rectangle": (4, 5), "circle": (2, 3), "rectangle": (2, 3)}
    for number in range(count):
        shape_type = list(num_points_range)[number % len(num_points_range)]
        points = rng.uniform(-5, 45, (rng.integers(*num_points_range[shape_type]), 2)).round(2).tolist()
        yield {"label": "cat", "points": points, "shape_type": shape_type, "group_id": None, "flags": {}}


def make_label_studio_tasks(rng, count):
    common_fields = {"to_name": "image", "original_width": 40, "original_height": 30, "image_rotation": 0}
    results = []
    for number in range(count):
        points = rng.uniform(0, 100, (rng.integers(3, 8), 2)).tolist()
        value = {"points": points, "closed": True, "polygonlabels": ["cat"]}
        results.append(
            {**common_fields, "id": f"p{number}", "from_name": "polygon", "type": "polygonlabels", "value": value}
        )
        x, y, width, height = rng.uniform(5, 50, 4)
        value = {"x": x, "y": y, "width": width, "height": height, "rotation": rng.uniform(1, 359)}
        value["rectanglelabels"] = ["cat"]
        results.append(
            {**common_fields, "id": f"r{number}", "from_name": "box", "type": "rectanglelabels", "value": value}
        )
    return [{"id": 1, "data": {"image": "a.png"}, "annotations": [{"id": 1, "result": results}]}]


@pytest.mark.all
def test_annotation_readers_match_converters_of_labeling_tools(tmp_path, tools_python):
    rng = np.random.default_rng(0)
    shapes = list(make_labelme_shapes(rng, 200))
    groups = [[{**shape, "group_id": 7} for shape in shapes[start : start + 4]] for start in range(0, 40, 4)]
    tasks = make_label_studio_tasks(rng, 50)
    brush_masks = [masks.encode_rle(rng.random((30, 40)) < density) for density in (0, 0.02, 0.5, 0.98, 1)]
    content = {
        "labelme": {"size": [40, 30], "shapes": shapes, "groups": groups},
        "label-studio": tasks,
        "masks": brush_masks,
    }
    (tmp_path / "shapes.json").write_text(json.dumps(content))
    script = Path(__file__).with_name("labeling_tool_geometry.py")
    process = subprocess.run([tools_python, script, tmp_path / "shapes.json"], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-2000:]
    tool_output = json.loads(process.stdout)

    for shape, expected_rle in zip(shapes, tool_output["labelme"], strict=True):
        annotations = labelme.read_annotations({"shapes": [shape]}, (40, 30), "a.json", SkipCounter())
        if shape["shape_type"] == "rectangle":  # which is a box, and has the pixels on its edge in LabelMe
            (x1, y1), (x2, y2) = np.sort(shape["points"], axis=0)
            assert annotations[0].box == (x1, y1, x2, y2)
        else:
            assert [annotation.mask for annotation in annotations] == (
                [expected_rle] if masks.compute_mask_area(expected_rle) else []
            )

    for group, expected_rle in zip(groups, tool_output["groups"], strict=True):
        (annotations,) = labelme.read_annotations({"shapes": group}, (40, 30), "a.json", SkipCounter())
        assert annotations.mask == expected_rle

    (image,) = label_studio.read_tasks(tasks, "ls.json", SkipCounter(), lambda name: None)
    annotation_by_id = {
        annotation.location.rpartition(" ")[2].strip("'"): annotation for annotation in image.annotations
    }
    polygons = [annotation["segmentation"] for annotation in tool_output["label-studio"] if annotation["segmentation"]]
    assert len(polygons) == len(tool_output["corners"]) == 50
    for number, (polygon, rectangle_corners) in enumerate(zip(polygons, tool_output["corners"], strict=True)):
        for name, rings in (
            (f"p{number}", polygon),
            (f"r{number}", [[coordinate for corner_point in rectangle_corners for coordinate in corner_point]]),
        ):
            expected = coco.parse_segmentation(rings, (40, 30), pytest.fail)
            difference = masks.decode_rle(annotation_by_id[name].mask) ^ masks.decode_rle(expected)
            assert difference.sum() <= 1, name  # corners differ in their last digits

    for expected_rle, brush_code in zip(brush_masks, tool_output["brushes"], strict=True):
        assert masks.encode_rle(decode_brush_rle(brush_code, 40, 30)) == expected_rle
