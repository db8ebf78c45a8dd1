"""Fine-tuning on exports of labeling tools: captions use the vocabulary of the data."""

import json
from pathlib import Path

import pytest

from sca.cli import run_command
from sca.data.scenes import Scenes

NOUN_BY_SHAPE = {"circle": "wheel", "square": "tile", "triangle": "sail", "star": "badge", "cross": "plus"}
NUM_IMAGES = 40
NUM_STEPS = 300


@pytest.fixture(scope="module")
def annotated_images():
    """Return images with regions, (image, [(x1, y1, x2, y2, caption)]), whose shape names are new to the model."""
    images_with_regions = []
    for sample in Scenes("train", num_images=NUM_IMAGES, image_size=128, seed=11):
        regions = [(*region.box, f"a {NOUN_BY_SHAPE.get(region.name, region.name)}") for region in sample.regions]
        images_with_regions.append((sample.image, regions))
    return images_with_regions


def write_label_studio(folder: Path, annotated_images) -> Path:
    """Write a "JSON" export and its images: a rectangle and its text area share an id."""
    tasks = []
    (folder / "images").mkdir(parents=True)
    for number, (image, regions) in enumerate(annotated_images):
        image.save(folder / "images" / f"{number}.png")
        width, height = image.size
        results = []
        for index, (x1, y1, x2, y2, caption) in enumerate(regions):
            percentages = {"x": 100 * x1 / width, "y": 100 * y1 / height, "rotation": 0}
            percentages |= {"width": 100 * (x2 - x1) / width, "height": 100 * (y2 - y1) / height}
            common_fields = {"id": f"r{index}", "to_name": "image", "original_width": width, "original_height": height}
            for kind, value in (("rectanglelabels", ["thing"]), ("textarea", [caption])):
                key = "text" if kind == "textarea" else kind
                results.append({**common_fields, "from_name": kind, "type": kind, "value": {**percentages, key: value}})
        data = {"image": f"/data/upload/1/{number}.png"}
        tasks.append({"id": number, "data": data, "annotations": [{"id": number, "result": results}]})
    (folder / "export.json").write_text(json.dumps(tasks))
    return folder


def write_labelme(folder: Path, annotated_images) -> Path:
    folder.mkdir()
    for number, (image, regions) in enumerate(annotated_images):
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


def build_coco(annotated_images, first_id: int, **fields) -> dict:
    """Write COCO whose class names are the captions."""
    names = sorted({region[4][2:] for _, regions in annotated_images for region in regions})
    images, annotations = [], []
    for number, (image, regions) in enumerate(annotated_images, first_id):
        images.append({"id": number, "file_name": f"{number}.png", "width": image.width, "height": image.height})
        for x1, y1, x2, y2, caption in regions:
            region = {"id": len(annotations) + 1, "image_id": number, "category_id": names.index(caption[2:]) + 1}
            annotations.append({**region, "bbox": [x1, y1, x2 - x1, y2 - y1], "iscrowd": 0, "area": 1.0, **fields})
    categories = [{"id": number, "name": name} for number, name in enumerate(names, 1)]
    return {"images": images, "annotations": annotations, "categories": categories}


def write_roboflow(folder: Path, annotated_images) -> Path:
    """Write `train/_annotations.coco.json` and `valid/_annotations.coco.json` next to their images."""
    for split, first_id, split_images in (
        ("train", 0, annotated_images[:-6]),
        ("valid", NUM_IMAGES - 6, annotated_images[-6:]),
    ):
        (folder / split).mkdir(parents=True)
        for number, (image, _) in enumerate(split_images, first_id):
            image.save(folder / split / f"{number}.png")
        (folder / split / "_annotations.coco.json").write_text(json.dumps(build_coco(split_images, first_id)))
    return folder


def write_cvat(folder: Path, annotated_images) -> Path:
    """Write `annotations/instances_default.json` and `images/`."""
    (folder / "annotations").mkdir(parents=True)
    (folder / "images").mkdir()
    for number, (image, _) in enumerate(annotated_images):
        image.save(folder / "images" / f"{number}.png")
    content = build_coco(annotated_images, 0, attributes={"occluded": False, "rotation": 0.0})
    (folder / "annotations" / "instances_default.json").write_text(json.dumps(content))
    return folder


@pytest.mark.all
@pytest.mark.parametrize("write_export", [write_label_studio, write_labelme, write_roboflow, write_cvat])
def test_own_data_recipe_learns_captions_from_labeling_tool_exports(
    write_export, annotated_images, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    data = write_export(tmp_path / "data", annotated_images)
    changes = [
        f"train.steps={NUM_STEPS}",
        "train.batch_size=4",
        "train.num_processes=1",
        "validate.eval_steps=1000",
        "validate.max_images=4",
        "--out",
        "run",
        "--quiet",
    ]
    assert run_command(["train", "own-data", f"data={data}", *changes]) == 0
    nouns_and_captions = []
    for number, (image, regions) in enumerate(annotated_images[:10]):
        image.save("one.png")
        box_options = [word for x1, y1, x2, y2, _ in regions for word in ("--box", f"{x1},{y1},{x2},{y2}")]
        options = ["--out", f"captions-{number}", "--model", "./run/model", "--quiet"]
        assert run_command(["caption", "one.png", *box_options, *options]) == 0
        lines = Path(f"captions-{number}", "captions.jsonl").read_text().splitlines()
        captions = [json.loads(line)["caption"] for line in lines]
        nouns = [caption.removeprefix("a ") for *_, caption in regions]
        nouns_and_captions += [(word, caption) for word, caption in zip(nouns, captions, strict=True)]
    assert {caption.removeprefix("a ") for _, caption in nouns_and_captions} <= {*NOUN_BY_SHAPE.values()}, (
        nouns_and_captions
    )
    assert sum(word in caption.split() for word, caption in nouns_and_captions) / len(nouns_and_captions) > 0.6, (
        nouns_and_captions
    )  # two shapes are similar
