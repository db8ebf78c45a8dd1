"""Pack feature maps of several resolutions into one tensor, so that they fit the contract of encoders.

A map with f times the resolution of the grid becomes f^2 times as many channels (`pixel_unshuffle`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def pack_feature_maps(image_features: Tensor, feature_maps: Sequence[Tensor]) -> Tensor:
    """Pack feature maps into the channels of the grid.

    Args:
        image_features: (B, C, h, w).
        feature_maps: (B, C', f h, f w) each, with an integer factor f.

    Returns:
        (B, C + the sum of C' f^2, h, w).
    """
    grid_width = image_features.shape[-1]
    packed = [F.pixel_unshuffle(each, each.shape[-1] // grid_width) for each in feature_maps]
    return torch.cat((image_features, *packed), dim=1)


def unpack_feature_maps(features: Tensor, shapes: Sequence[tuple[int, int]]) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Undo `pack_feature_maps`.

    Args:
        features: (B, C + the sum of C' f^2, h, w).
        shapes: C' and f of each feature map.

    Returns:
        Image features (B, C, h, w), and the feature maps (B, C', f h, f w).
    """
    sizes = [size * factor**2 for size, factor in shapes]
    image_features, *packed = features.split([features.shape[1] - sum(sizes), *sizes], dim=1)
    maps = [F.pixel_shuffle(each, factor) for each, (_, factor) in zip(packed, shapes, strict=True)]
    return image_features, tuple(maps)


def count_packed_channels(num_channels: int, shapes: Sequence[tuple[int, int]]) -> int:
    """Return the channels of C image features with feature maps packed into them, C + the sum of C' f^2."""
    return num_channels + sum(size * factor**2 for size, factor in shapes)
