"""Box operations. Boxes are x1 y1 x2 y2; x2 and y2 are exclusive."""

from __future__ import annotations

import torch
from sca_registry.contracts import PromptBatch, SegmenterOutput
from torch import Tensor

from sca.nn.masks import masks_to_boxes


def compute_box_iou(first: Tensor, second: Tensor) -> Tensor:
    """Compute the pairwise IoU of boxes.

    Args:
        first: (N, 4) boxes.
        second: (K, 4) boxes in the same frame.

    Returns:
        IoU (N, K).
    """
    top_left = torch.maximum(first[:, None, :2], second[None, :, :2])
    bottom_right = torch.minimum(first[:, None, 2:], second[None, :, 2:])
    intersection = (bottom_right - top_left).clamp(min=0).prod(2)
    areas = [(boxes[:, 2:] - boxes[:, :2]).clamp(min=0).prod(1) for boxes in (first, second)]
    return intersection / (areas[0][:, None] + areas[1][None] - intersection).clamp(min=1e-6)


def rasterize_boxes(boxes: Tensor, grid_size: int, image_size: int) -> Tensor:
    """Rasterize boxes on a square grid.

    Args:
        boxes: (N, 4) boxes in pixels of the square model input.
        grid_size: Side of the grid in cells.
        image_size: Side of the model input in pixels.

    Returns:
        Masks (N, grid_size, grid_size): 1 for cells whose center is in the box, else 0.
    """
    centers = (torch.arange(grid_size, device=boxes.device) + 0.5) * (image_size / grid_size)
    x1, y1, x2, y2 = boxes.float()[:, :, None].unbind(1)  # each (N, 1)
    is_inside_x, is_inside_y = (x1 <= centers) & (centers <= x2), (y1 <= centers) & (centers <= y2)  # (N, side)
    return (is_inside_y[:, :, None] & is_inside_x[:, None]).float()


def enclose_prompts(prompts: PromptBatch, image_size: int, margin: float = 0.0) -> Tensor:
    """Compute the box of each mask prompt, else of the foreground points.

    Args:
        prompts: N prompts with masks, points or both, in pixels of the model input.
        image_size: Side of the model input in pixels.
        margin: Pixels between the points and their box.

    Returns:
        Boxes (N, 4) x1 y1 x2 y2 in pixels of the model input. That of a mask prompt without a positive logit encloses
        its highest logits; that of a region without foreground points, all its points.
    """
    if prompts.masks is not None:
        logits = prompts.masks[:, 0]  # (N, 4h, 4w)
        is_inside = logits >= logits.amax((1, 2), keepdim=True).clamp(max=0)
        return masks_to_boxes(is_inside) * (image_size / logits.shape[-1])
    assert prompts.points is not None  # the only other prompt without a box
    assert prompts.labels is not None  # of the points
    is_foreground = prompts.labels == 1  # (N, P)
    is_excluded = ~(is_foreground | ~is_foreground.any(1, keepdim=True))[..., None]
    lowest = prompts.points.masked_fill(is_excluded, torch.inf).amin(1) - margin
    highest = prompts.points.masked_fill(is_excluded, -torch.inf).amax(1) + margin
    return torch.cat((lowest, highest), dim=1).clamp(0, image_size)


def require_boxes(regions: SegmenterOutput, mixer: str) -> Tensor:
    """Return the boxes of regions for a mixer that needs them.

    Args:
        regions: N regions.
        mixer: Name of the mixer.

    Returns:
        Boxes (N, 4) x1 y1 x2 y2 in the model input.

    Raises:
        ValueError: The regions have no boxes: point prompts with a segmenter that predicts no masks.
    """
    if regions.boxes is None:
        raise ValueError(
            f"the mixer {mixer!r} requires boxes; pass box prompts, or use segmenter=sam, which predicts them"
        )
    return regions.boxes
