"""What is written for other tools, read by their own packages, in an environment of theirs."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from sca_registry.contracts import Caption, Prompt

from sca.io import masks
from sca.io.annotations import coco, label_studio, labelme
from sca.io.annotations.annotation import SkipCounter
from sca.io.annotations.brush_rle import decode_brush_rle
from sca.output.formats import MultiFormatWriter
from sca.output.label_studio import LABELING_CONFIG

PACKAGES = ("label-studio-sdk", "labelme", "shapely", "pycocotools")


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """An interpreter beside which the tools are installed."""
    folder = tmp_path_factory.mktemp("tools")
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    python = folder / "bin" / "python"
    install = subprocess.run([python, "-m", "pip", "install", "--quiet", *PACKAGES], capture_output=True, text=True)
    if install.returncode:
        pytest.skip(f"{' '.join(PACKAGES)} cannot be installed here: {install.stderr.strip().splitlines()[-1]}")
    return python


@pytest.mark.all
def test_other_tools_read_what_is_written_for_them(tmp_path, monkeypatch, picture, captions, python):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    with MultiFormatWriter("out", ("jsonl", "label-studio", "labelme", "geojson"), model="m") as writers:
        for name, size in (("a.png", (40, 30)), ("deep/b.png", (301, 177)), ("c d é.png", (33, 9))):
            path = Path(name)
            path.parent.mkdir(exist_ok=True)
            drawn = picture.resize(size)
            drawn.save(path)
            width, height = size
            noise = [rng.random((height, width)) < share for share in (0.02, 0.5, 0.98)]
            full = np.ones((height, width), bool)
            regions = [
                Caption(
                    f"{n} of {name}", 0.5, masks.mask_to_box(mask), masks.encode_rle(mask), 0.5, Prompt(mask=mask), n
                )
                for n, mask in enumerate((*noise, full))
            ]
            writers.add(name, drawn, captions if name == "a.png" else regions)
        writers.add("none.png", picture, [])
    picture.save("none.png")
    script = Path(__file__).with_name("own_readers.py")
    ran = subprocess.run([python, script, "out", ".", LABELING_CONFIG], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert json.loads(ran.stdout) == {"label-studio": 12, "labelme": 12, "geojson": 12}


def labelme_shapes(rng, count):
    """Random shapes of the kinds that LabelMe draws, whose corners may lie outside the 40 x 30 image."""
    corners = {"polygon": (3, 8), "oriented_rectangle": (4, 5), "circle": (2, 3), "rectangle": (2, 3)}
    for number in range(count):
        kind = list(corners)[number % len(corners)]
        points = rng.uniform(-5, 45, (rng.integers(*corners[kind]), 2)).round(2).tolist()
        yield {"label": "cat", "points": points, "shape_type": kind, "group_id": None, "flags": {}}


def label_studio_tasks(rng, count):
    head = {"to_name": "image", "original_width": 40, "original_height": 30, "image_rotation": 0}
    results = []
    for number in range(count):
        points = rng.uniform(0, 100, (rng.integers(3, 8), 2)).tolist()
        value = {"points": points, "closed": True, "polygonlabels": ["cat"]}
        results.append({**head, "id": f"p{number}", "from_name": "polygon", "type": "polygonlabels", "value": value})
        x, y, width, height = rng.uniform(5, 50, 4)
        value = {"x": x, "y": y, "width": width, "height": height, "rotation": rng.uniform(1, 359)}
        value["rectanglelabels"] = ["cat"]
        results.append({**head, "id": f"r{number}", "from_name": "box", "type": "rectanglelabels", "value": value})
    return [{"id": 1, "data": {"image": "a.png"}, "annotations": [{"id": 1, "result": results}]}]


@pytest.mark.all
def test_geometry_is_that_of_the_tools_own_converters(tmp_path, python):
    rng = np.random.default_rng(0)
    shapes = list(labelme_shapes(rng, 200))
    groups = [[{**shape, "group_id": 7} for shape in shapes[at : at + 4]] for at in range(0, 40, 4)]
    tasks = label_studio_tasks(rng, 50)
    drawn = [masks.encode_rle(rng.random((30, 40)) < share) for share in (0, 0.02, 0.5, 0.98, 1)]
    content = {"labelme": {"size": [40, 30], "shapes": shapes, "groups": groups}, "label-studio": tasks, "masks": drawn}
    (tmp_path / "shapes.json").write_text(json.dumps(content))
    script = Path(__file__).with_name("tool_geometry.py")
    ran = subprocess.run([python, script, tmp_path / "shapes.json"], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-2000:]
    theirs = json.loads(ran.stdout)

    for shape, code in zip(shapes, theirs["labelme"], strict=True):
        found = labelme.read_annotations({"shapes": [shape]}, (40, 30), "a.json", SkipCounter())
        if shape["shape_type"] == "rectangle":  # which is a box, and has the pixels on its edge in LabelMe
            (x1, y1), (x2, y2) = np.sort(shape["points"], axis=0)
            assert found[0].box == (x1, y1, x2, y2)
        else:
            assert [each.mask for each in found] == ([code] if masks.compute_mask_area(code) else [])

    for group, code in zip(groups, theirs["groups"], strict=True):
        (found,) = labelme.read_annotations({"shapes": group}, (40, 30), "a.json", SkipCounter())
        assert found.mask == code

    (image,) = label_studio.read_tasks(tasks, "ls.json", SkipCounter(), lambda name: None)
    regions = {each.location.rpartition(" ")[2].strip("'"): each for each in image.annotations}
    polygons = [each["segmentation"] for each in theirs["label-studio"] if each["segmentation"]]
    assert len(polygons) == len(theirs["corners"]) == 50
    for number, (polygon, corners) in enumerate(zip(polygons, theirs["corners"], strict=True)):
        for name, rings in ((f"p{number}", polygon), (f"r{number}", [[v for corner in corners for v in corner]])):
            expected = coco.parse_segmentation(rings, (40, 30), pytest.fail)
            difference = masks.decode_rle(regions[name].mask) ^ masks.decode_rle(expected)
            assert difference.sum() <= 1, name  # corners differ in their last digits

    for code, brush in zip(drawn, theirs["brushes"], strict=True):
        assert masks.encode_rle(decode_brush_rle(brush, 40, 30)) == code
