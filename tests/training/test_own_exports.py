"""A model goes on learning from what labeling tools export, and its captions use the words of the data."""

import json
from pathlib import Path

import pytest

from sca.cli import run_command
from sca.data.scenes import Scenes

WORDS = {"circle": "wheel", "square": "tile", "triangle": "sail", "star": "badge", "cross": "plus"}
IMAGES = 40
STEPS = 300


@pytest.fixture(scope="module")
def annotated():
    """Images with regions, as (image, [(x1, y1, x2, y2, caption)]): forms have names that the model has not learned."""
    found = []
    for sample in Scenes("train", num_images=IMAGES, image_size=128, seed=11):
        regions = [(*region.box, f"a {WORDS.get(region.name, region.name)}") for region in sample.regions]
        found.append((sample.image, regions))
    return found


def write_label_studio(folder: Path, annotated) -> Path:
    """An export "JSON" with images beside it: a rectangle and its text area share an id."""
    tasks = []
    (folder / "images").mkdir(parents=True)
    for number, (image, regions) in enumerate(annotated):
        image.save(folder / "images" / f"{number}.png")
        width, height = image.size
        results = []
        for place, (x1, y1, x2, y2, caption) in enumerate(regions):
            shares = {"x": 100 * x1 / width, "y": 100 * y1 / height, "rotation": 0}
            shares |= {"width": 100 * (x2 - x1) / width, "height": 100 * (y2 - y1) / height}
            shared = {"id": f"r{place}", "to_name": "image", "original_width": width, "original_height": height}
            for kind, value in (("rectanglelabels", ["thing"]), ("textarea", [caption])):
                key = "text" if kind == "textarea" else kind
                results.append({**shared, "from_name": kind, "type": kind, "value": {**shares, key: value}})
        data = {"image": f"/data/upload/1/{number}.png"}
        tasks.append({"id": number, "data": data, "annotations": [{"id": number, "result": results}]})
    (folder / "export.json").write_text(json.dumps(tasks))
    return folder


def write_labelme(folder: Path, annotated) -> Path:
    folder.mkdir()
    for number, (image, regions) in enumerate(annotated):
        image.save(folder / f"{number}.png")
        shapes = [
            {
                "label": "thing",
                "description": caption,
                "points": [[x1, y1], [x2, y2]],
                "shape_type": "rectangle",
                "group_id": None,
                "flags": {},
            }
            for x1, y1, x2, y2, caption in regions
        ]
        content = {"version": "5.5.0", "flags": {}, "shapes": shapes, "imagePath": f"{number}.png", "imageData": None}
        content |= {"imageWidth": image.width, "imageHeight": image.height}
        (folder / f"{number}.json").write_text(json.dumps(content))
    return folder


def coco(annotated, first: int, **fields) -> dict:
    """COCO whose class names are the words."""
    names = sorted({region[4][2:] for _, regions in annotated for region in regions})
    images, annotations = [], []
    for number, (image, regions) in enumerate(annotated, first):
        images.append({"id": number, "file_name": f"{number}.png", "width": image.width, "height": image.height})
        for x1, y1, x2, y2, caption in regions:
            region = {"id": len(annotations) + 1, "image_id": number, "category_id": names.index(caption[2:]) + 1}
            annotations.append({**region, "bbox": [x1, y1, x2 - x1, y2 - y1], "iscrowd": 0, "area": 1.0, **fields})
    categories = [{"id": number, "name": name} for number, name in enumerate(names, 1)]
    return {"images": images, "annotations": annotations, "categories": categories}


def write_roboflow(folder: Path, annotated) -> Path:
    """`train/_annotations.coco.json` beside its images, and `valid/` likewise."""
    for split, first, some in (("train", 0, annotated[:-6]), ("valid", IMAGES - 6, annotated[-6:])):
        (folder / split).mkdir(parents=True)
        for number, (image, _) in enumerate(some, first):
            image.save(folder / split / f"{number}.png")
        (folder / split / "_annotations.coco.json").write_text(json.dumps(coco(some, first)))
    return folder


def write_cvat(folder: Path, annotated) -> Path:
    """`annotations/instances_default.json` and `images/`."""
    (folder / "annotations").mkdir(parents=True)
    (folder / "images").mkdir()
    for number, (image, _) in enumerate(annotated):
        image.save(folder / "images" / f"{number}.png")
    content = coco(annotated, 0, attributes={"occluded": False, "rotation": 0.0})
    (folder / "annotations" / "instances_default.json").write_text(json.dumps(content))
    return folder


@pytest.mark.all
@pytest.mark.parametrize("write", [write_label_studio, write_labelme, write_roboflow, write_cvat])
def test_own_data_learns_the_word_of_each_region_of_an_export(write, annotated, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = write(tmp_path / "data", annotated)
    changes = [
        f"train.steps={STEPS}",
        "train.batch_size=4",
        "train.num_processes=1",
        "validate.every=1000",
        "validate.limit=4",
        "--out",
        "run",
        "--quiet",
    ]
    assert run_command(["train", "own-data", f"data={data}", *changes]) == 0
    found = []
    for number, (image, regions) in enumerate(annotated[:10]):
        image.save("one.png")
        boxes = [word for x1, y1, x2, y2, _ in regions for word in ("--box", f"{x1},{y1},{x2},{y2}")]
        out = ["--out", f"captions-{number}", "--model", "./run/model", "--quiet"]
        assert run_command(["caption", "one.png", *boxes, *out]) == 0
        lines = Path(f"captions-{number}", "captions.jsonl").read_text().splitlines()
        captions = [json.loads(line)["caption"] for line in lines]
        words = [caption.removeprefix("a ") for *_, caption in regions]
        found += [(word, caption) for word, caption in zip(words, captions, strict=True)]
    assert {caption.removeprefix("a ") for _, caption in found} <= {*WORDS.values()}, found
    assert sum(word in caption.split() for word, caption in found) / len(found) > 0.6, found  # two words look alike
