"""Segmenter of boxes and points without masks or pretrained weights, for encoders without a segmenter of their own."""

from __future__ import annotations

import torch
from sca_registry.contracts import Encoder, PromptBatch, SegmenterOutput
from torch import Tensor, nn

from sca.segmenters.sam import SAM_HIDDEN_SIZE, FeatureNeck


class BoxSegmenter(nn.Module):
    """Segmenter that encodes boxes and points as tokens and predicts no masks.

    Tokens are random Fourier features of the coordinates plus a learned type embedding (outside point, inside point,
    first corner, second corner), as in SAM's prompt encoder (arXiv 2304.02643). The image features are passed on
    without a mask decoder. Mask prompts are not supported.

    Args:
        encoder: Image encoder.
        hidden_size: D; None for the encoder's channels, at most SAM's 256. A size other than the encoder's adds a
            trainable neck.
    """

    frequencies: Tensor  # (2, D / 2)

    def __init__(self, encoder: Encoder, hidden_size: int | None = None):
        super().__init__()
        self.channels: int = hidden_size or min(encoder.channels, SAM_HIDDEN_SIZE)
        self.image_size: int = encoder.image_format.size
        self.grid_size: int = self.image_size // encoder.stride
        self.neck: nn.Module = (
            FeatureNeck(encoder.channels, self.channels) if self.channels != encoder.channels else nn.Identity()
        )
        self.register_buffer("frequencies", torch.randn(2, self.channels // 2))
        self.point_embeddings: nn.Embedding = nn.Embedding(4, self.channels)

    def forward(self, features: Tensor, prompts: PromptBatch, multimask_output: bool = True) -> SegmenterOutput:
        """Encode prompted regions.

        Args:
            features: (B, C, h, w) features of the encoder.
            prompts: N prompts with boxes, points or both.
            multimask_output: Not used.

        Returns:
            Tokens and boxes of the N regions, without masks.

        Raises:
            ValueError: The prompts have masks.
        """
        if prompts.masks is not None:
            raise ValueError("the segmenter 'box' does not support mask prompts; use segmenter=sam")
        image_embeddings = self.neck(features)
        token_groups = []
        if prompts.points is not None:
            assert prompts.labels is not None  # of the points
            token_groups.append(
                self.encode_coordinates(prompts.points + 0.5)
                + self.point_embeddings(prompts.labels.long().clamp(min=0))
            )
        if prompts.boxes is not None:
            corners = prompts.boxes.unflatten(1, (2, 2))  # (N, 2, 2) in the model input
            token_groups.append(self.encode_coordinates(corners + 0.5) + self.point_embeddings.weight[2:])
        tokens = torch.cat(token_groups, dim=1)  # (N, P', D)
        return SegmenterOutput(
            image_index=prompts.image_index,
            image_embeddings=image_embeddings,
            image_size=self.image_size,
            dense_embeddings=image_embeddings.new_zeros(self.channels, 1, 1),
            positional_encoding=self.compute_positional_encoding(),
            prompt_tokens=tokens,
            tokens=tokens,
            boxes=prompts.boxes,
        )

    def encode_coordinates(self, coordinates: Tensor) -> Tensor:
        """Return the Fourier features (..., D) of coordinates (..., 2), x y in pixels of the model input."""
        angles = 2 * torch.pi * (2 * coordinates / self.image_size - 1).to(self.frequencies.dtype) @ self.frequencies
        return torch.cat((angles.sin(), angles.cos()), dim=-1)

    def compute_positional_encoding(self) -> Tensor:
        """Return the positional encoding of each cell's center, (D, h, w)."""
        centers = (torch.arange(self.grid_size, device=self.frequencies.device) + 0.5) * (
            self.image_size / self.grid_size
        )
        y, x = torch.meshgrid(centers, centers, indexing="ij")
        return self.encode_coordinates(torch.stack((x, y), dim=-1)).permute(2, 0, 1)
