"""Pretrained SAM weights in transformers' format, for `SamSegmenter`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from torch import nn
from transformers import SamConfig, SamMaskDecoderConfig, SamModel
from transformers.models.sam.modeling_sam import (
    SamMaskDecoder,
    SamPositionalEmbedding,
    SamPreTrainedModel,
    SamPromptEncoder,
)

from sca.nn.two_way_transformer import TwoWayForward

# `hidden_size` of the vision configuration, half of which is the std of the random frequencies: 1, as in SAM's own code
POSITION_FREQUENCY_SCALE = 2


def make_position_fields(hidden_size: int) -> dict[str, int]:
    """Return the fields of `vision_config` that determine the positional embedding of prompts."""
    return {"hidden_size": POSITION_FREQUENCY_SCALE, "num_pos_feats": hidden_size // 2}


def build_sam_modules(
    decoder_fields: Mapping[str, Any], prompt_fields: Mapping[str, Any]
) -> tuple[SamPromptEncoder, SamMaskDecoder]:
    """Build transformers' prompt encoder and mask decoder with random weights; see `SamSegmenter.build_modules`."""
    config = SamConfig(
        vision_config=make_position_fields(prompt_fields["hidden_size"]),
        prompt_encoder_config=dict(prompt_fields),
        mask_decoder_config=dict(decoder_fields),
    )
    model = SamPromptAndMaskModel(config)
    return model.prompt_encoder, model.mask_decoder


class SamPromptAndMaskModel(SamPreTrainedModel):
    """transformers' `SamModel` without its image encoder, with a faster two-way transformer.

    The modules are transformers', so that every field of the configuration applies; parameter names are the same.

    Args:
        config: SAM configuration.
    """

    _tied_weights_keys = SamModel._tied_weights_keys

    def __init__(self, config: SamConfig):
        super().__init__(config)
        self.shared_image_embedding: SamPositionalEmbedding = SamPositionalEmbedding(config.vision_config)
        self.prompt_encoder: SamPromptEncoder = SamPromptEncoder(config)
        self.mask_decoder: SamMaskDecoder = SamMaskDecoder(cast("SamMaskDecoderConfig", config.mask_decoder_config))
        cast("nn.Module", self.mask_decoder.transformer).__class__ = TwoWayForward
        self.post_init()
