"""ROIAlign (Mask R-CNN, arXiv 1703.06870) as two matrix products a region."""

from __future__ import annotations

import torch
from torch import Tensor

from sca.nn.region_rows import iter_rows_by_image


def roi_align(features: Tensor, image_index: Tensor, boxes: Tensor, output_size: int) -> Tensor:
    """(B, D, h, w) features and (N, 4) boxes x1 y1 x2 y2 in cells, each of the image at `image_index` (N,)
    -> (N, D, output_size, output_size).

    Each of the output_size x output_size bins is the mean of bilinear samples, as many along each side as the bin is
    long in cells, rounded up; a cell's value is at its center. The same as torchvision's with `aligned=True` and
    its adaptive `sampling_ratio`. Bilinear sampling over a grid is separable, so each axis is a (size, cells) matrix.
    """
    boxes = boxes.float()
    row_weights = _compute_bin_weights(boxes[:, 1], boxes[:, 3], features.shape[2], output_size).to(
        features.dtype
    )  # (N, size, h)
    column_weights = _compute_bin_weights(boxes[:, 0], boxes[:, 2], features.shape[3], output_size).to(
        features.dtype
    )  # (N, size, w)
    pooled = features.new_empty(len(boxes), features.shape[1], output_size, output_size)
    for index, rows in iter_rows_by_image(image_index):
        pooled[rows] = torch.einsum("nih,dhw,njw->ndij", row_weights[rows], features[index], column_weights[rows])
    return pooled


def _compute_bin_weights(start: Tensor, end: Tensor, num_cells: int, num_bins: int) -> Tensor:
    """How much each cell of an axis counts in each bin, (N, size, cells)."""
    bin_length = (end - start) / num_bins  # (N,) of a bin
    samples_per_bin = bin_length.ceil().clamp(min=0)  # along one bin
    max_samples = int(samples_per_bin.max()) if len(samples_per_bin) else 0
    steps = torch.arange(max_samples, device=start.device)
    bin_fractions = (steps + 0.5) / samples_per_bin.clamp(min=1)[:, None]  # (N, G) shares of a bin
    bins = torch.arange(num_bins, device=start.device)
    positions = (
        start[:, None, None] - 0.5 + (bins[:, None] + bin_fractions[:, None]) * bin_length[:, None, None]
    )  # (N, size, G)
    is_counted = (steps < samples_per_bin[:, None])[:, None] & (positions >= -1) & (positions <= num_cells)
    positions = positions.clamp(0, num_cells - 1)
    cell_weights = (1 - (positions[..., None] - torch.arange(num_cells, device=start.device)).abs()).clamp(
        min=0
    )  # (N, size, G, cells)
    return (cell_weights * is_counted[..., None]).sum(2) / samples_per_bin.clamp(min=1)[:, None, None]
