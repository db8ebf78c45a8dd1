"""Promises of proposers."""

from __future__ import annotations

import numpy as np
from PIL import Image
from sca_registry.contracts import Prompt

from sca.testing.conformance.promises import promise
from sca.testing.conformance.trials import Trial


@promise("proposers", written="sca_registry.contracts.Proposals")
def proposals_lie_in_the_image(trial: Trial) -> str | None:
    """Each proposal has a prompt that points into the image, a score and a name or None."""
    width, height = 48, 32
    prompts, scores, names = trial.part(Image.new("RGB", (width, height)), "image.png")
    if not len(prompts) == len(scores) == len(names):
        return f"{len(prompts)} prompts, {len(scores)} scores and {len(names)} names"
    for prompt in prompts:
        if not prompt:
            return "a prompt that points at nothing"
        if any(not (0 <= x < width and 0 <= y < height) for x, y, _ in prompt.points):
            return f"a point outside: {prompt.points}"
        if prompt.box and not (
            0 <= prompt.box[0] < prompt.box[2] <= width and 0 <= prompt.box[1] < prompt.box[3] <= height
        ):
            return f"a box outside: {prompt.box}"
        if prompt.mask is not None and prompt.mask.shape != (height, width):
            return f"a mask of {prompt.mask.shape} for an image of {(height, width)} (height, width)"
    return None


@promise("proposers")
def proposals_are_fixed(trial: Trial) -> str | None:
    """The same image has the same proposals."""
    image = Image.new("RGB", (48, 32), "grey")
    once, again = (trial.part(image, "image.png") for _ in range(2))
    same = once[1:] == again[1:] and len(once.prompts) == len(again.prompts)
    same = same and all(map(_alike, once.prompts, again.prompts))
    return None if same else "other proposals the second time"


def _alike(one: Prompt, other: Prompt) -> bool:
    if (one.mask is None) != (other.mask is None) or (one.box, one.points) != (other.box, other.points):
        return False
    return one.mask is None or np.array_equal(one.mask, other.mask)
