"""SAM's prompt encoder and mask decoder (Segment Anything, arXiv 2304.02643).

The steps of transformers' `SamMaskDecoder.forward` are called one by one, because captions need its intermediate
results: the output tokens and the updated image features of each region.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, NamedTuple, cast

import torch
from sca_registry.contracts import ConfidentMasks, DecoderMasks, Encoder, MaskTargets, PromptBatch, SegmenterOutput
from torch import Tensor, nn
from torch.nn import functional as F

from sca.io.hub import fetch_config_fields, load_pretrained
from sca.io.validation import check_range, check_type
from sca.nn.boxes import rasterize_boxes
from sca.nn.feature_packing import count_packed_channels, unpack_feature_maps
from sca.nn.masks import masks_to_boxes, select_best_masks, select_confident_masks
from sca.nn.region_batch import is_cpu_inference, split_rows
from sca.nn.sam import MaskDecoder, MaskDecoderConfig, PromptEncoder, VisionNeck

SAM_HIDDEN_SIZE = 256  # D of all published checkpoints
DEFAULT_OPTIONS = {"depth": 2, "num_heads": 8, "mlp_dim": 2048, "mask_input_channels": 16, "iou_head_depth": 3}
# option -> table and field of the configuration of transformers that contain it
CONFIG_FIELDS = {
    "hidden_size": ("mask_decoder_config", "hidden_size"),
    "depth": ("mask_decoder_config", "num_hidden_layers"),
    "num_heads": ("mask_decoder_config", "num_attention_heads"),
    "mlp_dim": ("mask_decoder_config", "mlp_dim"),
    "mask_input_channels": ("prompt_encoder_config", "mask_input_channels"),
    "iou_head_depth": ("mask_decoder_config", "iou_head_depth"),
    "iou_head_hidden_size": ("mask_decoder_config", "iou_head_hidden_dim"),
}
# fields that the modules of `sca.nn.sam` apply; others require those of transformers
MASK_DECODER_FIELDS = {field.name for field in fields(MaskDecoderConfig)}
PROMPT_ENCODER_FIELDS = {"hidden_size", "image_size", "patch_size", "mask_input_channels"}
BOX_MASKS_FIELD = "box_masks"  # of `prompt_encoder_config`; transformers ignores it
UPSCALE_ELEMENTS_PER_CHUNK = 2**22  # grid elements that are upscaled at once on a CPU


class _DecoderInputs(NamedTuple):
    """Inputs of the mask decoder for N prompts of B images.

    Attributes:
        image_embeddings: (B, D, h, w) image features.
        high_res_features: Features at higher resolutions, as prepared.
        prompt_tokens: (N, P', D) prompt tokens.
        dense_embeddings: (N, D, h, w) dense prompt embeddings, or (D, 1, 1) without dense prompts.
        positional_encoding: (D, h, w) positional encoding of the grid.
        tokens: (N, T, D) output tokens and prompt tokens.
        image_index: (N,) image of each prompt.
    """

    image_embeddings: Tensor
    high_res_features: tuple[Tensor, ...]
    prompt_tokens: Tensor
    dense_embeddings: Tensor
    positional_encoding: Tensor
    tokens: Tensor
    image_index: Tensor

    @property
    def transformer_inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Tokens, grids, positional encoding and image index for the two-way transformer."""
        if self.dense_embeddings.dim() == 3:  # without dense prompts, the regions of an image share its grid
            return (
                self.tokens,
                self.image_embeddings + self.dense_embeddings,
                self.positional_encoding,
                self.image_index,
            )
        grid = self.image_embeddings[self.image_index] + self.dense_embeddings  # (N, D, h, w)
        return self.tokens, grid, self.positional_encoding, None


class SamSegmenter(nn.Module):
    """SAM's promptable segmenter: predicts masks, IoU scores, output tokens and a feature grid for each region.

    The weights of a pretrained SAM encoder contain those of the segmenter, which are used unless `weights` is set. The
    options from `hidden_size` to `iou_head_hidden_size` apply to random weights only. None uses the configuration of
    `weights`, then that of the encoder, then the default in parentheses. A hidden size other than the encoder's
    channels adds a trainable SAM neck.

    Args:
        encoder: Image encoder.
        hidden_size: D (the encoder's channels, at most 256; 256 with `weights`).
        depth: Layers of the two-way transformer (2).
        num_heads: Attention heads of the two-way transformer (8).
        mlp_dim: MLP width of the two-way transformer (2,048).
        mask_input_channels: Channels of the mask prompt embedding (16).
        iou_head_depth: Layers of the IoU prediction head (3).
        iou_head_hidden_size: Width of the IoU prediction head (D).
        box_masks: Also draw boxes and points into the dense prompt, so that a small model trained from scratch attends
            to the right place from its first step; None for that of the weights, which is False for SAM's own.
        weights: Hub id or folder.
        revision: Revision of the Hub id.
        pretrained: Load pretrained weights; False initializes randomly.
        single_mask: Predict one mask per region; overrides `multimask_output`.
    """

    # `default_segmenter` of the encoders whose weights contain those of the segmenter
    encoder_families: tuple[str, ...] = ("sam",)
    # PromptEncoder and MaskDecoder; in subclasses, those of SAM's relatives in transformers, which have the same
    # submodules but no common base class
    prompt_encoder: Any
    decoder: Any

    def __init__(
        self,
        encoder: Encoder,
        hidden_size: int | None = None,
        depth: int | None = None,
        num_heads: int | None = None,
        mlp_dim: int | None = None,
        mask_input_channels: int | None = None,
        iou_head_depth: int | None = None,
        iou_head_hidden_size: int | None = None,
        box_masks: bool | None = None,
        weights: str | None = None,
        revision: str | None = None,
        pretrained: bool = True,
        single_mask: bool = False,
    ):
        super().__init__()
        self.single_mask = single_mask
        self.image_size: int = encoder.image_format.size
        self.grid_size: int = self.image_size // encoder.stride
        self.box_masks = False  # or as `load_modules` sets it
        has_own_encoder = encoder.default_segmenter in self.encoder_families
        if pretrained and weights is None and has_own_encoder:
            weights, revision = encoder.checkpoint, getattr(encoder, "revision", None)
        self.checkpoint: str | None = weights if pretrained else None
        self.high_res_shapes: tuple[tuple[int, int], ...] = (
            getattr(encoder, "high_res_shapes", ()) if has_own_encoder else ()
        )
        in_channels = encoder.channels - count_packed_channels(0, self.high_res_shapes)
        if self.checkpoint:
            self.prompt_encoder, self.decoder = self.load_modules(self.checkpoint, revision)
        else:
            stored_config: Mapping[str, Any] = {}
            if weights is not None:
                stored_config = fetch_config_fields(weights, revision)
            elif has_own_encoder and hasattr(encoder, "get_config_fields"):
                stored_config = encoder.get_config_fields()
            chosen_options = {
                "hidden_size": hidden_size,
                "depth": depth,
                "num_heads": num_heads,
                "mlp_dim": mlp_dim,
                "mask_input_channels": mask_input_channels,
                "iou_head_depth": iou_head_depth,
                "iou_head_hidden_size": iou_head_hidden_size,
            }
            options = {
                **DEFAULT_OPTIONS,
                "hidden_size": SAM_HIDDEN_SIZE if weights else min(in_channels, SAM_HIDDEN_SIZE),
                **_read_stored_options(stored_config),
                **{name: value for name, value in chosen_options.items() if value is not None},
            }
            options.setdefault("iou_head_hidden_size", options["hidden_size"])
            prompt_fields = {
                **_get_table(stored_config, "prompt_encoder_config"),
                "hidden_size": options["hidden_size"],
                "image_size": self.image_size,
                "patch_size": encoder.stride,
                "mask_input_channels": options.pop("mask_input_channels"),
            }
            decoder_fields = {
                **_get_table(stored_config, "mask_decoder_config"),
                **{CONFIG_FIELDS[name][1]: value for name, value in options.items()},
            }
            self.box_masks = bool(prompt_fields.pop(BOX_MASKS_FIELD, False))
            self.prompt_encoder, self.decoder = self.build_modules(decoder_fields, prompt_fields)
        if box_masks is not None:
            self.box_masks = box_masks
        self.channels: int = self.decoder.hidden_size
        self.prompt_encoder.input_image_size = self.image_size
        self.neck: nn.Module = nn.Identity()
        if self.channels != in_channels:
            self.neck = FeatureNeck(in_channels, self.channels)
        self.prompt_encoder.shared_embedding.positional_embedding.requires_grad_(False)
        self.prompt_encoder.no_mask_embed.weight.requires_grad_(not self.box_masks)  # unused: every prompt has a mask

    def load_modules(self, weights: str, revision: str | None) -> tuple[nn.Module, nn.Module]:
        """Load the pretrained prompt encoder and mask decoder, and set `box_masks` to the value of their training."""
        from sca.segmenters.sam_weights import SamPromptAndMaskModel

        sam = load_pretrained(
            SamPromptAndMaskModel, weights, revision, ("vision_encoder.", "encoder."), dtype="float32"
        )
        self.box_masks = bool(getattr(sam.config.prompt_encoder_config, BOX_MASKS_FIELD, False))
        return sam.prompt_encoder, sam.mask_decoder

    def build_modules(
        self, decoder_fields: Mapping[str, Any], prompt_fields: Mapping[str, Any]
    ) -> tuple[nn.Module, nn.Module]:
        """Build a prompt encoder and a mask decoder with random weights.

        Args:
            decoder_fields: Fields of transformers' `mask_decoder_config`: all that are stored with the weights, and the
                sizes.
            prompt_fields: Fields of `prompt_encoder_config`.

        Returns:
            The prompt encoder and the mask decoder.
        """
        if decoder_fields.keys() <= MASK_DECODER_FIELDS and prompt_fields.keys() <= PROMPT_ENCODER_FIELDS:
            prompt_encoder = PromptEncoder(
                prompt_fields["hidden_size"],
                prompt_fields["image_size"],
                prompt_fields["image_size"] // prompt_fields["patch_size"],
                prompt_fields["mask_input_channels"],
            )
            return prompt_encoder, MaskDecoder(MaskDecoderConfig(**decoder_fields))
        from sca.segmenters.sam_weights import build_sam_modules

        return build_sam_modules(decoder_fields, prompt_fields)

    def forward(self, features: Tensor, prompts: PromptBatch, multimask_output: bool = True) -> SegmenterOutput:
        """Segment prompted regions.

        Args:
            features: (B, C, h, w) features of the encoder.
            prompts: N prompts in pixels of the model input.
            multimask_output: Return all candidate masks of each region (three for SAM) instead of one.

        Returns:
            Masks, scores, tokens and image embeddings of the N regions.
        """
        inputs = self._prepare_decoder_inputs(features, prompts)
        tokens, grid = self.decoder.transformer(*inputs.transformer_inputs)
        masks, iou_scores = self.decode_masks(tokens, grid, prompts.image_index, inputs.high_res_features)
        mask_tokens = tokens[:, 1 : 1 + len(self.decoder.mask_tokens.weight)]
        decoder_masks = DecoderMasks(masks, iou_scores, mask_tokens)
        multimask_output = multimask_output and not self.single_mask
        masks, iou_scores, mask_tokens = self.select_masks(masks, iou_scores, mask_tokens, multimask_output)
        return SegmenterOutput(
            image_index=prompts.image_index,
            image_embeddings=inputs.image_embeddings,
            image_size=self.image_size,
            dense_embeddings=inputs.dense_embeddings,
            positional_encoding=inputs.positional_encoding,
            prompt_tokens=inputs.prompt_tokens,
            tokens=tokens,
            mask_tokens=mask_tokens,
            grid=grid,
            masks=masks,
            iou_scores=iou_scores,
            boxes=prompts.boxes if prompts.boxes is not None else self.compute_boxes(masks, iou_scores),
            decoder_masks=decoder_masks,
        )

    def predict_confident_masks(self, features: Tensor, prompts: PromptBatch, min_iou: float) -> ConfidentMasks:
        """Predict the candidate masks whose predicted IoU is above a minimum.

        A region without such a mask takes about half the time, because its grid is not upscaled.

        Args:
            features: (B, C, h, w) features of the encoder.
            prompts: N prompts in pixels of the model input.
            min_iou: Minimum predicted IoU.

        Returns:
            The masks above it.
        """
        inputs = self._prepare_decoder_inputs(features, prompts)
        candidates = slice(0, 1) if self.single_mask else slice(1, None)
        empty_masks = torch.zeros(0, 4 * self.grid_size, 4 * self.grid_size, device=features.device)
        parts = [ConfidentMasks(empty_masks, empty_masks[:, 0, 0], prompts.image_index[:0])]
        for chunk, tokens, grid in self.decoder.transformer.iter_chunks(*inputs.transformer_inputs):
            rows = (self.predict_iou(tokens)[:, candidates].float() > min_iou).any(1).nonzero()[:, 0]
            if not len(rows):
                continue
            if len(rows) < len(tokens):
                tokens, grid = tokens[rows], grid[rows]
            masks, iou_scores = self.decode_masks(
                tokens, grid, prompts.image_index[chunk][rows], inputs.high_res_features
            )
            selected = select_confident_masks(masks[:, candidates], iou_scores[:, candidates], min_iou)
            parts.append(selected._replace(region_index=(chunk.start or 0) + rows[selected.region_index]))
        return ConfidentMasks(*map(torch.cat, zip(*parts, strict=True)))

    def _prepare_decoder_inputs(self, features: Tensor, prompts: PromptBatch) -> _DecoderInputs:
        # (B, C, h, w), and features of higher resolutions if the encoder has them
        features, high_res_features = unpack_feature_maps(features, self.high_res_shapes)
        if not isinstance(self.neck, nn.Identity):  # another hidden size than the encoder's
            high_res_features = ()
        image_embeddings = self.neck(features)  # (B, D, h, w)
        prompt_tokens, dense_embeddings = self.embed_prompts(prompts)
        output_tokens = self.get_output_tokens()
        return _DecoderInputs(
            image_embeddings,
            self.prepare_high_res_features(image_embeddings, high_res_features),
            prompt_tokens,
            dense_embeddings,
            self.compute_positional_encoding(),
            torch.cat((output_tokens.expand(len(prompts), -1, -1), prompt_tokens), dim=1),
            prompts.image_index,
        )

    def get_output_tokens(self) -> Tensor:
        """Return the learned output tokens: the IoU token, M + 1 mask tokens, then those of subclasses, (T, D)."""
        return torch.cat((self.decoder.iou_token.weight, self.decoder.mask_tokens.weight))

    def select_masks(
        self, masks: Tensor, iou_scores: Tensor, mask_tokens: Tensor, multimask_output: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Select all candidate masks of each region, or the single one, with their scores and tokens."""
        selected = slice(1, None) if multimask_output else slice(0, 1)
        return masks[:, selected], iou_scores[:, selected], mask_tokens[:, selected]

    def embed_prompts(self, prompts: PromptBatch) -> tuple[Tensor, Tensor]:
        """Embed prompts.

        Args:
            prompts: N prompts in pixels of the model input.

        Returns:
            Prompt tokens (N, P', D), and dense embeddings: (N, D, h, w) for mask prompts or with `box_masks`, else
            (D, 1, 1).
        """

        def add_point_dimension(value: Tensor | None) -> Tensor | None:
            return None if value is None else value.unsqueeze(1)

        masks = (
            draw_prompts(prompts, 4 * self.grid_size, self.image_size)
            if self.box_masks and prompts.masks is None
            else prompts.masks
        )
        if masks is not None:
            masks = masks.to(self.prompt_encoder.no_mask_embed.weight.dtype)
        tokens, dense_embeddings = self.prompt_encoder(
            add_point_dimension(prompts.points),
            add_point_dimension(prompts.labels),
            add_point_dimension(prompts.boxes),
            masks,
        )
        if tokens is None:  # only mask prompts
            tokens = dense_embeddings.new_zeros(len(prompts), 1, 0, self.channels)
        if masks is None:
            dense_embeddings = self.prompt_encoder.no_mask_embed.weight.reshape(-1, 1, 1)
        return tokens.squeeze(1), dense_embeddings

    def compute_positional_encoding(self) -> Tensor:
        """Return the random Fourier features of each cell's center, (D, h, w)."""
        embedding = self.get_grid_embedding()
        device = cast("Tensor", embedding.positional_embedding).device
        centers = (torch.arange(self.grid_size, device=device) + 0.5) / self.grid_size
        y, x = torch.meshgrid(centers, centers, indexing="ij")
        return embedding(torch.stack((x, y), dim=-1).unsqueeze(0)).squeeze(0).permute(2, 0, 1)

    def get_grid_embedding(self) -> nn.Module:
        """Return the module that maps the centers of cells to Fourier features."""
        return self.prompt_encoder.shared_embedding

    def prepare_high_res_features(
        self, image_embeddings: Tensor, high_res_features: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...]:
        """Compute, once per image, the features of higher resolutions that masks are predicted from."""
        return high_res_features

    def decode_masks(
        self, tokens: Tensor, grid: Tensor, image_index: Tensor, high_res_features: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor]:
        """Predict masks and their IoU.

        Args:
            tokens: (N, T, D) output tokens.
            grid: (N, D, h, w) image features of each region.
            image_index: (N,) image of each region.
            high_res_features: Features of images at higher resolutions, (B, ...) each, as prepared.

        Returns:
            Mask logits (N, M + 1, 4h, 4w) and predicted IoU (N, M + 1). The first mask is the single mask.
        """
        rows_per_chunk = None
        if is_cpu_inference(grid) and len(grid):  # upscaled grids are 8 times larger
            rows_per_chunk = UPSCALE_ELEMENTS_PER_CHUNK // grid[0].numel()
        masks = [
            self.predict_masks(tokens[chunk], grid[chunk], image_index[chunk], high_res_features)
            for chunk in split_rows(len(grid), rows_per_chunk)
        ]
        return torch.cat(masks), self.predict_iou(tokens)

    def predict_iou(self, tokens: Tensor) -> Tensor:
        """Predict the IoU of the masks of N regions: output tokens (N, T, D) -> (N, M + 1)."""
        return self.decoder.iou_prediction_head(tokens[:, 0])

    def predict_masks(
        self, tokens: Tensor, grid: Tensor, image_index: Tensor, high_res_features: tuple[Tensor, ...]
    ) -> Tensor:
        """Predict the mask logits of some regions, (N, M + 1, 4h, 4w); the arguments are those of `decode_masks`."""
        upscaled = self.upscale_grid(grid, image_index, high_res_features)
        return torch.einsum("nmc,nchw->nmhw", self.compute_mask_weights(tokens), upscaled)

    def compute_mask_weights(self, tokens: Tensor) -> Tensor:
        """Return the weights of each mask over the channels of the upscaled grid, (N, M + 1, D/8)."""
        networks = self.decoder.output_hypernetworks_mlps
        return torch.stack([network(tokens[:, 1 + index]) for index, network in enumerate(networks)], dim=1)

    def upscale_grid(self, grid: Tensor, image_index: Tensor, high_res_features: tuple[Tensor, ...]) -> Tensor:
        """Upscale the grids of N regions: (N, D, h, w) -> (N, D/8, 4h, 4w)."""
        decoder = self.decoder
        upscaled = decoder.activation(decoder.upscale_layer_norm(decoder.upscale_conv1(grid)))
        return decoder.activation(decoder.upscale_conv2(upscaled))

    def compute_boxes(self, masks: Tensor, scores: Tensor) -> Tensor:
        """Return the boxes of the best masks in pixels of the model input, (N, 4)."""
        return masks_to_boxes(select_best_masks(masks.detach(), scores)) * (self.image_size / masks.shape[-1])

    def compute_losses(self, regions: SegmenterOutput, targets: MaskTargets) -> dict[str, Tensor]:
        """Compute SAM's losses; padding and regions without a ground-truth mask are ignored.

        Args:
            regions: Output of `forward`.
            targets: Soft ground-truth masks (N, 4h, 4w).

        Returns:
            "mask", 20 focal + dice loss of the best mask per region, and "iou", the mean squared error of all predicted
            IoU scores.
        """
        assert regions.masks is not None  # see `forward`
        assert regions.iou_scores is not None
        region_rows = targets.has_mask.nonzero().squeeze(1)  # indices: a bool mask would synchronize at every use
        if not len(region_rows):
            zero = regions.masks.sum() * 0.0
            return {"mask": zero, "iou": zero}
        logits, iou_scores = regions.masks[region_rows].float(), regions.iou_scores[region_rows].float()
        target_masks = targets.masks[region_rows].unsqueeze(1).expand_as(logits)
        valid_pixels = targets.valid_pixels[region_rows].unsqueeze(1)
        num_valid = valid_pixels.sum((2, 3)).clamp(min=1)
        probabilities = logits.sigmoid()
        cross_entropy = F.binary_cross_entropy_with_logits(logits, target_masks, reduction="none")
        target_probability = probabilities * target_masks + (1 - probabilities) * (1 - target_masks)
        class_weights = 0.25 * target_masks + 0.75 * (1 - target_masks)
        # (N, M)
        focal = (class_weights * (1 - target_probability).square() * cross_entropy * valid_pixels).sum(
            (2, 3)
        ) / num_valid
        probabilities = probabilities * valid_pixels
        total_area = probabilities.sum((2, 3)) + (target_masks * valid_pixels).sum((2, 3))
        dice = 1 - (2 * (probabilities * target_masks).sum((2, 3)) + 1) / (total_area + 1)
        with torch.no_grad():
            is_predicted, is_target = (logits > 0) & valid_pixels, (target_masks > 0.5) & valid_pixels
            iou = (is_predicted & is_target).sum((2, 3)) / (is_predicted | is_target).sum((2, 3)).clamp(min=1)
        return {
            "mask": (20 * focal + dice).min(dim=1).values.mean(),
            "iou": F.mse_loss(iou_scores, iou.to(iou_scores.dtype)),
        }


def _read_stored_options(config: Mapping[str, Any]) -> dict[str, int]:
    """Return the options of a segmenter that the fields of a configuration contain."""
    options: dict[str, int] = {}
    for name, (table, field) in CONFIG_FIELDS.items():
        value = _get_table(config, table).get(field)
        if value is not None:
            check_range(f"{table}.{field} of the weights", value, int, 1)
            options[name] = value
    return options


def _get_table(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Return a nested configuration; empty if it does not exist. Raises ValueError if it is not a table."""
    table = config.get(name)
    check_type(f"{name} of the weights", {} if table is None else table, Mapping)
    return table or {}


def draw_prompts(prompts: PromptBatch, mask_size: int, image_size: int) -> Tensor:
    """Draw boxes and points into mask prompts.

    A box is 1 inside and -1 outside. A point adds a Gaussian of height 2, negative for points outside the region.

    Args:
        prompts: N prompts in pixels of the model input.
        mask_size: Side of the mask prompts in cells.
        image_size: Side S of the model input in pixels.

    Returns:
        Mask prompts (N, 1, mask_size, mask_size).
    """
    centers = (torch.arange(mask_size, device=prompts.image_index.device) + 0.5) * (image_size / mask_size)
    canvas = torch.zeros(len(prompts), mask_size, mask_size, device=prompts.image_index.device)
    if prompts.boxes is not None:
        canvas += rasterize_boxes(prompts.boxes, mask_size, image_size) * 2.0 - 1.0
    if prompts.points is not None:
        assert prompts.labels is not None  # of the points
        squared_distance = (prompts.points.float()[..., None] + 0.5 - centers).square()  # (N, P, 2, side)
        x, y = (-squared_distance / (2 * (image_size / 32) ** 2)).exp().unbind(2)
        height = torch.where(prompts.labels == 1, 2.0, torch.where(prompts.labels == 0, -2.0, 0.0))
        canvas += torch.einsum("np,npy,npx->nyx", height, y, x)
    return canvas.unsqueeze(1)


class FeatureNeck(nn.Module):
    """SAM's neck from the encoder's channels to the segmenter's: (B, C, h, w) -> (B, D, h, w).

    Args:
        in_channels: C.
        out_channels: D.
    """

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.layers: VisionNeck = VisionNeck(in_channels, out_channels)

    def forward(self, features: Tensor) -> Tensor:
        """Apply the neck."""
        return self.layers(features.permute(0, 2, 3, 1))
