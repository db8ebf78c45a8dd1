"""Points drawn inside a region, which stand for the clicks of a person."""

from __future__ import annotations

import numpy as np
from sca_registry.contracts import Prompt, Region

from sca.io.masks import decode_rle


def sample_point_prompt(region: Region, rng: np.random.Generator) -> Prompt:
    """Return a prompt with one point drawn inside the region's mask, or its box if it has none, in image pixels."""
    x, y = sample_point(region, None if region.mask is None else decode_rle(region.mask), rng)
    return Prompt(points=((x, y, 1),))


def sample_point(region: Region, mask: np.ndarray | None, rng: np.random.Generator) -> tuple[float, float]:
    """Draw a point inside a region.

    Args:
        region: The region, whose box is used if there is no mask.
        mask: (height, width) bool, or None.
        rng: The generator.

    Returns:
        x and y in image pixels.
    """
    if mask is not None and mask.any():
        inside = np.flatnonzero(mask)
        y, x = divmod(int(inside[rng.integers(len(inside))]), mask.shape[1])
        return float(x), float(y)
    x1, y1, x2, y2 = region.box
    return float(rng.uniform(x1, x2)), float(rng.uniform(y1, y2))
