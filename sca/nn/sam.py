"""SAM's prompt encoder, mask decoder and neck (Segment Anything, arXiv 2304.02643), without transformers.

The parameters have the names that transformers gives them. Importing transformers takes longer than loading a small
model and captioning an image, so these modules do not import it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from sca.nn.two_way_transformer import TwoWayTransformer

NUM_POINT_EMBEDDINGS = 4  # background point, foreground point, top left and bottom right corner of a box


@dataclass(frozen=True)
class MaskDecoderConfig:
    """Sizes of a mask decoder, with the names of transformers' `SamMaskDecoderConfig`.

    Attributes:
        hidden_size: Width D.
        num_hidden_layers: Layers of the two-way transformer.
        num_attention_heads: Attention heads of the two-way transformer.
        mlp_dim: MLP width of the two-way transformer.
        iou_head_depth: Layers of the IoU prediction head.
        iou_head_hidden_dim: Width of the IoU prediction head.
        num_multimask_outputs: Candidate masks M per region, in addition to the single mask.
    """

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    mlp_dim: int
    iou_head_depth: int
    iou_head_hidden_dim: int
    num_multimask_outputs: int = 3


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over the channels of a grid: (B, C, h, w) -> (B, C, h, w).

    Args:
        num_channels: Channels C.
    """

    def __init__(self, num_channels: int):
        super().__init__(num_channels, eps=1e-6)

    def forward(self, features: Tensor) -> Tensor:
        """Normalize each cell."""
        return super().forward(features.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class VisionNeck(nn.Module):
    """SAM's neck: (B, h, w, C) -> (B, D, h, w).

    Args:
        in_channels: C.
        out_channels: D.
    """

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.conv1: nn.Conv2d = nn.Conv2d(in_channels, out_channels, 1, bias=False)
        self.layer_norm1: LayerNorm2d = LayerNorm2d(out_channels)
        self.conv2: nn.Conv2d = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.layer_norm2: LayerNorm2d = LayerNorm2d(out_channels)

    def forward(self, features: Tensor) -> Tensor:
        """Apply the neck to features with channels last."""
        features = self.layer_norm1(self.conv1(features.permute(0, 3, 1, 2)))
        return self.layer_norm2(self.conv2(features))


class PositionalEmbedding(nn.Module):
    """Random Fourier features of coordinates in [0, 1]: (..., 2) -> (..., D).

    Args:
        hidden_size: Width D.
        scale: Standard deviation of the frequencies.
    """

    def __init__(self, hidden_size: int, scale: float = 1.0):
        super().__init__()
        self.positional_embedding: nn.Parameter = nn.Parameter(scale * torch.randn(2, hidden_size // 2))

    def forward(self, coordinates: Tensor) -> Tensor:
        """Return the features of coordinates."""
        coordinates = (2 * coordinates - 1).to(self.positional_embedding.dtype)
        angles = 2 * math.pi * (coordinates @ self.positional_embedding)
        return torch.cat((angles.sin(), angles.cos()), dim=-1)


class MaskEmbedding(nn.Module):
    """Embedding of mask prompts: (N, 1, 4h, 4w) -> (N, D, h, w).

    Args:
        hidden_size: Width D.
        channels: Channels at half of the grid's stride.
    """

    def __init__(self, hidden_size: int, channels: int):
        super().__init__()
        self.activation: nn.GELU = nn.GELU()
        self.conv1: nn.Conv2d = nn.Conv2d(1, channels // 4, 2, stride=2)
        self.conv2: nn.Conv2d = nn.Conv2d(channels // 4, channels, 2, stride=2)
        self.conv3: nn.Conv2d = nn.Conv2d(channels, hidden_size, 1)
        self.layer_norm1: LayerNorm2d = LayerNorm2d(channels // 4)
        self.layer_norm2: LayerNorm2d = LayerNorm2d(channels)

    def forward(self, masks: Tensor) -> Tensor:
        """Embed masks."""
        features = self.activation(self.layer_norm1(self.conv1(masks)))
        return self.conv3(self.activation(self.layer_norm2(self.conv2(features))))


class PromptEncoder(nn.Module):
    """SAM's prompt encoder.

    Args:
        hidden_size: Width D.
        image_size: Side of the model input in pixels.
        grid_size: Side of the feature grid in cells.
        mask_input_channels: Channels of the mask embedding.
    """

    def __init__(self, hidden_size: int, image_size: int, grid_size: int, mask_input_channels: int):
        super().__init__()
        self.input_image_size = image_size
        self.grid_size = grid_size
        self.shared_embedding: PositionalEmbedding = PositionalEmbedding(hidden_size)
        self.mask_embed: MaskEmbedding = MaskEmbedding(hidden_size, mask_input_channels)
        self.no_mask_embed: nn.Embedding = nn.Embedding(1, hidden_size)
        self.point_embed: nn.ModuleList = nn.ModuleList(
            nn.Embedding(1, hidden_size) for _ in range(NUM_POINT_EMBEDDINGS)
        )
        self.not_a_point_embed: nn.Embedding = nn.Embedding(1, hidden_size)

    def forward(
        self, points: Tensor | None, labels: Tensor | None, boxes: Tensor | None, masks: Tensor | None
    ) -> tuple[Tensor | None, Tensor]:
        """Embed prompts. The arguments are those of transformers' `SamPromptEncoder`.

        Args:
            points: (N, 1, P, 2) points in pixels of the model input.
            labels: (N, 1, P) 1 for foreground, 0 for background, -1 for no point.
            boxes: (N, 1, 4) boxes in pixels of the model input.
            masks: (N, 1, 4h, 4w) masks.

        Returns:
            Tokens of points and boxes (N, 1, P', D), None without both; and embeddings of masks, or of no mask,
            (N, D, h, w).
        """
        tokens: list[Tensor] = []
        if points is not None:
            assert labels is not None  # of the points
            tokens.append(self._embed_points(points, labels, needs_padding=boxes is None))
        if boxes is not None:
            tokens.append(self._embed_boxes(boxes))
        if masks is not None:
            return torch.cat(tokens, dim=2) if tokens else None, self.mask_embed(masks)
        no_mask = self.no_mask_embed.weight[..., None, None]  # (1, D, 1, 1)
        return torch.cat(tokens, dim=2), no_mask.expand(len(tokens[0]), -1, self.grid_size, self.grid_size)

    def _embed_points(self, points: Tensor, labels: Tensor, needs_padding: bool) -> Tensor:
        """Embed points; without a box, SAM appends a token for no point."""
        if needs_padding:
            points = torch.cat((points, points.new_zeros(*points.shape[:2], 1, 2)), dim=2)
            labels = torch.cat((labels, -labels.new_ones(*labels.shape[:2], 1)), dim=2)
        labels = labels[..., None]
        embeddings = self._embed_coordinates(points)
        embeddings = torch.where(labels == -1, self.not_a_point_embed.weight, embeddings)
        for label in (0, 1):
            embeddings = torch.where(labels == label, embeddings + self._get_point_embedding(label), embeddings)
        return embeddings

    def _embed_boxes(self, boxes: Tensor) -> Tensor:
        corners = self._embed_coordinates(boxes.unflatten(2, (2, 2)))  # (N, 1, 2, D)
        return corners + torch.cat((self._get_point_embedding(2), self._get_point_embedding(3)))

    def _get_point_embedding(self, index: int) -> Tensor:
        return cast("nn.Embedding", self.point_embed[index]).weight

    def _embed_coordinates(self, pixels: Tensor) -> Tensor:
        return self.shared_embedding((pixels + 0.5) / self.input_image_size)  # pixel centers


class FeedForward(nn.Module):
    """MLP with ReLU: (..., in_size) -> (..., out_size).

    Args:
        in_size: Input width.
        hidden_size: Width of the hidden layers.
        out_size: Output width.
        depth: Layers.
    """

    def __init__(self, in_size: int, hidden_size: int, out_size: int, depth: int):
        super().__init__()
        self.activation: nn.ReLU = nn.ReLU()
        self.proj_in: nn.Linear = nn.Linear(in_size, hidden_size)
        self.proj_out: nn.Linear = nn.Linear(hidden_size, out_size)
        self.layers: nn.ModuleList = nn.ModuleList(nn.Linear(hidden_size, hidden_size) for _ in range(depth - 2))

    def forward(self, values: Tensor) -> Tensor:
        """Apply the MLP."""
        values = self.activation(self.proj_in(values))
        for layer in self.layers:
            values = self.activation(layer(values))
        return self.proj_out(values)


class MaskDecoder(nn.Module):
    """Modules of SAM's mask decoder; `SamSegmenter` calls them one by one.

    Args:
        config: Sizes.
    """

    def __init__(self, config: MaskDecoderConfig):
        super().__init__()
        self.config = config
        size, num_masks = config.hidden_size, config.num_multimask_outputs + 1
        self.hidden_size = size
        self.iou_token: nn.Embedding = nn.Embedding(1, size)
        self.mask_tokens: nn.Embedding = nn.Embedding(num_masks, size)
        self.transformer: TwoWayTransformer = TwoWayTransformer(
            size, config.num_hidden_layers, config.num_attention_heads, config.mlp_dim
        )
        self.upscale_conv1: nn.ConvTranspose2d = nn.ConvTranspose2d(size, size // 4, 2, stride=2)
        self.upscale_conv2: nn.ConvTranspose2d = nn.ConvTranspose2d(size // 4, size // 8, 2, stride=2)
        self.upscale_layer_norm: LayerNorm2d = LayerNorm2d(size // 4)
        self.activation: nn.GELU = nn.GELU()
        self.output_hypernetworks_mlps: nn.ModuleList = nn.ModuleList(
            FeedForward(size, size, size // 8, 3) for _ in range(num_masks)
        )
        self.iou_prediction_head: FeedForward = FeedForward(
            size, config.iou_head_hidden_dim, num_masks, config.iou_head_depth
        )
