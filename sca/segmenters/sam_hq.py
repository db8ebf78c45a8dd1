"""HQ-SAM's prompt encoder and mask decoder (Segment Anything in High Quality, arXiv 2306.01567).

The modules are transformers'; the steps are those of SAM and of the authors' code, github.com/SysCV/sam-hq. The forward
of transformers 5.23 differs from both: it upscales the grid from before its two-way transformer, with height and width
exchanged.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import SamHQConfig, SamHQMaskDecoderConfig, SamHQModel
from transformers.models.sam_hq.modeling_sam_hq import (
    SamHQMaskDecoder,
    SamHQPositionalEmbedding,
    SamHQPreTrainedModel,
    SamHQPromptEncoder,
)

from sca.io.hub import load_pretrained
from sca.nn.two_way_transformer import TwoWayForward
from sca.segmenters.sam import SamSegmenter
from sca.segmenters.sam_weights import make_position_fields


class SamHqSegmenter(SamSegmenter):
    """HQ-SAM's promptable segmenter: SAM's, with a mask of higher quality added to each of its masks.

    The weights of a pretrained HQ-SAM encoder contain those of the segmenter, which are used unless `weights` is set.
    Other encoders have no high-resolution features, so masks have coarser borders. The arguments are those of
    `SamSegmenter`.
    """

    encoder_families = ("sam-hq",)

    def load_modules(self, weights: str, revision: str | None) -> tuple[nn.Module, nn.Module]:
        """Load the pretrained prompt encoder and mask decoder."""
        model = load_pretrained(SamHqPromptAndMaskModel, weights, revision, ("vision_encoder.",), dtype="float32")
        return model.prompt_encoder, _prepare_decoder(model.mask_decoder)

    def build_modules(
        self, decoder_fields: Mapping[str, Any], prompt_fields: Mapping[str, Any]
    ) -> tuple[nn.Module, nn.Module]:
        """Build a prompt encoder and a mask decoder with random weights."""
        model = SamHqPromptAndMaskModel(
            SamHQConfig(
                vision_config=make_position_fields(prompt_fields["hidden_size"]),
                prompt_encoder_config=dict(prompt_fields),
                mask_decoder_config=dict(decoder_fields),
            )
        )
        return model.prompt_encoder, _prepare_decoder(model.mask_decoder)

    def get_output_tokens(self) -> Tensor:
        """Return the learned output tokens: the IoU token, M + 1 mask tokens, and the HQ token, (M + 3, D)."""
        return torch.cat((super().get_output_tokens(), self.decoder.hq_token.weight))

    def prepare_high_res_features(
        self, image_embeddings: Tensor, high_res_features: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...]:
        """Upscale the image features and add the encoder's high-resolution features, if any: (B, D/8, 4h, 4w)."""
        decoder = self.decoder
        upscaled = decoder.activation(decoder.encoder_norm(decoder.encoder_conv1(image_embeddings)))
        return (sum(high_res_features, start=decoder.encoder_conv2(upscaled)),)

    def predict_masks(
        self, tokens: Tensor, grid: Tensor, image_index: Tensor, high_res_features: tuple[Tensor, ...]
    ) -> Tensor:
        """Predict the mask logits of some regions, (N, M + 1, 4h, 4w), each the sum of SAM's and the HQ mask."""
        decoder = self.decoder
        upscaled = self.upscale_grid(grid, image_index, high_res_features)
        masks = torch.einsum("nmc,nchw->nmhw", self.compute_mask_weights(tokens), upscaled)
        refined = decoder.mask_conv2(decoder.activation(decoder.mask_norm(decoder.mask_conv1(upscaled))))
        refined = refined + high_res_features[0][image_index]
        hq_token = tokens[:, 1 + len(decoder.mask_tokens.weight)]
        return masks + torch.einsum("nc,nchw->nhw", decoder.hq_mask_mlp(hq_token), refined).unsqueeze(1)


class SamHqPromptAndMaskModel(SamHQPreTrainedModel):
    """transformers' `SamHQModel` without its image encoder; parameter names are the same.

    Args:
        config: HQ-SAM configuration.
    """

    _tied_weights_keys = SamHQModel._tied_weights_keys

    def __init__(self, config: SamHQConfig):
        super().__init__(config)
        self.shared_image_embedding = SamHQPositionalEmbedding(config.vision_config)
        self.prompt_encoder = SamHQPromptEncoder(config)
        self.mask_decoder = SamHQMaskDecoder(cast("SamHQMaskDecoderConfig", config.mask_decoder_config))
        self.post_init()


def _prepare_decoder(decoder: SamHQMaskDecoder) -> SamHQMaskDecoder:
    """Speed up the transformer, and remove what the encoder contains."""
    cast("nn.Module", decoder.transformer).__class__ = TwoWayForward
    del decoder.compress_vit_conv1, decoder.compress_vit_norm, decoder.compress_vit_conv2
    return decoder
