"""The mixer of SCA (arXiv 2312.00869): learned queries in SAM's two-way transformer."""

from __future__ import annotations

import torch
from sca_registry.contracts import Segmenter, SegmenterOutput
from torch import Tensor, nn

from sca.nn.masks import pool_under_masks, select_best_masks
from sca.nn.two_way_transformer import TwoWayTransformer, init_weights


class QueryMixer(nn.Module):
    """Two-way transformer over learned queries, the segmenter's output tokens and the feature grid of a region.

    The defaults are those of the released models.

    Args:
        segmenter: Segmenter.
        num_queries: Queries Q per region.
        depth: Layers of the transformer.
        num_heads: Attention heads.
        mlp_dim: MLP width.
        mask_pooling: Add a projection of the image features averaged under the best mask to the queries. A small model
            trained from scratch needs this shortcut from the image to the language model; the original SCA model does
            not have it.
    """

    uses_grid = True

    def __init__(
        self,
        segmenter: Segmenter,
        num_queries: int = 8,
        depth: int = 12,
        num_heads: int = 8,
        mlp_dim: int = 2048,
        mask_pooling: bool = False,
    ):
        super().__init__()
        self.hidden_size: int = segmenter.channels
        self.num_queries = num_queries
        self.tokens: nn.Embedding = nn.Embedding(num_queries, self.hidden_size)
        self.transformer: TwoWayTransformer = TwoWayTransformer(self.hidden_size, depth, num_heads, mlp_dim)
        self.apply(init_weights)
        self.pool: nn.Linear | None = None
        if mask_pooling:
            self.pool = nn.Linear(self.hidden_size, num_queries * self.hidden_size)

    def forward(self, regions: SegmenterOutput) -> Tensor:
        """Return the query embeddings of each region, (N, Q, D)."""
        grid = regions.grid
        if grid is None:
            grid = regions.image_embeddings[regions.image_index] + regions.dense_embeddings  # (N, D, h, w)
        queries = self.tokens.weight.expand(len(regions), -1, -1)  # (N, Q, D)
        tokens = torch.cat((queries, regions.tokens), dim=1)
        tokens, _ = self.transformer(tokens, grid, regions.positional_encoding, return_grids=False)
        region_queries = tokens[:, : self.num_queries]
        if self.pool is not None:
            assert regions.masks is not None  # `option_requires` of the card
            assert regions.iou_scores is not None
            best_logits = select_best_masks(regions.masks.detach(), regions.iou_scores)  # (N, 4h, 4w)
            pooled = pool_under_masks(regions.image_embeddings, regions.image_index, best_logits.sigmoid())  # (N, D)
            region_queries = region_queries + self.pool(pooled).unflatten(1, (self.num_queries, self.hidden_size))
        return region_queries
