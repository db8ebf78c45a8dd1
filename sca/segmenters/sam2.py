"""SAM 2's prompt encoder and mask decoder (arXiv 2408.00714), also those of EdgeTAM and of SAM 3's tracker.

The modules are transformers'; the steps are those of SAM, with these differences: an object token, high-resolution
features in the upscaling of masks, a sigmoid over IoU scores, and a single mask that is replaced if it is unstable.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from sca_registry.contracts import ConfidentMasks, PromptBatch, SegmenterOutput
from torch import Tensor, nn
from transformers import Sam2MaskDecoderConfig, Sam2PromptEncoderConfig
from transformers.models.sam2.modeling_sam2 import Sam2MaskDecoder, Sam2PromptEncoder

from sca.nn.masks import select_confident_masks, select_mask_indices
from sca.nn.sam2 import load_sam2_model
from sca.nn.two_way_transformer import TwoWayForward
from sca.segmenters.sam import SamSegmenter

NO_OBJECT_LOGIT = -1024.0  # logits of the mask of an object that is not in the image


class Sam2Segmenter(SamSegmenter):
    """SAM 2's promptable segmenter: predicts masks, IoU scores, output tokens and a feature grid for each region.

    The weights of a pretrained encoder of SAM 2's family contain those of the segmenter, which are used unless
    `weights` is set. Other encoders have no high-resolution features, so masks have coarser borders. The arguments
    are those of `SamSegmenter`.
    """

    encoder_families = ("sam2",)
    grid_embedding: nn.Module

    def load_modules(self, weights: str, revision: str | None) -> tuple[nn.Module, nn.Module]:
        """Load the pretrained prompt encoder and mask decoder."""
        model = load_sam2_model(weights, revision)
        self.grid_embedding = model.shared_image_embedding
        return model.prompt_encoder, _prepare_decoder(model.mask_decoder)

    def build_modules(
        self, decoder_fields: Mapping[str, Any], prompt_fields: Mapping[str, Any]
    ) -> tuple[nn.Module, nn.Module]:
        """Build a prompt encoder and a mask decoder with random weights."""
        decoder_config = Sam2MaskDecoderConfig.from_dict(dict(decoder_fields))
        prompt_encoder = Sam2PromptEncoder(Sam2PromptEncoderConfig.from_dict(dict(prompt_fields)))
        self.grid_embedding = copy.deepcopy(prompt_encoder.shared_embedding)
        return prompt_encoder, _prepare_decoder(Sam2MaskDecoder(decoder_config))

    def get_output_tokens(self) -> Tensor:
        """Return the learned output tokens: the IoU token, M + 1 mask tokens, and the object token, (M + 3, D)."""
        return torch.cat((super().get_output_tokens(), self.decoder.obj_score_token.weight))

    def get_grid_embedding(self) -> nn.Module:
        """Return the module that maps the centers of cells to Fourier features."""
        return self.grid_embedding

    def embed_prompts(self, prompts: PromptBatch) -> tuple[Tensor, Tensor]:
        """Embed prompts as `SamSegmenter.embed_prompts` does; a mask prompt alone has two tokens for no point."""
        if prompts.boxes is None and prompts.points is None:
            no_point = prompts.image_index.new_zeros(len(prompts), 1, 2)
            prompts = replace(prompts, points=no_point, labels=no_point[..., 0] - 1)
        return super().embed_prompts(prompts)

    def forward(self, features: Tensor, prompts: PromptBatch, multimask_output: bool = True) -> SegmenterOutput:
        """Segment prompted regions as `SamSegmenter.forward` does.

        With the option `single_mask`, the mask of an object that is not in the image is empty, as in SAM 2's video
        predictor.
        """
        regions = super().forward(features, prompts, multimask_output)
        if not self.single_mask:
            return regions
        assert regions.masks is not None  # see `SamSegmenter.forward`
        assert regions.iou_scores is not None
        object_token = regions.tokens[:, len(super().get_output_tokens())]
        is_object = self.decoder.pred_obj_score_head(object_token) > 0  # (N, 1)
        masks = torch.where(is_object[..., None, None], regions.masks, NO_OBJECT_LOGIT)
        boxes = regions.boxes if prompts.boxes is not None else self.compute_boxes(masks, regions.iou_scores)
        return replace(regions, masks=masks, boxes=boxes)

    def predict_confident_masks(self, features: Tensor, prompts: PromptBatch, min_iou: float) -> ConfidentMasks:
        """Predict confident masks as `SamSegmenter.predict_confident_masks` does."""
        if not self.single_mask:
            return super().predict_confident_masks(features, prompts, min_iou)
        regions = self(features, prompts)  # empties masks of objects that are not in the image
        return select_confident_masks(regions.masks, regions.iou_scores, min_iou)

    def upscale_grid(self, grid: Tensor, image_index: Tensor, high_res_features: tuple[Tensor, ...]) -> Tensor:
        """Upscale the grids of N regions, adding high-resolution features: (N, D, h, w) -> (N, D/8, 4h, 4w)."""
        middle, high = high_res_features or (None, None)
        decoder = self.decoder
        upscaled = _add_image_features(decoder.upscale_conv1(grid), middle, image_index)
        upscaled = decoder.activation(decoder.upscale_layer_norm(upscaled))
        return decoder.activation(_add_image_features(decoder.upscale_conv2(upscaled), high, image_index))

    def select_masks(
        self, masks: Tensor, iou_scores: Tensor, mask_tokens: Tensor, multimask_output: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Select all candidate masks of each region, or one.

        The one is the single mask. In inference, if it is unstable, it is the best of the others, except with the
        option `single_mask`.
        """
        config = self.decoder.config
        is_fixed = multimask_output or self.single_mask or self.training
        if is_fixed or not config.dynamic_multimask_via_stability:
            return super().select_masks(masks, iou_scores, mask_tokens, multimask_output)
        selected = select_mask_indices(
            masks, iou_scores, config.dynamic_multimask_stability_delta, config.dynamic_multimask_stability_thresh
        )
        rows = torch.arange(len(masks), device=masks.device)
        masks, iou_scores, mask_tokens = (
            values[rows, selected].unsqueeze(1) for values in (masks, iou_scores, mask_tokens)
        )
        return masks, iou_scores, mask_tokens


def _prepare_decoder(decoder: nn.Module) -> nn.Module:
    """Speed up the transformer, remove what the encoder contains, and freeze the object score head, which is unused."""
    decoder.transformer.__class__ = TwoWayForward
    del decoder.conv_s0, decoder.conv_s1
    decoder.pred_obj_score_head.requires_grad_(False)
    return decoder


def _add_image_features(values: Tensor, features: Tensor | None, image_index: Tensor) -> Tensor:
    """Add the features (B, C, h, w) of each region's image to values (N, C, h, w)."""
    return values if features is None else values + features[image_index]
