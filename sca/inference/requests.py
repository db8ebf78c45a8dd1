"""From the arguments of a call to prompts that fit their image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from sca_registry.contracts import TASKS, Prompt

from sca.io.errors import InputError
from sca.io.masks import RLE, checked, decode
from sca.io.prompts import check


def collect_prompts(
    prompts: Sequence[Prompt],
    boxes: Sequence[Sequence[float]],
    points: Sequence[Sequence[float]],
    masks: Sequence[np.ndarray | RLE],
    size: tuple[int, int],
) -> list[Prompt]:
    """Return the prompts of a call in one list, checked against the image.

    Args:
        prompts: Regions with any combination of a box, points and a mask.
        boxes: (N, 4) x1 y1 x2 y2.
        points: (N, 2) x y.
        masks: (height, width) arrays, or COCO RLEs.
        size: Width and height of the image.

    Raises:
        InputError: No region, or one that does not fit the image.
    """
    request = [*_check_list("prompts", prompts)]
    request += [Prompt(box=_plain(box)) for box in _check_list("boxes", boxes)]
    request += [Prompt(points=(_plain(point),)) for point in _check_list("points", points)]
    request += [Prompt(mask=mask) for mask in _check_list("masks", masks)]
    if not request:
        raise InputError("no region; give prompts, boxes, points or masks")
    return check_prompts(request, *size)


def check_prompts(prompts: Sequence[Prompt], width: int, height: int) -> list[Prompt]:
    """Check prompts against their image, see `sca.io.prompts.check`; a message names the index of its prompt."""
    found = []
    for place, prompt in enumerate(_check_list("prompts", prompts)):
        try:
            if not isinstance(prompt, Prompt):
                raise InputError(f"{type(prompt).__name__} is not a prompt; give sca.Prompt(box=(x1, y1, x2, y2))")
            if isinstance(prompt.mask, Mapping):
                prompt = replace(prompt, mask=_decode(prompt.mask))
            found.append(check(prompt, width, height))
        except InputError as error:
            raise InputError(f"prompt {place}: {error}") from error
    return found


def _check_list(name: str, values: Any) -> Sequence[Any]:
    """The regions of an argument; None is none. Raises InputError for one region in place of a list."""
    if values is None:
        return ()
    if isinstance(values, Prompt | Mapping | str) or not hasattr(values, "__len__"):
        raise InputError(f"{name} is of type {type(values).__name__}; give a list of {name}")
    if name in ("boxes", "points") and len(values) and not hasattr(values[0], "__len__"):
        raise InputError(f"{name} is a list of numbers; give a list of {name}: {name}=[{list(map(_plain, values))}]")
    return values


def _decode(code: RLE) -> np.ndarray:
    try:
        return decode(checked(code))
    except ValueError as error:
        raise InputError(f"the mask is unusable: {error}") from error


def _plain(numbers: Any) -> Any:
    """Of an array or tensor its numbers."""
    return numbers.tolist() if hasattr(numbers, "tolist") else numbers


def check_task(task: str) -> None:
    """Raise ValueError for an unknown task."""
    if task not in TASKS:
        raise ValueError(f"unknown task {task!r}; choose from {', '.join(map(repr, TASKS))}")
