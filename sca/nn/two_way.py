"""SAM's two-way transformer: tokens look at an image grid, and the grid looks back.

The block is the one of Segment Anything (arXiv 2304.02643), on transformers' modules. SCA (arXiv 2312.00869) stacks a
second, deeper one on SAM's own as its text feature mixer.
"""

from __future__ import annotations

from torch import Tensor, nn
from transformers import SamMaskDecoderConfig
from transformers.models.sam.modeling_sam import SamTwoWayTransformer


class TwoWayTransformer(SamTwoWayTransformer):
    """Takes and gives regions in rows: tokens (N, T, D) and a grid (N, D, h, w) with its position code (D, h, w)."""

    def __init__(self, width: int, depth: int, heads: int = 8, mlp: int = 2048):
        super().__init__(decoder_config(width, depth, heads, mlp))

    def forward(self, tokens: Tensor, grid: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        fused, keys = super().forward(tokens.unsqueeze(1), grid, position.unsqueeze(0), None)
        keys = keys.squeeze(1).transpose(1, 2)  # (N, D, h*w)
        return fused.squeeze(1), keys.unflatten(2, grid.shape[-2:])


def decoder_config(width: int, depth: int, heads: int, mlp: int, **more: int) -> SamMaskDecoderConfig:
    if width % (2 * heads):
        raise ValueError(f"width {width} must be a multiple of twice the {heads} heads: cross-attention halves it")
    config = SamMaskDecoderConfig(
        hidden_size=width, num_hidden_layers=depth, num_attention_heads=heads, mlp_dim=mlp, **more
    )
    config._attn_implementation = "sdpa"
    return config


def init_weights(module: nn.Module) -> None:
    """SAM's rule: N(0, 0.02) for linear, convolution and embedding weights, zero biases. Use with `Module.apply`."""
    if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
        if getattr(module, "bias", None) is not None:
            nn.init.zeros_(module.bias)
