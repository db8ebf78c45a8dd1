"""Options of generation as callers give them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from sca_registry.errors import format_choices, suggest_name
from sca_registry.spec import DEFAULT_GENERATION, check_generation

GENERATION_OPTIONS = ("max_new_tokens", "beams", "captions", "sample", "temperature", "top_p", "seed")
ARGUMENT_ALIASES = {  # of transformers and SAM, with the names here
    "num_beams": "beams",
    "num_return_sequences": "captions",
    "do_sample": "sample",
    "max_length": "max_new_tokens",
    "max_tokens": "max_new_tokens",
    "point_coords": "points",
    "box": "boxes",
    "mask_input": "masks",
    "input_boxes": "boxes",
    "input_points": "points",
}
SAMPLING_ONLY_OPTIONS = ("temperature", "top_p")  # that nothing but sampling uses


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
) -> dict[str, Any]:
    """Check options of generation, and return those that are given as captioners take them.

    The best of several captions are found by beam search, so without `beams` there are at least as many beams. A seed
    counts for sampling only.

    Args:
        captioner: A captioner; its `generation` are its own settings, and its `generation_options` name what it takes.
        max_new_tokens: Maximum tokens per caption.
        beams: Beams of the search.
        captions: Captions per region, best first.
        sample: Draw tokens instead of taking the likeliest.
        temperature: Divides the logits that are sampled from.
        top_p: Probability mass that is sampled from.
        seed: Of what is drawn.

    Raises:
        ValueError: A value of another type or out of range, one that only sampling uses, or an option that the
            captioner does not take.
    """
    values = (max_new_tokens, num_beams, num_captions, do_sample, temperature, top_p, seed)
    settings = {name: value for name, value in zip(GENERATION_OPTIONS, values, strict=True) if value is not None}
    check_generation("generation", settings)
    defaults = getattr(captioner, "generation", DEFAULT_GENERATION)
    is_sampling = settings.get("sample", defaults.get("sample", False))
    for name in SAMPLING_ONLY_OPTIONS:
        if name in settings and not is_sampling:
            raise ValueError(f"{name} has no effect without sampling; add sample=True")
    if not is_sampling:
        settings.pop("seed", None)
    if settings.get("sample") is False and not defaults.get("sample"):
        del settings["sample"]
    supported = getattr(captioner, "generation_options", GENERATION_OPTIONS)
    for name in settings:
        if name not in supported:
            raise ValueError(
                f"{type(captioner).__name__} does not support the generation option {name!r}.{format_choices(supported)}"
            )
    if num_captions and num_beams is None:
        if is_sampling and num_captions > defaults["beams"]:
            settings["beams"] = 1  # each caption is drawn by itself
        elif not is_sampling:
            settings["beams"] = max(num_captions, defaults["beams"])
    elif num_captions and num_beams is not None and num_captions > num_beams and (num_beams > 1 or not is_sampling):
        raise ValueError(f"captions={num_captions} needs beams={num_captions} or more, not {num_beams}")
    return settings


def reject_unknown_arguments(
    function: str, unknown_names: Iterable[str], known_names: Iterable[str], aliases: Mapping[str, str] | None = None
) -> None:
    """Raise TypeError if there is an unknown keyword.

    Args:
        function: Whose keywords they are.
        unknown: Keywords that it does not have.
        known: Keywords that it has; the closest is suggested.
        other_names: What keywords are called in other packages, with the names here.
    """
    for name in sorted(unknown_names):
        canonical_name = {**ARGUMENT_ALIASES, **(aliases or {})}.get(name, name)
        raise TypeError(f"{function}() has no argument {name!r}.{suggest_name(canonical_name, known_names)}")
