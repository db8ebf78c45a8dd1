"""The published mixer: learned queries gather a region's words in SAM's two-way transformer (SCA, arXiv 2312.00869)."""

from __future__ import annotations

import torch
from sca_registry.contracts import Regions, Segmenter
from torch import Tensor, nn

from sca.nn.masks import best_masks, mean_under
from sca.nn.two_way import TwoWayTransformer, init_weights


class QueryMixer(nn.Module):
    """Learned queries and the segmenter's fused tokens go together through a two-way transformer over the fused grid.

    queries: Q, given to the language model. depth, heads, mlp: of the transformer; the defaults are those of the
    released models. pooled: the image's features averaged under the best mask are added to what each query gathered: a
    short way from pixels to words, which a small model trained from scratch needs and the published one does without.
    """

    uses_grid = True

    def __init__(
        self,
        segmenter: Segmenter,
        queries: int = 8,
        depth: int = 12,
        heads: int = 8,
        mlp: int = 2048,
        pooled: bool = False,
    ):
        super().__init__()
        self.width = segmenter.channels
        self.queries = queries
        self.tokens = nn.Embedding(queries, self.width)
        self.transformer = TwoWayTransformer(self.width, depth, heads, mlp)
        self.apply(init_weights)
        self.pool = nn.Linear(self.width, queries * self.width) if pooled else None

    def forward(self, regions: Regions) -> Tensor:
        grid = regions.grid
        if grid is None:
            grid = regions.image[regions.owner] + regions.dense  # (N, D, h, w)
        queries = self.tokens.weight.expand(len(regions), -1, -1)  # (N, Q, D)
        tokens = torch.cat((queries, regions.tokens), dim=1)
        tokens, _ = self.transformer(tokens, grid, regions.position, grids=False)
        gathered = tokens[:, : self.queries]
        if self.pool is not None:
            best = best_masks(regions.masks.detach(), regions.scores)  # (N, 4h, 4w)
            pooled = mean_under(regions.image, regions.owner, best.sigmoid())  # (N, D)
            gathered = gathered + self.pool(pooled).unflatten(1, (self.queries, self.width))
        return gathered
