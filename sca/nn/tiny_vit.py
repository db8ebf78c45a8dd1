"""Modules of `tiny-vit`: a convolutional stem, a small vision transformer and SAM's neck."""

from __future__ import annotations

from typing import Literal, cast

import torch
from sca_registry.contracts import ImageFormat
from torch import Tensor, nn

from sca.nn.sam import VisionNeck


class TinyVitBody(nn.Module):
    """Small vision transformer: (B, 3, S, S) -> (B, output_channels, S/8, S/8).

    Args:
        image_size: S in pixels, a multiple of 8.
        hidden_size: Width of the transformer.
        depth: Layers of the transformer.
        num_heads: Attention heads.
        output_channels: Feature channels.
        stem_channels: Channels at 1/2 and 1/4 of the resolution.
        stem_blocks: Residual convolution blocks at 1/4 of the resolution.
        resize_mode: "pad" or "stretch", see `ImageFormat`.

    Raises:
        ValueError: `image_size` is not a multiple of 8.
    """

    stride = 8

    def __init__(
        self,
        image_size: int,
        hidden_size: int,
        depth: int,
        num_heads: int,
        output_channels: int,
        stem_channels: tuple[int, int],
        stem_blocks: int,
        resize_mode: str,
    ):
        super().__init__()
        if image_size % self.stride:
            raise ValueError(f"image_size {image_size} must be a multiple of the stride {self.stride}")
        self.image_format: ImageFormat = ImageFormat(
            size=image_size, resize_mode=cast("Literal['pad', 'stretch']", resize_mode)
        )
        self.channels = output_channels
        half_channels, quarter_channels = stem_channels
        self.stem: nn.Module = nn.Sequential(
            *_make_convolution_layers(3, half_channels),
            *_make_convolution_layers(half_channels, quarter_channels),
            *(ConvolutionBlock(quarter_channels) for _ in range(stem_blocks)),
            nn.Conv2d(quarter_channels, hidden_size, 3, stride=2, padding=1),
        )
        grid_size = image_size // self.stride
        self.position: nn.Parameter = nn.Parameter(torch.zeros(1, grid_size * grid_size, hidden_size))
        nn.init.normal_(self.position, std=0.02)
        layer = nn.TransformerEncoderLayer(
            hidden_size, num_heads, 4 * hidden_size, 0.0, "gelu", batch_first=True, norm_first=True
        )
        self.transformer: nn.TransformerEncoder = nn.TransformerEncoder(
            layer, depth, nn.LayerNorm(hidden_size), enable_nested_tensor=False
        )
        for parameter in self.transformer.parameters():  # TransformerEncoder copies one layer: initialize each anew
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
        self.neck: VisionNeck = VisionNeck(hidden_size, output_channels)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Encode images: (B, 3, S, S) -> (B, output_channels, S/8, S/8)."""
        patches = self.stem(pixel_values.contiguous(memory_format=torch.channels_last))  # (B, hidden_size, S/8, S/8)
        tokens = patches.flatten(2).transpose(1, 2) + self.position  # (B, h*w, hidden_size)
        return self.neck(self.transformer(tokens).unflatten(1, patches.shape[-2:]))


class ConvolutionBlock(nn.Module):
    """Residual block of two 3x3 convolutions: (B, C, h, w) -> (B, C, h, w).

    Args:
        channels: Channels C.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.layers: nn.Sequential = nn.Sequential(
            *_make_convolution_layers(channels, channels, stride=1),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
        )

    def forward(self, features: Tensor) -> Tensor:
        """Apply the block."""
        return nn.functional.gelu(features + self.layers(features))


def _make_convolution_layers(in_channels: int, out_channels: int, stride: int = 2) -> tuple[nn.Module, ...]:
    return (
        nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.GELU(),
    )
