"""Validation of generation options."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sca_registry.errors import format_choices
from sca_registry.spec import DEFAULT_GENERATION, check_generation

from sca.io.validation import check_choice, check_encodable, check_type
from sca.language_models.questions import LENGTH_REQUESTS

CAPTION_OPTIONS = ("max_new_tokens", "num_beams", "num_captions", "do_sample", "temperature", "top_p", "seed")
GENERATION_OPTIONS = (*CAPTION_OPTIONS, "question", "length")  # the last two require a model that is trained for them
SAMPLING_ONLY_OPTIONS = ("temperature", "top_p")


def resolve_generation_options(
    captioner: Any,
    *,
    max_new_tokens: int | None = None,
    num_beams: int | None = None,
    num_captions: int | None = None,
    do_sample: bool | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    question: str | None = None,
    length: str | None = None,
) -> dict[str, Any]:
    """Validate generation options and return those that are set.

    Options that are None are omitted: the captioner uses its defaults. Without sampling, `num_beams` defaults to at
    least `num_captions`, because the captions are the best beams, and `seed` is dropped.

    Args:
        captioner: Captioner. Its `generation` contains its defaults, its `generation_options` the names of the options
            that it supports.
        max_new_tokens: Maximum number of tokens per caption.
        num_beams: Number of beams.
        num_captions: Captions per region, best first.
        do_sample: Sample tokens instead of decoding greedily.
        temperature: Sampling temperature.
        top_p: Probability mass for nucleus sampling.
        seed: Random seed for sampling.
        question: Question to answer instead of captioning.
        length: Length of the captions: "short" (up to 3 words), "phrase" (4 to 8 words) or "full".

    Returns:
        Keyword arguments for `Captioner.caption` and `MaskEngine.caption_batch`.

    Raises:
        ValueError: A value has the wrong type or is out of range, a sampling option is set without `do_sample`, or the
            captioner does not support an option.
    """
    values = (max_new_tokens, num_beams, num_captions, do_sample, temperature, top_p, seed, question, length)
    settings = {name: value for name, value in zip(GENERATION_OPTIONS, values, strict=True) if value is not None}
    check_generation("generation", settings)
    supported = getattr(captioner, "generation_options", CAPTION_OPTIONS)
    if question is not None:
        check_type("question", question, str)
        check_encodable("the question", question)
        if "question" not in supported:
            raise ValueError(
                "this captioner does not support questions; use a model that is trained with train.question_prob, or a "
                "vision-language model such as qwen2.5-vl-3b"
            )
        if hasattr(captioner, "check_question"):
            captioner.check_question(question)
    if length is not None:
        _check_length(length, question, supported)
    defaults = getattr(captioner, "generation", DEFAULT_GENERATION)
    is_sampling = settings.get("do_sample", defaults.get("do_sample", False))
    for name in SAMPLING_ONLY_OPTIONS:
        if name in settings and not is_sampling:
            raise ValueError(f"{name} has no effect without sampling; add do_sample=True")
    if not is_sampling:
        settings.pop("seed", None)
    if settings.get("do_sample") is False and not defaults.get("do_sample"):
        del settings["do_sample"]
    for name in settings:
        if name not in supported:
            raise ValueError(
                f"{type(captioner).__name__} does not support the generation option {name!r}."
                f"{format_choices(supported)}"
            )
    if num_captions and num_beams is None:
        if is_sampling and num_captions > defaults["num_beams"]:
            settings["num_beams"] = 1  # each caption is sampled independently
        elif not is_sampling:
            settings["num_beams"] = max(num_captions, defaults["num_beams"])
    elif num_captions and num_beams is not None and num_captions > num_beams and (num_beams > 1 or not is_sampling):
        raise ValueError(f"num_captions={num_captions} requires num_beams of at least {num_captions}, not {num_beams}")
    return settings


def _check_length(length: Any, question: str | None, supported: Sequence[str]) -> None:
    """Raise ValueError if the captioner does not support a length, or if it conflicts with a question."""
    check_choice("length", length, LENGTH_REQUESTS)
    if question is not None:
        raise ValueError("length and question are mutually exclusive; omit one of them")
    if "length" not in supported:
        raise ValueError(
            "this captioner does not support a length; use a model that is trained with train.length_prob, or omit it"
        )
