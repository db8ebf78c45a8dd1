"""Evaluation during training, which keeps the best model."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from sca_registry.contracts import Dataset
from sca_registry.messages import unknown
from transformers import TrainerCallback

from sca.checkpoints.native import save
from sca.evaluation.evaluate import evaluate
from sca.evaluation.predictions import Questions
from sca.io.atomic import write_file
from sca.io.json import read_json
from sca.training.log import VALIDATION
from sca.training.recipe import Validation
from sca.training.trainer import CaptionTrainer


class ValidationCallback(TrainerCallback):
    """Evaluates while training, logs the scores, and keeps the best model."""

    def __init__(
        self,
        trainer: CaptionTrainer,
        options: Validation,
        unseen: Dataset,
        folder: Path,
        report: Callable[[str], None] = lambda line: None,
    ):
        self.trainer, self.options, self.unseen, self.folder, self.report = trainer, options, unseen, folder, report
        self.questions = Questions(prompt=options.prompt)
        self.values: dict[str, list[float]] = {}  # of the scores that chose
        self.unusable: set[str] = set()  # scores of `best` that were not a number

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step % self.options.every == 0 or state.global_step == state.max_steps:
            logs = control.should_log
            self._validate(state.global_step)
            control.should_log = logs  # what one process logged here, all are still to log together

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        for metric, values in self.values.items():
            if len(values) > 1 and len(set(values)) == 1:
                self.report(
                    f"validate.best: {metric} was {values[0]:g} at all {len(values)} validations, so `best` is the "
                    "first of them; name another score, or validate on more images"
                )

    def _validate(self, step: int) -> None:
        model, options = self.trainer.model.model, self.options
        if self.trainer.args.world_size > 1:  # statistics of batches differ, and all are to ask the same model
            for buffer in model.buffers():
                torch.distributed.broadcast(buffer, 0)
        training = model.training
        folder = self.folder / "validation" / f"step-{step}"
        folder.mkdir(parents=True, exist_ok=True)
        scored = evaluate(
            model.eval(),
            self.unseen,
            options.split,
            questions=self.questions,
            metrics=options.metrics or None,
            limit=options.limit,
            folder=folder,
            overwrite=True,  # of a run that was ended between this step and its last checkpoint
        )
        model.train(training)
        if scored is not None:
            self._note(step, scored.scores)
        self.trainer.accelerator.wait_for_everyone()

    def _note(self, step: int, scores: Mapping[str, float]) -> None:
        scored = [name for name in self.options.best if name in scores]
        if not scored:
            raise unknown(f"validate.best is {list(self.options.best)}, and none was scored", "", scores)
        metric = next((name for name in scored if math.isfinite(scores[name])), None)
        self._report_unusable(scored, metric)
        note = self.folder / "best.json"
        if metric is not None:
            self.values.setdefault(metric, []).append(scores[metric])
            if self._is_best(metric, scores[metric], read_json(note) if note.exists() else None):
                save(self.trainer.model.model, self.folder / "best")
                write_file(note, json.dumps({"step": step, "metric": metric, "score": scores[metric]}))
        self.trainer.log({f"{VALIDATION}{name}": value for name, value in scores.items()})

    def _report_unusable(self, scored: Sequence[str], metric: str | None) -> None:
        """Report, once each, the scores of `best` that should have chosen and are not a number."""
        for name in scored if metric is None else scored[: scored.index(metric)]:
            if name not in self.unusable:
                self.unusable.add(name)
                instead = f"{metric} chooses `best`" if metric else "no model is kept as `best`"
                self.report(f"validate.best: {name} is not a number on this data; {instead}")

    def _is_best(self, metric: str, score: float, before: Mapping[str, Any] | None) -> bool:
        """Whether a model is better than the one that is kept; a score that is named earlier in `best` decides."""
        if before is None or before["metric"] == metric:
            return before is None or score > before["score"]
        order = list(self.options.best)
        return before["metric"] not in order or order.index(metric) < order.index(before["metric"])
