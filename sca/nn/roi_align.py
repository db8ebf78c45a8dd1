"""ROIAlign (Mask R-CNN, arXiv 1703.06870) as two matrix products a region."""

from __future__ import annotations

import torch
from torch import Tensor

from sca.nn.regions import rows_by_image


def roi_align(image: Tensor, owner: Tensor, boxes: Tensor, size: int) -> Tensor:
    """(B, D, h, w) features and (N, 4) boxes x1 y1 x2 y2 in cells, each of the image `owner` (N,) says -> (N, D, size,
    size).

    Each of the size x size bins is the mean of bilinear samples, as many along each side as the bin is long in cells,
    rounded up; a cell's value stands at its centre. The same as torchvision's with `aligned=True` and its adaptive
    `sampling_ratio`. Bilinear sampling over a grid is separable, so each axis is a (size, cells) matrix.
    """
    boxes = boxes.float()
    down = _weights(boxes[:, 1], boxes[:, 3], image.shape[2], size).to(image.dtype)  # (N, size, h)
    across = _weights(boxes[:, 0], boxes[:, 2], image.shape[3], size).to(image.dtype)  # (N, size, w)
    pooled = image.new_empty(len(boxes), image.shape[1], size, size)
    for place, rows in rows_by_image(owner):
        pooled[rows] = torch.einsum("nih,dhw,njw->ndij", down[rows], image[place], across[rows])
    return pooled


def _weights(start: Tensor, end: Tensor, cells: int, size: int) -> Tensor:
    """How much each cell of an axis counts in each bin, (N, size, cells)."""
    length = (end - start) / size  # (N,) of a bin
    samples = length.ceil().clamp(min=0)  # along one bin
    most = int(samples.max()) if len(samples) else 0
    steps = torch.arange(most, device=start.device)
    inside = (steps + 0.5) / samples.clamp(min=1)[:, None]  # (N, G) shares of a bin
    bins = torch.arange(size, device=start.device)
    at = start[:, None, None] - 0.5 + (bins[:, None] + inside[:, None]) * length[:, None, None]  # (N, size, G)
    counted = (steps < samples[:, None])[:, None] & (at >= -1) & (at <= cells)
    at = at.clamp(0, cells - 1)
    near = (1 - (at[..., None] - torch.arange(cells, device=start.device)).abs()).clamp(min=0)  # (N, size, G, cells)
    return (near * counted[..., None]).sum(2) / samples.clamp(min=1)[:, None, None]
