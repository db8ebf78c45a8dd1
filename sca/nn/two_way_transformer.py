"""SAM's two-way transformer: tokens attend to an image grid, and the grid attends to the tokens.

The block is that of Segment Anything (arXiv 2304.02643). SCA (arXiv 2312.00869) stacks a second, deeper one on SAM's as
its text feature mixer.

The parameters have the names that transformers gives them, but the forward is optimized, because nearly all of the work
is on the grids of the regions: each layer projects a grid once for keys, values and queries; the positional encoding is
projected once for all regions; and while regions share the grid of their image, it is projected once per image. In CPU
inference, grids to which few tokens attend are not projected at all: the tokens are projected to the width of the grid
instead.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sca.nn.region_batch import is_cpu_inference, split_rows

GridProjection = tuple[Tensor, Tensor]


class Attention(nn.Module):
    """Projections of an attention layer.

    Args:
        hidden_size: Width D of inputs and outputs.
        inner_size: Width I of queries, keys and values.
        num_heads: Attention heads.
    """

    def __init__(self, hidden_size: int, inner_size: int, num_heads: int):
        super().__init__()
        self.num_attention_heads = num_heads
        self.q_proj: nn.Linear = nn.Linear(hidden_size, inner_size)
        self.k_proj: nn.Linear = nn.Linear(hidden_size, inner_size)
        self.v_proj: nn.Linear = nn.Linear(hidden_size, inner_size)
        self.out_proj: nn.Linear = nn.Linear(inner_size, hidden_size)


class Mlp(nn.Module):
    """MLP with one hidden layer and ReLU.

    Args:
        hidden_size: Width D of inputs and outputs.
        mlp_dim: Width of the hidden layer.
    """

    def __init__(self, hidden_size: int, mlp_dim: int):
        super().__init__()
        self.lin1: nn.Linear = nn.Linear(hidden_size, mlp_dim)
        self.lin2: nn.Linear = nn.Linear(mlp_dim, hidden_size)

    def forward(self, values: Tensor) -> Tensor:
        """Apply the MLP: (..., D) -> (..., D)."""
        return self.lin2(F.relu(self.lin1(values)))


class TwoWayBlock(nn.Module):
    """Modules of a layer of the two-way transformer.

    Args:
        hidden_size: Width D; that of cross-attention is half of it.
        num_heads: Attention heads.
        mlp_dim: MLP width.
        layer_norm_eps: Epsilon of the LayerNorms.
        skip_first_layer_pe: Whether self-attention has neither a residual connection nor positions, as in the first
            layer.
    """

    def __init__(
        self, hidden_size: int, num_heads: int, mlp_dim: int, layer_norm_eps: float, skip_first_layer_pe: bool
    ):
        super().__init__()
        self.self_attn: Attention = Attention(hidden_size, hidden_size, num_heads)
        self.layer_norm1: nn.LayerNorm = nn.LayerNorm(hidden_size, layer_norm_eps)
        self.cross_attn_token_to_image: Attention = Attention(hidden_size, hidden_size // 2, num_heads)
        self.layer_norm2: nn.LayerNorm = nn.LayerNorm(hidden_size, layer_norm_eps)
        self.mlp: Mlp = Mlp(hidden_size, mlp_dim)
        self.layer_norm3: nn.LayerNorm = nn.LayerNorm(hidden_size, layer_norm_eps)
        self.layer_norm4: nn.LayerNorm = nn.LayerNorm(hidden_size, layer_norm_eps)
        self.cross_attn_image_to_token: Attention = Attention(hidden_size, hidden_size // 2, num_heads)
        self.skip_first_layer_pe = skip_first_layer_pe


class TwoWayForward(nn.Module):
    """The optimized forward for the modules of a two-way transformer of SAM, SAM 2 or one of its relatives.

    It has no modules of its own: assign it to `__class__` of a transformer of SAM 2 from transformers.
    """

    max_elements_per_chunk = 2**20  # grid elements per chunk in CPU inference

    # Modules of `TwoWayTransformer`; those of SAM's relatives in transformers have the same submodules
    layers: nn.ModuleList
    final_attn_token_to_image: Attention
    layer_norm_final_attn: nn.LayerNorm

    @property
    def _blocks(self) -> Sequence[TwoWayBlock]:
        return cast("Sequence[TwoWayBlock]", self.layers)

    def forward(
        self,
        tokens: Tensor,
        grid: Tensor,
        positional_encoding: Tensor,
        image_index: Tensor | None = None,
        return_grids: bool = True,
    ) -> tuple[Tensor, Tensor | None]:
        """Update tokens and grids.

        Args:
            tokens: (N, T, D) tokens.
            grid: (N, D, h, w) grids of regions, or (B, D, h, w) grids of images if `image_index` is set.
            positional_encoding: (D, h, w) positional encoding of the grid.
            image_index: (N,) image of each region; None if the grids are those of regions.
            return_grids: Return the updated grids, too.

        Returns:
            Tokens (N, T, D), and grids (N, D, h, w) or None.
        """
        token_chunks, grid_chunks = [], []
        for _, updated_tokens, updated_grid in self.iter_chunks(tokens, grid, positional_encoding, image_index):
            token_chunks.append(updated_tokens)
            if return_grids:
                grid_chunks.append(updated_grid)
        if not token_chunks:
            return tokens, grid[:0] if return_grids else None
        tokens = torch.cat(token_chunks)
        if not return_grids:
            return tokens, None
        return tokens, torch.cat(grid_chunks) if len(grid_chunks) > 1 else grid_chunks[0]

    def iter_chunks(
        self, tokens: Tensor, grid: Tensor, positional_encoding: Tensor, image_index: Tensor | None = None
    ) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Update tokens and grids chunk by chunk: the regions whose grids the CPU cache holds, or all on other devices.

        Args:
            tokens: (N, T, D) tokens.
            grid: (N, D, h, w) or (B, D, h, w) grids, see `forward`.
            positional_encoding: (D, h, w) positional encoding of the grid.
            image_index: (N,) image of each region; None if the grids are those of regions.

        Yields:
            The rows of a chunk of n regions, their tokens (n, T, D) and their grids (n, D, h, w).
        """
        if not len(tokens):
            return
        cells = grid.flatten(2).transpose(1, 2)  # (N or B, P, D)
        positions = positional_encoding.flatten(1).T  # (P, D)
        projections = [_build_grid_projection(layer, positions) for layer in self._blocks]
        final_projection = _build_key_value_projection(self.final_attn_token_to_image, positions)
        shared_projected = None if image_index is None else _project_cells(cells, *projections[0])  # (B, P, 3I)
        rows_per_chunk = None
        if is_cpu_inference(grid):  # keep the grids of a chunk in the CPU cache
            rows_per_chunk = self.max_elements_per_chunk // (cells.shape[1] * cells.shape[2])
        for chunk in split_rows(len(tokens), rows_per_chunk):
            rows = chunk if image_index is None else image_index[chunk]
            first_projected = None if shared_projected is None else _select_rows(shared_projected, rows)
            queries, keys = self._forward_chunk(
                tokens[chunk], _select_rows(cells, rows), first_projected, projections, final_projection
            )
            # not `transpose(1, 2).unflatten(...)`, for which convolutions of one grid do not recognize channels last
            yield chunk, queries, keys.unflatten(1, grid.shape[-2:]).permute(0, 3, 1, 2)

    def _forward_chunk(
        self,
        tokens: Tensor,
        cells: Tensor,
        first_projected: Tensor | None,
        projections: list[GridProjection],
        final_projection: GridProjection,
    ) -> tuple[Tensor, Tensor]:
        """Apply all layers to a chunk; `first_projected` are its grids projected for the first layer, if available."""
        queries = tokens
        for index, (layer, projection) in enumerate(zip(self._blocks, projections, strict=True)):
            if index == 0 and first_projected is not None:
                grid: _Grid = _ProjectedGrid(*first_projected.chunk(3, dim=-1))
            else:
                grid = _build_grid(layer.cross_attn_token_to_image, tokens, cells, projection)
            queries = _update_tokens(layer, queries, tokens, grid)
            image_to_token = layer.cross_attn_image_to_token
            cells = _update_cells(image_to_token, cells, grid, queries + tokens, queries, in_place=index > 0)
            cells = layer.layer_norm4(cells)
        grid = _build_grid(self.final_attn_token_to_image, tokens, cells, final_projection)
        queries = queries + grid.attend_to_cells(self.final_attn_token_to_image, queries + tokens)
        return self.layer_norm_final_attn(queries), cells


