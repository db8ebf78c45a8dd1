"""Pretrained SAM weights in transformers' format, for `SamSegmenter`."""

from __future__ import annotations

from typing import cast

from transformers import SamConfig, SamMaskDecoderConfig, SamModel, SamPromptEncoderConfig
from transformers.models.sam.modeling_sam import SamPositionalEmbedding, SamPreTrainedModel

from sca.nn.sam import MaskDecoder, MaskDecoderConfig, PromptEncoder

# `hidden_size` of the vision configuration, half of which is the std of the random frequencies: 1, as in SAM's own code
POSITION_FREQUENCY_SCALE = 2


class SamPromptAndMaskModel(SamPreTrainedModel):
    """transformers' `SamModel` without its image encoder; parameter names are the same.

    Args:
        config: SAM configuration.
    """

    _tied_weights_keys = SamModel._tied_weights_keys

    def __init__(self, config: SamConfig):
        super().__init__(config)
        decoder_config = cast("SamMaskDecoderConfig", config.mask_decoder_config)
        prompt_config = cast("SamPromptEncoderConfig", config.prompt_encoder_config)
        self.shared_image_embedding: SamPositionalEmbedding = SamPositionalEmbedding(config.vision_config)
        self.prompt_encoder: PromptEncoder = PromptEncoder(
            prompt_config.hidden_size,
            cast("int", prompt_config.image_size),
            prompt_config.image_embedding_size,
            prompt_config.mask_input_channels,
        )
        self.mask_decoder: MaskDecoder = MaskDecoder(
            MaskDecoderConfig(
                hidden_size=decoder_config.hidden_size,
                num_hidden_layers=decoder_config.num_hidden_layers,
                num_attention_heads=decoder_config.num_attention_heads,
                mlp_dim=decoder_config.mlp_dim,
                iou_head_depth=decoder_config.iou_head_depth,
                iou_head_hidden_dim=decoder_config.iou_head_hidden_dim,
                num_multimask_outputs=decoder_config.num_multimask_outputs,
            )
        )
        self.post_init()
