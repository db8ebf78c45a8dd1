"""SCA's split mixer (arXiv 2312.00869): a text mixer parallel to SAM's decoder, on image features and raw prompts."""

from __future__ import annotations

import torch
from sca_registry.contracts import Segmenter, SegmenterOutput
from torch import Tensor, nn

from sca.nn.two_way_transformer import TwoWayTransformer, init_weights


class SplitMixer(nn.Module):
    """Two-way transformer over learned queries, prompt tokens and image features; returns (N, Q, D).

    The dense prompt embeddings are added to the image features. The outputs of the mask decoder are not used. The
    defaults are those of the released models.

    Args:
        segmenter: Segmenter.
        num_queries: Queries Q per region.
        depth: Layers of the transformer.
        num_heads: Attention heads.
        mlp_dim: MLP width.
    """

    uses_grid = False

    def __init__(
        self, segmenter: Segmenter, num_queries: int = 8, depth: int = 12, num_heads: int = 8, mlp_dim: int = 2048
    ):
        super().__init__()
        self.hidden_size: int = segmenter.channels
        self.num_queries = num_queries
        self.tokens: nn.Embedding = nn.Embedding(num_queries, self.hidden_size)
        self.transformer: TwoWayTransformer = TwoWayTransformer(self.hidden_size, depth, num_heads, mlp_dim)
        self.apply(init_weights)

    def forward(self, regions: SegmenterOutput) -> Tensor:
        """Return the query embeddings of each region, (N, Q, D)."""
        queries = self.tokens.weight.expand(len(regions), -1, -1)  # (N, Q, D)
        grid = regions.image_embeddings[regions.image_index] + regions.dense_embeddings  # (N, D, h, w)
        tokens, _ = self.transformer(
            torch.cat((queries, regions.prompt_tokens), dim=1), grid, regions.positional_encoding, return_grids=False
        )
        return tokens[:, : self.num_queries]
