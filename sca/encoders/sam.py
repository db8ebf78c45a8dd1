"""SAM's image encoder (Segment Anything, arXiv 2304.02643), on transformers' modules."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from sca_registry.contracts import ImageFormat
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import SamConfig, SamVisionModel
from transformers.models.sam.modeling_sam import SamVisionEncoder, SamVisionSdpaAttention

from sca.io.hub import fetch_pretrained_config, load_pretrained

INITIALIZER_RANGE = 0.02  # of random weights; SamVisionConfig has 1e-10, with which all images look the same


class SamEncoder(nn.Module):
    """(B, 3, S, S) normalized pixels -> (B, 256, S/16, S/16): a ViT with windowed attention and SAM's neck.

    weights: a hub id, at a revision, or a folder in the same format. config: fields of transformers' `SamConfig` that
    differ from ViT-B's; with `pretrained=False` it is built with random weights from them, or from the configuration
    that lies with the weights.
    """

    default_segmenter = "sam"

    def __init__(
        self,
        weights: str | None = None,
        revision: str | None = None,
        pretrained: bool = True,
        config: Mapping[str, Any] | None = None,
    ):
        super().__init__()
        self.checkpoint = weights if pretrained else None
        self.revision = revision
        if self.checkpoint:
            other_modules = ("mask_decoder.", "prompt_encoder.", "shared_image_embedding.")
            self.vision = load_pretrained(
                SamVisionModel, weights, revision, other_modules, dtype="float32"
            ).vision_encoder
        else:
            self.vision = SamVisionEncoder(build_sam_config(weights, revision, config).vision_config)
        for layer in self.vision.layers:
            layer.attn.__class__ = ChunkedAttention  # the same parameters, used otherwise
        self.image_format = ImageFormat(size=self.vision.config.image_size)
        self.channels = self.vision.config.output_channels
        self.stride = self.vision.config.patch_size

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.vision(pixel_values).last_hidden_state


class ChunkedAttention(SamVisionSdpaAttention):
    """That of transformers; on a CPU, where nothing is learned, a few heads at a time, since what positions add for all
    heads, (heads, h w, h w), is the most that an encoder holds: 0.8 GB for ViT-B, twice.
    """

    max_bias_elements = 2**24  # numbers that positions add at a time

    def forward(self, hidden_states: Tensor, output_attentions: bool = False) -> tuple[Tensor, None]:
        batch, height, width, _ = hidden_states.shape
        cells, heads = height * width, self.num_attention_heads
        if hidden_states.device.type != "cpu" or torch.is_grad_enabled() or not self.use_rel_pos:
            return super().forward(hidden_states, output_attentions)
        qkv = self.qkv(hidden_states).reshape(batch, cells, 3, heads, -1).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.reshape(3, batch * heads, cells, -1).unbind(0)  # (B heads, h w, d)
        outputs = torch.empty_like(query)
        chunk_size = max(1, self.max_bias_elements // cells**2)
        for start in range(0, batch * heads, chunk_size):
            chunk = slice(start, start + chunk_size)
            relative_positions = self.get_decomposed_rel_pos(
                query[chunk], self.rel_pos_h, self.rel_pos_w, (height, width), (height, width)
            )
            bias = relative_positions.reshape(1, -1, cells, cells)
            chunk_inputs = (each[chunk].unsqueeze(0) for each in (query, key, value))
            outputs[chunk] = F.scaled_dot_product_attention(*chunk_inputs, attn_mask=bias).squeeze(0)
        merged = outputs.view(batch, heads, cells, -1).transpose(1, 2).reshape(batch, height, width, -1)
        return self.proj(merged), None


def build_sam_config(weights: str | None, revision: str | None, config: Mapping[str, Any] | None) -> SamConfig:
    """From the fields given, or else as it lies with the weights. Raises ValueError if there is neither."""
    if config is None and weights is None:
        raise ValueError("there are neither weights nor a config: give weights=facebook/sam-vit-base, or a folder")
    full_config = SamConfig(**config) if config is not None else fetch_pretrained_config(SamConfig, weights, revision)
    full_config.vision_config._attn_implementation = "sdpa"
    full_config.vision_config.initializer_range = INITIALIZER_RANGE
    return full_config
