"""Direct decoding (SCA, arXiv 2312.00869): the segmenter's mask tokens take the place of learned queries."""

from __future__ import annotations

import torch
from sca_registry.contracts import Regions, Segmenter
from torch import Tensor, nn

from sca.nn.two_way import TwoWayTransformer, init_weights


class MaskTokenMixer(nn.Module):
    """The fused tokens of all masks of a region, taken through a two-way transformer over the fused grid: (N, M, D).

    masks: M, how many a region has; SAM has three. depth, heads, mlp: of the transformer.
    """

    uses_grid = True

    def __init__(self, segmenter: Segmenter, masks: int = 3, depth: int = 12, heads: int = 8, mlp: int = 2048):
        super().__init__()
        self.width = segmenter.channels
        self.queries = masks
        self.transformer = TwoWayTransformer(self.width, depth, heads, mlp)
        self.apply(init_weights)

    def forward(self, regions: Regions) -> Tensor:
        queries = regions.mask_tokens  # (N, M, D)
        if queries.shape[1] != self.queries:
            raise ValueError(f"the mixer 'mask-tokens' was built for {self.queries} masks and got {queries.shape[1]}")
        tokens, _ = self.transformer(
            torch.cat((queries, regions.tokens), dim=1), regions.grid, regions.position, grids=False
        )
        return tokens[:, : self.queries]
