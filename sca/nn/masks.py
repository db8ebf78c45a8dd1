"""Operations on batches of masks."""

from __future__ import annotations

import torch
from sca_registry.contracts import ConfidentMasks
from torch import Tensor
from torch.nn import functional as F

from sca.nn.region_batch import iter_rows_by_image

STABILITY_OFFSET, STABILITY_THRESHOLD = 0.05, 0.98  # of all published SAM 2 checkpoints


def pool_under_masks(image_embeddings: Tensor, image_index: Tensor, weights: Tensor) -> Tensor:
    """Average the features of each region's image under its mask.

    Args:
        image_embeddings: (B, D, h, w) features.
        image_index: (N,) image of each region, sorted.
        weights: (N, H, W) masks in [0, 1] of any resolution. An empty mask averages all cells.

    Returns:
        Means (N, D).
    """
    height, width = image_embeddings.shape[-2:]
    weights = F.adaptive_avg_pool2d(weights, (height, width)).flatten(1) + 1e-4
    weights = (weights / weights.sum(1, keepdim=True)).to(image_embeddings.dtype)
    means = image_embeddings.new_empty(len(weights), image_embeddings.shape[1])
    for index, rows in iter_rows_by_image(image_index, len(image_embeddings)):
        means[rows] = weights[rows] @ image_embeddings[index].flatten(1).T
    return means


def masks_to_boxes(masks: Tensor) -> Tensor:
    """Compute the bounding boxes of masks.

    Args:
        masks: (N, h, w) masks or logits; a mask contains the cells above zero.

    Returns:
        Boxes (N, 4) x1 y1 x2 y2 in mask cells; x2 and y2 are exclusive. Zeros for an empty mask.
    """
    if not masks.numel():
        return torch.zeros(len(masks), 4, device=masks.device)
    spans = []
    for dim in (1, 2):  # columns, then rows
        is_occupied = masks.amax(dim) > 0  # (N, w), (N, h)
        cells = torch.arange(is_occupied.shape[1], device=masks.device)
        first = torch.where(is_occupied, cells, is_occupied.shape[1]).amin(1)
        last = torch.where(is_occupied, cells + 1, 0).amax(1)
        spans += [torch.minimum(first, last), last]
    return torch.stack((spans[0], spans[2], spans[1], spans[3]), dim=1).float()


def compute_stability_scores(logits: Tensor, offset: float) -> Tensor:
    """Return the IoU of masks (N, h, w) cut at `offset` and at `-offset`, (N,); 1 for empty masks."""
    intersection = (logits > offset).sum((1, 2)).float()
    union = (logits > -offset).sum((1, 2)).float()
    return torch.where(union > 0, intersection / union, 1.0)


def select_mask_indices(
    masks: Tensor,
    scores: Tensor,
    offset: float = STABILITY_OFFSET,
    threshold: float = STABILITY_THRESHOLD,
) -> Tensor:
    """Select the single mask of each region if it is stable, else the best of the others, as SAM 2 (arXiv 2408.00714).

    Args:
        masks: (N, M + 1, h, w) logits, the single mask first.
        scores: (N, M + 1) predicted IoU.
        offset: Offset of the logits for the stability score.
        threshold: Minimum stability score of a stable mask.

    Returns:
        Index of the selected mask of each region, (N,).
    """
    is_stable = compute_stability_scores(masks[:, 0], offset) >= threshold
    return torch.where(is_stable, 0, 1 + scores[:, 1:].argmax(dim=1))


def select_best_masks(masks: Tensor, scores: Tensor) -> Tensor:
    """Select the mask with the highest score of each region.

    Args:
        masks: (N, M, h, w) masks or logits.
        scores: (N, M) scores.

    Returns:
        Masks (N, h, w).
    """
    return masks[torch.arange(len(masks), device=masks.device), scores.argmax(1)]


def select_confident_masks(masks: Tensor, scores: Tensor, min_iou: float) -> ConfidentMasks:
    """Select the masks whose predicted IoU is above a minimum.

    Args:
        masks: (N, M, h, w) logits.
        scores: (N, M) predicted IoU.
        min_iou: The minimum.

    Returns:
        The masks in order: those of a region by their position.
    """
    scores = scores.float()
    region_index, mask_index = (scores > min_iou).nonzero(as_tuple=True)
    selected = masks[region_index, mask_index].float()
    return ConfidentMasks(selected, scores[region_index, mask_index], region_index)
