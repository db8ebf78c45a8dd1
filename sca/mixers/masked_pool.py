"""Mask pooling: a minimal mixer of the features under the mask and the geometry of the mask."""

from __future__ import annotations

import torch
from sca_registry.contracts import Segmenter, SegmenterOutput
from torch import Tensor, nn

from sca.nn.masks import masks_to_boxes, pool_under_masks, select_best_masks


class MaskedPoolMixer(nn.Module):
    """Two-layer MLP on mask-pooled features and mask geometry; returns query embeddings (N, Q, D).

    The image features are averaged under the best mask, as in the mask pooling of Osprey (arXiv 2312.10032). The
    geometry is the center, sides and area of the mask.

    Args:
        segmenter: Segmenter with masks.
        num_queries: Queries Q per region.
        mlp_dim: Width of the hidden layer.
    """

    uses_grid = False

    def __init__(self, segmenter: Segmenter, num_queries: int = 8, mlp_dim: int = 2048):
        super().__init__()
        self.hidden_size: int = segmenter.channels
        self.num_queries = num_queries
        self.norm: nn.LayerNorm = nn.LayerNorm(self.hidden_size)
        self.geometry: nn.Linear = nn.Linear(5, self.hidden_size)
        self.layers: nn.Sequential = nn.Sequential(
            nn.LayerNorm(self.hidden_size),
            nn.Linear(self.hidden_size, mlp_dim),
            nn.GELU(),
            nn.Linear(mlp_dim, num_queries * self.hidden_size),
        )

    def forward(self, regions: SegmenterOutput) -> Tensor:
        """Return the query embeddings of each region, (N, Q, D)."""
        assert regions.masks is not None  # `requires` of the card
        assert regions.iou_scores is not None
        best_logits = select_best_masks(regions.masks, regions.iou_scores)  # (N, 4h, 4w)
        probabilities = best_logits.sigmoid()
        pooled = pool_under_masks(regions.image_embeddings, regions.image_index, probabilities)
        # fractions of the frame's side
        x1, y1, x2, y2 = (masks_to_boxes(best_logits) / best_logits.shape[-1]).unbind(1)
        box_features = torch.stack(
            ((x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1, probabilities.mean((1, 2)).float()), dim=1
        )
        region_features = self.norm(pooled) + self.geometry(box_features.to(pooled.dtype))
        return self.layers(region_features).unflatten(1, (self.num_queries, self.hidden_size))
