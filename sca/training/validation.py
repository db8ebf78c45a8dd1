"""Validation during training, which saves the best model."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from sca_registry.contracts import Dataset
from sca_registry.errors import make_unknown_name_error
from transformers import TrainerCallback

from sca.checkpoints.native import save
from sca.evaluation.evaluate import evaluate
from sca.evaluation.predictions import PromptingOptions
from sca.io.atomic import write_file
from sca.io.json import read_json
from sca.io.score_format import format_score
from sca.training.log import VALIDATION_PREFIX
from sca.training.recipe import ValidationOptions
from sca.training.trainer import CaptionTrainer


class ValidationCallback(TrainerCallback):
    """Evaluate during training, log the scores, and save the best model.

    Args:
        trainer: Trainer.
        options: Options of [validate].
        dataset: Validation dataset.
        folder: Run folder. It receives `validation/step-N`, `best` and `best.json`.
        report: Called with each message for the user.
    """

    def __init__(
        self,
        trainer: CaptionTrainer,
        options: ValidationOptions,
        dataset: Dataset,
        folder: Path,
        report: Callable[[str], None] = lambda line: None,
    ):
        self.trainer = trainer
        self.options = options
        self.dataset = dataset
        self.folder = folder
        self.report = report
        self.prompting: PromptingOptions = PromptingOptions(prompt_type=options.prompt_type)
        self.best_scores: dict[str, list[float]] = {}  # by score that selected the best model
        self.reported_metrics: set[str] = set()  # scores that were NaN or infinite

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step % self.options.eval_steps == 0 or state.global_step == state.max_steps:
            logs = control.should_log
            self._run_validation(state.global_step)
            control.should_log = logs  # only the first process logs here; all processes must still log the step

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        for metric, values in self.best_scores.items():
            if len(values) > 1 and len(set(values)) == 1:
                self.report(
                    f"validate.metric_for_best_model: {metric} was {format_score(values[0])} in all {len(values)} "
                    "validations, so `best` is the first model; choose another score, or validate on more images"
                )

    def _run_validation(self, step: int) -> None:
        model, options = self.trainer.model.model, self.options
        if self.trainer.args.world_size > 1:  # batch norm statistics differ; all processes must evaluate the same model
            for buffer in model.buffers():
                torch.distributed.broadcast(buffer, 0)
        training = model.training
        folder = self.folder / "validation" / f"step-{step}"
        folder.mkdir(parents=True, exist_ok=True)
        result = evaluate(
            model.eval(),
            self.dataset,
            options.split,
            prompting=self.prompting,
            metrics=options.metrics or None,
            max_images=options.max_images,
            folder=folder,
            overwrite=True,  # left by a run that ended between this step and its last checkpoint
        )
        model.train(training)
        if result is not None:
            self._record_scores(step, result.scores)
        self.trainer.accelerator.wait_for_everyone()

    def _record_scores(self, step: int, scores: Mapping[str, float]) -> None:
        scored_metrics = [name for name in self.options.metric_for_best_model if name in scores]
        if not scored_metrics:
            raise make_unknown_name_error(
                f"validate.metric_for_best_model is {list(self.options.metric_for_best_model)}, and none was computed",
                "",
                scores,
            )
        metric = next((name for name in scored_metrics if math.isfinite(scores[name])), None)
        self._report_unusable_metrics(scored_metrics, metric)
        best_file = self.folder / "best.json"
        if metric is not None:
            self.best_scores.setdefault(metric, []).append(scores[metric])
            if self._is_best(metric, scores[metric], read_json(best_file) if best_file.exists() else None):
                save(self.trainer.model.model, self.folder / "best")
                write_file(best_file, json.dumps({"step": step, "metric": metric, "score": scores[metric]}))
        self.trainer.log({f"{VALIDATION_PREFIX}{name}": value for name, value in scores.items()})

    def _report_unusable_metrics(self, scored_metrics: Sequence[str], metric: str | None) -> None:
        """Report, once each, the scores that could not select a model because they are not finite."""
        for name in scored_metrics if metric is None else scored_metrics[: scored_metrics.index(metric)]:
            if name not in self.reported_metrics:
                self.reported_metrics.add(name)
                consequence = f"{metric} selects `best`" if metric else "no model is saved as `best`"
                self.report(f"validate.metric_for_best_model: {name} is NaN or infinite on this data; {consequence}")

    def _is_best(self, metric: str, score: float, previous: Mapping[str, Any] | None) -> bool:
        """Return whether a model is better than the saved one; earlier metrics of the option take precedence."""
        if previous is None or previous["metric"] == metric:
            return previous is None or score > previous["score"]
        order = list(self.options.metric_for_best_model)
        return previous["metric"] not in order or order.index(metric) < order.index(previous["metric"])
