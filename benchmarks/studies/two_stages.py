"""Models that learn class names of many scenes and then captions of few, or the few captions alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

MODEL = {
    "encoder": {"name": "tiny-vit", "size": 128},
    "segmenter": {"name": "sam", "depth": 2, "heads": 4, "mlp": 256, "drawn": True},
    "mixer": {"name": "query", "queries": 4, "depth": 2, "heads": 4, "mlp": 256, "pooled": True},
    "language_model": "tiny-gpt2",
    "task_tokens": 2,
    "trainable": ["encoder", "segmenter", "mixer", "projection", "task_tokens", "language_model"],
}
SHARED = {"images": 8, "learning_rate": 1e-3, "adam_beta2": 0.98, "weight_decay": 0.02, "warmup": 30, "jitter": 0.03}
FEW, MANY, SIZE = 8, 4000, 128  # scenes with captions, scenes with names, pixels
WAYS = ("names, then captions", "captions", "captions, as many steps")
METRICS = ("cider-d", "attributes", "mask-iou")


def stage(start: Any, steps: int, seed: int, few: int | None) -> dict[str, Any]:
    """The table of a recipe: captions of few scenes, or names of many."""
    names = few is None
    source = {"name": "scenes", "size": SIZE, "count": few or MANY, "seed": 1 if names else 2}
    if names:
        source["names"] = "caption"
    options = {**SHARED, "steps": steps, "seed": seed, "save": steps, "recognition": 1.0 if names else 0.0}
    return {"model": start, "data": {"scenes": source}, "train": options}


def work(config: Mapping[str, Any], folder: str) -> dict[str, Any]:
    """One model, trained and evaluated in a process of its own; leaves `predictions.jsonl` in the folder."""
    import torch

    from sca.evaluation.evaluate import evaluate
    from sca.training.recipe import Recipe
    from sca.training.train import train

    torch.set_num_threads(1)
    left, first, second, seed = Path(folder), config["first"], config["second"], config["seed"]
    start: Any = MODEL
    if config["way"] == WAYS[0]:
        train(Recipe.from_dict("names", stage(MODEL, first, seed, None)), left / "names", resume=False)
        start = str(left / "names/model")
    steps = first + second if config["way"] == WAYS[2] else second
    recipe = Recipe.from_dict("captions", stage(start, steps, seed, config["few"]))
    model = train(recipe, left / "few", resume=False)
    asked = {"name": "scenes", "size": SIZE, "count": config["scenes"]}
    report = evaluate(model, asked, "val", metrics=METRICS, folder=folder)
    return {"state": "done", "scores": report.scores}
