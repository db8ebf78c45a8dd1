"""Self-distillation, as DINO (arXiv 2104.14294): crops of an image have the same distribution over prototypes.

A student sees all crops. A teacher, the moving average of the student, sees the large ones. Outputs of the teacher are
centered and sharpened, so that they do not collapse.

The images are crops around one region, as the photographs of ImageNet show one object: crops of a whole scene have its
background in common, and little else.
"""

from __future__ import annotations

import copy
import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

from pretraining_data import PretrainingData, crop_randomly, preprocess_images
from pretraining_loop import Objective, draw_corner, encode_small_images
from sca.encoders.tiny_vit import TinyVit

NUM_GLOBAL_CROPS, NUM_LOCAL_CROPS = 2, 4
GLOBAL_FRACTIONS, LOCAL_FRACTIONS = (0.6, 1.0), (0.3, 0.6)  # side of a crop, of the side of the image
COLOR_JITTER = 0.4  # maximum change of brightness, and of the contrast of each channel
GRAY_PROBABILITY = 0.2
NUM_PROTOTYPES = 512
STUDENT_TEMPERATURE, TEACHER_TEMPERATURE = 0.1, 0.04
CENTER_MOMENTUM = 0.9
TEACHER_MOMENTUM = 0.99  # at the start; it increases to 1


class Crops(NamedTuple):
    """Crops of B images, by crop and then by image, and the windows of the grid that they use."""

    global_crops: Tensor  # (2 B, 3, s, s)
    local_crops: Tensor  # (4 B, 3, s / 2, s / 2)
    global_corner: tuple[int, int]
    local_corner: tuple[int, int]


class SelfDistillationObjective(Objective):
    """Cross-entropy between the teacher's and the student's distributions of different crops of an image.

    Args:
        encoder: Encoder that initializes the student and the teacher.
        data: Samples.
    """

    default_steps = 450
    batch_size = 32
    learning_rate = 5e-4
    source = "DINO, arXiv 2104.14294"
    center: Tensor

    def __init__(self, encoder: TinyVit, data: PretrainingData):
        super().__init__()
        self.student = nn.ModuleDict({"encoder": encoder, "head": PrototypeHead(encoder.channels)})
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.data = data
        self.global_size, self.local_size = (encoder.image_format.size // divisor for divisor in (2, 4))
        self.register_buffer("center", torch.zeros(NUM_PROTOTYPES))

    @property
    def encoder(self) -> TinyVit:
        return self.teacher["encoder"]

    def draw_batch(self, step: int, rng: np.random.Generator) -> Crops:
        images = [self.data.draw_region_crop(rng)[0] for _ in range(self.batch_size)]

        def draw_crops(count: int, fractions: tuple[float, float], size: int) -> Tensor:
            crops = [crop_randomly(image, fractions, rng) for _ in range(count) for image in images]
            return jitter_colors(preprocess_images(self.encoder, crops, size), rng)

        return Crops(
            draw_crops(NUM_GLOBAL_CROPS, GLOBAL_FRACTIONS, self.global_size),
            draw_crops(NUM_LOCAL_CROPS, LOCAL_FRACTIONS, self.local_size),
            draw_corner(self.encoder, self.global_size, rng),
            draw_corner(self.encoder, self.local_size, rng),
        )

    def compute_losses(self, batch: Crops) -> dict[str, Tensor]:
        with torch.no_grad():
            teacher_logits = compute_logits(self.teacher, batch.global_crops, batch.global_corner)
            targets = ((teacher_logits - self.center) / TEACHER_TEMPERATURE).softmax(dim=-1)
            self.center.lerp_(teacher_logits.mean(dim=0), 1 - CENTER_MOMENTUM)
        student_logits = torch.cat(
            (
                compute_logits(self.student, batch.global_crops, batch.global_corner),
                compute_logits(self.student, batch.local_crops, batch.local_corner),
            )
        )
        log_probabilities = (student_logits / STUDENT_TEMPERATURE).log_softmax(dim=-1)
        target_crops = targets.chunk(NUM_GLOBAL_CROPS)
        losses = [
            -(target * predicted).sum(dim=-1).mean()
            for target_index, target in enumerate(target_crops)
            for index, predicted in enumerate(log_probabilities.chunk(NUM_GLOBAL_CROPS + NUM_LOCAL_CROPS))
            if index != target_index
        ]
        return {"distillation": torch.stack(losses).mean()}

    @torch.no_grad()
    def finish_step(self, progress: float) -> None:
        """Move the teacher towards the student."""
        momentum = 1 - (1 - TEACHER_MOMENTUM) * (math.cos(math.pi * progress) + 1) / 2
        for teacher_parameter, parameter in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
            teacher_parameter.lerp_(parameter, 1 - momentum)


class PrototypeHead(nn.Module):
    """Projection head: features (B, C, h, w) -> logits of prototypes (B, P).

    Args:
        channels: Channels C.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(channels, 192), nn.GELU(), nn.Linear(192, 192), nn.GELU(), nn.Linear(192, 64)
        )
        self.prototypes = weight_norm(nn.Linear(64, NUM_PROTOTYPES, bias=False))
        self.prototypes.parametrizations.weight.original0.data.fill_(1).requires_grad_(False)  # norms

    def forward(self, features: Tensor) -> Tensor:
        return self.prototypes(F.normalize(self.layers(features.mean(dim=(2, 3))), dim=-1))


def compute_logits(network: nn.ModuleDict, crops: Tensor, corner: tuple[int, int]) -> Tensor:
    """Return the logits of the prototypes, (B, P)."""
    return network["head"](encode_small_images(network["encoder"], crops, corner))


def jitter_colors(pixel_values: Tensor, rng: np.random.Generator) -> Tensor:
    """Change the brightness, contrast and hue of normalized images at random, and make some of them gray."""
    count = len(pixel_values)
    contrast = rng.uniform(-COLOR_JITTER, COLOR_JITTER, (count, 3, 1, 1)).astype(np.float32)
    brightness = rng.uniform(-COLOR_JITTER, COLOR_JITTER, (count, 1, 1, 1)).astype(np.float32)
    is_gray = torch.from_numpy(rng.random((count, 1, 1, 1)) < GRAY_PROBABILITY)
    colored = torch.where(is_gray, pixel_values.mean(dim=1, keepdim=True), pixel_values)
    return colored * (1 + torch.from_numpy(contrast)) + torch.from_numpy(brightness)
