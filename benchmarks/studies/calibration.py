"""Measure confidences and OOD scores: `python benchmarks/studies/calibration.py --help`

Crops of an image are its quarters and its center, with half its sides. The backgrounds of scenes are those that the
model was trained on, in other sizes, and others that it was not trained on.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import sca_registry
import torch
from PIL import Image

import sca
from sca.data.scenes import Scenes
from sca.evaluation.calibration import compute_ece, is_correct_caption
from sca.evaluation.evaluate import evaluate
from sca.evaluation.predictions_file import read_predictions
from sca.inference.engine import Engine
from sca.io.images import find_images, open_image
from sca.uncertainty import MIN_PROBABILITY, fit_calibration
from study_results import write_results

NUM_SCENES = 60
SCENE_SIZES = (64, 128, 256, 512)
BATCH_SIZE = 16


class BackgroundScenes(Scenes):
    """Scenes with a background that `Scenes` does not draw.

    Args:
        background: "white", "black", "color" (any color), "gradient" (between any colors) or "noise".
        num_images: Number of scenes.
    """

    def __init__(self, background: str, num_images: int):
        super().__init__("test", num_images=num_images)
        self.background = background

    def _draw_background(self, rng: np.random.Generator) -> np.ndarray:
        canvas = super()._draw_background(rng)
        height = np.linspace(0, 1, len(canvas), dtype=np.float32)[:, None, None]
        first, second = rng.uniform(0, 255, 3), rng.uniform(0, 255, 3)
        values: dict[str, Any] = {
            "white": 245,
            "black": 12,
            "color": first,
            "gradient": height * first + (1 - height) * second,
            "noise": rng.uniform(0, 255, canvas.shape),
        }
        canvas[:] = values[self.background]
        return canvas


BACKGROUNDS = ("white", "black", "color", "gradient", "noise")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python benchmarks/studies/calibration.py", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--street", required=True, help="Folder with CamVid in COCO format.")
    parser.add_argument(
        "--photographs", required=True, help="Folder with photographs of other subjects, such as faces and food."
    )
    parser.add_argument(
        "--calibrations", type=Path, nargs="+", required=True, help="Outputs of `sca calibrate MODEL DATASET --json`."
    )
    parser.add_argument(
        "--predictions", type=Path, nargs="+", required=True, help="Folders of `sca evaluate`, to compare maps."
    )
    parser.add_argument("--out", type=Path, help="JSON file for the results.")
    args = parser.parse_args(arguments)
    results = {
        "torch": torch.__version__,
        "maps": [compare_maps(folder) for folder in args.predictions],
        "calibrations": [json.loads(path.read_text("utf-8")) for path in args.calibrations],
        "ood": [*measure_street(args.street, args.photographs), *measure_scenes(args.photographs)],
        "photographs": [path.stem for path in find_images([args.photographs])[0]],
    }
    print(render_results(results))
    write_results(results, args.out)


def compare_maps(folder: Path) -> dict[str, Any]:
    """Compare maps from scores to confidences, fitted on every other image and measured on the rest.

    Platt scaling is also fitted on the first half of the images, because neighboring frames of a video are alike.
    """
    predictions = read_predictions(folder)
    task = "caption" if predictions.run["dataset"] == "scenes" else "recognition"
    judged = [(each, is_correct_caption(each, task)) for each in predictions.records]
    judged = [(record, correct) for record, correct in judged if correct is not None]
    scores = torch.tensor([record["score"] for record, _ in judged], dtype=torch.float64)
    correct = torch.tensor([each for _, each in judged])
    _, images = np.unique([record["index"] for record, _ in judged], return_inverse=True)
    errors = measure_maps(scores, correct, torch.from_numpy(images % 2 == 0))
    errors["platt, first half"] = measure_maps(scores, correct, torch.from_numpy(images <= images.max() // 2))["platt"]
    run = predictions.run
    return {"model": run["model"], "task": task, "prompt_type": run["prompt_type"], "ece": errors}


def measure_maps(scores: torch.Tensor, correct: torch.Tensor, is_fit: torch.Tensor) -> dict[str, float]:
    """Fit maps on some captions, and return their expected calibration errors on the others."""
    logits = scores.clamp(MIN_PROBABILITY, 1 - MIN_PROBABILITY).logit()
    platt = fit_calibration(scores[is_fit], correct[is_fit])
    measured = logits[~is_fit]
    confidences = {
        "none": scores[~is_fit],
        "temperature": (fit_temperature(logits[is_fit], correct[is_fit]) * measured).sigmoid(),
        "platt": (platt.slope * measured + platt.intercept).sigmoid(),
    }
    truth = correct[~is_fit].double().numpy()
    return {name: compute_ece(values.numpy(), truth)[0] for name, values in confidences.items()}


def fit_temperature(logits: torch.Tensor, correct: torch.Tensor) -> float:
    """Return the inverse temperature of the highest likelihood (arXiv 1706.04599)."""
    candidates = torch.logspace(-2, 2, 2001, dtype=torch.float64)
    scaled = candidates[:, None] * logits
    targets = correct.double().expand_as(scaled)
    losses = torch.nn.functional.binary_cross_entropy_with_logits(scaled, targets, reduction="none").mean(1)
    return float(candidates[losses.argmin()])


def measure_street(street: str, photographs: str) -> list[dict[str, Any]]:
    engine = Engine(sca.load("sca-street"))
    dataset = sca_registry.datasets.build("coco", "val", root=street)
    held_out = [dataset[index].image for index in range(1, len(dataset), 2)]  # the others fit the threshold
    photos = [open_image(path) for path in find_images([photographs])[0]]
    return [
        measure_images(engine, "sca-street", name, images)
        for name, images in (
            ("street photographs, held out", held_out),
            ("crops of them", crop_all(held_out[::2])),
            ("photographs of other subjects", photos),
            ("crops of them", crop_all(photos)),
        )
    ]


def measure_scenes(photographs: str) -> list[dict[str, Any]]:
    engine = Engine(sca.load("sca-tiny"))
    photos = [open_image(path) for path in find_images([photographs])[0]]
    rows = []
    datasets: dict[str, Scenes] = {
        **{f"scenes of {size} pixels": Scenes("test", NUM_SCENES, size) for size in SCENE_SIZES},
        **{f"scenes on {name}": BackgroundScenes(name, NUM_SCENES) for name in BACKGROUNDS},
    }
    for name, dataset in datasets.items():
        row = measure_images(engine, "sca-tiny", name, [dataset[index].image for index in range(len(dataset))])
        report = evaluate(engine, dataset, metrics=["attributes"], batch_size=BATCH_SIZE)
        rows.append({**row, "accuracy": report.scores["attributes/all"]})
    rows.append(measure_images(engine, "sca-tiny", "photographs", photos))
    rows.append(measure_images(engine, "sca-tiny", "crops of them", crop_all(photos)))
    return rows


def measure_images(engine: Engine, model: str, name: str, images: Sequence[Image.Image]) -> dict[str, Any]:
    """Return the number of images and the fraction with an OOD score above 1."""
    scores: list[float] = []
    for start in range(0, len(images), BATCH_SIZE):
        scores += engine.compute_ood_scores(engine.encode(images[start : start + BATCH_SIZE])) or []
    quantiles = np.quantile(scores, (0.05, 0.5, 0.95)).tolist()
    return {
        "model": model,
        "images": name,
        "num_images": len(scores),
        "flagged_fraction": sum(score > 1 for score in scores) / len(scores),
        "quantiles": quantiles,
        "accuracy": None,
    }


def crop_all(images: Iterable[Image.Image]) -> list[Image.Image]:
    """Return the four quarters and the center of each image."""
    crops = []
    for image in images:
        width, height = image.width // 2, image.height // 2
        for x, y in ((0, 0), (width, 0), (0, height), (width, height), (width // 2, height // 2)):
            crops.append(image.crop((x, y, x + width, y + height)))
    return crops


def render_results(results: Mapping[str, Any]) -> str:
    """Render the tables of docs/benchmarks.md."""
    tables: tuple[Callable[[Mapping[str, Any]], list[str]], ...] = (
        render_maps,
        render_calibrations,
        render_reliability,
        render_ood,
    )
    return "\n\n".join("\n".join(render(results)) for render in tables)


def render_maps(results: Mapping[str, Any]) -> list[str]:
    lines = [
        "| model, task, prompt | score | temperature | Platt scaling | Platt scaling, first half |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for each in results["maps"]:
        errors = " | ".join(f"{100 * value:.1f}" for value in each["ece"].values())
        lines.append(f"| {each['model']}, {each['task']}, {each['prompt_type']} | {errors} |")
    return lines


def render_calibrations(results: Mapping[str, Any]) -> list[str]:
    lines = [
        "| model, task, prompt | regions | correct | ECE of score | ECE of confidence | 95% CI | saved |",
        "| --- | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for report in results["calibrations"]:
        for each in report["results"]:
            low, high = each["ece_interval"]
            values = (each["accuracy"], each["score_ece"], each["ece"])
            lines.append(
                f"| {report['model']}, {each['task']}, {each['prompt_type']} | {each['num_regions']} | "
                f"{' | '.join(f'{100 * value:.1f}' for value in values)} | {100 * low:.1f} to {100 * high:.1f} | "
                f"{'no' if each['reason'] else 'yes'} |"
            )
    return lines


def render_reliability(results: Mapping[str, Any]) -> list[str]:
    """Render the bins of sca-street for class names, as confidence and accuracy in percent."""
    (report,) = (each for each in results["calibrations"] if each["model"] == "sca-street")
    bins = {
        each["prompt_type"]: each["bins"]
        for each in report["results"]
        if each["task"] == "recognition" and each["prompt_type"] in ("box", "mask-point")
    }
    lines = ["| bin | box: confidence | correct | point: confidence | correct |", "| ---: " * 5 + "|"]
    for index, (box, point) in enumerate(zip(bins["box"], bins["mask-point"], strict=True), 1):
        values = (box["confidence"], box["accuracy"], point["confidence"], point["accuracy"])
        lines.append(f"| {index} | {' | '.join(f'{100 * value:.0f}' for value in values)} |")
    return lines


def render_ood(results: Mapping[str, Any]) -> list[str]:
    lines = ["| model | images | number | flagged | median OOD score | correct |", "| --- | --- " + "| ---: " * 4 + "|"]
    for each in results["ood"]:
        accuracy = "" if each["accuracy"] is None else f"{100 * each['accuracy']:.1f}"
        lines.append(
            f"| {each['model']} | {each['images']} | {each['num_images']} | {100 * each['flagged_fraction']:.1f} | "
            f"{each['quantiles'][1]:.2f} | {accuracy} |"
        )
    return lines


if __name__ == "__main__":
    main()
