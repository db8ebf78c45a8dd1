"""SAM's two-way transformer: tokens look at an image grid, and the grid looks back.

The block is the one of Segment Anything (arXiv 2304.02643), on transformers' modules. SCA (arXiv 2312.00869) stacks a
second, deeper one on SAM's own as its text feature mixer. The weights are transformers', the way through them is not:
nearly all of the work is done on the private grid of every region, so a grid is projected once a layer for all that is
asked of it, what positions add is projected once for all regions, and while regions share a grid, so is the grid.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import SamMaskDecoderConfig
from transformers.models.sam.modeling_sam import SamAttention, SamTwoWayAttentionBlock, SamTwoWayTransformer


class TwoWayTransformer(SamTwoWayTransformer):
    """Takes and gives regions in rows: tokens (N, T, D) and a grid (N, D, h, w) with its position code (D, h, w)."""

    together = 4  # regions that go through all layers at a time on a CPU when nothing is learned: grids stay in cache

    def __init__(self, width: int, depth: int, heads: int = 8, mlp: int = 2048):
        super().__init__(decoder_config(width, depth, heads, mlp))

    def forward(
        self, tokens: Tensor, grid: Tensor, position: Tensor, owner: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """owner: (N,) where the grid is that of images, (B, D, h, w): the one that each region begins with."""
        cells = grid.flatten(2).transpose(1, 2)  # (N or B, P, D)
        places = position.flatten(1).T  # (P, D)
        placed = [_placed(layer, places) for layer in self.layers]  # (P, 3I) each
        final = _placed_keys(self.final_attn_token_to_image, places)  # (P, 2I)
        shared = None if owner is None else _projected(self.layers[0], cells, placed[0])  # (B, P, 3I)
        step = self.together if grid.device.type == "cpu" and not torch.is_grad_enabled() else len(tokens)
        fused, grids = [], []
        for start in range(0, len(tokens), max(step, 1)):
            part = slice(start, start + step)
            rows = part if owner is None else owner[part]
            queries, keys = self._through(
                tokens[part], cells[rows], None if shared is None else shared[rows], placed, final
            )
            fused.append(queries)
            grids.append(keys)
        if not fused:
            return tokens, grid[:0]
        keys = torch.cat(grids) if len(grids) > 1 else grids[0]
        return torch.cat(fused), keys.transpose(1, 2).unflatten(2, grid.shape[-2:])

    def _through(
        self, tokens: Tensor, cells: Tensor, first: Tensor | None, placed: list[Tensor], final: Tensor
    ) -> tuple[Tensor, Tensor]:
        """All layers for a few regions; `first`: what the first layer asks of their grids, if that is known."""
        queries = tokens
        for layer, added in zip(self.layers, placed, strict=True):
            asked = _projected(layer, cells, added) if first is None else first
            first = None
            keys, values, looks = asked.chunk(3, dim=-1)
            queries = _look(layer, queries, tokens, keys, values)
            back = layer.cross_attn_image_to_token
            answer = _attend(back, looks, back.k_proj(queries + tokens), back.v_proj(queries))
            cells = layer.layer_norm4(cells + answer)
        last = self.final_attn_token_to_image
        keys, values = (F.linear(cells, torch.cat((last.k_proj.weight, last.v_proj.weight))) + final).chunk(2, dim=-1)
        queries = queries + _attend(last, last.q_proj(queries + tokens), keys, values)
        return self.layer_norm_final_attn(queries), cells


def _look(layer: SamTwoWayAttentionBlock, queries: Tensor, tokens: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Tokens (N, T, D) look at one another, then at the projected grid."""
    own, there = layer.self_attn, layer.cross_attn_token_to_image
    asking = queries if layer.skip_first_layer_pe else queries + tokens
    gathered = _attend(own, own.q_proj(asking), own.k_proj(asking), own.v_proj(queries))
    queries = layer.layer_norm1(gathered if layer.skip_first_layer_pe else queries + gathered)
    queries = layer.layer_norm2(queries + _attend(there, there.q_proj(queries + tokens), keys, values))
    return layer.layer_norm3(queries + layer.mlp(queries))


def _attend(attention: SamAttention, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Projected query (N, L, I), key and value (N, M, I) -> (N, L, D)."""
    heads = (attention.num_attention_heads, -1)
    query, key, value = (each.unflatten(2, heads).transpose(1, 2) for each in (query, key, value))
    return attention.out_proj(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))


def _projected(layer: SamTwoWayAttentionBlock, cells: Tensor, added: Tensor) -> Tensor:
    """(N, P, D) -> (N, P, 3I): keys and values that tokens look at, and queries of the cells that look back."""
    there, back = layer.cross_attn_token_to_image, layer.cross_attn_image_to_token
    return F.linear(cells, torch.cat((there.k_proj.weight, there.v_proj.weight, back.q_proj.weight))) + added


def _placed(layer: SamTwoWayAttentionBlock, places: Tensor) -> Tensor:
    """(P, D) -> (P, 3I): what positions and biases add to `_projected`."""
    looks = layer.cross_attn_image_to_token.q_proj
    return torch.cat((_placed_keys(layer.cross_attn_token_to_image, places), looks(places)), dim=1)


def _placed_keys(attention: SamAttention, places: Tensor) -> Tensor:
    """(P, D) -> (P, 2I): what positions and biases add to keys and values."""
    return torch.cat((attention.k_proj(places), attention.v_proj.bias.expand(len(places), -1)), dim=1)


def decoder_config(width: int, depth: int, heads: int, mlp: int, **more: int) -> SamMaskDecoderConfig:
    if width % (2 * heads):
        raise ValueError(f"width {width} must be a multiple of twice the {heads} heads: cross-attention halves it")
    config = SamMaskDecoderConfig(
        hidden_size=width, num_hidden_layers=depth, num_attention_heads=heads, mlp_dim=mlp, **more
    )
    config._attn_implementation = "sdpa"
    return config


def init_weights(module: nn.Module) -> None:
    """SAM's rule: N(0, 0.02) for linear, convolution and embedding weights, zero biases. Use with `Module.apply`."""
    if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
        if getattr(module, "bias", None) is not None:
            nn.init.zeros_(module.bias)
