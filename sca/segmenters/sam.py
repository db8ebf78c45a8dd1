"""SAM's prompt encoder and mask decoder (Segment Anything, arXiv 2304.02643), on transformers' modules.

They are called step by step rather than through `SamMaskDecoder.forward`, because captions need what it keeps to
itself: the fused tokens and the image as each region sees it.
"""

from __future__ import annotations

import torch
from sca_registry.contracts import Encoder, PromptBatch, SegmenterOutput, Targets
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import SamConfig, SamModel, SamPromptEncoderConfig, SamVisionConfig
from transformers.models.sam.modeling_sam import (
    SamMaskDecoder,
    SamPositionalEmbedding,
    SamPreTrainedModel,
    SamPromptEncoder,
    SamVisionNeck,
)

from sca.io.hub import load_pretrained
from sca.nn.boxes import filled_boxes
from sca.nn.masks import best_masks, tight_boxes
from sca.nn.two_way import TwoWayTransformer, decoder_config

SAM_WIDTH = 256  # D of all that are published
UPSCALED = 2**22  # numbers of grids that are upscaled at a time on a CPU
POSITION_SPREAD = 2  # half of it is the deviation of the random frequencies: 1, as in SAM's own code


class SamSegmenter(nn.Module):
    """Features and prompts -> masks, predicted IoU, fused tokens and a private grid for every region.

    A SAM encoder with pretrained weights brings those of this part along; `weights` (a hub id, at a revision, or a
    folder) names others. Without, weights are random and these options count: width, D (default: the encoder's
    channels, but no more than 256); depth, heads and mlp of the two-way transformer; mask_channels of the embedding of
    mask prompts; iou_depth and iou_width (default: D) of the head that predicts IoU. A width that is not the encoder's
    adds a trainable SAM neck. drawn: boxes and points are drawn into the dense prompt as well, so that a small model
    trained from scratch looks at the right place from its first step; SAM's own weights have not seen that.
    """

    def __init__(
        self,
        encoder: Encoder,
        hidden_size: int | None = None,
        depth: int = 2,
        num_heads: int = 8,
        mlp_dim: int = 2048,
        mask_input_channels: int = 16,
        iou_head_depth: int = 3,
        iou_head_hidden_size: int | None = None,
        box_masks: bool = False,
        weights: str | None = None,
        revision: str | None = None,
        pretrained: bool = True,
    ):
        super().__init__()
        self.size = encoder.image_format.size
        self.grid = self.size // encoder.stride
        self.drawn = box_masks
        if pretrained and weights is None and encoder.default_segmenter == "sam":
            weights, revision = encoder.checkpoint, getattr(encoder, "revision", None)
        self.checkpoint = weights if pretrained else None
        if self.checkpoint:
            elsewhere = ("vision_encoder.",)
            sam = load_pretrained(SamHeads, weights, revision, elsewhere, dtype="float32")
            self.prompt_encoder, self.decoder = sam.prompt_encoder, sam.mask_decoder
        else:
            channels = hidden_size or (SAM_WIDTH if weights else min(encoder.channels, SAM_WIDTH))
            decoder = decoder_config(
                channels, depth, num_heads, mlp_dim, iou_head_depth=iou_head_depth, iou_head_hidden_dim=iou_head_hidden_size or channels
            )
            prompts = SamPromptEncoderConfig(
                hidden_size=channels, image_size=self.size, patch_size=encoder.stride, mask_input_channels=mask_input_channels
            )
            vision = SamVisionConfig(hidden_size=POSITION_SPREAD, num_pos_feats=channels // 2)
            self.prompt_encoder, self.decoder = _modules(
                SamConfig(vision_config=vision, prompt_encoder_config=prompts, mask_decoder_config=decoder)
            )
        self.channels = self.decoder.hidden_size
        self.prompt_encoder.input_image_size = self.size
        self.neck = nn.Identity()
        if self.channels != encoder.channels:
            self.neck = FeatureNeck(encoder.channels, self.channels)
        self.prompt_encoder.shared_embedding.positional_embedding.requires_grad_(False)
        self.prompt_encoder.no_mask_embed.weight.requires_grad_(not box_masks)  # there is always a picture to embed

    def forward(self, features: Tensor, prompts: PromptBatch, multimask_output: bool = True) -> SegmenterOutput:
        image = self.neck(features)  # (B, D, h, w)
        prompt_tokens, dense = self.embed(prompts)
        position = self.position()
        shared = dense.dim() == 3  # no region has drawn into its grid yet: one for each image will do
        grid = (image if shared else image[prompts.image_index]) + dense  # (B or N, D, h, w)
        outputs = torch.cat((self.decoder.iou_token.weight, self.decoder.mask_tokens.weight))  # (1 + M + 1, D)
        tokens = torch.cat((outputs.expand(len(prompts), -1, -1), prompt_tokens), dim=1)
        tokens, grid = self.decoder.transformer(tokens, grid, position, prompts.image_index if shared else None)
        masks, scores = self.masks(tokens, grid)
        chosen = slice(1, None) if multimask_output else slice(0, 1)
        masks, scores = masks[:, chosen], scores[:, chosen]
        return SegmenterOutput(
            image_index=prompts.image_index,
            image_embeddings=image,
            image_size=self.size,
            dense_embeddings=dense,
            positional_encoding=position,
            prompt_tokens=prompt_tokens,
            tokens=tokens,
            mask_tokens=tokens[:, 1 : outputs.shape[0]][:, chosen],
            grid=grid,
            masks=masks,
            iou_scores=scores,
            boxes=prompts.boxes if prompts.boxes is not None else self._boxes(masks, scores),
        )

    def embed(self, prompts: PromptBatch) -> tuple[Tensor, Tensor]:
        """Prompt tokens (N, P', D) and the dense prompt: (N, D, h, w) for mask and drawn prompts, else (D, 1, 1)."""

        def rows(value: Tensor | None) -> Tensor | None:
            return None if value is None else value.unsqueeze(1)

        masks = draw(prompts, 4 * self.grid, self.size) if self.drawn and prompts.masks is None else prompts.masks
        if masks is not None:
            masks = masks.to(self.prompt_encoder.no_mask_embed.weight.dtype)
        tokens, dense = self.prompt_encoder(rows(prompts.points), rows(prompts.labels), rows(prompts.boxes), masks)
        if tokens is None:  # a mask alone has no tokens
            tokens = dense.new_zeros(len(prompts), 1, 0, self.channels)
        if masks is None:
            dense = self.prompt_encoder.no_mask_embed.weight.reshape(-1, 1, 1)
        return tokens.squeeze(1), dense

    def position(self) -> Tensor:
        """The random-Fourier code of each cell's centre, (D, h, w)."""
        code = self.prompt_encoder.shared_embedding
        centres = (torch.arange(self.grid, device=code.positional_embedding.device) + 0.5) / self.grid
        y, x = torch.meshgrid(centres, centres, indexing="ij")
        return code(torch.stack((x, y), dim=-1).unsqueeze(0)).squeeze(0).permute(2, 0, 1)

    def masks(self, tokens: Tensor, grid: Tensor) -> tuple[Tensor, Tensor]:
        """Mask logits (N, M + 1, 4h, 4w) and IoU (N, M + 1) of fused tokens and grids; the first is the single mask."""
        networks = self.decoder.output_hypernetworks_mlps
        weights = torch.stack([network(tokens[:, 1 + index]) for index, network in enumerate(networks)], dim=1)
        step = max(1, len(grid))
        if grid.device.type == "cpu" and not torch.is_grad_enabled():  # what is upscaled is eight times a grid
            step = max(1, UPSCALED // max(1, grid[:1].numel()))
        masks = [
            torch.einsum("nmc,nchw->nmhw", few, self._upscaled(grids))
            for few, grids in zip(weights.split(step), grid.split(step), strict=True)
        ]
        return torch.cat(masks), self.decoder.iou_prediction_head(tokens[:, 0])

    def _upscaled(self, grid: Tensor) -> Tensor:
        """(N, D, h, w) -> (N, D/8, 4h, 4w)"""
        decoder = self.decoder
        upscaled = decoder.activation(decoder.upscale_layer_norm(decoder.upscale_conv1(grid)))
        return decoder.activation(decoder.upscale_conv2(upscaled))

    def _boxes(self, masks: Tensor, scores: Tensor) -> Tensor:
        return tight_boxes(best_masks(masks.detach(), scores) > 0) * (self.size / masks.shape[-1])

    def loss(self, regions: SegmenterOutput, targets: Targets) -> dict[str, Tensor]:
        """SAM's losses: 20 focal + dice for the best of the masks, squared error for every predicted IoU.

        `targets.masks` (N, 4h, 4w) soft truth. Cells that show padding and regions without a mask do not count.
        """
        has = targets.has_mask.nonzero().squeeze(1)  # by number, so that the host waits for an accelerator once
        if not len(has):
            zero = regions.masks.sum() * 0.0
            return {"mask": zero, "iou": zero}
        logits, scores = regions.masks[has].float(), regions.iou_scores[has].float()
        truth = targets.masks[has].unsqueeze(1).expand_as(logits)
        valid = targets.valid_pixels[has].unsqueeze(1)
        cells = valid.sum((2, 3)).clamp(min=1)
        shares = logits.sigmoid()
        surprise = F.binary_cross_entropy_with_logits(logits, truth, reduction="none")
        right = shares * truth + (1 - shares) * (1 - truth)
        balance = 0.25 * truth + 0.75 * (1 - truth)
        focal = (balance * (1 - right).square() * surprise * valid).sum((2, 3)) / cells  # (N, M)
        shares = shares * valid
        both = shares.sum((2, 3)) + (truth * valid).sum((2, 3))
        dice = 1 - (2 * (shares * truth).sum((2, 3)) + 1) / (both + 1)
        with torch.no_grad():
            sure, true = (logits > 0) & valid, (truth > 0.5) & valid
            iou = (sure & true).sum((2, 3)) / (sure | true).sum((2, 3)).clamp(min=1)
        return {
            "mask": (20 * focal + dice).min(dim=1).values.mean(),
            "iou": F.mse_loss(scores, iou.to(scores.dtype)),
        }


class SamHeads(SamPreTrainedModel):
    """All of transformers' `SamModel` but its image encoder, under the same names."""

    _tied_weights_keys = SamModel._tied_weights_keys

    def __init__(self, config: SamConfig):
        super().__init__(config)
        self.shared_image_embedding = SamPositionalEmbedding(config.vision_config)
        self.prompt_encoder, self.mask_decoder = _modules(config)
        self.post_init()


def _modules(config: SamConfig) -> tuple[SamPromptEncoder, SamMaskDecoder]:
    figures = config.mask_decoder_config
    decoder = SamMaskDecoder(figures)
    decoder.transformer = TwoWayTransformer(
        figures.hidden_size, figures.num_hidden_layers, figures.num_attention_heads, figures.mlp_dim
    )
    return SamPromptEncoder(config), decoder


def draw(prompts: PromptBatch, side: int, size: int) -> Tensor:
    """Boxes and points of the input frame as pictures (N, 1, side, side): 1 inside the box and -1 around it, and a soft
    dot of height 2 for each point, negative for points outside the region.
    """
    centres = (torch.arange(side, device=prompts.image_index.device) + 0.5) * (size / side)
    picture = torch.zeros(len(prompts), side, side, device=prompts.image_index.device)
    if prompts.boxes is not None:
        picture += filled_boxes(prompts.boxes, side, size) * 2.0 - 1.0
    if prompts.points is not None:
        away = (prompts.points.float()[..., None] + 0.5 - centres).square()  # (N, P, 2, side)
        x, y = (-away / (2 * (size / 32) ** 2)).exp().unbind(2)
        height = torch.where(prompts.labels == 1, 2.0, torch.where(prompts.labels == 0, -2.0, 0.0))
        picture += torch.einsum("np,npy,npx->nyx", height, y, x)
    return picture.unsqueeze(1)


class FeatureNeck(nn.Module):
    """SAM's neck between an encoder of one width and a segmenter of another: (B, C, h, w) -> (B, D, h, w)."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.layers = SamVisionNeck(SamVisionConfig(hidden_size=inputs, output_channels=outputs))

    def forward(self, features: Tensor) -> Tensor:
        return self.layers(features.permute(0, 2, 3, 1))
