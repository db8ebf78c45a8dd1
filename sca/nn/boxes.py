"""Box arithmetic, x1 y1 x2 y2 with exclusive far edges."""

from __future__ import annotations

import torch
from torch import Tensor


def compute_box_iou(first: Tensor, second: Tensor) -> Tensor:
    """(N, 4) and (K, 4) -> (N, K)."""
    top_left = torch.maximum(first[:, None, :2], second[None, :, :2])
    bottom_right = torch.minimum(first[:, None, 2:], second[None, :, 2:])
    intersection = (bottom_right - top_left).clamp(min=0).prod(2)
    areas = [(boxes[:, 2:] - boxes[:, :2]).clamp(min=0).prod(1) for boxes in (first, second)]
    return intersection / (areas[0][:, None] + areas[1][None] - intersection).clamp(min=1e-6)


def rasterize_boxes(boxes: Tensor, grid_size: int, image_size: int) -> Tensor:
    """(N, 4) in a square frame -> (N, grid_size, grid_size): 1 in the cells whose center is in the box, else 0."""
    centers = (torch.arange(grid_size, device=boxes.device) + 0.5) * (image_size / grid_size)
    x1, y1, x2, y2 = boxes.float()[:, :, None].unbind(1)  # (N, 1) each
    is_inside_x, is_inside_y = (x1 <= centers) & (centers <= x2), (y1 <= centers) & (centers <= y2)  # (N, side)
    return (is_inside_y[:, :, None] & is_inside_x[:, None]).float()
