"""Measure pretrained parts: `python benchmarks/pretraining/pretraining_probe.py [--street FOLDER] [--out FILE]`

Linear classifiers of region features predict the attributes of unseen scenes and, with --street, the class of regions
in unseen photographs. The features of a region are those of the encoder for the whole image, averaged under its mask.
For comparison: the same encoder with random weights and the batch-norm statistics of these images, and the most
frequent value. Differences to random weights have 95% intervals over images. Also measures the masks of a pretrained
segmenter, and the loss of the language model on unseen texts.
Prints Markdown tables.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sca_bench.worker import collect_environment
from sca_registry.contracts import Dataset, Sample
from torch import Tensor
from torch.nn import functional as F

from language_model_objective import compute_token_loss, draw_block
from pretraining_data import PretrainingData, load_street_photographs
from pretraining_loop import recompute_batch_norm
from sca.data.scenes import Scenes
from sca.encoders.tiny_vit import TinyVit
from sca.evaluation.bootstrap import bootstrap_scores, compute_interval, make_mean_statistics
from sca.evaluation.evaluate import evaluate
from sca.evaluation.predictions import PromptingOptions
from sca.inference.factory import load_captioner
from sca.inference.processor import Processor
from sca.io.atomic import write_file
from sca.io.json import read_json
from sca.io.masks import decode_rle
from sca.io.score_format import format_interval, format_score
from sca.language_models.hf import HfLanguageModel
from sca.nn.masks import pool_under_masks

PRETRAINED = Path(__file__).resolve().parents[1] / "pretrained"
SCENE_ATTRIBUTES = ("color", "shape", "size", "texture")
RANDOM_LABEL, FREQUENT_LABEL = "random weights", "most frequent value"
PROMPT_TYPES = ("box", "mask-point")
IMAGES_PER_BATCH = 32
WEIGHT_PENALTY = 1e-3  # of the classifiers, on standardized features
NUM_TEXT_BLOCKS = 64


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--pretrained", type=Path, default=PRETRAINED, help="Folder of the folders of weights.")
    parser.add_argument("--street", type=Path, help="Folder of street photographs in COCO's format.")
    parser.add_argument("--num-scenes", type=int, default=500, help="Scenes to fit on, and as many to test on.")
    parser.add_argument("--out", type=Path, help="JSON file for the results.")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    results = probe_folders(args.pretrained, args.street, args.num_scenes)
    print(render_results(results))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_file(args.out, json.dumps(results, indent=1) + "\n")


def probe_folders(pretrained: Path, street: Path | None, num_scenes: int) -> dict[str, Any]:
    """Measure all folders of weights.

    Args:
        pretrained: Folder of the folders.
        street: Folder of the street photographs; None to leave them out.
        num_scenes: Scenes to fit on, and as many to test on.

    Returns:
        The content of the results file.
    """
    configs = {folder.name: read_json(folder / "config.json") for folder in sorted(pretrained.iterdir())}
    names = [name for name, config in configs.items() if config["training"]["kind"] == "encoder"]
    folders = {name: pretrained / name for name in names}
    datasets: dict[str, tuple[Dataset, Dataset]] = {"scenes": (Scenes("val", num_scenes), Scenes("test", num_scenes))}
    if street:
        datasets["street"] = (load_street_photographs(street, "train"), load_street_photographs(street, "val"))
    torch.manual_seed(0)
    encoders = {name: TinyVit(weights=str(folder)) for name, folder in folders.items()}
    encoders[RANDOM_LABEL] = TinyVit(weights=str(folders[names[0]]), pretrained=False)
    recompute_batch_norm(encoders[RANDOM_LABEL], PretrainingData(street), seed=0)
    accuracies: dict[str, dict[str, float]] = {name: {} for name in (*encoders, FREQUENT_LABEL)}
    differences: dict[str, dict[str, list[float]]] = {name: {} for name in names}
    num_regions: dict[str, list[int]] = {}
    for source, (fit_dataset, test_dataset) in datasets.items():
        is_correct: dict[tuple[str, str], np.ndarray] = {}
        for name, encoder in encoders.items():
            fit_features, fit_labels, _ = collect_region_features(encoder.eval(), fit_dataset)
            test_features, test_labels, image_indices = collect_region_features(encoder, test_dataset)
            for attribute, values in fit_labels.items():
                predicted = fit_and_predict(fit_features, values, test_features)
                is_correct[name, attribute] = predicted == test_labels[attribute]
                accuracies[name][f"{source}/{attribute}"] = float(np.mean(is_correct[name, attribute]))
        for name in names:
            for attribute in fit_labels:
                gains = is_correct[name, attribute].astype(float) - is_correct[RANDOM_LABEL, attribute]
                interval = compute_interval(bootstrap_scores(make_mean_statistics(gains), image_indices))
                assert interval is not None  # no value is NaN
                differences[name][f"{source}/{attribute}"] = [float(gains.mean()), *interval]
        for attribute, values in fit_labels.items():
            unique, counts = np.unique(values, return_counts=True)
            is_frequent = test_labels[attribute] == unique[counts.argmax()]
            accuracies[FREQUENT_LABEL][f"{source}/{attribute}"] = float(np.mean(is_frequent))
        num_regions[source] = [len(fit_features), len(test_features)]
    return {
        "accuracies": accuracies,
        "differences": differences,
        "num_regions": num_regions,
        "mask_iou": {
            name: measure_masks(folders[name], street, num_scenes)
            for name in names
            if configs[name]["training"]["segmenter"] == "sam"
        },
        "token_loss": {
            name: measure_language_model(pretrained / name, [test for _, test in datasets.values()])
            for name, config in configs.items()
            if config["training"]["kind"] == "language_model"
        },
        "environment": collect_environment("cpu"),
    }


@torch.inference_mode()
def collect_region_features(encoder: TinyVit, dataset: Dataset) -> tuple[Tensor, dict[str, np.ndarray], np.ndarray]:
    """Return the features of all regions, (N, C), their values by attribute, and the indices of their images, (N,)."""
    processor = Processor.from_encoder(encoder)
    features: list[Tensor] = []
    image_indices: list[int] = []
    labels: dict[str, list[str]] = {}
    for start in range(0, len(dataset), IMAGES_PER_BATCH):
        samples = [dataset[index] for index in range(start, min(start + IMAGES_PER_BATCH, len(dataset)))]
        grids = encoder(processor.preprocess_images([sample.image for sample in samples]))
        for index, (grid, sample) in enumerate(zip(grids, samples, strict=True), start):
            frame = processor.compute_frame(*sample.image.size)
            regions = [region for region in sample.regions if region.mask is not None]
            if not regions:
                continue
            masks = torch.stack([processor.compute_coverage(decode_rle(region.mask), frame) for region in regions])
            features.append(pool_under_masks(grid[None], torch.zeros(len(regions), dtype=torch.long), masks))
            image_indices += [index] * len(regions)
            for region in regions:
                values = {name: region.attributes[name] for name in SCENE_ATTRIBUTES} if region.attributes else {}
                for name, value in (values or {"class": region.name}).items():
                    labels.setdefault(name, []).append(value)
    return torch.cat(features), {name: np.array(values) for name, values in labels.items()}, np.array(image_indices)


def fit_and_predict(fit_features: Tensor, fit_values: np.ndarray, test_features: Tensor) -> np.ndarray:
    """Fit a linear classifier by logistic regression and return its predictions.

    Args:
        fit_features: (N, C) features to fit on.
        fit_values: (N,) their values.
        test_features: (M, C) other features.

    Returns:
        (M,) predicted values.
    """
    mean, std = fit_features.mean(0), fit_features.std(0) + 1e-6
    inputs, test_inputs = (fit_features - mean) / std, (test_features - mean) / std
    unique, indices = np.unique(fit_values, return_inverse=True)
    targets = torch.from_numpy(indices)
    weight = torch.zeros(len(unique), inputs.shape[1], requires_grad=True)
    bias = torch.zeros(len(unique), requires_grad=True)
    optimizer = torch.optim.LBFGS((weight, bias), max_iter=200, line_search_fn="strong_wolfe")

    def compute_loss() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(F.linear(inputs, weight, bias), targets) + WEIGHT_PENALTY * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(compute_loss)
    with torch.inference_mode():
        return unique[F.linear(test_inputs, weight, bias).argmax(1).numpy()]


def measure_masks(folder: Path, street: Path | None, num_scenes: int) -> dict[str, float]:
    """Return the mean IoU of the masks of unseen regions by "SOURCE/PROMPT_TYPE"."""
    captioner = load_captioner({"name": "none", "encoder": {"name": "tiny-vit", "weights": str(folder)}})
    datasets: dict[str, tuple[dict[str, Any], str]] = {"scenes": ({"name": "scenes", "num_images": num_scenes}, "test")}
    if street:
        datasets["street"] = ({"name": "coco", "root": str(street)}, "val")
    scores = {}
    for source, (dataset, split) in datasets.items():
        for prompt_type in PROMPT_TYPES:
            prompting = PromptingOptions(prompt_type=prompt_type)
            report = evaluate(captioner, dataset, split, prompting=prompting, metrics=["mask-iou"])
            assert report is not None  # a single process
            scores[f"{source}/{prompt_type}"] = report.scores["mask-iou/mean"]
    return scores


@torch.inference_mode()
def measure_language_model(folder: Path, datasets: Sequence[Dataset]) -> dict[str, float]:
    """Return the loss per token in nats on texts of the datasets, with the weights and with random ones."""
    torch.manual_seed(0)
    losses = {}
    for label, pretrained in (("pretrained", True), (RANDOM_LABEL, False)):
        language_model = HfLanguageModel(str(folder), pretrained=pretrained, tokenizer=str(folder)).eval()
        rng = np.random.default_rng(0)
        length = language_model.model.config.n_positions

        def draw_sample(rng: np.random.Generator = rng) -> Sample:
            samples = datasets[rng.integers(len(datasets))]
            return samples[int(rng.integers(len(samples)))]

        blocks = [draw_block(draw_sample, language_model.tokenizer, length, rng) for _ in range(NUM_TEXT_BLOCKS)]
        losses[label] = compute_token_loss(language_model, torch.tensor(blocks)).item()
    return losses


def render_results(results: Mapping[str, Any]) -> str:
    """Render Markdown tables of accuracies and mask IoU, times 100, and of losses per token."""
    accuracies = results["accuracies"]
    tables = [
        render_table("encoder", {name: format_scores(scores) for name, scores in accuracies.items()}),
        render_table(
            "difference to random weights (95% CI)",
            {name: format_differences(values) for name, values in results["differences"].items()},
        ),
        render_table("masks", {name: format_scores(scores) for name, scores in results["mask_iou"].items()}),
        render_table(
            "loss per token",
            {
                name: {label: f"{loss:.3f}" for label, loss in losses.items()}
                for name, losses in results["token_loss"].items()
            },
        ),
    ]
    return "\n\n".join(table for table in tables if table)


def format_scores(scores: Mapping[str, float]) -> dict[str, str]:
    return {name.replace("/", ": "): format_score(value) for name, value in scores.items()}


def format_differences(differences: Mapping[str, Sequence[float]]) -> dict[str, str]:
    return {
        name.replace("/", ": "): f"{format_score(value, signed=True)} ({format_interval(low, high, signed=True)})"
        for name, (value, low, high) in differences.items()
    }


def render_table(title: str, rows: Mapping[str, Mapping[str, str]]) -> str:
    """Render a table with one row per name and the columns of the first; "" without rows."""
    if not rows:
        return ""
    columns = list(next(iter(rows.values())))
    header = [f"| {title} | {' | '.join(columns)} |", "| --- |" + " ---: |" * len(columns)]
    return "\n".join(
        [*header, *(f"| {name} | {' | '.join(row[column] for column in columns)} |" for name, row in rows.items())]
    )


if __name__ == "__main__":
    main()
