"""Conformance checks of captioners."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from PIL import Image
from sca_registry.contracts import TASKS, Caption, Prompt

from sca.testing.conformance.checks import register_check
from sca.testing.conformance.harnesses import ComponentHarness

EXAMPLE_IMAGE_SIZE = (48, 32)  # width, height
EXAMPLE_BOXES = ((2.0, 3.0, 20.0, 30.0), (10.0, 4.0, 44.0, 28.0), (0.0, 0.0, 48.0, 32.0))


def make_example() -> tuple[Image.Image, list[Prompt]]:
    """Return a noise image and box prompts in it."""
    pixels = np.random.default_rng(1).integers(0, 255, (EXAMPLE_IMAGE_SIZE[1], EXAMPLE_IMAGE_SIZE[0], 3), np.uint8)
    return Image.fromarray(pixels), [Prompt(box=box) for box in EXAMPLE_BOXES]


def _list_texts(captions: list[Caption]) -> list[str]:
    return [caption.text for caption in captions]


@register_check("captioners", source="sca_registry.contracts.Caption")
def captions_match_prompts(harness: ComponentHarness) -> str | None:
    """Each prompt has one caption with text, score, prompt and region id, in order; no prompts return an empty list."""
    image, prompts = make_example()
    has_scores = getattr(harness.component, "has_scores", True)
    for task in TASKS:
        captions = harness.component.caption(image, prompts, task)
        if not isinstance(captions, list) or not all(isinstance(caption, Caption) for caption in captions):
            return f"{task}: {captions!r:.200} is not a list of Caption objects"
        if [caption.region_id for caption in captions] != list(range(len(prompts))):
            return f"{task}: region ids {[caption.region_id for caption in captions]} for {len(prompts)} prompts"
        for prompt, caption in zip(prompts, captions, strict=True):
            if caption.prompt is not prompt:
                return f"{task}: the caption of region {caption.region_id} refers to another prompt"
            if not isinstance(caption.text, str) or not _is_valid_score(caption.score, has_scores):
                return f"{task}: text {caption.text!r}, score {caption.score!r}"
        if _list_texts(harness.component.caption(image, prompts[::-1], task)) != _list_texts(captions)[::-1]:
            return f"{task}: texts depend on the order of the prompts"
    no_captions = harness.component.caption(image, [])
    return None if no_captions == [] else f"no prompts: {no_captions!r:.200}, not an empty list"


def _is_valid_score(score: Any, has_scores: bool) -> bool:
    """Return whether a score is in [0, 1], or NaN for a captioner without scores."""
    return isinstance(score, float) and (0 <= score <= 1 if has_scores else math.isnan(score))


@register_check("captioners", source="sca_registry.contracts.Caption")
def box_prompts_are_kept(harness: ComponentHarness) -> str | None:
    """The caption of a box prompt has that box, and its mask, if any, has the size of the image."""
    image, prompts = make_example()
    for prompt, caption in zip(prompts, harness.component.caption(image, prompts), strict=True):
        if caption.box is None or tuple(caption.box) != prompt.box:
            return f"box {caption.box} for the prompt {prompt.box}"
        if caption.mask is not None and list(caption.mask["size"]) != [image.height, image.width]:
            return f"mask size {caption.mask['size']} for an image of {[image.height, image.width]} (height, width)"
    return None


@register_check("captioners")
def batch_invariance(harness: ComponentHarness) -> str | None:
    """A region has the same text alone as in a batch."""
    image, prompts = make_example()
    batch_texts = _list_texts(harness.component.caption(image, prompts))
    for index, (prompt, text) in enumerate(zip(prompts, batch_texts, strict=True)):
        (single_text,) = _list_texts(harness.component.caption(image, [prompt]))
        if single_text != text:
            return f"region {index}: {single_text!r} alone, {text!r} in a batch"
    return None


@register_check("captioners")
def rejects_unknown_arguments(harness: ComponentHarness) -> str | None:
    """An unknown task or generation option raises a ValueError or TypeError that names it."""
    image, prompts = make_example()
    for unknown_value, kwargs in (("translation", {"task": "translation"}), ("color_of_ink", {"color_of_ink": 3})):
        try:
            harness.component.caption(image, prompts, **kwargs)
        except (ValueError, TypeError) as error:
            if unknown_value not in str(error):
                return f"the error message {str(error)!r} does not name {unknown_value!r}"
        else:
            return f"{unknown_value!r} is accepted"
    return None


@register_check("captioners")
def image_is_unchanged(harness: ComponentHarness) -> str | None:
    """The image is unchanged after captioning."""
    image, prompts = make_example()
    initial_bytes = image.tobytes()
    harness.component.caption(image, prompts)
    return None if image.tobytes() == initial_bytes else "the image was modified"
