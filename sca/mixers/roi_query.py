"""Queries in a two-way transformer over a crop of the features: a fast variant of the mixer of SCA."""

from __future__ import annotations

import torch
from sca_registry.contracts import Segmenter, SegmenterOutput
from torch import Tensor, nn
from torch.nn import functional as F

from sca.nn.boxes import require_boxes
from sca.nn.geometry import GeometryEmbedding
from sca.nn.roi_align import roi_align
from sca.nn.two_way_transformer import TwoWayTransformer, init_weights


class RoiQueryMixer(nn.Module):
    """Two-way transformer over learned queries, the segmenter's output tokens and a crop of the features of a region.

    ROIAlign crops the features around the box of the region to a fixed number of cells, so that the cost of a region
    does not depend on the size of the grid. Positions are relative to the crop. The box of the region in the model
    input is an additional token.

    Args:
        segmenter: Segmenter.
        num_queries: Queries Q per region.
        depth: Layers of the transformer.
        num_heads: Attention heads.
        mlp_dim: MLP width.
        output_size: Side of the crop in cells.
        context: Side of the crop as a multiple of that of the box.
    """

    uses_grid = True

    def __init__(
        self,
        segmenter: Segmenter,
        num_queries: int = 8,
        depth: int = 6,
        num_heads: int = 8,
        mlp_dim: int = 2048,
        output_size: int = 12,
        context: float = 1.5,
    ):
        super().__init__()
        self.hidden_size: int = segmenter.channels
        self.num_queries = num_queries
        self.output_size = output_size
        self.context = context
        self.tokens: nn.Embedding = nn.Embedding(num_queries, self.hidden_size)
        self.transformer: TwoWayTransformer = TwoWayTransformer(self.hidden_size, depth, num_heads, mlp_dim)
        self.apply(init_weights)
        self.geometry: GeometryEmbedding = GeometryEmbedding(self.hidden_size)

    def forward(self, regions: SegmenterOutput) -> Tensor:
        """Return the query embeddings of each region, (N, Q, D).

        Args:
            regions: N regions with boxes.

        Returns:
            (N, Q, D) queries.

        Raises:
            ValueError: The regions have no boxes: point prompts with a segmenter that predicts no masks.
        """
        boxes = require_boxes(regions, "roi-query").float() / regions.image_size  # (N, 4) fractions of the frame
        aspect_ratio = boxes.new_ones(len(boxes), 1)
        box_tokens = self.geometry(torch.cat((boxes, aspect_ratio), dim=1)).unsqueeze(1)  # (N, 1, D)
        queries = self.tokens.weight.expand(len(regions), -1, -1)  # (N, Q, D)
        tokens = torch.cat((queries, regions.tokens, box_tokens), dim=1)
        positions = F.interpolate(
            regions.positional_encoding[None], size=(self.output_size, self.output_size), mode="bilinear"
        )[0]
        tokens, _ = self.transformer(tokens, self._crop_features(regions, boxes), positions, return_grids=False)
        return tokens[:, : self.num_queries]

    def _crop_features(self, regions: SegmenterOutput, boxes: Tensor) -> Tensor:
        """Crop the features of each region around its box: (N, D, output_size, output_size)."""
        size = regions.image_embeddings.shape[-1]
        top_left, bottom_right = (boxes * size).split(2, dim=1)
        center, half_sides = (top_left + bottom_right) / 2, (bottom_right - top_left).clamp(min=1) / 2 * self.context
        crops = torch.cat((center - half_sides, center + half_sides), dim=1)
        if regions.grid is not None:
            return roi_align(regions.grid, None, crops, self.output_size)
        cropped = roi_align(regions.image_embeddings, regions.image_index, crops, self.output_size)
        dense = regions.dense_embeddings
        return cropped + (dense if dense.ndim == 3 else roi_align(dense, None, crops, self.output_size))
