"""Box arithmetic, x1 y1 x2 y2 with exclusive far edges."""

from __future__ import annotations

import torch
from torch import Tensor


def box_iou(first: Tensor, second: Tensor) -> Tensor:
    """(N, 4) and (K, 4) -> (N, K)."""
    corner = torch.maximum(first[:, None, :2], second[None, :, :2])
    far = torch.minimum(first[:, None, 2:], second[None, :, 2:])
    shared = (far - corner).clamp(min=0).prod(2)
    areas = [(boxes[:, 2:] - boxes[:, :2]).clamp(min=0).prod(1) for boxes in (first, second)]
    return shared / (areas[0][:, None] + areas[1][None] - shared).clamp(min=1e-6)


def filled_boxes(boxes: Tensor, side: int, size: int) -> Tensor:
    """(N, 4) in a frame of size x size -> (N, side, side): 1 in the cells whose centre lies in the box, 0 around it."""
    centres = (torch.arange(side, device=boxes.device) + 0.5) * (size / side)
    x1, y1, x2, y2 = boxes.float()[:, :, None].unbind(1)  # (N, 1) each
    across, down = (x1 <= centres) & (centres <= x2), (y1 <= centres) & (centres <= y2)  # (N, side)
    return (down[:, :, None] & across[:, None]).float()
