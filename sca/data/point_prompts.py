"""Random points inside regions, which simulate a user's clicks."""

from __future__ import annotations

import numpy as np
from sca_registry.contracts import Prompt, Region

from sca.io.masks import decode_rle


def sample_point_prompt(region: Region, rng: np.random.Generator) -> Prompt:
    """Sample a prompt with one point inside a region.

    Args:
        region: Region. Its box is used if it has no mask.
        rng: Random generator.

    Returns:
        Prompt with a positive point in image pixels.
    """
    x, y = sample_point(region, None if region.mask is None else decode_rle(region.mask), rng)
    return Prompt(points=((x, y, 1),))


def sample_point(region: Region, mask: np.ndarray | None, rng: np.random.Generator) -> tuple[float, float]:
    """Sample a point inside a region.

    Args:
        region: Region. Its box is used without a mask.
        mask: (height, width) bool mask of the region, or None.
        rng: Random generator.

    Returns:
        x and y in image pixels.
    """
    if mask is not None and mask.any():
        inside = np.flatnonzero(mask)
        y, x = divmod(int(inside[rng.integers(len(inside))]), mask.shape[1])
        return float(x), float(y)
    x1, y1, x2, y2 = region.box
    return float(rng.uniform(x1, x2)), float(rng.uniform(y1, y2))
