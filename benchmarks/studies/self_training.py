"""Test whether self-training helps: `python benchmarks/studies/self_training.py scenes|FOLDER [--out FILE]`

Trains a model on few labeled images, lets it find and caption the regions of unlabeled images (everything mode), keeps
the regions whose calibrated confidence is high and whose caption matches them best among the regions of the image, and
continues the training on the labeled images and these regions. The comparison models continue for the same number of
steps on the labeled images alone, and with all found regions. The images are synthetic scenes, or the photographs of a
folder in COCO format (`train`, `val`) with class names. Every seed selects other labeled images. Further labeled images
calibrate the confidence; they are used for nothing else.

Prints a Markdown table and writes the results as JSON. Differences have 95% confidence intervals over images; the mean
over seeds is resampled.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from sca.io.atomic import write_file
from score_table import compute_differences, render_table
from study_results import write_results

METHODS = ("labels and selected regions", "labels only", "labels and all found regions")
SCORE_LABELS = {
    "scenes": {"cider-d": "CIDEr-D", "attributes/all": "all four attributes correct", "mask-iou/mean": "mask IoU"},
    "photographs": {"class/accuracy": "class accuracy", "mask-iou/mean": "mask IoU"},
}
BASE = "base model"
REGION_WEIGHT = 0.5  # fraction of the training images that have no labels


def write_images(samples: Sequence[Any], folder: Path) -> list[Path]:
    """Write the images of samples as PNG files and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{index}.png" for index in range(len(samples))]
    for sample, path in zip(samples, paths, strict=True):
        sample.image.save(path)
    return paths


def write_labels(samples: Sequence[Any], paths: Sequence[Path], file: Path) -> None:
    """Write the labeled regions of samples in JSON Lines."""
    lines = [
        {
            "image": str(path),
            "width": sample.image.width,
            "height": sample.image.height,
            "box": list(region.box),
            "mask": region.mask,
            **({"name": region.name} if region.name else {}),
            **({"phrases": list(region.phrases)} if region.phrases else {}),
            "attributes": region.attributes,
        }
        for sample, path in zip(samples, paths, strict=True)
        for region in sample.regions
    ]
    write_file(file, "".join(json.dumps(line) + "\n" for line in lines))


def find_regions(model_folder: Path, paths: Sequence[Path], task: str, min_confidence: float) -> list[dict[str, Any]]:
    """Find and caption the regions of images.

    Args:
        model_folder: Calibrated checkpoint.
        paths: Image files.
        task: "caption" or "recognition".
        min_confidence: Minimum confidence of a selected region.

    Returns:
        Lines of a JSON Lines file, with the additional field `is_selected`.
    """
    from PIL import Image

    import sca
    from sca.inference.text_search import check_can_find, index_regions

    predictor = sca.Predictor(sca.load(model_folder))
    engine, lines = check_can_find(predictor.engine), []
    text_field = "name" if task == "recognition" else "caption"
    for path in paths:
        predictor.set_image(Image.open(path))
        captions = sca.caption_everything(predictor, task)
        usable = [each for each in captions if each.mask is not None and each.box is not None and each.text]
        if not usable:
            continue
        index = index_regions(engine, predictor.encoded, [[each.prompt for each in usable]], task)
        scores = index.score_texts([each.text for each in usable]).cpu().numpy()  # (regions, texts)
        for row, caption in enumerate(usable):
            # several regions have the same class name, so only captions have to match their own region best
            is_unique = task == "recognition" or scores[row, row] >= scores[:, row].max()
            confidence = caption.confidence if caption.confidence is not None else 0.0
            lines.append(
                {
                    "image": str(path),
                    "width": predictor.image.width,
                    "height": predictor.image.height,
                    "box": list(caption.box),
                    "mask": caption.mask,
                    text_field: caption.text,
                    "is_selected": bool(is_unique and confidence >= min_confidence),
                }
            )
    return lines


