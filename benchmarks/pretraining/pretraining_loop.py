"""Training loop of all objectives: AdamW with warmup and cosine decay, in one process."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim.swa_utils import update_bn

from pretraining_data import PretrainingData, preprocess_images
from sca.encoders.tiny_vit import TinyVit
from sca.io.errors import InputError

WARMUP_FRACTION = 0.05  # of the steps
REPORTS_PER_RUN = 20
WEIGHT_DECAY = 0.05
MAX_GRAD_NORM = 3.0


class Objective(nn.Module, ABC):
    """What is trained, on which batches, and with which loss.

    Attributes:
        default_steps: Steps of the committed checkpoint.
        batch_size: Images, pairs or texts per step.
        learning_rate: Peak learning rate.
        source: Paper.
        kind: Kind of the trained component: encoder, language_model or captioner.
    """

    default_steps: int
    batch_size: int
    learning_rate: float = 1e-3
    source: str
    kind: str = "encoder"

    def prepare(self, steps: int, seed: int) -> None:
        """Prepare the data of a run."""

    @abstractmethod
    def draw_batch(self, step: int, rng: np.random.Generator) -> Any:
        """Draw the inputs of a step, from 0."""

    @abstractmethod
    def compute_losses(self, batch: Any) -> dict[str, Tensor]:
        """Return the losses to add up."""

    def finish_step(self, progress: float) -> None:
        """Update what has no gradient, after the step of the optimizer; `progress` is in (0, 1]."""


def train_objective(
    objective: Objective, steps: int, seed: int, report: Callable[[str], None] = print
) -> dict[str, float]:
    """Train an objective.

    Args:
        objective: Objective.
        steps: Optimizer steps.
        seed: Seed of the batches; the caller seeds the weights.
        report: Called with lines about the losses.

    Returns:
        The mean of each loss over the last tenth of the steps.

    Raises:
        InputError: A loss is not finite.
    """
    objective.prepare(steps, seed)
    objective.train()
    decaying, others = [], []
    for parameter in objective.parameters():
        if parameter.requires_grad:
            (decaying if parameter.dim() > 1 else others).append(parameter)
    groups = [{"params": decaying, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=objective.learning_rate, betas=(0.9, 0.98))
    warmup_steps = max(1, round(WARMUP_FRACTION * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warmup_steps, 0.5 * (1 + np.cos(np.pi * min(1, step / steps)))),
    )
    history: list[dict[str, float]] = []
    report_interval = max(1, steps // REPORTS_PER_RUN)
    start = time.process_time()
    for step in range(steps):
        losses = objective.compute_losses(objective.draw_batch(step, np.random.default_rng([seed, step])))
        total = torch.stack(list(losses.values())).sum()
        if not total.isfinite():
            raise InputError(f"the loss of step {step + 1} is {total.item()}; use a lower learning rate")
        optimizer.zero_grad(set_to_none=True)
        total.backward()
        clip_grad_norm_([*decaying, *others], MAX_GRAD_NORM)
        optimizer.step()
        schedule.step()
        objective.finish_step((step + 1) / steps)
        history.append({name: loss.item() for name, loss in losses.items()})
        if (step + 1) % report_interval == 0:
            means = average_losses(history[-report_interval:])
            text = ", ".join(f"{name} {value:.4f}" for name, value in means.items())
            report(f"step {step + 1}/{steps}: {text} ({time.process_time() - start:.0f} CPU seconds)")
    objective.eval()
    return average_losses(history[-max(1, steps // 10) :])


def average_losses(history: list[dict[str, float]]) -> dict[str, float]:
    return {name: float(np.mean([losses[name] for losses in history])) for name in history[0]}


def encode_small_images(encoder: TinyVit, pixel_values: Tensor, corner: tuple[int, int]) -> Tensor:
    """Encode images smaller than the encoder's input, with the position embeddings of a window of its grid.

    Args:
        encoder: Encoder.
        pixel_values: (B, 3, s, s) images, s at most S and a multiple of the stride.
        corner: Row and column of the window's top left cell.

    Returns:
        Features (B, C, s / 8, s / 8).
    """
    grid_size, cells = encoder.image_format.size // encoder.stride, pixel_values.shape[-1] // encoder.stride
    row, column = corner
    positions = encoder.position.unflatten(1, (grid_size, grid_size))[:, row : row + cells, column : column + cells]
    return torch.func.functional_call(encoder, {"position": positions.flatten(1, 2)}, (pixel_values,))


def draw_corner(encoder: TinyVit, size: int, rng: np.random.Generator) -> tuple[int, int]:
    """Draw the corner of a random window of the grid, for images of `size` pixels."""
    free_cells = (encoder.image_format.size - size) // encoder.stride
    row, column = rng.integers(free_cells + 1, size=2).tolist()
    return row, column


def recompute_batch_norm(encoder: TinyVit, data: PretrainingData, seed: int, num_batches: int = 20) -> None:
    """Replace the running means and variances, which are those of crops or masked images, by those of whole images."""
    rng = np.random.default_rng([seed, 2**32])

    def draw_batch() -> Tensor:
        images: list[Image.Image] = data.draw_images(rng, 32)
        return preprocess_images(encoder, images, encoder.image_format.size)

    update_bn((draw_batch() for _ in range(num_batches)), encoder)
    encoder.eval()
