"""Train models on class names of many scenes and then captions of a few, or only on the few captions."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

MODEL_SPEC = {
    "encoder": {"name": "tiny-vit", "image_size": 128},
    "segmenter": {"name": "sam", "depth": 2, "num_heads": 4, "mlp_dim": 256, "box_masks": True},
    "mixer": {
        "name": "query",
        "num_queries": 4,
        "depth": 2,
        "num_heads": 4,
        "mlp_dim": 256,
        "mask_pooling": True,
    },
    "language_model": "tiny-gpt2",
    "task_tokens": 2,
    "trainable": ["encoder", "segmenter", "mixer", "projection", "task_tokens", "language_model"],
}
SHARED_OPTIONS = {
    "batch_size": 8,
    "learning_rate": 1e-3,
    "adam_beta2": 0.98,
    "weight_decay": 0.02,
    "warmup_steps": 30,
    "box_jitter": 0.03,
}
NUM_CAPTIONED_SCENES, NUM_NAMED_SCENES, IMAGE_SIZE = 8, 4000, 128  # scenes with captions, scenes with names, pixels
METHODS = ("class names, then captions", "captions only", "captions only, equal steps")
METRICS = ("cider-d", "attributes", "mask-iou")


def make_stage_recipe(initial_model: Any, steps: int, seed: int, num_captioned_scenes: int | None) -> dict[str, Any]:
    """Return the recipe table of one stage: captions of a few scenes, or class names of many."""
    learns_names = num_captioned_scenes is None
    source = {
        "name": "scenes",
        "size": IMAGE_SIZE,
        "num_images": num_captioned_scenes or NUM_NAMED_SCENES,
        "seed": 1 if learns_names else 2,
    }
    if learns_names:
        source["class_name_task"] = "caption"
    options = {
        **SHARED_OPTIONS,
        "steps": steps,
        "seed": seed,
        "save_steps": steps,
        "class_name_prob": 1.0 if learns_names else 0.0,
    }
    return {"model": initial_model, "data": {"scenes": source}, "train": options}


def run_job(config: Mapping[str, Any], folder: str) -> dict[str, Any]:
    """Train and evaluate one model as a launcher job; writes `predictions.jsonl` to the folder."""
    import torch

    from sca.evaluation.evaluate import evaluate
    from sca.training.recipe import Recipe
    from sca.training.train import train

    torch.set_num_threads(1)
    folder_path, name_steps, caption_steps, seed = (
        Path(folder),
        config["name_steps"],
        config["caption_steps"],
        config["seed"],
    )
    initial_model: Any = MODEL_SPEC
    if config["method"] == METHODS[0]:
        train(
            Recipe.from_dict("names", make_stage_recipe(MODEL_SPEC, name_steps, seed, None)),
            folder_path / "names",
            resume=False,
        )
        initial_model = str(folder_path / "names/model")
    steps = name_steps + caption_steps if config["method"] == METHODS[2] else caption_steps
    recipe = Recipe.from_dict("captions", make_stage_recipe(initial_model, steps, seed, config["num_captioned_scenes"]))
    model = train(recipe, folder_path / "captions", resume=False)
    dataset = {"name": "scenes", "image_size": IMAGE_SIZE, "num_images": config["num_eval_scenes"]}
    report = evaluate(model, dataset, "val", metrics=METRICS, folder=folder)
    return {"state": "done", "scores": report.scores}
