"""Resampler: queries attend to image features that all regions share, so that additional regions are cheap."""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
from sca_registry.contracts import Segmenter, SegmenterOutput
from torch import Tensor, nn
from torch.nn import functional as F

from sca.nn.region_batch import iter_rows_by_image
from sca.nn.two_way_transformer import init_weights

ImageKeysValues = list[tuple[Tensor, Tensor]]  # keys and values of each layer, (B, heads, h w, D / heads)


class ResamplerMixer(nn.Module):
    """Perceiver (arXiv 2103.03206) in the style of the Q-Former (BLIP-2, arXiv 2301.12597); returns queries (N, Q, D).

    Learned queries and the output tokens of a region attend to each other, and the queries attend to the features of
    the image. `prepare_images` computes the keys and values once per image, and all its regions share them without a
    copy.

    Args:
        segmenter: Segmenter.
        num_queries: Queries Q per region.
        depth: Layers of the transformer.
        num_heads: Attention heads; they must divide the segmenter's channels.
        mlp_dim: MLP width.

    Raises:
        ValueError: The segmenter's channels are not a multiple of `num_heads`.
    """

    uses_grid = False

    def __init__(
        self, segmenter: Segmenter, num_queries: int = 8, depth: int = 6, num_heads: int = 8, mlp_dim: int = 2048
    ):
        super().__init__()
        self.hidden_size: int = segmenter.channels
        if self.hidden_size % num_heads:
            raise ValueError(f"hidden_size {self.hidden_size} must be a multiple of the {num_heads} heads")
        self.num_queries = num_queries
        self.tokens: nn.Embedding = nn.Embedding(num_queries, self.hidden_size)
        self.layers: nn.ModuleList = nn.ModuleList(
            ResamplerLayer(self.hidden_size, num_heads, mlp_dim) for _ in range(depth)
        )
        self.norm: nn.LayerNorm = nn.LayerNorm(self.hidden_size)
        self.apply(init_weights)

    def prepare_images(self, image_embeddings: Tensor, positional_encoding: Tensor) -> ImageKeysValues:
        """Compute the keys and values of images.

        Args:
            image_embeddings: (B, D, h, w) features.
            positional_encoding: (D, h, w) positional encoding of the grid.

        Returns:
            Keys and values of each layer, (B, heads, h w, D / heads).
        """
        layers = cast("Iterable[ResamplerLayer]", self.layers)
        return [layer.project_image(image_embeddings, positional_encoding) for layer in layers]

    def forward(self, regions: SegmenterOutput, prepared: ImageKeysValues | None = None) -> Tensor:
        """Return the query embeddings of each region, (N, Q, D).

        Args:
            regions: N regions.
            prepared: Output of `prepare_images` for their images; None computes it.

        Returns:
            (N, Q, D) queries.
        """
        if prepared is None:
            prepared = self.prepare_images(regions.image_embeddings, regions.positional_encoding)
        queries = self.tokens.weight.expand(len(regions), -1, -1)  # (N, Q, D)
        tokens = torch.cat((queries, regions.tokens), dim=1)
        for layer_number, (layer, (keys, values)) in enumerate(zip(self.layers, prepared, strict=True), 1):
            is_last = layer_number == len(self.layers)
            tokens = layer(tokens, regions.image_index, keys, values, self.num_queries, is_last=is_last)
        return self.norm(tokens)


class ResamplerLayer(nn.Module):
    """Pre-norm layer: self-attention, cross-attention from the queries to the image, and an MLP.

    Args:
        hidden_size: Width D.
        num_heads: Attention heads.
        mlp_dim: MLP width.
    """

    def __init__(self, hidden_size: int, num_heads: int, mlp_dim: int):
        super().__init__()
        self.num_heads = num_heads
        # before self-attention, of the queries and of the image before cross-attention, and before the MLP
        self.norms: nn.ModuleList = nn.ModuleList(nn.LayerNorm(hidden_size) for _ in range(4))
        self.qkv: nn.Linear = nn.Linear(hidden_size, 3 * hidden_size)
        self.self_attn_out: nn.Linear = nn.Linear(hidden_size, hidden_size)
        self.query: nn.Linear = nn.Linear(hidden_size, hidden_size)
        self.key: nn.Linear = nn.Linear(hidden_size, hidden_size)
        self.value: nn.Linear = nn.Linear(hidden_size, hidden_size)
        self.cross_attn_out: nn.Linear = nn.Linear(hidden_size, hidden_size)
        self.mlp: nn.Sequential = nn.Sequential(
            nn.Linear(hidden_size, mlp_dim), nn.GELU(), nn.Linear(mlp_dim, hidden_size)
        )

    def project_image(self, image_embeddings: Tensor, positional_encoding: Tensor) -> tuple[Tensor, Tensor]:
        """Return the keys and values of images for this layer, (B, heads, h w, D / heads)."""
        cells = self.norms[2](image_embeddings.flatten(2).transpose(1, 2))  # (B, h w, D)
        keys = self.key(cells + positional_encoding.flatten(1).T)
        # contiguous, because they are read many times
        return self._split_heads(keys).contiguous(), self._split_heads(self.value(cells)).contiguous()

    def forward(
        self, tokens: Tensor, image_index: Tensor, keys: Tensor, values: Tensor, num_queries: int, is_last: bool = False
    ) -> Tensor:
        """Apply the layer.

        Args:
            tokens: (N, T, D) tokens, queries first.
            image_index: (N,) image of each region, sorted.
            keys: (B, heads, h w, D / heads) keys of the images.
            values: (B, heads, h w, D / heads) values of the images.
            num_queries: Queries Q.
            is_last: Return the queries only.

        Returns:
            Tokens (N, T, D), or query embeddings (N, Q, D) for the last layer.
        """
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
    """Attend from (N, heads, T, d) queries to their images, without copying keys and values for each region."""
    outputs = torch.empty_like(query)
    for index, rows in iter_rows_by_image(image_index, len(keys)):
        image_queries = query[rows]  # (n, heads, T, d)
        # all queries of an image form one sequence
        flat_queries = image_queries.transpose(0, 1).flatten(1, 2).unsqueeze(0)  # (1, heads, n T, d)
        attended = F.scaled_dot_product_attention(flat_queries, keys[index : index + 1], values[index : index + 1])
        outputs[rows] = attended.squeeze(0).unflatten(1, (len(image_queries), -1)).transpose(0, 1)
    return outputs
