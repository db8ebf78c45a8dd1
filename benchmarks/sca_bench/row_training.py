"""Train the model of a row stage by stage, and share trained models between the rows of a sweep."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from transformers.trainer_utils import get_last_checkpoint

from sca.checkpoints.load import load
from sca.io.atomic import write_folder
from sca.io.json import read_json
from sca.model import SegmentCaptioner
from sca.training.recipe import Recipe
from sca.training.train import train
from sca_bench.row import SweepRow

FEATURES_FOLDER, MODELS_FOLDER, RUNS_FOLDER = "features", "models", "runs"  # in the results folder
MODEL_NAME, LOG_NAME = "model", "stage.json"


class TrainedStage(NamedTuple):
    """A trained stage: its folder with the model, losses by step, seconds, and whether another row has trained it."""

    folder: Path
    losses: list[tuple[int, float]]
    seconds: float
    is_reused: bool


def train_stages(sweep_row: SweepRow, work_folder: Path, results_folder: Path) -> list[TrainedStage]:
    """Train every stage of a row, except those that another row has trained and kept.

    Args:
        sweep_row: Row with training.
        work_folder: Folder for the training runs.
        results_folder: Results folder of the sweep, with the features and models that rows share.

    Returns:
        The stages. The last one has the model of the row.

    Raises:
        ValueError: A recipe, or something it refers to, is invalid.
    """
    stages: list[TrainedStage] = []
    keeps_models = sweep_row.config["train"].get("keep_models", False)
    recipes = sweep_row.make_recipes(str(results_folder / FEATURES_FOLDER))
    if sweep_row.stop_step is not None:
        return [_train_to_step(recipes[0], sweep_row, work_folder, results_folder)]
    for recipe, key in zip(recipes, sweep_row.make_stage_keys(), strict=True):
        if stages:
            recipe = replace(recipe, model=str(stages[-1].folder / MODEL_NAME))
        kept_folder = results_folder / MODELS_FOLDER / key
        if not kept_folder.is_dir():
            _train_stage(recipe, work_folder / recipe.name, kept_folder if keeps_models else None)
        folder = kept_folder if keeps_models else work_folder / recipe.name
        stages.append(_read_stage(folder, is_reused=not (work_folder / recipe.name).is_dir()))
    return stages


def _train_to_step(recipe: Recipe, sweep_row: SweepRow, work_folder: Path, results_folder: Path) -> TrainedStage:
    """Train to the step of a row, from where an earlier row has stopped the same training run."""
    assert sweep_row.stop_step is not None
    folder = results_folder / RUNS_FOLDER / sweep_row.make_stage_keys()[0]
    first_step = _find_last_step(folder)
    if first_step > sweep_row.stop_step:  # the run is further
        folder, first_step = work_folder / recipe.name, 0
    start = time.perf_counter()
    train(recipe, folder, stop_step=sweep_row.stop_step, allow_external=True)
    losses = [(step, loss) for step, loss in _iter_losses(folder) if step > first_step]
    return TrainedStage(folder, losses, time.perf_counter() - start, is_reused=False)


def _find_last_step(folder: Path) -> int:
    """Return the last step that a training run has saved; 0 for none."""
    checkpoint = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    return int(checkpoint.rpartition("-")[2]) if checkpoint else 0


def load_trained_model(stages: list[TrainedStage]) -> SegmentCaptioner:
    """Load the model of the last stage.

    Args:
        stages: Stages as returned by `train_stages`.

    Returns:
        The model.

    Raises:
        FloatingPointError: A weight is not finite.
    """
    model = load(str(stages[-1].folder / MODEL_NAME), allow_external=True)
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise FloatingPointError(f"{name} is not finite after training")
    return model


def _train_stage(recipe: Recipe, folder: Path, kept_folder: Path | None) -> None:
    start = time.perf_counter()
    train(recipe, folder, resume=False, allow_external=True)
    log = {"losses": [*_iter_losses(folder)], "seconds": time.perf_counter() - start}
    (folder / LOG_NAME).write_text(json.dumps(log), "utf-8")
    if kept_folder is not None:
        with write_folder(kept_folder, (MODEL_NAME, LOG_NAME)) as draft:
            shutil.copytree(folder / MODEL_NAME, draft / MODEL_NAME)
            shutil.copy(folder / LOG_NAME, draft)


def _read_stage(folder: Path, is_reused: bool) -> TrainedStage:
    log = read_json(folder / LOG_NAME)
    return TrainedStage(folder, log["losses"], log["seconds"], is_reused)


def _iter_losses(training_folder: Path) -> Iterator[tuple[int, float]]:
    checkpoint = get_last_checkpoint(str(training_folder))
    for each in read_json(Path(checkpoint) / "trainer_state.json")["log_history"] if checkpoint else []:
        if "loss" in each:
            yield each["step"], each["loss"]
