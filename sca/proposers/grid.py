"""Points on a regular grid, as SAM's automatic mask generator asks (arXiv 2304.02643)."""

from __future__ import annotations

from PIL import Image
from sca_registry.contracts import Prompt, Proposals


class PointGrid:
    """points_per_side x points_per_side prompts, one point each, in the middle of equal cells of the image."""

    def __init__(self, points_per_side: int = 32):
        if points_per_side < 1:
            raise ValueError(f"points_per_side is {points_per_side}; use an integer of 1 or more")
        self.points_per_side = points_per_side

    def __call__(self, image: Image.Image, image_id: int | str) -> Proposals:
        fractions = [(step + 0.5) / self.points_per_side for step in range(self.points_per_side)]
        prompts = tuple(Prompt(points=((x * image.width, y * image.height, 1),)) for y in fractions for x in fractions)
        return Proposals(prompts, (1.0,) * len(prompts), (None,) * len(prompts))
