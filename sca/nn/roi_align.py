"""ROIAlign (Mask R-CNN, arXiv 1703.06870) as two matrix products per region."""

from __future__ import annotations

import torch
from torch import Tensor

from sca.nn.region_batch import iter_rows_by_image


def roi_align(features: Tensor, image_index: Tensor | None, boxes: Tensor, output_size: int) -> Tensor:
    """Pool the features under boxes.

    Each of the output_size x output_size bins is the mean of bilinear samples. The number of samples along an axis is
    the length of the bin in cells, rounded up. Values are located at cell centers. The result equals torchvision's
    `roi_align` with `aligned=True` and adaptive `sampling_ratio`. Bilinear sampling on a grid is separable, so that
    each axis is an (output_size, cells) matrix.

    Args:
        features: (B, D, h, w) features of images, or (N, D, h, w) features of regions if `image_index` is None.
        image_index: (N,) image of each box, sorted; None if each box has features of its own.
        boxes: (N, 4) boxes x1 y1 x2 y2 in cells.
        output_size: Bins per side.

    Returns:
        Pooled features (N, D, output_size, output_size).
    """
    boxes = boxes.float()
    # (N, output_size, h) and (N, output_size, w)
    row_weights = _compute_bin_weights(boxes[:, 1], boxes[:, 3], features.shape[2], output_size).to(features.dtype)
    column_weights = _compute_bin_weights(boxes[:, 0], boxes[:, 2], features.shape[3], output_size).to(features.dtype)
    if image_index is None:
        cells = features.permute(0, 2, 3, 1)  # (N, h, w, D), the memory layout of a two-way transformer's output
        pooled_rows = (row_weights @ cells.flatten(2)).unflatten(2, cells.shape[2:])  # (N, output_size, w, D)
        return (column_weights.unsqueeze(1) @ pooled_rows).permute(0, 3, 1, 2)
    pooled = features.new_empty(len(boxes), features.shape[1], output_size, output_size)
    for index, rows in iter_rows_by_image(image_index, len(features)):
        pooled[rows] = torch.einsum("nih,dhw,njw->ndij", row_weights[rows], features[index], column_weights[rows])
    return pooled


def _compute_bin_weights(start: Tensor, end: Tensor, num_cells: int, num_bins: int) -> Tensor:
    """Return the weight of each cell in each bin along an axis, (N, bins, cells)."""
    bin_length = (end - start) / num_bins  # (N,)
    samples_per_bin = bin_length.ceil().clamp(min=0)
    max_samples = int(samples_per_bin.max()) if len(samples_per_bin) else 0
    steps = torch.arange(max_samples, device=start.device)
    bin_fractions = (steps + 0.5) / samples_per_bin.clamp(min=1)[:, None]  # (N, samples) fractions of a bin
    bins = torch.arange(num_bins, device=start.device)
    # (N, bins, samples)
    positions = start[:, None, None] - 0.5 + (bins[:, None] + bin_fractions[:, None]) * bin_length[:, None, None]
    is_counted = (steps < samples_per_bin[:, None])[:, None] & (positions >= -1) & (positions <= num_cells)
    positions = positions.clamp(0, num_cells - 1)
    # (N, bins, samples, cells)
    cell_weights = (1 - (positions[..., None] - torch.arange(num_cells, device=start.device)).abs()).clamp(min=0)
    return (cell_weights * is_counted[..., None]).sum(2) / samples_per_bin.clamp(min=1)[:, None, None]