def make_recipe(model: str | None, data: Mapping[str, Any], steps: int, seed: int, is_scenes: bool) -> Any:
    """Return the recipe of a bundled model with other data, steps and seed, in one process and without extra losses."""
    from sca.io.toml import parse_toml
    from sca.training.recipe import Recipe, read_recipe_text

    name = "sca-tiny" if is_scenes else "sca-street"
    table = parse_toml(read_recipe_text(name))
    table["train"] |= {"steps": steps, "seed": seed, "num_processes": 1, "batch_size": 8, "save_steps": steps}
    table["train"] |= {"warmup_steps": steps // 20}
    table["loss"] |= {"attributes": 0.0, "feature_attributes": 0.0}
    return Recipe.from_dict(name, {**table, "model": model or table["model"], "data": data})


def run_seed(args: argparse.Namespace, seed: int, folder: Path) -> dict[str, int]:
    """Train the base model and all methods with one seed, and write their predictions.

    Args:
        args: Arguments of the command line.
        seed: Selects the labeled images and seeds the training.
        folder: Working folder. The predictions of each method are in a subfolder with its name.

    Returns:
        Numbers of found and of selected regions.
    """
    import sca_registry

    import sca
    from sca.evaluation.calibration import calibrate_checkpoint
    from sca.evaluation.predictions import PromptingOptions
    from sca.training.train import train

    is_scenes = args.data == "scenes"
    task = "caption" if is_scenes else "recognition"
    component = {"name": "scenes"} if is_scenes else {"name": "coco", "root": args.data}
    counts = (args.num_labeled, args.num_calibration, args.num_unlabeled)
    num_images = sum(counts)
    pool_options = {"num_images": num_images, "seed": seed} if is_scenes else {"root": args.data}
    pool = sca_registry.datasets.build(component["name"], "train", **pool_options)
    if len(pool) < num_images:
        raise SystemExit(f"{args.data} has {len(pool)} training images, fewer than the {num_images} requested")
    order = np.random.default_rng(seed).permutation(len(pool))[:num_images].tolist()
    samples = [pool[index] for index in order]
    paths = write_images(samples, folder / "images")
    unlabeled = slice(args.num_labeled + args.num_calibration, None)
    sources = {}
    for name, rows in (("labels", slice(args.num_labeled)), ("calibration", slice(args.num_labeled, unlabeled.start))):
        write_labels(samples[rows], paths[rows], folder / f"{name}.jsonl")
        sources[name] = {"name": "jsonl", "file": str(folder / f"{name}.jsonl")}
    labels = sources["labels"]

    base = folder / "base" / "model"
    train(make_recipe(None, {"labels": labels}, args.base_steps, seed, is_scenes), base.parent, resume=False)
    prompt_types = ("box", "mask-point", "box-and-point")
    calibrate_checkpoint(base, sources["calibration"], "train", prompt_types=prompt_types, train_split=None)
    regions = find_regions(base, paths[unlabeled], task, args.min_confidence)
    selected = [line for line in regions if line["is_selected"]]
    models = {BASE: base}
    for number, (method, lines) in enumerate(zip(METHODS, (selected, [], regions), strict=True)):
        data: dict[str, Any] = {"labels": labels}
        if lines:
            file = folder / f"regions-{number}.jsonl"
            write_file(file, "".join(json.dumps(line) + "\n" for line in lines))
            data["labels"] = {**labels, "weight": 1 - REGION_WEIGHT}
            data["regions"] = {"name": "jsonl", "file": str(file), "weight": REGION_WEIGHT}
        run = folder / f"method-{number}"
        train(make_recipe(str(base), data, args.steps, seed, is_scenes), run, resume=False)
        models[method] = run / "model"
    for method, model in models.items():
        sca.evaluate(
            model,
            {**component, "num_images": args.num_eval_images} if is_scenes else component,
            split="test" if is_scenes else "val",
            prompting=PromptingOptions(tasks=(task,)),
            folder=folder / method,
        )
    return {"num_found": len(regions), "num_selected": len(selected)}


def collect_scores(folders: Sequence[Path], kind: str) -> dict[str, Any]:
    """Score the predictions of all seeds.

    Args:
        folders: Working folder of each seed.
        kind: Key of `SCORE_LABELS`.

    Returns:
        By method: `scores`, the mean over seeds by score, and `differences`, those of the first method to it; see
        `compute_differences`.
    """
    from sca.evaluation.evaluate import score_file

    names = SCORE_LABELS[kind]
    metrics = sorted({name.partition("/")[0] for name in names})
    reports = {
        method: [score_file(folder / method / "predictions.jsonl", metrics) for folder in folders]
        for method in (*METHODS, BASE)
    }
    return {
        method: {
            "scores": {name: mean(each.scores[name] for each in each_seed) for name in names},
            "differences": compute_differences(reports[METHODS[0]], each_seed, names),
        }
        for method, each_seed in reports.items()
    }


def render_results(results: Mapping[str, Any]) -> str:
    """Render a Markdown table of scores, times 100, and of the differences of the first method to the others."""
    methods = results["methods"]
    differences = {f"difference to {method}": methods[method]["differences"] for method in (*METHODS[1:], BASE)}
    scores = {method: each["scores"] for method, each in methods.items()}
    return render_table(SCORE_LABELS[results["kind"]], scores, differences)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python benchmarks/studies/self_training.py", description=__doc__.split("\n")[0]
    )
    parser.add_argument("data", help='"scenes", or a folder of photographs in COCO format.')
    parser.add_argument("--num-labeled", type=int, default=40, help="Images with labels.")
    parser.add_argument("--num-calibration", type=int, default=60, help="Further images with labels, to calibrate.")
    parser.add_argument("--num-unlabeled", type=int, default=400, help="Images without labels.")
    parser.add_argument("--base-steps", type=int, default=800, help="Steps of the base model.")
    parser.add_argument("--steps", type=int, default=400, help="Further steps of each method.")
    parser.add_argument("--min-confidence", type=float, default=0.8, help="Minimum confidence of a selected region.")
    parser.add_argument("--num-seeds", type=int, default=3, help="Number of seeds.")
    parser.add_argument("--num-eval-images", type=int, default=200, help="Scenes for evaluation.")
    parser.add_argument("--out", type=Path, help="JSON file for the results.")
    args = parser.parse_args(arguments)

    import torch
    from sca_bench.worker import collect_environment

    torch.set_num_threads(1)
    kind = "scenes" if args.data == "scenes" else "photographs"
    names = (
        "num_labeled",
        "num_calibration",
        "num_unlabeled",
        "base_steps",
        "steps",
        "min_confidence",
        "num_eval_images",
    )
    with TemporaryDirectory() as temporary_folder:
        folders = [Path(temporary_folder, str(seed)) for seed in range(args.num_seeds)]
        counts = []
        for seed, folder in enumerate(folders):
            counts.append(run_seed(args, seed, folder))
            print(
                f"seed {seed}: {counts[-1]['num_selected']} of {counts[-1]['num_found']} regions selected", flush=True
            )
        results = {
            "kind": kind,
            **{name: getattr(args, name) for name in names},
            "regions": counts,
            "methods": collect_scores(folders, kind),
            "environment": collect_environment("cpu"),
        }
    print(render_results(results))
    write_results(results, args.out)


if __name__ == "__main__":
    main()
