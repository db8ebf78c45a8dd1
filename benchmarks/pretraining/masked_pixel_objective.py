"""Masked pixels, as MAE (arXiv 2111.06377): a decoder predicts hidden patches from the features of the others.

Patches are hidden in the pixels, as in SimMIM (arXiv 2111.09886), because the convolutional stem of the encoder needs
the full grid. The features of hidden patches are replaced by a mask token before the decoder, as in MAE, so that the
features of the visible ones describe the image. Unlike in MAE, the visible pixels are predicted, too: in so few steps,
the hidden ones alone teach less about color than random weights know.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pretraining_data import PretrainingData, crop_randomly, preprocess_images
from pretraining_loop import Objective
from sca.encoders.tiny_vit import TinyVit

PATCH_SIZE = 16  # pixels
MASKED_FRACTION = 0.6
CROP_FRACTIONS = (0.6, 1.0)  # of the shorter side
DECODER_DEPTH, DECODER_HEADS = 2, 4


class MaskedImages(NamedTuple):
    """Images and their hidden pixels."""

    pixel_values: Tensor  # (B, 3, S, S)
    is_masked: Tensor  # (B, 1, S, S) bool


class MaskedPixelObjective(Objective):
    """Mean absolute errors of normalized pixels in hidden and in visible patches.

    Args:
        encoder: Encoder to train.
        data: Samples.
    """

    default_steps = 550
    batch_size = 16
    source = "MAE, arXiv 2111.06377"

    def __init__(self, encoder: TinyVit, data: PretrainingData):
        super().__init__()
        self.encoder = encoder
        self.data = data
        self.mask_color = nn.Parameter(torch.zeros(3, 1, 1))
        channels, grid_size = encoder.channels, encoder.image_format.size // encoder.stride
        self.mask_token = nn.Parameter(torch.randn(channels) * 0.02)
        self.position = nn.Parameter(torch.randn(grid_size * grid_size, channels) * 0.02)
        layer = nn.TransformerEncoderLayer(
            channels, DECODER_HEADS, 2 * channels, 0.0, "gelu", batch_first=True, norm_first=True
        )
        self.decoder = nn.TransformerEncoder(layer, DECODER_DEPTH, nn.LayerNorm(channels), enable_nested_tensor=False)
        self.pixel_head = nn.Linear(channels, 3 * encoder.stride**2)

    def draw_batch(self, step: int, rng: np.random.Generator) -> MaskedImages:
        size = self.encoder.image_format.size
        images = [crop_randomly(image, CROP_FRACTIONS, rng) for image in self.data.draw_images(rng, self.batch_size)]
        return MaskedImages(preprocess_images(self.encoder, images, size), draw_patch_masks(self.batch_size, size, rng))

    def compute_losses(self, batch: MaskedImages) -> dict[str, Tensor]:
        features = self.encoder(torch.where(batch.is_masked, self.mask_color, batch.pixel_values))  # (B, C, h, w)
        stride = self.encoder.stride
        is_masked_cell = batch.is_masked[:, :, ::stride, ::stride].flatten(2).transpose(1, 2)  # (B, h w, 1)
        cells = torch.where(is_masked_cell, self.mask_token, features.flatten(2).transpose(1, 2)) + self.position
        pixels = self.pixel_head(self.decoder(cells)).transpose(1, 2).unflatten(2, features.shape[2:])
        errors = (F.pixel_shuffle(pixels, stride) - batch.pixel_values).abs().mean(dim=1, keepdim=True)
        return {"hidden": errors[batch.is_masked].mean(), "visible": errors[~batch.is_masked].mean()}


def draw_patch_masks(count: int, size: int, rng: np.random.Generator) -> Tensor:
    """Draw which pixels are hidden: the same number of patches per image, (count, 1, size, size) bool."""
    side = size // PATCH_SIZE
    ranks = rng.random((count, side * side)).argsort(axis=1).argsort(axis=1)
    is_masked = torch.from_numpy(ranks < round(MASKED_FRACTION * side * side)).view(count, 1, side, side)
    return is_masked.repeat_interleave(PATCH_SIZE, 2).repeat_interleave(PATCH_SIZE, 3)
