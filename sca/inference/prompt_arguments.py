"""Conversion of call arguments to prompts, checked against their image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from sca_registry.contracts import TASKS, Prompt
from sca_registry.errors import make_unknown_name_error

from sca.io.errors import InputError
from sca.io.masks import RLE, decode_rle, parse_rle
from sca.io.prompts import check_prompt


def collect_prompts(
    prompts: Sequence[Prompt] | None,
    boxes: Sequence[Sequence[float]] | None,
    points: Sequence[Sequence[float]] | None,
    masks: Sequence[np.ndarray | RLE] | None,
    image_size: tuple[int, int],
) -> list[Prompt]:
    """Collect the prompts of a call in one list, checked against the image.

    Coordinates are image pixels. None is the same as an empty list.

    Args:
        prompts: Regions with any combination of a box, points and a mask.
        boxes: (N, 4) x1 y1 x2 y2; one region each.
        points: (N, 2) x y; one region each.
        masks: (height, width) arrays or COCO RLEs; one region each.
        image_size: Width and height of the image.

    Returns:
        The prompts in the order of the arguments, with boxes clipped to the image.

    Raises:
        InputError: No region is given, or a region does not fit the image.
    """
    collected = [*_check_is_list("prompts", prompts)]
    collected += [Prompt(box=_to_list(box)) for box in _check_is_list("boxes", boxes)]
    collected += [Prompt(points=(_to_list(point),)) for point in _check_is_list("points", points)]
    collected += [Prompt(mask=mask) for mask in _check_is_list("masks", masks)]
    if not collected:
        raise InputError("no regions; pass prompts, boxes, points or masks")
    return check_prompts(collected, *image_size)


def check_prompts(prompts: Sequence[Prompt], width: int, height: int) -> list[Prompt]:
    """Check prompts against the size of their image; see `sca.io.prompts.check_prompt`.

    Args:
        prompts: Prompts in image pixels; masks can be COCO RLEs.
        width: Width of the image.
        height: Height of the image.

    Returns:
        The prompts with boxes clipped to the image and decoded masks.

    Raises:
        InputError: A prompt does not fit the image; the message contains the index of the prompt.
    """
    checked_prompts = []
    for index, prompt in enumerate(_check_is_list("prompts", prompts)):
        try:
            if not isinstance(prompt, Prompt):
                raise InputError(f"{type(prompt).__name__} is not a prompt; pass sca.Prompt(box=(x1, y1, x2, y2))")
            if isinstance(prompt.mask, Mapping):
                prompt = replace(prompt, mask=_decode_rle(prompt.mask))
            checked_prompts.append(check_prompt(prompt, width, height))
        except InputError as error:
            raise InputError(f"prompt {index}: {error}") from error
    return checked_prompts


def _check_is_list(name: str, values: Any) -> Sequence[Any]:
    """Return a list argument, () for None; raise InputError for a single region instead of a list."""
    if values is None:
        return ()
    if isinstance(values, Prompt | Mapping | str) or not hasattr(values, "__len__"):
        raise InputError(f"{name} is of type {type(values).__name__}; expected a list of {name}")
    if name in ("boxes", "points") and len(values) and not hasattr(values[0], "__len__"):
        raise InputError(
            f"{name} is a list of numbers; expected a list of {name}: {name}=[{list(map(_to_list, values))}]"
        )
    return values


def _decode_rle(rle: RLE) -> np.ndarray:
    try:
        return decode_rle(parse_rle(rle))
    except ValueError as error:
        raise InputError(f"invalid mask: {error}") from error


def _to_list(values: Any) -> Any:
    return values.tolist() if hasattr(values, "tolist") else values


def get_tasks(captioner: Any) -> Sequence[str]:
    """Return the names of the tasks of a captioner: its attribute `tasks` if it has one, else `TASKS`."""
    names: Sequence[str] = getattr(captioner, "tasks", TASKS)
    return names


def check_task(task: str, names: Sequence[str]) -> None:
    """Check the name of a task.

    Args:
        task: Name of the task.
        names: Names of the tasks of the model.

    Raises:
        ValueError: The model does not have the task.
    """
    if task not in names:
        raise make_unknown_name_error(f"unknown task {task!r}", str(task), names)


def check_question_task(task: str) -> None:
    """Check the task of a question or of a request for a length: models are trained on them as captions.

    Args:
        task: Name of the task.

    Raises:
        ValueError: The task is not "caption".
    """
    if task != "caption":
        raise ValueError(f"the task {task} cannot be combined with a question or a length; omit one of them")
