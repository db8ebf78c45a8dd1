"""Parse a prompt from the command line or from plain values, and check it against its image.

Coordinates are in pixels of the upright image.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ImageOps, UnidentifiedImageError
from sca_registry.contracts import Prompt

from sca.io import masks
from sca.io.annotations.annotation import SkipCounter
from sca.io.coordinates import Box, clip_box, find_normalized_scale, scale_to_pixels
from sca.io.errors import InputError
from sca.io.images import format_path, open_undecoded
from sca.io.json import open_regular_file
from sca.io.paths import expand_user
from sca.io.validation import is_finite_number
from sca.io.warnings_once import warn_once

Point = tuple[float, float, int]
NPY_MAGIC = b"\x93NUMPY"  # first bytes of an array file
MAX_POINTS = 256  # maximum of a prompt from the network: each point costs as much as a text token

_BOX_FORMAT = "write a box as 4 numbers x1,y1,x2,y2 in pixels"
_POINT_FORMAT = "write a point as x,y or x,y,label, with x and y in pixels and label 1 (foreground) or 0 (background)"
_MASK_FORMAT = "a mask file is an image or a .npy array: a binary mask, probabilities or logits"
_REGION_FORMAT = "write any of box=x1,y1,x2,y2;point=x,y,1;point=x,y,0;mask=FILE"


def parse_box(text: str) -> Box:
    """Parse `"x1,y1,x2,y2"`. `check_prompt` checks it against the image."""
    return _parse_box_values(text.split(","), text)


def parse_point(text: str) -> Point:
    """Parse `"x,y"`, a point inside, or `"x,y,label"` with label 1 inside or 0 outside."""
    return _parse_point_values(text.split(","), text)


def parse_region(text: str, allow_pipe: bool = False) -> Prompt:
    """Parse `"box=x1,y1,x2,y2;point=x,y,1;point=x,y,0;mask=FILE"`; every field is optional, and `point` is repeatable.

    Args:
        text: Region.
        allow_pipe: See `read_mask_file`.

    Returns:
        The prompt, in image pixels.

    Raises:
        InputError: The text is malformed, or the mask cannot be read.
    """
    box, points, mask = None, [], None
    for part in filter(None, (part.strip() for part in text.split(";"))):
        name, _, value = part.partition("=")
        match name.strip():
            case "box" if box is None:
                box = parse_box(value)
            case "point":
                points.append(parse_point(value))
            case "mask" if mask is None:
                mask = read_mask_file(expand_user(value.strip()), allow_pipe)
            case "box" | "mask" as twice:
                raise InputError(f"{quote_value(text)} has '{twice}' twice; write it once")
            case other:
                raise InputError(f"{quote_value(other)} is not a field of a region; {_REGION_FORMAT}")
    prompt = Prompt(box, tuple(points), mask)
    if not prompt:
        raise InputError(f"{quote_value(text)} is empty; {_REGION_FORMAT}")
    return prompt


def list_mask_files(regions: Iterable[str]) -> list[str]:
    """List the mask files that regions name, in the format of `parse_region`."""
    parts = (part.partition("=") for text in regions for part in text.split(";"))
    return [str(expand_user(value.strip())) for name, _, value in parts if name.strip() == "mask"]


def read_mask_file(path: str | Path, allow_pipe: bool = False) -> np.ndarray:
    """Read a mask file.

    Args:
        path: A .npy array, see `sca.io.masks.binarize_mask`, or an image, see `sca.io.masks.binarize_mask_image`.
        allow_pipe: Accept a pipe such as /dev/stdin. Set it only for a path that a person typed.

    Returns:
        (height, width) bool.

    Raises:
        InputError: The file cannot be read, or is not a mask.
    """
    try:
        with open_regular_file(path, require_seekable=True, allow_pipe=allow_pipe) as file:
            is_array = str(path).lower().endswith(".npy") or file.read(len(NPY_MAGIC)) == NPY_MAGIC
            file.seek(0)
            if is_array:
                if isinstance(file, io.BytesIO):  # a pipe
                    return masks.binarize_mask(np.load(file, allow_pickle=False))
                return masks.binarize_mask(np.load(path, mmap_mode="r", allow_pickle=False))
            with open_undecoded(file) as image:
                return masks.binarize_mask_image(ImageOps.exif_transpose(image), image.format in masks.LOSSY_FORMATS)
    except UnidentifiedImageError as error:
        raise InputError(f"cannot read the mask {format_path(path)}: it is not an image; {_MASK_FORMAT}") from error
    except Exception as error:  # a decoder may raise anything for damaged data
        reason = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"cannot read the mask {format_path(path)}: {reason}; {_MASK_FORMAT}") from error


def parse_prompt(value: Any, location: str, width: int, height: int) -> Prompt:
    """Parse `{"box": [x1, y1, x2, y2], "points": [[x, y, label]], "mask": RLE}`; every key is optional.

    Args:
        value: JSON value.
        location: Subject of the error messages.
        width: Width of the image in pixels.
        height: Height of the image in pixels.

    Returns:
        The prompt, in image pixels.

    Raises:
        InputError: The value is malformed or does not fit the image, see `check_prompt`.
    """
    box, points, mask = parse_prompt_fields(value, location)
    if isinstance(mask, str):
        raise InputError(f"{location}, 'mask' must be an RLE, not a file name")
    if mask is not None and mask["size"] != [height, width]:  # checked before decoding, because the mask may be huge
        raise InputError(
            f"{location}, 'mask': the mask is {mask['size'][1]} x {mask['size'][0]}, but the image is {width} x "
            f"{height} (width x height); use a mask of the same size as the image"
        )
    try:
        return check_prompt(Prompt(box, points, None if mask is None else masks.decode_rle(mask)), width, height)
    except InputError as error:
        raise InputError(f"{location}: {error}") from error


def check_prompt(prompt: Prompt, width: int, height: int) -> Prompt:
    """Check a prompt against its image.

    A box may cross the edge, as annotated boxes often do by a pixel, but must overlap the image. A point must satisfy 0
    <= x < width and 0 <= y < height. A mask must have the size of the image and at least one pixel inside. Normalized
    coordinates and prompts with only negative points are rejected.

    Args:
        prompt: Prompt in image pixels.
        width: Width of the image in pixels.
        height: Height of the image in pixels.

    Returns:
        The prompt as plain Python numbers, its box clipped to the image.

    Raises:
        InputError: The prompt does not fit the image.
    """
    if not prompt:
        raise InputError("the prompt is empty; set a box, a point or a mask")
    box = None if prompt.box is None else _check_and_clip_box(_parse_box_values(prompt.box), width, height)
    points = tuple(_parse_point_values(point) for point in prompt.points)
    if points and not any(label for _, _, label in points) and prompt.box is None and prompt.mask is None:
        raise InputError("all points have label 0 (outside); add a point with label 1, a box or a mask")
    _check_not_normalized(points, width, height)
    for x, y, label in points:
        if not (0 <= x < width and 0 <= y < height):
            raise InputError(
                f"the point {x:g},{y:g},{label} is outside the {width} x {height} image; x must be at least 0 and less "
                f"than {width}, and y at least 0 and less than {height}"
            )
    return Prompt(box, points, None if prompt.mask is None else _check_mask(prompt.mask, width, height))


def check_and_count_clipping(
    prompt: Prompt, width: int, height: int, clip_counter: SkipCounter, location: str
) -> Prompt:
    """Check a prompt with `check_prompt`, and count its box in `clip_counter` under `location` if it was clipped."""
    checked_prompt = check_prompt(prompt, width, height)
    if prompt.box is not None and checked_prompt.box != _parse_box_values(prompt.box):
        clip_counter("box clipped", location)
    return checked_prompt


def _check_and_clip_box(box: Box, width: int, height: int) -> Box:
    x1, y1, x2, y2 = box
    text = ",".join(f"{value:g}" for value in box)
    for low, high, axis in ((x1, x2, "x"), (y1, y2, "y")):
        if high <= low:
            state = "empty" if high == low else "reversed"
            hint = ""
            if x2 > 0 and y2 > 0:
                hint = f" (if {text} is x,y,width,height, write {x1:g},{y1:g},{x1 + x2:g},{y1 + y2:g})"
            raise InputError(
                f"the box {text} is {state}: {axis}2 must be greater than {axis}1; write x1,y1,x2,y2{hint}"
            )
    clipped = clip_box(box, width, height)
    scale = find_normalized_scale(box, width, height)
    if clipped is not None and scale is None:
        return clipped
    problem = f"{'is outside' if clipped is None else 'extends beyond'} the {width} x {height} image"
    hint = "boxes are x1,y1,x2,y2 in pixels"
    if scale is not None:
        pixels = ",".join(f"{value:g}" for value in scale_to_pixels(box, scale, width, height))
        if scale == 1:
            problem, hint = "looks normalized to [0, 1]", f"{hint}, so write {pixels}"
        else:
            hint += f"; if the box is normalized to [0, {scale}], write {pixels}"
    raise InputError(f"the box {text} {problem}; {hint}")


def _check_not_normalized(points: Sequence[Point], width: int, height: int) -> None:
    """Reject points that are all within [0, 1] and not at pixel corners: they are normalized."""
    values = [value for x, y, _ in points for value in (x, y)]
    if not values or max(width, height) <= 1 or not 0 <= min(values) <= max(values) <= 1:
        return
    if all(map(float.is_integer, values)):
        return
    x, y, label = points[0]
    pixels = ",".join(f"{value:g}" for value in scale_to_pixels((x, y), 1, width, height))
    raise InputError(
        f"the point {x:g},{y:g},{label} looks normalized to [0, 1]; points are in pixels, so write {pixels}"
    )


def _check_mask(mask: np.ndarray, width: int, height: int) -> np.ndarray:
    try:
        binary_mask = masks.binarize_mask(np.asarray(mask))
    except ValueError as error:
        raise InputError(f"invalid mask: {error}") from error
    if binary_mask.shape != (height, width):
        raise InputError(
            f"the mask is {binary_mask.shape[1]} x {binary_mask.shape[0]}, but the image is {width} x {height} "
            "(width x height); use a mask of the same size as the image"
        )
    if not binary_mask.any():
        raise InputError("the mask is empty; mark the region with nonzero pixels")
    if binary_mask.all():
        warn_once("whole mask", f"a mask covers the full {width} x {height} image; pixels outside the region must be 0")
    return binary_mask


def parse_prompt_fields(value: Any, location: str) -> tuple[Box | None, tuple[Point, ...], dict[str, Any] | str | None]:
    """Parse the box, points and mask of a plain prompt; a text mask is a file name and returned unchanged.

    Args:
        value: JSON value.
        location: Subject of the error messages.

    Returns:
        Box x1, y1, x2, y2; points (x, y, label); and the mask as RLE or file name.

    Raises:
        InputError: A field is malformed, or all are missing; the message begins with `location`.
    """
    if not isinstance(value, dict):
        raise InputError(
            f"{location}, 'prompt' must be an object with 'box', 'points' or 'mask', not {quote_value(value)}"
        )
    box, points, mask = (value.get(name) for name in ("box", "points", "mask"))
    if box is None and not points and mask is None:
        other_keys = f", only {', '.join(map(quote_value, value))}" if value else ""
        raise InputError(f"{location}: no 'box', 'points' or 'mask'{other_keys}")
    box = None if box is None else parse_field(location, "box", _parse_box_values, box)
    points = () if points is None else parse_field(location, "points", _parse_points, points)
    return (
        box,
        points,
        mask if mask is None or isinstance(mask, str) else parse_field(location, "mask", masks.parse_rle, mask),
    )


def _parse_box_values(values: Any, source: Any = None) -> Box:
    x1, y1, x2, y2 = _parse_numbers(values, (4,), source, _BOX_FORMAT)
    return x1, y1, x2, y2


def _parse_point_values(values: Any, source: Any = None) -> Point:
    x, y, *label = _parse_numbers(values, (2, 3), source, _POINT_FORMAT)
    if label not in ([], [0], [1]):
        raise InputError(
            f"the label of the point {quote_value(values if source is None else source)} must be 1 or 0; "
            f"{_POINT_FORMAT}"
        )
    return x, y, int(label[0]) if label else 1


def _parse_points(values: Any) -> tuple[Point, ...]:
    if not isinstance(values, list):
        raise InputError(f"must be a list of points [[x, y, label]], not {quote_value(values)}")
    return tuple(_parse_point_values(point) for point in values)


def _parse_numbers(values: Any, lengths: tuple[int, ...], source: Any, expected_format: str) -> list[float]:
    """Parse finite numbers of an allowed count, from a list or from command-line text (`source` is the full value)."""
    source = values if source is None else source
    if isinstance(values, str | Mapping) or not hasattr(values, "__len__") or len(values) not in lengths:
        raise InputError(f"cannot parse {quote_value(source)}; {expected_format}")
    parsed = []
    for value in values:
        number = _parse_float(value) if isinstance(source, str) else value
        if not is_finite_number(number):
            raise InputError(f"{quote_value(value)} in {quote_value(source)} is not a finite number; {expected_format}")
        parsed.append(float(number))
    return parsed


def _parse_float(text: str) -> float:
    """Parse a float; NaN if the text is not a number."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def parse_field(location: str, field: str, parse: Callable[[Any], Any], value: Any) -> Any:
    """Return `parse(value)`; convert a ValueError to an InputError that names the field."""
    try:
        return parse(value)
    except ValueError as error:
        raise InputError(f"{location}, '{field}': {error}") from error


def quote_value(value: Any) -> str:
    """Format a value for a message, on one line of at most 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
