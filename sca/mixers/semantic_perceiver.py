"""Semantic perceiver of Perceive Anything (PAM, arXiv 2506.05302): learned queries, and the whole grid as tokens."""

from __future__ import annotations

import torch
from sca_registry.contracts import Segmenter, SegmenterOutput
from torch import Tensor, nn

from sca.nn.masks import select_best_masks, select_mask_indices
from sca.nn.two_way_transformer import TwoWayTransformer, init_weights

CELLS_PER_SIDE = 2  # an image token contains the features of 2 x 2 cells
NUM_MASK_TOKENS = 2  # of the selected mask and of the single mask
LAYER_NORM_EPS = 1e-5


class SemanticPerceiverMixer(nn.Module):
    """Two-way transformer over two mask tokens, learned queries and the feature grid of a region.

    The outputs are image tokens, each with the features of 2 x 2 cells, down the columns of the grid first; a learned
    newline vector; the learned queries; and a second newline vector: Q = h w / 4 + `num_queries` + 2. Image tokens and
    queries have a projector each, an MLP of two layers. With the projection "none" of a model, their width is that of
    the language model.

    The two mask tokens are that of the selected mask (the single mask if it is stable, else the candidate with the
    highest predicted IoU, see `sca.nn.masks.select_mask_indices`) and that of the single mask. A segmenter without
    `decoder_masks` provides the token of its best mask for both. The positional encoding is the mixer's own. The
    defaults are those of the released models.

    Args:
        segmenter: Segmenter with masks and a grid of even size.
        num_queries: Learned queries per region.
        depth: Layers of the transformer.
        num_heads: Attention heads.
        mlp_dim: MLP width.
        hidden_size: Width of the outputs; None for that of the segmenter.

    Raises:
        ValueError: The segmenter has no attribute `grid_size`, or its grid has an odd size.
    """

    uses_grid = True
    frequencies: Tensor  # (2, D / 2)

    def __init__(
        self,
        segmenter: Segmenter,
        num_queries: int = 16,
        depth: int = 2,
        num_heads: int = 8,
        mlp_dim: int = 2048,
        hidden_size: int | None = None,
    ):
        super().__init__()
        grid_size: int | None = getattr(segmenter, "grid_size", None)
        if grid_size is None or grid_size % CELLS_PER_SIDE:
            size = "no grid_size" if grid_size is None else f"a grid of {grid_size} x {grid_size} cells"
            raise ValueError(
                f"the segmenter has {size}, but the mixer 'semantic-perceiver' requires one of an even size; use "
                "another segmenter or image size, or the mixer 'query'"
            )
        width = segmenter.channels
        self.hidden_size: int = hidden_size or width
        self.num_queries: int = (grid_size // CELLS_PER_SIDE) ** 2 + num_queries + 2
        self.tokens: nn.Embedding = nn.Embedding(num_queries, width)
        self.transformer: TwoWayTransformer = TwoWayTransformer(width, depth, num_heads, mlp_dim, LAYER_NORM_EPS)
        self.image_projector: nn.Sequential = _build_projector(CELLS_PER_SIDE**2 * width, self.hidden_size)
        self.query_projector: nn.Sequential = _build_projector(width, self.hidden_size)
        self.apply(init_weights)
        self.image_newline: nn.Parameter = nn.Parameter(torch.randn(self.hidden_size) * 0.02)
        self.query_newline: nn.Parameter = nn.Parameter(torch.randn(self.hidden_size) * 0.02)
        self.register_buffer("frequencies", torch.randn(2, width // 2))

    def forward(self, regions: SegmenterOutput) -> Tensor:
        """Return the image tokens and queries of each region with a newline vector after each group, (N, Q, E)."""
        tokens, grid = self.update_regions(regions)
        rows = len(regions)
        return torch.cat(
            (
                self.image_projector(merge_cells(grid)),
                self.image_newline.expand(rows, 1, -1),
                self.query_projector(tokens),
                self.query_newline.expand(rows, 1, -1),
            ),
            dim=1,
        )

    def update_regions(self, regions: SegmenterOutput) -> tuple[Tensor, Tensor]:
        """Update the learned queries and the grid of each region.

        Args:
            regions: N regions with masks and a grid.

        Returns:
            Queries (N, `num_queries`, D) and grids (N, D, h, w).
        """
        assert regions.grid is not None  # `requires` of the card
        queries = self.tokens.weight.expand(len(regions), -1, -1)
        tokens = torch.cat((select_mask_tokens(regions), queries), dim=1)
        tokens, grid = self.transformer(tokens, regions.grid, self.compute_positional_encoding(regions.grid))
        assert grid is not None  # `return_grids` is true
        return tokens[:, NUM_MASK_TOKENS:], grid

    def compute_positional_encoding(self, grid: Tensor) -> Tensor:
        """Return the random Fourier features of each cell's center, (D, h, w), computed in float32.

        Args:
            grid: (N, D, h, w) grids, for the size and the dtype.

        Returns:
            The positional encoding.
        """
        height, width = grid.shape[-2:]
        y, x = torch.meshgrid(
            (torch.arange(height, device=grid.device) + 0.5) / height,
            (torch.arange(width, device=grid.device) + 0.5) / width,
            indexing="ij",
        )
        angles = 2 * torch.pi * ((2 * torch.stack((x, y), dim=-1) - 1) @ self.frequencies.float())
        return torch.cat((angles.sin(), angles.cos()), dim=-1).permute(2, 0, 1).to(grid.dtype)


def select_mask_tokens(regions: SegmenterOutput) -> Tensor:
    """Select the tokens of the selected mask and of the single mask of each region.

    Args:
        regions: N regions with masks. Without `decoder_masks`, the token of the best mask is used for both.

    Returns:
        Tokens (N, 2, D).
    """
    rows = torch.arange(len(regions), device=regions.image_index.device)
    decoded = regions.decoder_masks
    if decoded is not None:
        selected = select_mask_indices(decoded.masks, decoded.iou_scores)
        return torch.stack((decoded.tokens[rows, selected], decoded.tokens[:, 0]), dim=1)
    assert regions.mask_tokens is not None  # `requires` of the card
    assert regions.iou_scores is not None
    best_tokens = select_best_masks(regions.mask_tokens, regions.iou_scores)
    return best_tokens.unsqueeze(1).expand(-1, NUM_MASK_TOKENS, -1)


def merge_cells(grid: Tensor) -> Tensor:
    """Merge 2 x 2 cells of grids to one token each.

    Args:
        grid: (N, D, h, w) grids.

    Returns:
        Tokens (N, h w / 4, 4 D), down the columns first; their channels are the four cells, row by row.
    """
    cells = grid.unflatten(3, (-1, CELLS_PER_SIDE)).unflatten(2, (-1, CELLS_PER_SIDE))  # (N, D, h/2, 2, w/2, 2)
    return cells.permute(0, 4, 2, 3, 5, 1).flatten(3).flatten(1, 2)


def _build_projector(in_features: int, out_features: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(in_features, out_features), nn.GELU(), nn.Linear(out_features, out_features))
