"""Pretrain a tiny model: `python benchmarks/pretraining/pretrain.py masks --out FOLDER [--street FOLDER] [...]`

Objectives of the encoder tiny-vit: masks (SAM), image-text (CLIP), masked-pixels (MAE), self-distillation (DINO).
Objective of the language model: language-model (GPT-2). Objective of the captioner: crop-captions (GIT). The data are
generated scenes and, with --street FOLDER, street photographs in COCO's format. Computes in one thread, and is
deterministic for a seed.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from sca_bench.worker import collect_environment

from crop_caption_objective import CropCaptionObjective, TinyGit
from image_text_objective import ImageTextObjective
from language_model_objective import LanguageModelObjective
from mask_objective import MaskObjective
from masked_pixel_objective import MaskedPixelObjective
from pretrained_folder import FOLDER_CONTENT, save_captioner, save_encoder, save_language_model
from pretraining_data import PretrainingData
from pretraining_loop import Objective, recompute_batch_norm, train_objective
from sca.encoders.tiny_vit import TinyVit
from sca.io.atomic import check_folder_replaceable
from sca.io.errors import InputError, OutputError
from sca.language_models.tiny_gpt2 import TinyGpt2
from self_distillation_objective import SelfDistillationObjective

OBJECTIVES: dict[str, type[Objective]] = {
    "masks": MaskObjective,
    "image-text": ImageTextObjective,
    "masked-pixels": MaskedPixelObjective,
    "self-distillation": SelfDistillationObjective,
    "language-model": LanguageModelObjective,
    "crop-captions": CropCaptionObjective,
}
ENCODER_OPTIONS: dict[str, Any] = {  # of all encoders, so that they differ in their objective only
    "image_size": 128,
    "hidden_size": 96,
    "depth": 4,
    "num_heads": 4,
    "output_channels": 96,
    "stem_channels": [32, 64],
    "stem_blocks": 1,
    "resize_mode": "pad",
}
LANGUAGE_MODEL_OPTIONS = {"hidden_size": 128, "depth": 3, "num_heads": 4, "max_positions": 96}
CAPTIONER_OPTIONS = {"image_size": 64, "patch_size": 8, "hidden_size": 96, "depth": 3, "num_heads": 4}
MODELS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {  # kind -> model and its default options
    "encoder": (TinyVit, ENCODER_OPTIONS),
    "language_model": (TinyGpt2, LANGUAGE_MODEL_OPTIONS),
    "captioner": (TinyGit, CAPTIONER_OPTIONS),
}
COMPONENTS = {"encoder": "tiny-vit", "language_model": "hf", "captioner": "crop-captioner"}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("objective", choices=OBJECTIVES, help="Training objective.")
    parser.add_argument("--out", type=Path, required=True, help="Folder for the weights.")
    parser.add_argument("--street", type=Path, help="Folder with train.json and train/, in COCO's format.")
    parser.add_argument("--steps", type=int, help="Optimizer steps. Default: those of the committed weights.")
    parser.add_argument("--seed", type=int, default=0, help="Random seed.")
    args = parser.parse_args(arguments)
    try:
        train_and_save(args.objective, args.out, args.street, args.steps, args.seed)
    except (InputError, OutputError) as error:
        sys.exit(f"error: {error}")


def train_and_save(
    objective_name: str,
    folder: Path,
    street: Path | None = None,
    steps: int | None = None,
    seed: int = 0,
    options: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Train a model and write its folder.

    Args:
        objective_name: One of `OBJECTIVES`.
        folder: New folder, or one that this function wrote.
        street: Folder of the street photographs; None for scenes only.
        steps: Optimizer steps; None for the default of the objective.
        seed: Random seed.
        options: Options of the model; None for those in `MODELS`.

    Returns:
        The facts about the training, as stored in `config.json`.

    Raises:
        InputError: The data cannot be read, or the loss is not finite.
        OutputError: The folder cannot be written.
    """
    check_folder_replaceable(folder, FOLDER_CONTENT)
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    start = time.process_time()
    objective_class = OBJECTIVES[objective_name]
    if steps is not None and steps < 1:
        raise InputError(f"--steps is {steps}; expected an integer of at least 1")
    steps = objective_class.default_steps if steps is None else steps
    data = PretrainingData(street)
    kind = objective_class.kind
    build_model, default_options = MODELS[kind]
    options = options or default_options
    objective = objective_class(build_model(**options), data)
    losses = train_objective(objective, steps, seed, lambda line: print(line, flush=True))
    segmenter = getattr(objective, "segmenter", None)
    if kind == "encoder" and segmenter is None:
        recompute_batch_norm(objective.encoder, data, seed)
    facts = {
        "objective": objective_name,
        "source": objective_class.source,
        "kind": kind,
        "component": COMPONENTS[kind],
        "segmenter": ("sam" if segmenter else "box") if kind == "encoder" else None,
        "steps": steps,
        "batch_size": objective_class.batch_size,
        "seed": seed,
        "cpu_seconds": round(time.process_time() - start, 1),
        "final_losses": {name: round(loss, 5) for name, loss in losses.items()},
        "data": data.describe_sources(),
        "versions": collect_environment("cpu")["versions"],
    }
    if kind == "encoder":
        save_encoder(folder, options, objective.encoder, segmenter, facts)
    elif kind == "language_model":
        save_language_model(folder, objective.language_model, facts)
    else:
        save_captioner(folder, objective.captioner, facts)
    return facts


if __name__ == "__main__":
    main()
