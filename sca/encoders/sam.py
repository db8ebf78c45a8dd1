"""SAM's image encoder (Segment Anything, arXiv 2304.02643), on transformers' modules."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sca_registry.contracts import ImageFormat
from torch import Tensor, nn
from transformers import SamConfig, SamVisionModel
from transformers.models.sam.modeling_sam import SamVisionEncoder

from sca.hub import load_pretrained, read_config

SPREAD = 0.02  # of random weights; SamVisionConfig has 1e-10, with which all images look the same


class SamEncoder(nn.Module):
    """(B, 3, S, S) normalised pixels -> (B, 256, S/16, S/16): a ViT with windowed attention and SAM's neck.

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
            elsewhere = ("mask_decoder.", "prompt_encoder.", "shared_image_embedding.")
            self.vision = load_pretrained(SamVisionModel, weights, revision, elsewhere, dtype="float32").vision_encoder
        else:
            self.vision = SamVisionEncoder(sam_config(weights, revision, config).vision_config)
        self.image = ImageFormat(size=self.vision.config.image_size)
        self.channels = self.vision.config.output_channels
        self.stride = self.vision.config.patch_size

    def forward(self, pixels: Tensor) -> Tensor:
        return self.vision(pixels).last_hidden_state


def sam_config(weights: str | None, revision: str | None, config: Mapping[str, Any] | None) -> SamConfig:
    """From the fields given, or else as it lies with the weights. Raises ValueError if there is neither."""
    if config is None and weights is None:
        raise ValueError("there are neither weights nor a config: give weights=facebook/sam-vit-base, or a folder")
    whole = SamConfig(**config) if config is not None else read_config(SamConfig, weights, revision)
    whole.vision_config._attn_implementation = "sdpa"
    whole.vision_config.initializer_range = SPREAD
    return whole
