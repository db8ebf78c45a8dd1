"""Direct decoding (SCA, arXiv 2312.00869): the segmenter's mask tokens take the place of learned queries."""

from __future__ import annotations

import torch
from sca_registry.contracts import Segmenter, SegmenterOutput
from torch import Tensor, nn

from sca.nn.two_way import TwoWayTransformer, init_weights


class MaskTokenMixer(nn.Module):
    """The fused tokens of all masks of a region, taken through a two-way transformer over the fused grid: (N, M, D).

    num_masks: M, masks per region; SAM has three. depth, num_heads, mlp_dim: of the transformer.
    """

    uses_grid = True

    def __init__(
        self, segmenter: Segmenter, num_masks: int = 3, depth: int = 12, num_heads: int = 8, mlp_dim: int = 2048
    ):
        super().__init__()
        self.hidden_size = segmenter.channels
        self.num_queries = num_masks
        self.transformer = TwoWayTransformer(self.hidden_size, depth, num_heads, mlp_dim)
        self.apply(init_weights)

    def forward(self, regions: SegmenterOutput) -> Tensor:
        queries = regions.mask_tokens  # (N, M, D)
        if queries.shape[1] != self.num_queries:
            raise ValueError(
                f"the mixer 'mask-tokens' was built for {self.num_queries} masks and got {queries.shape[1]}"
            )
        tokens, _ = self.transformer(
            torch.cat((queries, regions.tokens), dim=1), regions.grid, regions.positional_encoding, return_grids=False
        )
        return tokens[:, : self.num_queries]
