"""A text mixer beside SAM's own (SCA's split mixer, arXiv 2312.00869): it sees the raw image and the raw prompt."""

from __future__ import annotations

import torch
from sca_registry.contracts import Regions, Segmenter
from torch import Tensor, nn

from sca.nn.two_way import TwoWayTransformer, init_weights


class SplitMixer(nn.Module):
    """Learned queries and the prompt's raw tokens go together through a two-way transformer over the image's features
    with the dense prompt added: (N, Q, D), without anything that the segmenter has made of them.

    queries: Q. depth, heads, mlp: of the transformer; the defaults are those of the released models.
    """

    uses_grid = False

    def __init__(self, segmenter: Segmenter, queries: int = 8, depth: int = 12, heads: int = 8, mlp: int = 2048):
        super().__init__()
        self.width = segmenter.channels
        self.queries = queries
        self.tokens = nn.Embedding(queries, self.width)
        self.transformer = TwoWayTransformer(self.width, depth, heads, mlp)
        self.apply(init_weights)

    def forward(self, regions: Regions) -> Tensor:
        queries = self.tokens.weight.expand(len(regions), -1, -1)  # (N, Q, D)
        grid = regions.image[regions.owner] + regions.dense  # (N, D, h, w)
        tokens, _ = self.transformer(
            torch.cat((queries, regions.prompt_tokens), dim=1), grid, regions.position, grids=False
        )
        return tokens[:, : self.queries]
