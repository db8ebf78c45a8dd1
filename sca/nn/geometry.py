"""Geometry of regions: normalized boxes, and their embedding in the space of the language model."""

from __future__ import annotations

import math

import torch
from sca_registry.contracts import PromptBatch, SegmenterOutput
from torch import Tensor, nn

NUM_FREQUENCIES = 4  # periods of 2, 1, 1/2 and 1/4 of the image side
HIDDEN_SIZE = 128
NUM_BOX_VALUES = 8  # x1 y1 x2 y2, center and size
WHOLE_IMAGE = torch.tensor([[0.0, 0.0, 1.0, 1.0, 1.0]])  # geometry of a square image


class GeometryEmbedding(nn.Module):
    """Embedding of the box of a region: Fourier features (arXiv 2006.10739) and a small MLP.

    Args:
        hidden_size: Hidden size E of the language model.
    """

    def __init__(self, hidden_size: int):
        super().__init__()
        num_features = NUM_BOX_VALUES * (1 + 2 * NUM_FREQUENCIES) + 1
        output_layer = nn.Linear(HIDDEN_SIZE, hidden_size)
        nn.init.normal_(output_layer.weight, std=0.02)  # the scale of token embeddings
        nn.init.zeros_(output_layer.bias)
        self.layers: nn.Sequential = nn.Sequential(nn.Linear(num_features, HIDDEN_SIZE), nn.GELU(), output_layer)

    def forward(self, geometry: Tensor) -> Tensor:
        """Embed geometry.

        Args:
            geometry: (N, 5) output of `compute_geometry`.

        Returns:
            Embeddings (N, E).
        """
        boxes, aspect_ratio = geometry.float().split((4, 1), dim=1)
        top_left, bottom_right = boxes.split(2, dim=1)
        values = torch.cat((boxes, (top_left + bottom_right) / 2, bottom_right - top_left), dim=1)  # (N, 8)
        frequencies = math.pi * 2.0 ** torch.arange(NUM_FREQUENCIES, device=values.device)
        angles = (values[..., None] * frequencies).flatten(1)  # (N, 8 * frequencies)
        features = torch.cat((values, angles.sin(), angles.cos(), aspect_ratio.log()), dim=1)
        return self.layers(features.to(next(self.parameters()).dtype))


def compute_geometry(regions: SegmenterOutput, prompts: PromptBatch) -> Tensor:
    """Compute the geometry of regions.

    The box of a region is the first of these that exists:

    1. its box prompt;
    2. the box of its best mask, if that is not empty;
    3. the box of its foreground points.

    Args:
        regions: Output of the segmenter.
        prompts: The prompts of the same N regions, with `image_boxes` and `aspect_ratios`.

    Returns:
        (N, 5) x1 y1 x2 y2 as fractions of the whole image, and its width divided by its height.

    Raises:
        ValueError: The prompts do not have the boxes of their images, or a region has neither a box nor a point.
    """
    if prompts.image_boxes is None or prompts.aspect_ratios is None:
        raise ValueError(
            "the model uses the geometry of regions, but the prompts have no image_boxes and aspect_ratios; create the "
            "prompts with Processor.group_prompts"
        )
    boxes = regions.boxes
    if prompts.points is not None and prompts.boxes is None:
        point_boxes = _enclose_points(prompts)
        boxes = point_boxes if boxes is None else torch.where(boxes.any(1, keepdim=True), boxes, point_boxes)
    if boxes is None:
        raise ValueError("the segmenter returns no boxes for mask prompts; use a segmenter that does, such as sam")
    origin, end = prompts.image_boxes.float().split(2, dim=1)
    corners = (boxes.float().unflatten(1, (2, 2)) - origin[:, None]) / (end - origin)[:, None]  # (N, 2, 2)
    return torch.cat((corners.flatten(1).clamp(0, 1), prompts.aspect_ratios.float()[:, None]), dim=1)


def _enclose_points(prompts: PromptBatch) -> Tensor:
    """Return the boxes (N, 4) of the foreground points, or of all points of a region without any."""
    assert prompts.points is not None
    assert prompts.labels is not None  # of the points
    is_used = (prompts.labels == 1) | ~(prompts.labels == 1).any(1, keepdim=True)  # (N, P)
    excluded = ~is_used[..., None]
    lowest = prompts.points.masked_fill(excluded, torch.inf).amin(1)
    highest = prompts.points.masked_fill(excluded, -torch.inf).amax(1)
    return torch.cat((lowest, highest), dim=1)
