"""Point prompts on a regular grid, as in SAM's automatic mask generator (arXiv 2304.02643)."""

from __future__ import annotations

from PIL import Image
from sca_registry.contracts import Prompt, Proposals


class PointGrid:
    """Proposer of point prompts at the centers of a regular grid over the image.

    Args:
        points_per_side: Points along each side; the proposals are points_per_side ** 2 prompts with one point each.

    Raises:
        ValueError: `points_per_side` is less than 1.
    """

    def __init__(self, points_per_side: int = 32):
        if points_per_side < 1:
            raise ValueError(f"points_per_side is {points_per_side}; expected an integer of at least 1")
        self.points_per_side = points_per_side

    def __call__(self, image: Image.Image, image_id: int | str) -> Proposals:
        """Return the point prompts row by row. All scores are 1."""
        fractions = [(step + 0.5) / self.points_per_side for step in range(self.points_per_side)]
        prompts = tuple(Prompt(points=((x * image.width, y * image.height, 1),)) for y in fractions for x in fractions)
        return Proposals(prompts, (1.0,) * len(prompts), (None,) * len(prompts))
