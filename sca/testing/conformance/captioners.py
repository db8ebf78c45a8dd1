"""Promises of captioners."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image
from sca_registry.contracts import TASKS, Caption, Prompt

from sca.testing.conformance.promises import promise
from sca.testing.conformance.trials import Trial

SIZE = (48, 32)  # width, height
BOXES = ((2.0, 3.0, 20.0, 30.0), (10.0, 4.0, 44.0, 28.0), (0.0, 0.0, 48.0, 32.0))


def example() -> tuple[Image.Image, list[Prompt]]:
    """A picture of noise, and boxes in it."""
    pixels = np.random.default_rng(1).integers(0, 255, (SIZE[1], SIZE[0], 3), np.uint8)
    return Image.fromarray(pixels), [Prompt(box=box) for box in BOXES]


def _told(captions: list[Caption]) -> list[str]:
    return [caption.text for caption in captions]


@promise("captioners", written="sca_registry.contracts.Caption")
def describe_answers_in_order(trial: Trial) -> str | None:
    """Each prompt has one caption with its text, its score, the prompt itself and its place, in the order that was
    asked; no prompts have none.
    """
    image, prompts = example()
    for task in TASKS:
        found = trial.part.describe(image, prompts, task)
        if not isinstance(found, list) or not all(isinstance(caption, Caption) for caption in found):
            return f"{task}: {found!r:.200}, which is no list of captions"
        if [caption.region for caption in found] != list(range(len(prompts))):
            return f"{task}: regions {[caption.region for caption in found]} for {len(prompts)} prompts"
        for prompt, caption in zip(prompts, found, strict=True):
            if caption.prompt is not prompt:
                return f"{task}: the caption of region {caption.region} is of another prompt"
            if not isinstance(caption.text, str) or not isinstance(caption.score, float) or math.isnan(caption.score):
                return f"{task}: text {caption.text!r}, score {caption.score!r}"
        if _told(trial.part.describe(image, prompts[::-1], task)) != _told(found)[::-1]:
            return f"{task}: other texts when the same is asked in another order"
    none = trial.part.describe(image, [])
    return None if none == [] else f"{none!r:.200} for no prompts"


@promise("captioners", written="sca_registry.contracts.Caption")
def boxes_are_kept(trial: Trial) -> str | None:
    """A caption that was asked for by a box has that box, and its mask, where there is one, the size of the image."""
    image, prompts = example()
    for prompt, caption in zip(prompts, trial.part.describe(image, prompts), strict=True):
        if caption.box is None or tuple(caption.box) != prompt.box:
            return f"box {caption.box} for {prompt.box}"
        if caption.mask is not None and list(caption.mask["size"]) != [image.height, image.width]:
            return f"a mask of {caption.mask['size']} for an image of {[image.height, image.width]} (height, width)"
    return None


@promise("captioners")
def alone_as_together(trial: Trial) -> str | None:
    """A region has alone the text that it has among others."""
    image, prompts = example()
    together = _told(trial.part.describe(image, prompts))
    for place, (prompt, text) in enumerate(zip(prompts, together, strict=True)):
        (alone,) = _told(trial.part.describe(image, [prompt]))
        if alone != text:
            return f"region {place} alone: {alone!r}, among others {text!r}"
    return None


@promise("captioners")
def what_is_unknown_is_refused(trial: Trial) -> str | None:
    """A task or an option of generation that there is not raises ValueError, which names it."""
    image, prompts = example()
    for word, how in (("translation", {"task": "translation"}), ("colour_of_ink", {"colour_of_ink": 3})):
        try:
            trial.part.describe(image, prompts, **how)
        except (ValueError, TypeError) as error:
            if word not in str(error):
                return f"{error}, which does not name {word!r}"
        else:
            return f"an answer with {word!r}"
    return None


@promise("captioners")
def the_picture_is_left_alone(trial: Trial) -> str | None:
    """The picture is the same afterwards."""
    image, prompts = example()
    before = image.tobytes()
    trial.part.describe(image, prompts)
    return None if image.tobytes() == before else "the picture is drawn into"
