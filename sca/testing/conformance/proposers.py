"""Conformance checks of proposers."""

from __future__ import annotations

import numpy as np
from PIL import Image
from sca_registry.contracts import Prompt

from sca.testing.conformance.checks import register_check
from sca.testing.conformance.harnesses import ComponentHarness


@register_check("proposers", source="sca_registry.contracts.Proposals")
def proposals_are_inside_image(harness: ComponentHarness) -> str | None:
    """Each proposal has a prompt inside the image, a score, and a name or None."""
    width, height = 48, 32
    prompts, scores, names = harness.component(Image.new("RGB", (width, height)), "image.png")
    if not len(prompts) == len(scores) == len(names):
        return f"{len(prompts)} prompts, {len(scores)} scores and {len(names)} names"
    for prompt in prompts:
        if not prompt:
            return "a proposal has an empty prompt"
        if any(not (0 <= x < width and 0 <= y < height) for x, y, _ in prompt.points):
            return f"a point is outside the image: {prompt.points}"
        if prompt.box and not (
            0 <= prompt.box[0] < prompt.box[2] <= width and 0 <= prompt.box[1] < prompt.box[3] <= height
        ):
            return f"a box is outside the image: {prompt.box}"
        if prompt.mask is not None and prompt.mask.shape != (height, width):
            return f"a mask has shape {prompt.mask.shape} for an image of {(height, width)} (height, width)"
    return None


@register_check("proposers")
def proposals_are_deterministic(harness: ComponentHarness) -> str | None:
    """Two calls on the same image return the same proposals."""
    image = Image.new("RGB", (48, 32), "gray")
    first_proposals, second_proposals = (harness.component(image, "image.png") for _ in range(2))
    are_equal = first_proposals[1:] == second_proposals[1:] and len(first_proposals.prompts) == len(
        second_proposals.prompts
    )
    are_equal = are_equal and all(map(_is_same_prompt, first_proposals.prompts, second_proposals.prompts))
    return None if are_equal else "two calls return different proposals"


def _is_same_prompt(first: Prompt, second: Prompt) -> bool:
    if (first.mask is None) != (second.mask is None) or (first.box, first.points) != (second.box, second.points):
        return False
    return first.mask is None or second.mask is None or np.array_equal(first.mask, second.mask)
