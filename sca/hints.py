"""Names in SAM, transformers, peft and timm, and what replaces them here, for error messages; imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import wraps
from inspect import Parameter, signature
from typing import ParamSpec, TypeVar

from sca_registry.contracts import COMPONENT_KINDS
from sca_registry.errors import suggest_name

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

NAME_HINTS = {  # attribute that `sca` does not have -> what to use
    "AutoModel": "sca.load",
    "AutomaticMaskGenerator": "sca.caption_everything",
    "SAM2AutomaticMaskGenerator": "sca.caption_everything",
    "SAM2ImagePredictor": "sca.Predictor",
    "SCAModel": "sca.load",
    "SamAutomaticMaskGenerator": "sca.caption_everything",
    "SamPredictor": "sca.Predictor",
    "Trainer": "sca.train",
    "TrainingArguments": "sca.train",
    "create_model": "sca.compose",
    "from_pretrained": "sca.load",
    "list_models": "`sca list`",
    "push_to_hub": "`sca push`",
    "save_pretrained": "sca.save",
}
MODEL_ATTRIBUTE_HINTS = {  # attribute that a model does not have -> what to use
    "from_pretrained": "sca.load(NAME)",
    "predict": "sca.Predictor(model)",
    "push_to_hub": "sca.save(model, FOLDER), then `sca push FOLDER OWNER/NAME`",
    "save_pretrained": "sca.save(model, FOLDER)",
    "set_image": "sca.Predictor(model)",
}
COMMAND_HINTS = {  # command that `sca` does not have -> what to use
    "finetune": "`sca train own-data`",
    "fine-tune": "`sca train own-data`",
    "push-to-hub": "`sca push`",
    "segment": "`sca caption IMAGE --model NAME+none` for masks without captions, such as sca-tiny+none",
    "sweep": "`sca bench run FILE.toml`, with the values to compare in [axes] of that file, or `sca bench run smoke`",
}
ARGUMENT_ALIASES = {  # keyword argument there -> the same argument here, in the functions that have it
    "backbone": "encoder",
    "box": "boxes",
    "decoder": "language_model",
    "device_map": "device",
    "dtype": "precision",
    "image_encoder": "encoder",
    "input_boxes": "boxes",
    "llm": "language_model",
    "map_location": "device",
    "mask_input": "masks",
    "max_length": "max_new_tokens",
    "max_tokens": "max_new_tokens",
    "min_mask_region_area": "min_area",
    "num_return_sequences": "num_captions",
    "output_dir": "folder",
    "pretrained": "weights",
    "pretrained_model_name_or_path": "source",
    "save_directory": "folder",
    "torch_dtype": "precision",
    "vision_encoder": "encoder",
}
LABELED_POINTS_HINT = "Give the points of one region with labels: sca.Prompt(points=((x, y, label), ...))."
LORA_HINT = 'Use lora=8 for rank 8, or lora={"rank": 8, "alpha": 16}.'
ARGUMENT_HINTS = {  # keyword argument there -> how to do the same here
    "input_labels": LABELED_POINTS_HINT,
    "input_points": LABELED_POINTS_HINT,
    "lora_alpha": LORA_HINT,
    "lora_config": LORA_HINT,
    "lora_r": LORA_HINT,
    "multimask_output": "Masks without captions come from segment(), which has this argument.",
    "peft_config": LORA_HINT,
    "point_coords": LABELED_POINTS_HINT,
    "point_labels": LABELED_POINTS_HINT,
    "points_per_batch": "The batch size is an option of the predictor: sca.Predictor(model, region_batch_size=64).",
}


def make_attribute_error(name: str, public_names: Iterable[str]) -> AttributeError:
    """Return the error for a name that `sca` does not have, with what to use or the closest name.

    Args:
        name: The unknown name.
        public_names: Public names of `sca`.

    Returns:
        The error, to be raised by the caller.
    """
    if name in NAME_HINTS:
        hint = f"; use {NAME_HINTS[name]}"
    elif name.startswith("register_"):
        plurals = {kind.singular: plural for plural, kind in COMPONENT_KINDS.items()}
        plural = plurals.get(name.removeprefix("register_"), "encoders")
        hint = f'; use import sca_registry and @sca_registry.{plural}.register("name")'
    else:
        suggestion = "" if name.startswith("_") else suggest_name(name, public_names)
        hint = suggestion and f".{suggestion}"
    # `name` without `obj`, so that tracebacks add no second suggestion
    return AttributeError(f"module 'sca' has no attribute {name!r}{hint}", name=name)


def reject_unknown_arguments(
    function: str, unknown_names: Iterable[str], known_names: Iterable[str], hints: Mapping[str, str] | None = None
) -> None:
    """Reject unknown keyword arguments of a function, all in one error.

    Args:
        function: Name of the function.
        unknown_names: Keyword arguments that the function does not have.
        known_names: Keyword arguments of the function; the error suggests the closest one.
        hints: Keyword arguments of other functions -> how to do the same here, in addition to `ARGUMENT_HINTS`.

    Raises:
        TypeError: `unknown_names` is not empty.
    """
    names, known_names = sorted(unknown_names), list(known_names)
    if not names:
        return
    names_by_hint: dict[str, list[str]] = {}
    for name in names:
        names_by_hint.setdefault(_get_argument_hint(name, known_names, hints or {}), []).append(name)
    if len(names) == 1:
        raise TypeError(f"{function}() has no argument {names[0]!r}.{next(iter(names_by_hint))}")
    hint_text = "".join(f" For {_join_names(names)}:{hint}" for hint, names in names_by_hint.items() if hint)
    raise TypeError(f"{function}() has no arguments {_join_names(names)}.{hint_text}")


def _get_argument_hint(name: str, known_names: Iterable[str], hints: Mapping[str, str]) -> str:
    """Return a sentence with a leading space; "" for a name that is not similar to any known one."""
    if hint := {**ARGUMENT_HINTS, **hints}.get(name):
        return f" {hint}"
    return suggest_name(ARGUMENT_ALIASES.get(name, name), known_names)


def _join_names(names: list[str]) -> str:
    quoted = [repr(name) for name in names]
    return f"{', '.join(quoted[:-1])} and {quoted[-1]}" if len(quoted) > 1 else quoted[0]


def check_argument_names(
    *extra_names: str, hints: Mapping[str, str] | None = None
) -> Callable[[Callable[Arguments, Result]], Callable[Arguments, Result]]:
    """Decorate a function so that unknown keyword arguments raise `TypeError` with the closest name.

    Args:
        *extra_names: Keyword arguments that the function accepts in its `**` parameter.
        hints: See `reject_unknown_arguments`.

    Returns:
        The decorator, which keeps the signature.
    """

    def decorate_function(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
        parameters = signature(function).parameters.values()
        names = [each.name for each in parameters if each.kind is not Parameter.VAR_KEYWORD and each.name != "self"]
        known_names = (*names, *extra_names)

        @wraps(function)
        def call_checked(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
            reject_unknown_arguments(function.__name__, kwargs.keys() - known_names, known_names, hints)
            return function(*args, **kwargs)

        return call_checked

    return decorate_function
