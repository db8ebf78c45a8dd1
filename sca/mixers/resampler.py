"""Queries that look at the image all regions share, so that one more region costs little."""

from __future__ import annotations

import torch
from sca_registry.contracts import Segmenter, SegmenterOutput
from torch import Tensor, nn
from torch.nn import functional as F

from sca.nn.region_rows import iter_rows_by_image
from sca.nn.two_way import init_weights

ImageKeysValues = list[tuple[Tensor, Tensor]]  # keys and values of each layer, (B, heads, h w, D / heads)


class ResamplerMixer(nn.Module):
    """A Perceiver (arXiv 2103.03206) in the manner of the Q-Former (BLIP-2, arXiv 2301.12597): learned queries and a
    region's fused tokens attend to one another, and the queries to the features of its image, (N, Q, D).

    Keys and values are computed once an image, by `prepare`, and the regions of an image attend to them in place.
    num_queries: Q. depth, num_heads, mlp_dim: of the transformer.
    """

    uses_grid = False

    def __init__(
        self, segmenter: Segmenter, num_queries: int = 8, depth: int = 6, num_heads: int = 8, mlp_dim: int = 2048
    ):
        super().__init__()
        self.hidden_size = segmenter.channels
        if self.hidden_size % num_heads:
            raise ValueError(f"hidden_size {self.hidden_size} must be a multiple of the {num_heads} heads")
        self.num_queries = num_queries
        self.tokens = nn.Embedding(num_queries, self.hidden_size)
        self.layers = nn.ModuleList(ResamplerLayer(self.hidden_size, num_heads, mlp_dim) for _ in range(depth))
        self.norm = nn.LayerNorm(self.hidden_size)
        self.apply(init_weights)

    def prepare(self, image_embeddings: Tensor, positional_encoding: Tensor) -> ImageKeysValues:
        """Of the features (B, D, h, w) of whole images and the position code (D, h, w) of their grid."""
        return [layer.project_image(image_embeddings, positional_encoding) for layer in self.layers]

    def forward(self, regions: SegmenterOutput, prepared: ImageKeysValues | None = None) -> Tensor:
        if prepared is None:
            prepared = self.prepare(regions.image_embeddings, regions.positional_encoding)
        queries = self.tokens.weight.expand(len(regions), -1, -1)  # (N, Q, D)
        tokens = torch.cat((queries, regions.tokens), dim=1)
        for layer_number, (layer, (keys, values)) in enumerate(zip(self.layers, prepared, strict=True), 1):
            is_last = layer_number == len(self.layers)
            tokens = layer(tokens, regions.image_index, keys, values, self.num_queries, is_last=is_last)
        return self.norm(tokens)


class ResamplerLayer(nn.Module):
    """Pre-norm self-attention, the queries' attention to the image, and an MLP: (N, T, D) -> the same; the last layer
    gives the queries alone, (N, Q, D).
    """

    def __init__(self, hidden_size: int, num_heads: int, mlp_dim: int):
        super().__init__()
        self.num_heads = num_heads
        self.norms = nn.ModuleList(
            nn.LayerNorm(hidden_size) for _ in range(4)
        )  # of tokens, of tokens, of the image, of both
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.self_attn_out = nn.Linear(hidden_size, hidden_size)
        self.query = nn.Linear(hidden_size, hidden_size)
        self.key = nn.Linear(hidden_size, hidden_size)
        self.value = nn.Linear(hidden_size, hidden_size)
        self.cross_attn_out = nn.Linear(hidden_size, hidden_size)
        self.mlp = nn.Sequential(nn.Linear(hidden_size, mlp_dim), nn.GELU(), nn.Linear(mlp_dim, hidden_size))

    def project_image(self, image_embeddings: Tensor, positional_encoding: Tensor) -> tuple[Tensor, Tensor]:
        cells = self.norms[2](image_embeddings.flatten(2).transpose(1, 2))  # (B, h w, D)
        keys = self.key(cells + positional_encoding.flatten(1).T)
        return self._split_heads(keys).contiguous(), self._split_heads(
            self.value(cells)
        ).contiguous()  # they are read many times

    def forward(
        self, tokens: Tensor, image_index: Tensor, keys: Tensor, values: Tensor, num_queries: int, is_last: bool = False
    ) -> Tensor:
        query, key, value = map(self._split_heads, self.qkv(self.norms[0](tokens)).chunk(3, dim=-1))
        tokens = tokens + self.self_attn_out(self._merge_heads(F.scaled_dot_product_attention(query, key, value)))
        query_tokens, other_tokens = tokens[:, :num_queries], tokens[:, num_queries:]
        query = self._split_heads(self.query(self.norms[1](query_tokens)))  # (N, heads, Q, d)
        attended = _attend_by_image(query, image_index, keys, values)
        query_tokens = query_tokens + self.cross_attn_out(self._merge_heads(attended))
        tokens = query_tokens if is_last else torch.cat((query_tokens, other_tokens), dim=1)
        return tokens + self.mlp(self.norms[3](tokens))

    def _split_heads(self, values: Tensor) -> Tensor:
        return values.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (N, heads, T, d)

    def _merge_heads(self, values: Tensor) -> Tensor:
        return values.transpose(1, 2).flatten(2)  # (N, T, D)


def _attend_by_image(query: Tensor, image_index: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Attention of (N, heads, T, d) queries to the keys and values of the image that each is of, without a copy of them
    for each region: the queries of an image go as one long row.
    """
    outputs = torch.empty_like(query)
    for index, rows in iter_rows_by_image(image_index):
        image_queries = query[rows]  # (n, heads, T, d)
        flat_queries = image_queries.transpose(0, 1).flatten(1, 2).unsqueeze(0)  # (1, heads, n T, d)
        attended = F.scaled_dot_product_attention(flat_queries, keys[index : index + 1], values[index : index + 1])
        outputs[rows] = attended.squeeze(0).unflatten(1, (len(image_queries), -1)).transpose(0, 1)
    return outputs
