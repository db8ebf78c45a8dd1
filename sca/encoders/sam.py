"""SAM's image encoder (Segment Anything, arXiv 2304.02643), built from transformers' modules."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from sca_registry.contracts import ImageFormat
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import SamConfig, SamVisionConfig, SamVisionModel
from transformers.models.sam.modeling_sam import SamVisionEncoder, SamVisionSdpaAttention

from sca.encoders.stored_normalization import apply_stored_normalization
from sca.io.hub import check_model_type, fetch_config_fields, fetch_pretrained_config, load_pretrained

INITIALIZER_RANGE = 0.02  # SamVisionConfig has 1e-10, for which all images have the same features


class SamEncoder(nn.Module):
    """SAM's image encoder: a ViT with windowed attention and SAM's neck.

    It maps normalized images (B, 3, S, S) to features (B, 256, S/16, S/16).

    Args:
        weights: Hub id or folder in transformers' format.
        revision: Revision of the Hub id.
        pretrained: Load `weights`; False initializes randomly from `config`, or else from the configuration stored with
            the weights.
        config: Fields of transformers' `SamConfig` that differ from ViT-B's.

    Raises:
        ValueError: Neither `weights` nor `config` is set.
    """

    default_segmenter = "sam"
    vision: SamVisionEncoder

    def __init__(
        self,
        weights: str | None = None,
        revision: str | None = None,
        pretrained: bool = True,
        config: Mapping[str, Any] | None = None,
    ):
        super().__init__()
        self.checkpoint: str | None = weights if pretrained else None
        self.revision = revision
        self._config_source = (weights, revision, config)
        if self.checkpoint:
            check_model_type(self.checkpoint, revision, ("sam", "sam_vision_model"))
            other_modules = ("mask_decoder.", "prompt_encoder.", "shared_image_embedding.")
            self.vision = load_pretrained(
                SamVisionModel, self.checkpoint, revision, other_modules, dtype="float32"
            ).vision_encoder
        else:
            self.vision = SamVisionEncoder(_get_vision_config(build_sam_config(weights, revision, config)))
        for layer in self.vision.layers:
            layer.attn.__class__ = ChunkedAttention  # same parameters, other forward
        self.image_format: ImageFormat = apply_stored_normalization(
            ImageFormat(size=cast("int", self.vision.config.image_size)), self.checkpoint, revision
        )
        self.channels: int = self.vision.config.output_channels
        self.stride: int = cast("int", self.vision.config.patch_size)

    def get_config_fields(self) -> Mapping[str, Any]:
        """Return the stored configuration, including that of the segmenter; empty without weights."""
        return fetch_config_fields(*self._config_source)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Encode images: (B, 3, S, S) -> (B, 256, S/16, S/16)."""
        return self.vision(pixel_values).last_hidden_state


class ChunkedAttention(SamVisionSdpaAttention):
    """transformers' attention with relative positions, computed in chunks of heads for CPU inference.

    The relative position bias of all heads, (heads, h w, h w), is the largest tensor of the encoder: 0.8 GB for ViT-B,
    twice.
    """

    max_bias_elements = 2**24  # elements of the position bias per chunk

    # transformers declares that the method returns a tensor, but returns this tuple
    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, output_attentions: bool = False
    ) -> tuple[Tensor, None]:
        """Attend over the grid: (B, h, w, C) -> (B, h, w, C)."""
        batch, height, width, _ = hidden_states.shape
        cells, heads = height * width, self.num_attention_heads
        if hidden_states.device.type != "cpu" or torch.is_grad_enabled() or not self.use_rel_pos:
            return cast("tuple[Tensor, None]", super().forward(hidden_states, output_attentions))
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
            chunk_query, chunk_key, chunk_value = (each[chunk].unsqueeze(0) for each in (query, key, value))
            outputs[chunk] = F.scaled_dot_product_attention(
                chunk_query, chunk_key, chunk_value, attn_mask=bias
            ).squeeze(0)
        merged = outputs.view(batch, heads, cells, -1).transpose(1, 2).reshape(batch, height, width, -1)
        return self.proj(merged), None


def build_sam_config(weights: str | None, revision: str | None, config: Mapping[str, Any] | None) -> SamConfig:
    """Return a SAM configuration.

    Args:
        weights: Hub id or folder whose configuration is used if `config` is None.
        revision: Revision of the Hub id.
        config: Fields that differ from transformers' defaults.

    Returns:
        The configuration of transformers.

    Raises:
        ValueError: Neither `weights` nor `config` is set.
    """
    if config is not None:
        full_config = SamConfig(**config)
    elif weights is not None:
        full_config = fetch_pretrained_config(SamConfig, weights, revision)
    else:
        raise ValueError(
            "neither weights nor config is set; set weights to a Hub id, such as weights=facebook/sam-vit-base, or "
            "to a folder"
        )
    vision_config = _get_vision_config(full_config)
    vision_config._attn_implementation = "sdpa"
    vision_config.initializer_range = INITIALIZER_RANGE
    return full_config


def _get_vision_config(config: SamConfig) -> SamVisionConfig:
    return cast("SamVisionConfig", config.vision_config)  # transformers converts tables
