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
from sca.io.atomic import write_file, write_folder
from sca.io.file_lock import wait_for_lock
from sca.io.json import read_json
from sca.model import SegmentCaptioner
from sca.training.recipe import Recipe
from sca.training.train import read_checkpoint_step, train
from sca_bench.row import SweepRow

FEATURES_FOLDER, MODELS_FOLDER, RUNS_FOLDER = "features", "models", "runs"  # in the results folder
MODEL_NAME, LOG_NAME = "model", "stage.json"


class TrainedStage(NamedTuple):
    """A trained stage.

    Attributes:
        folder: Folder with the model.
        losses: Losses by step, from the first step.
        seconds: Time of the training, from the first step.
        own_seconds: Time of this process, which trained or waited for another one; the rest was spent by other rows.
    """

    folder: Path
    losses: list[tuple[int, float]]
    seconds: float
    own_seconds: float


def train_stages(sweep_row: SweepRow, work_folder: Path, results_folder: Path) -> list[TrainedStage]:
    """Train every stage of a row, except those that another row has trained and kept.

    Args:
        sweep_row: Row with training.
        work_folder: Folder for the training runs of this row.
        results_folder: Results folder of the sweep, with the features and models that rows share.

    Returns:
        The stages. The last one has the model of the row.

    Raises:
        ValueError: A recipe, or something it refers to, is invalid.
    """
    stages: list[TrainedStage] = []
    recipes = sweep_row.make_recipes(str(results_folder / FEATURES_FOLDER))
    for recipe, key in zip(recipes, sweep_row.make_stage_keys(), strict=True):
        start = time.perf_counter()
        folder = work_folder / recipe.name
        if stages:
            recipe = replace(recipe, model=str(stages[-1].folder / MODEL_NAME))
        if sweep_row.keeps_models:
            folder = _share_stage(recipe, key, sweep_row.stop_step, work_folder, results_folder)
        else:
            _train_stage(recipe, folder)
        log = read_json(folder / LOG_NAME)
        stages.append(TrainedStage(folder, log["losses"], log["seconds"], time.perf_counter() - start))
    return stages


def load_trained_model(stages: list[TrainedStage]) -> SegmentCaptioner:
    """Load the model of the last stage.

    Args:
        stages: Stages as returned by `train_stages`.

    Returns:
        The model.

    Raises:
        NonFiniteWeightsError: A weight is not finite.
    """
    return load(str(stages[-1].folder / MODEL_NAME), allow_external=True)


def _share_stage(recipe: Recipe, key: str, stop_step: int | None, work_folder: Path, results_folder: Path) -> Path:
    """Return the folder of a kept stage, after training it unless another row has; waits for a row that trains it."""
    models_folder = results_folder / MODELS_FOLDER
    kept_folder = models_folder / (key if stop_step is None else f"{key}-{stop_step}")
    models_folder.mkdir(parents=True, exist_ok=True)
    with wait_for_lock(models_folder / f"{key}.lock"):
        if not kept_folder.is_dir():
            training_folder = work_folder / recipe.name
            shared_run = results_folder / RUNS_FOLDER / key
            if stop_step is not None and read_checkpoint_step(shared_run) <= stop_step:
                training_folder = shared_run
            _train_stage(recipe, training_folder, stop_step)
            with write_folder(kept_folder, (MODEL_NAME, LOG_NAME)) as draft:
                shutil.copytree(training_folder / MODEL_NAME, draft / MODEL_NAME)
                shutil.copy(training_folder / LOG_NAME, draft)
    return kept_folder


def _train_stage(recipe: Recipe, folder: Path, stop_step: int | None = None) -> None:
    """Train, and write the losses and seconds from the first step beside the model.

    With a stop, an earlier run in the folder continues.
    """
    log_path = folder / LOG_NAME
    earlier_seconds = read_json(log_path)["seconds"] if log_path.is_file() else 0.0
    start = time.perf_counter()
    train(recipe, folder, resume=stop_step is not None, stop_step=stop_step, allow_external=True)
    log = {"losses": [*_iter_losses(folder)], "seconds": earlier_seconds + time.perf_counter() - start}
    write_file(log_path, json.dumps(log))


def _iter_losses(training_folder: Path) -> Iterator[tuple[int, float]]:
    checkpoint = get_last_checkpoint(str(training_folder))
    for each in read_json(Path(checkpoint) / "trainer_state.json")["log_history"] if checkpoint else []:
        if "loss" in each:
            yield each["step"], each["loss"]