class TwoWayTransformer(TwoWayForward):
    """Two-way transformer over the tokens and the grids of regions.

    Args:
        hidden_size: Width D, a multiple of twice the number of heads.
        depth: Layers.
        num_heads: Attention heads.
        mlp_dim: MLP width.
        layer_norm_eps: Epsilon of the LayerNorms in the layers; that of the last one is 1e-5.

    Raises:
        ValueError: `hidden_size` is not a multiple of `2 * num_heads`.
    """

    def __init__(
        self, hidden_size: int, depth: int, num_heads: int = 8, mlp_dim: int = 2048, layer_norm_eps: float = 1e-6
    ):
        super().__init__()
        if hidden_size % (2 * num_heads):
            raise ValueError(
                f"hidden_size ({hidden_size}) must be divisible by 2 * num_heads ({2 * num_heads}), because "
                "cross-attention halves the hidden size"
            )
        self.layers: nn.ModuleList = nn.ModuleList(
            TwoWayBlock(hidden_size, num_heads, mlp_dim, layer_norm_eps, skip_first_layer_pe=index == 0)
            for index in range(depth)
        )
        self.final_attn_token_to_image: Attention = Attention(hidden_size, hidden_size // 2, num_heads)
        self.layer_norm_final_attn: nn.LayerNorm = nn.LayerNorm(hidden_size)


class _ProjectedGrid(NamedTuple):
    """Grids of N regions, projected for the attention modules of a layer.

    Attributes:
        keys: (N, P, I) keys for the tokens.
        values: (N, P, I) values for the tokens.
        cell_queries: (N, P, I) queries of the cells; None for a module in which only tokens attend.
    """

    keys: Tensor
    values: Tensor
    cell_queries: Tensor | None = None

    def attend_to_cells(self, attention: Attention, queries: Tensor) -> Tensor:
        """Attend from tokens to the grid: (N, T, D) -> (N, T, D)."""
        return _compute_attention(attention, attention.q_proj(queries), self.keys, self.values)

    def score_tokens(self, attention: Attention, token_keys: Tensor) -> Tensor:
        """Multiply keys of tokens (N, heads, T, d) by the queries of the cells: (N, heads, T, P)."""
        assert self.cell_queries is not None
        return token_keys @ _split_heads(attention, self.cell_queries).transpose(2, 3)


class _UnprojectedGrid(NamedTuple):
    """Grids of N regions, not projected.

    Attributes:
        cells: (N, P, D) cells.
        key_positions: (P, I) positional encoding, projected to keys, with bias.
        query_positions: (P, I) positional encoding, projected to queries, with bias; None as for `_ProjectedGrid`.
    """

    cells: Tensor
    key_positions: Tensor
    query_positions: Tensor | None = None

    def attend_to_cells(self, attention: Attention, queries: Tensor) -> Tensor:
        """Attend from tokens to the grid: (N, T, D) -> (N, T, D)."""
        heads = _split_heads(attention, attention.q_proj(queries))  # (N, heads, T, d)
        heads = heads * heads.shape[-1] ** -0.5
        scores = self._score_cells(attention, attention.k_proj.weight, self.key_positions, heads)
        pooled = torch.softmax(scores, dim=3).flatten(1, 2) @ self.cells
        value_weight = attention.v_proj.weight.unflatten(0, (attention.num_attention_heads, -1))  # (heads, d, D)
        values = (pooled.unflatten(1, heads.shape[1:3]) @ value_weight.transpose(1, 2)).transpose(1, 2).flatten(2)
        return _get_output_projection(attention)(values + attention.v_proj.bias)  # the attention weights sum to 1

    def score_tokens(self, attention: Attention, token_keys: Tensor) -> Tensor:
        """Multiply keys of tokens (N, heads, T, d) by the queries of the cells: (N, heads, T, P)."""
        assert self.query_positions is not None
        return self._score_cells(attention, attention.q_proj.weight, self.query_positions, token_keys)

    def _score_cells(self, attention: Attention, weight: Tensor, positions: Tensor, heads: Tensor) -> Tensor:
        """Multiply tokens (N, heads, T, d) by projected cells, through the tokens projected to the cells' width."""
        scores = heads @ _split_heads(attention, positions[None]).transpose(2, 3)
        tokens = heads @ weight.unflatten(0, (attention.num_attention_heads, -1))  # (N, heads, T, D)
        scores = scores.flatten(1, 2).baddbmm_(tokens.flatten(1, 2), self.cells.transpose(1, 2))
        return scores.unflatten(1, heads.shape[1:3])


_Grid = _ProjectedGrid | _UnprojectedGrid


def _build_grid(attention: Attention, tokens: Tensor, cells: Tensor, projection: GridProjection) -> _Grid:
    """Return grids (N, P, D) for tokens (N, T, D), projected unless projecting the tokens takes fewer operations."""
    weight, bias = projection
    inner_size = attention.q_proj.out_features
    num_projections = len(weight) // inner_size
    if len(cells) == 1 and is_cpu_inference(cells):
        num_rows = attention.num_attention_heads * tokens.shape[1]
        if num_rows * cells.shape[2] <= inner_size * (cells.shape[2] + tokens.shape[1]):
            key_positions, _, *query_positions = bias.chunk(num_projections, dim=-1)
            return _UnprojectedGrid(cells, key_positions, *query_positions)
    return _ProjectedGrid(*_project_cells(cells, weight, bias).chunk(num_projections, dim=-1))


def _select_rows(values: Tensor, rows: Tensor | slice) -> Tensor:
    """Select rows of `values`; a view if all rows are the same."""
    if isinstance(rows, slice):
        return values[rows]
    if len(values) == 1:
        return values.expand(len(rows), -1, -1)
    if values.device.type == "cpu" and len(rows) and bool((rows == rows[0]).all()):
        return values[int(rows[0])].expand(len(rows), -1, -1)
    return values[rows]


def _update_tokens(layer: TwoWayBlock, queries: Tensor, tokens: Tensor, grid: _Grid) -> Tensor:
    """Attend from tokens (N, T, D) to each other, then to the grid."""
    self_attention = layer.self_attn
    self_queries = queries if layer.skip_first_layer_pe else queries + tokens
    attended = _compute_attention(
        self_attention,
        self_attention.q_proj(self_queries),
        self_attention.k_proj(self_queries),
        self_attention.v_proj(queries),
    )
    queries = layer.layer_norm1(attended if layer.skip_first_layer_pe else queries + attended)
    queries = layer.layer_norm2(queries + grid.attend_to_cells(layer.cross_attn_token_to_image, queries + tokens))
    return layer.layer_norm3(queries + layer.mlp(queries))


def _compute_attention(attention: Attention, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attend from projected queries (N, L, I) to keys and values (N, M, I): (N, L, D)."""
    query, key, value = (_split_heads(attention, each) for each in (query, key, value))
    return _get_output_projection(attention)(
        F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
    )


def _split_heads(attention: Attention, states: Tensor) -> Tensor:
    """Split projected states into heads: (N, L, I) -> (N, heads, L, d)."""
    return states.unflatten(2, (attention.num_attention_heads, -1)).transpose(1, 2)


def _get_output_projection(attention: nn.Module) -> nn.Linear:
    """Return the output projection, which SAM and SAM 2 name differently in transformers."""
    return cast("nn.Linear", attention.out_proj if hasattr(attention, "out_proj") else attention.o_proj)


def _update_cells(
    attention: Attention, cells: Tensor, grid: _Grid, keys: Tensor, values: Tensor, in_place: bool
) -> Tensor:
    """Attend from the cells (N, P, D) of a grid to tokens (N, T, D); `in_place` overwrites `cells`."""
    # On a CPU, cells are the last dimension, since a softmax over the few tokens would leave SIMD registers mostly
    # empty. The output projection is applied to the tokens, so that one matrix product updates the cells.
    token_keys, token_values = attention.k_proj(keys), attention.v_proj(values)
    if not is_cpu_inference(cells):
        assert isinstance(grid, _ProjectedGrid)
        assert grid.cell_queries is not None
        return cells + _compute_attention(attention, grid.cell_queries, token_keys, token_values)
    num_heads, out_proj = attention.num_attention_heads, _get_output_projection(attention)
    token_keys, token_values = (_split_heads(attention, each) for each in (token_keys, token_values))
    scores = grid.score_tokens(attention, token_keys * token_keys.shape[-1] ** -0.5)  # (N, heads, T, P)
    weights = torch.softmax(scores, dim=2).flatten(1, 2).transpose(1, 2)
    updates = token_values @ out_proj.weight.T.unflatten(0, (num_heads, -1))
    updates = updates + out_proj.bias / num_heads  # (N, heads, T, D); the attention weights of a head sum to 1
    add_product = cells.baddbmm_ if in_place else cells.baddbmm
    return add_product(weights, updates.flatten(1, 2))


def _project_cells(cells: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Project cells (N, P, D) to keys and values for the tokens and queries of the cells, (N, P, 3I)."""
    if len(cells) == 1 and is_cpu_inference(cells):
        return torch.addmm(bias, cells[0], weight.T).unsqueeze(0)
    return F.linear(cells, weight) + bias


def _build_grid_projection(layer: TwoWayBlock, positions: Tensor) -> GridProjection:
    """Return the weights (3I, D) of a layer for `_project_cells`, and the bias (P, 3I) with projected positions."""
    query_proj = layer.cross_attn_image_to_token.q_proj
    weight, bias = _build_key_value_projection(layer.cross_attn_token_to_image, positions)
    return torch.cat((weight, query_proj.weight)), torch.cat((bias, query_proj(positions)), dim=1)


def _build_key_value_projection(attention: Attention, positions: Tensor) -> GridProjection:
    """Return the weights (2I, D) and the bias (P, 2I) for keys and values only."""
    bias = torch.cat((attention.k_proj(positions), attention.v_proj.bias.expand(len(positions), -1)), dim=1)
    return torch.cat((attention.k_proj.weight, attention.v_proj.weight)), bias


def init_weights(module: nn.Module) -> None:
    """Initialize weights as N(0, 0.02) and biases with zeros, as SAM does; use it with `Module.apply`.

    Args:
        module: Linear, convolution or embedding layer; other modules are unchanged.
    """
    if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
        bias = getattr(module, "bias", None)
        if bias is not None:
            nn.init.zeros_(bias)
