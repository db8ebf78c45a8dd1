"""Progress messages of training."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback

from sca.io.score_format import format_score

VALIDATION_PREFIX = "validation_"  # prefix of validation scores in the trainer's logs


class TrainingLog(TrainerCallback):
    """Print one line on standard error per logging step and validation, and a progress bar on a terminal.

    Args:
        loss_names: Names of the losses that sum up to `loss`.
        best_metrics: Names of scores; the first that is a number is shown after each validation.
    """

    def __init__(self, loss_names: Collection[str], best_metrics: Sequence[str] = ()):
        self.loss_names = loss_names
        self.best_metrics = best_metrics

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.start_time: float = time.monotonic()
        self.first_step: int = state.global_step
        is_hidden = None if state.is_world_process_zero else True  # None: hidden unless standard error is a terminal
        self.bar: tqdm[Any] = tqdm(
            total=state.max_steps, initial=state.global_step, disable=is_hidden, dynamic_ncols=True
        )

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, float] | None = None, **_: Any) -> None:
        if logs is None or not state.is_world_process_zero:
            return
        seconds, steps = time.monotonic() - self.start_time, state.global_step - self.first_step
        remaining = seconds / steps * (state.max_steps - state.global_step) if steps else None
        line = format_logs(logs, state.global_step, state.max_steps, remaining, self.loss_names, self.best_metrics)
        if line:
            tqdm.write(line, file=sys.stderr)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar.close()
        if state.is_world_process_zero:
            seconds, steps = time.monotonic() - self.start_time, state.global_step - self.first_step
            tqdm.write(f"trained {steps} steps in {tqdm.format_interval(seconds)}", file=sys.stderr)


def format_logs(
    logs: Mapping[str, float],
    step: int,
    steps: int,
    remaining_seconds: float | None,
    loss_names: Collection[str] = (),
    best_metrics: Sequence[str] = (),
) -> str:
    """Format the trainer's logs of a step as one line; empty if they contain no loss and no score.

    Args:
        logs: As transformers' Trainer passes them to `on_log`.
        step: Steps done.
        steps: Total steps.
        remaining_seconds: Seconds left, if known.
        loss_names: See `TrainingLog`.
        best_metrics: See `TrainingLog`.

    Returns:
        One line without a newline.
    """
    step_text = f"step {step:>{len(str(steps))}}/{steps}"
    if "loss" in logs:
        loss_texts = ", ".join(f"{name} {logs[name]:.4g}" for name in loss_names if name in logs)
        columns = [f"loss {logs['loss']:.4g}" + (f" ({loss_texts})" if loss_texts else "")]
        columns += [f"learning rate {logs['learning_rate']:.2e}"] if "learning_rate" in logs else []
        columns += [f"{tqdm.format_interval(remaining_seconds)} left"] if remaining_seconds is not None else []
        return "  ".join([step_text, *columns])
    scores = {name: logs[f"{VALIDATION_PREFIX}{name}"] for name in best_metrics if f"{VALIDATION_PREFIX}{name}" in logs}
    metric = next((name for name, score in scores.items() if math.isfinite(score)), None)
    return f"{step_text}  validation {metric} {format_score(scores[metric])}" if metric else ""
