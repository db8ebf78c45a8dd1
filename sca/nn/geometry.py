"""Geometry of regions: normalized boxes, and their embedding in the space of the language model."""

from __future__ import annotations

import math

import torch
from sca_registry.contracts import PromptBatch, SegmenterOutput
from torch import Tensor, nn

from sca.nn.boxes import enclose_prompts

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

    The box of a region is that of `SegmentationModel.segment`. For a segmenter without boxes, it is the box of the mask
    prompt, else of the foreground points.

    Args:
        regions: Output of `SegmentationModel.segment`.
        prompts: The prompts of the same N regions, with `image_boxes` and `aspect_ratios`.

    Returns:
        (N, 5) x1 y1 x2 y2 as fractions of the whole image, and its width divided by its height.

    Raises:
        ValueError: The prompts do not have the boxes of their images.
    """
    if prompts.image_boxes is None or prompts.aspect_ratios is None:
        raise ValueError(
            "the model uses the geometry of regions, but the prompts have no image_boxes and aspect_ratios; create the "
            "prompts with Processor.group_prompts"
        )
    boxes = enclose_prompts(prompts, regions.image_size) if regions.boxes is None else regions.boxes
    origin, end = prompts.image_boxes.float().split(2, dim=1)
    corners = (boxes.float().unflatten(1, (2, 2)) - origin[:, None]) / (end - origin)[:, None]  # (N, 2, 2)
    return torch.cat((corners.flatten(1).clamp(0, 1), prompts.aspect_ratios.float()[:, None]), dim=1)
