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

Asks = tuple[Tensor, Tensor]


class TwoWayTransformer(SamTwoWayTransformer):
    """Takes and gives regions in rows: tokens (N, T, D) and a grid (N, D, h, w) with its position code (D, h, w)."""

    together = 2**20  # numbers of the grids that go through all layers at a time on a CPU when nothing is learned

    def __init__(self, hidden_size: int, depth: int, num_heads: int = 8, mlp_dim: int = 2048):
        super().__init__(decoder_config(hidden_size, depth, num_heads, mlp_dim))

    def forward(
        self, tokens: Tensor, grid: Tensor, position: Tensor, owner: Tensor | None = None, grids: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        """owner: (N,) where the grid is that of images, (B, D, h, w): the one that each region begins with. grids:
        whether what becomes of the grids is wanted, too.
        """
        cells = grid.flatten(2).transpose(1, 2)  # (N or B, P, D)
        places = position.flatten(1).T  # (P, D)
        asks = [_asks(layer, places) for layer in self.layers]
        final = _asks_keys(self.final_attn_token_to_image, places)
        shared = None if owner is None else _projected(cells, *asks[0])  # (B, P, 3I)
        step = len(tokens)
        if _fuses(grid):  # grids stay in cache
            step = self.together // (cells.shape[1] * cells.shape[2])
        fused, after = [], []
        for start in range(0, len(tokens), max(step, 1)):
            part = slice(start, start + max(step, 1))
            rows = part if owner is None else owner[part]
            first = None if shared is None else _rows(shared, rows)
            queries, keys = self._through(tokens[part], _rows(cells, rows), first, asks, final)
            fused.append(queries)
            if grids:
                after.append(keys)
        if not fused:
            return tokens, grid[:0] if grids else None
        if not grids:
            return torch.cat(fused), None
        keys = torch.cat(after) if len(after) > 1 else after[0]
        return torch.cat(fused), keys.transpose(1, 2).unflatten(2, grid.shape[-2:])

    def _through(
        self, tokens: Tensor, cells: Tensor, first: Tensor | None, asks: list[Asks], final: Asks
    ) -> tuple[Tensor, Tensor]:
        """All layers for a few regions; `first`: what the first layer asks of their grids, if that is known."""
        queries = tokens
        for layer, ask in zip(self.layers, asks, strict=True):
            asked = _projected(cells, *ask) if first is None else first
            first = None
            keys, values, looks = asked.chunk(3, dim=-1)
            queries = _look(layer, queries, tokens, keys, values)
            back = layer.cross_attn_image_to_token
            cells = layer.layer_norm4(_answered(back, cells, looks, queries + tokens, queries))
        last = self.final_attn_token_to_image
        keys, values = _projected(cells, *final).chunk(2, dim=-1)
        queries = queries + _attend(last, last.q_proj(queries + tokens), keys, values)
        return self.layer_norm_final_attn(queries), cells


def _fuses(grid: Tensor) -> bool:
    """Whether steps are fused that a GPU, or learning, has better ways for."""
    return grid.device.type == "cpu" and not torch.is_grad_enabled()


def _rows(values: Tensor, rows: Tensor | slice) -> Tensor:
    """The rows of `values`; a view where all are the same one."""
    if isinstance(rows, slice):
        return values[rows]
    if values.device.type == "cpu" and len(rows) and bool((rows == rows[0]).all()):
        return values[int(rows[0])].expand(len(rows), -1, -1)
    return values[rows]


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


def _answered(attention: SamAttention, cells: Tensor, looks: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Cells (N, P, D) and what tokens (N, T, D) answer to what the cells ask, `looks` (N, P, I).

    On a CPU cells stand side by side, since a softmax over a few tokens would leave most of a register empty, and the
    last projection is done on the tokens, so that one product adds everything to the cells.
    """
    if not _fuses(cells):
        return cells + _attend(attention, looks, attention.k_proj(keys), attention.v_proj(values))
    heads, width = attention.num_attention_heads, looks.shape[-1]
    split = (heads, width // heads)
    keys = attention.k_proj(keys).unflatten(2, split).transpose(1, 2) * split[1] ** -0.5  # (N, heads, T, d)
    shares = torch.softmax(keys @ looks.unflatten(2, split).permute(0, 2, 3, 1), dim=2)  # (N, heads, T, P)
    out = attention.out_proj
    values = attention.v_proj(values).unflatten(2, split).transpose(1, 2) @ out.weight.T.unflatten(0, split)
    values = values + out.bias / heads  # (N, heads, T, D); the shares of a head add up to 1
    return torch.baddbmm(cells, shares.flatten(1, 2).transpose(1, 2), values.flatten(1, 2))


def _projected(cells: Tensor, weight: Tensor, added: Tensor) -> Tensor:
    """(N, P, D) -> (N, P, 3I): keys and values that tokens look at, and queries of the cells that look back."""
    if len(cells) == 1 and _fuses(cells):
        return torch.addmm(added, cells[0], weight.T).unsqueeze(0)
    return F.linear(cells, weight) + added


def _asks(layer: SamTwoWayAttentionBlock, places: Tensor) -> Asks:
    """What `_projected` takes for a layer: weights (3I, D), and (P, 3I) that positions and biases add."""
    looks = layer.cross_attn_image_to_token.q_proj
    weight, added = _asks_keys(layer.cross_attn_token_to_image, places)
    return torch.cat((weight, looks.weight)), torch.cat((added, looks(places)), dim=1)


def _asks_keys(attention: SamAttention, places: Tensor) -> Asks:
    """As `_asks`, for keys and values alone: (2I, D), (P, 2I)."""
    added = torch.cat((attention.k_proj(places), attention.v_proj.bias.expand(len(places), -1)), dim=1)
    return torch.cat((attention.k_proj.weight, attention.v_proj.weight)), added


def decoder_config(hidden_size: int, depth: int, num_heads: int, mlp_dim: int, **more: int) -> SamMaskDecoderConfig:
    if hidden_size % (2 * num_heads):
        raise ValueError(f"width {hidden_size} must be a multiple of twice the {num_heads} heads: cross-attention halves it")
    config = SamMaskDecoderConfig(
        hidden_size=hidden_size, num_hidden_layers=depth, num_attention_heads=num_heads, mlp_dim=mlp_dim, **more
    )
    config._attn_implementation = "sdpa"
    return config


def init_weights(module: nn.Module) -> None:
    """SAM's rule: N(0, 0.02) for linear, convolution and embedding weights, zero biases. Use with `Module.apply`."""
    if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
        if getattr(module, "bias", None) is not None:
            nn.init.zeros_(module.bias)
