"""Mixer for direct decoding (SCA, arXiv 2312.00869): the segmenter's mask tokens replace learned queries."""

from __future__ import annotations

import torch
from sca_registry.contracts import Segmenter, SegmenterOutput
from torch import Tensor, nn

from sca.nn.two_way_transformer import TwoWayTransformer, init_weights


class MaskTokenMixer(nn.Module):
    """Two-way transformer over the mask tokens and the feature grid of a region; returns queries (N, M, D).

    Args:
        segmenter: Segmenter with mask tokens and a grid.
        num_masks: Masks M per region; SAM has three.
        depth: Layers of the transformer.
        num_heads: Attention heads.
        mlp_dim: MLP width.
    """

    uses_grid = True

    def __init__(
        self, segmenter: Segmenter, num_masks: int = 3, depth: int = 12, num_heads: int = 8, mlp_dim: int = 2048
    ):
        super().__init__()
        self.hidden_size: int = segmenter.channels
        self.num_queries = num_masks
        self.transformer: TwoWayTransformer = TwoWayTransformer(self.hidden_size, depth, num_heads, mlp_dim)
        self.apply(init_weights)

    def forward(self, regions: SegmenterOutput) -> Tensor:
        """Return the query embeddings of each region, (N, M, D).

        Args:
            regions: N regions.

        Returns:
            (N, M, D) queries.

        Raises:
            ValueError: The regions have the wrong number of masks.
        """
        assert regions.mask_tokens is not None  # `requires` of the card
        assert regions.grid is not None
        queries = regions.mask_tokens  # (N, M, D)
        if queries.shape[1] != self.num_queries:
            raise ValueError(
                f"the mixer 'mask-tokens' requires {self.num_queries} masks per region, not {queries.shape[1]}"
            )
        tokens, _ = self.transformer(
            torch.cat((queries, regions.tokens), dim=1), regions.grid, regions.positional_encoding, return_grids=False
        )
        return tokens[:, : self.num_queries]
