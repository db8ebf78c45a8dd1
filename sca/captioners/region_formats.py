"""Ways to show a region to a vision-language model: crops, drawings, coordinates and alpha channels."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw
from sca_registry.contracts import Prompt
from transformers.models.kosmos2.processing_kosmos2 import coordinate_to_patch_index
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from sca.captioners.region_captioner import (
    MAX_ASPECT_RATIO,
    RegionView,
    box_to_pixels,
    check_aspect_ratio,
    crop_image,
)
from sca.io.coordinates import Box
from sca.io.masks import decode_rle, resize_rle
from sca.io.validation import check_range

MARK_COLOR = (255, 0, 0)
LINE_WIDTH_DIVISOR = 150  # line width of a drawn region: the image's longer side divided by this
DEFAULT_CONTEXT, MAX_CONTEXT = 1.5, 100.0  # of a crop
REGION_PLACEHOLDER = "{region}"  # place of the coordinates in a question
TAG_PATTERN = re.compile(r"</?[a-z_]+\d*/?>")  # location and phrase tags in a generated text
BOX_LIST = r"\[\s*\d+(?:\.\d+)?(?:\s*,\s*\d+(?:\.\d+)?){3}\s*\]"
QUESTIONS = {  # by region format: for recognition, and for a caption
    "crop": ("What is in this picture? Answer with its name alone.", "Describe this picture in one short phrase."),
    "box": (
        "What is inside the red box? Answer with its name alone.",
        "Describe what is inside the red box in one short phrase.",
    ),
    "outline": (
        "What is inside the red outline? Answer with its name alone.",
        "Describe what is inside the red outline in one short phrase.",
    ),
    "coordinates": (
        "What is in the region {region}? Answer with its name alone.",
        "Describe what is in the region {region} in one short phrase.",
    ),
    "alpha": (
        "What is the masked region? Answer with its name alone.",
        "Describe the masked region in one short phrase.",
    ),
}
MODEL_QUESTIONS = {  # by model type and region format, for models that were trained on other wordings
    ("florence2", "crop"): ("<CAPTION>", "<CAPTION>"),
    ("florence2", "coordinates"): ("<REGION_TO_CATEGORY>{region}", "<REGION_TO_DESCRIPTION>{region}"),
    ("kosmos-2", "crop"): ("An image of", "An image of"),
    ("kosmos-2", "coordinates"): ("<grounding><phrase> It</phrase>{region} is",) * 2,
    ("molmo2", "coordinates"): (
        "What is at {region}? Answer with its name alone.",
        "Describe what is at {region} in one short phrase.",
    ),
    ("paligemma", "crop"): ("answer en What is in this picture?", "caption en"),
    ("paligemma", "box"): ("answer en What is inside the red box?",) * 2,
    ("paligemma", "outline"): ("answer en What is inside the red outline?",) * 2,
    ("paligemma", "coordinates"): ("caption {region}", "caption {region}"),
}


class Resizing(NamedTuple):
    """Size to which Qwen2.5-VL resizes images: the defaults of its image processor.

    Attributes:
        factor: Sides are multiples of this.
        min_pixels: Minimum number of pixels.
        max_pixels: Maximum number of pixels.
    """

    factor: int = 28
    min_pixels: int = 56 * 56
    max_pixels: int = 28 * 28 * 1280


class CoordinateFormat(NamedTuple):
    """Notation of boxes that a family of models was trained on.

    Attributes:
        format_box: Function of a box in pixels of an image, and of the size of that image.
        pattern: Regular expression of coordinates in a generated text, in which special tokens are missing.
        resizing: Resizing of images, if the coordinates are pixels of the resized image.
    """

    format_box: Callable[[Box, tuple[int, int]], str]
    pattern: re.Pattern[str] = TAG_PATTERN
    resizing: Resizing | None = None

    def adapt_to_processor(self, image_processor: Any) -> CoordinateFormat:
        """Return the notation for images that an image processor resizes with its own limits."""
        if self.resizing is None:
            return self
        factor, size = image_processor.patch_size * image_processor.merge_size, image_processor.size
        return self._replace(resizing=Resizing(factor, size["shortest_edge"], size["longest_edge"]))


def get_questions(model_type: str | None, region_format: str) -> tuple[str, str]:
    """Return the questions for recognition and for a caption; "{region}" is the place of the coordinates.

    Args:
        model_type: Model type of transformers; None if it is unknown.
        region_format: How the region is shown.

    Returns:
        Both questions.
    """
    return MODEL_QUESTIONS.get((model_type or "", region_format)) or QUESTIONS[region_format]


def insert_coordinates(question: str, coordinates: str) -> str:
    """Replace "{region}" in a question by coordinates, or append them if the question does not contain it."""
    if coordinates and REGION_PLACEHOLDER not in question:
        question = f"{question} {REGION_PLACEHOLDER}"
    return question.replace(REGION_PLACEHOLDER, coordinates)


def remove_coordinates(text: str, model_type: str) -> str:
    """Remove coordinates and tags from a generated text.

    Args:
        text: Text.
        model_type: Model type of transformers, whose notation in `COORDINATE_FORMATS`, if any, is removed.

    Returns:
        The text with single spaces.
    """
    if model_type in COORDINATE_FORMATS:
        text = COORDINATE_FORMATS[model_type].pattern.sub(" ", text)
    return " ".join(TAG_PATTERN.sub(" ", text).split())


def check_region_placeholder(question: str, region_format: str) -> None:
    """Check that only a question for coordinates contains "{region}".

    Args:
        question: Question.
        region_format: How the region is shown.

    Raises:
        ValueError: The question contains "{region}", but the region is not shown by coordinates.
    """
    if REGION_PLACEHOLDER in question and region_format != "coordinates":
        raise ValueError(
            f"the question contains {REGION_PLACEHOLDER} although region_format is not coordinates; remove it"
        )


def resolve_context(context: float | None, region_format: str) -> float:
    """Check the context of crops, and replace None by the default.

    Args:
        context: Sides of a crop as multiples of those of the box, or None.
        region_format: How the region is shown.

    Returns:
        The context.

    Raises:
        ValueError: The context is out of range, or set although the region is not shown by a crop.
    """
    if context is None:
        return DEFAULT_CONTEXT
    check_range("context", context, float, 1.0, MAX_CONTEXT)
    if region_format != "crop":
        raise ValueError("context requires region_format=crop; remove it")
    return context


def crop_region(view: RegionView, context: float) -> Image.Image:
    """Crop the box of a region.

    Args:
        view: Region. Its box is the box prompt, else the tight box of its mask.
        context: Sides of the crop as multiples of those of the box; the crop is clipped to the image.

    Returns:
        The RGB crop, see `crop_image`.
    """
    x1, y1, x2, y2 = get_box(view)
    x_margin, y_margin = (context - 1) * (x2 - x1) / 2, (context - 1) * (y2 - y1) / 2
    return crop_image(view, (x1 - x_margin, y1 - y_margin, x2 + x_margin, y2 + y_margin))


def get_box(view: RegionView) -> Box:
    """Return the box prompt of a region, else the tight box of its mask."""
    return view.prompt.box or view.tight_box


def draw_box(image: Image.Image, box: Box) -> Image.Image:
    """Return a copy of an image with a red outline around a box x1 y1 x2 y2, drawn outside of its edges."""
    x1, y1, x2, y2 = box_to_pixels(box, image.size)
    line_width = _compute_line_width(image)
    annotated = image.copy()
    outline = (x1 - line_width, y1 - line_width, x2 + line_width - 1, y2 + line_width - 1)
    ImageDraw.Draw(annotated).rectangle(outline, outline=MARK_COLOR, width=line_width)
    return annotated


def draw_outline(view: RegionView) -> Image.Image:
    """Return a copy of the image of a region with a red outline around its mask, or its box if it has no mask."""
    mask = None if view.mask is None else decode_rle(view.mask)
    if mask is None or not mask.any():
        return draw_box(view.image, get_box(view))
    line_width = _compute_line_width(view.image)
    annotated = view.image.copy()
    annotated.paste(MARK_COLOR, mask=Image.fromarray(_dilate_mask(mask, line_width) & ~mask))
    return annotated


def add_alpha(view: RegionView) -> Image.Image:
    """Return the RGBA image of a region, opaque in its mask, or in its box if it has no mask."""
    mask = None if view.mask is None else decode_rle(view.mask)
    if mask is None or not mask.any():
        alpha = Image.new("L", view.image.size)
        alpha.paste(255, box_to_pixels(get_box(view), view.image.size))
    else:
        alpha = Image.fromarray(mask.astype(np.uint8) * 255)
    image = view.image.copy()
    image.putalpha(alpha)
    return image


def resize_for_coordinates(view: RegionView, coordinate_format: CoordinateFormat) -> tuple[Image.Image, str]:
    """Resize the image of a region as a model does, and format the coordinates of its box.

    Args:
        view: Region.
        coordinate_format: Notation of the model.

    Returns:
        The image, resized if coordinates are pixels of the resized image, and the coordinates.

    Raises:
        ValueError: The model does not support the aspect ratio of the image.
    """
    image, (x1, y1, x2, y2) = view.image, get_box(view)
    if coordinate_format.resizing is not None:
        check_aspect_ratio(image)
        height, width = smart_resize(image.height, image.width, *coordinate_format.resizing)
        x_scale, y_scale = width / image.width, height / image.height
        x1, y1, x2, y2 = x1 * x_scale, y1 * y_scale, x2 * x_scale, y2 * y_scale
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    return image, coordinate_format.format_box((x1, y1, x2, y2), image.size)


def limit_size(image: Image.Image, max_side: int) -> Image.Image:
    """Return an image whose longer side is at most `max_side`, scaled down to an aspect ratio that models support."""
    scale = max_side / max(image.size)
    if scale >= 1:
        return image
    min_side = math.ceil(max_side / MAX_ASPECT_RATIO)
    width, height = (max(min_side, round(side * scale)) for side in image.size)
    return image.resize((width, height), Image.Resampling.LANCZOS)


def scale_region(view: RegionView, max_side: int) -> RegionView:
    """Scale a region and its image down, so that the longer side of the image is at most `max_side`."""
    image = limit_size(view.image, max_side)
    if image is view.image:
        return view
    x_scale, y_scale = image.width / view.image.width, image.height / view.image.height
    x1, y1, x2, y2 = get_box(view)
    prompt = Prompt(box=(x1 * x_scale, y1 * y_scale, x2 * x_scale, y2 * y_scale))
    mask = None if view.mask is None else resize_rle(view.mask, *image.size)
    return view._replace(image=image, prompt=prompt, mask=mask)


def _format_florence2_box(box: Box, image_size: tuple[int, int]) -> str:
    """Return Florence-2's location tokens of a box: thousandths of the image sides (arXiv 2311.06242)."""
    return "".join(f"<loc_{part}>" for part in _scale_box(box, image_size, 1000))


def _format_kosmos2_box(box: Box, image_size: tuple[int, int]) -> str:
    """Return Kosmos-2's location tokens: the cells of a 32 x 32 grid that contain the corners (arXiv 2306.14824)."""
    x1, y1, x2, y2 = box_to_pixels(box, image_size)
    width, height = image_size
    first, last = coordinate_to_patch_index((x1 / width, y1 / height, x2 / width, y2 / height), 32)
    return f"<object><patch_index_{first:04d}><patch_index_{last:04d}></object>"


def _format_paligemma_box(box: Box, image_size: tuple[int, int]) -> str:
    """Return PaliGemma's location tokens: y1, x1, y2, x2 from 0 to 1,023 (arXiv 2407.07726)."""
    x1, y1, x2, y2 = _scale_box(box, image_size, 1024)
    return "".join(f"<loc{part:04d}>" for part in (y1, x1, y2, x2))


def _format_qwen2_box(box: Box, image_size: tuple[int, int]) -> str:
    """Return both corners from 0 to 999 between Qwen2-VL's box tokens (arXiv 2409.12191)."""
    x1, y1, x2, y2 = _scale_box(box, image_size, 1000)
    return f"<|box_start|>({x1},{y1}),({x2},{y2})<|box_end|>"


def _format_qwen2_5_box(box: Box, image_size: tuple[int, int]) -> str:
    """Return x1, y1, x2, y2 in pixels, as Qwen2.5-VL (arXiv 2502.13923) writes them."""
    return str([*box_to_pixels(box, image_size)])


def _format_qwen3_box(box: Box, image_size: tuple[int, int]) -> str:
    """Return x1, y1, x2, y2 from 0 to 1,000, as Qwen3-VL (arXiv 2511.21631) writes them."""
    return str(_round_to_thousandths(box, image_size))


def _format_internvl_box(box: Box, image_size: tuple[int, int]) -> str:
    """Return x1, y1, x2, y2 from 0 to 1,000 between InternVL's box tags (arXiv 2404.16821)."""
    return f"<box>[{_round_to_thousandths(box, image_size)}]</box>"


def _format_molmo2_point(box: Box, image_size: tuple[int, int]) -> str:
    """Return the center of a box in thousandths as Molmo 2 (arXiv 2601.10611) writes the first point of an image.

    Molmo 2 has no notation of boxes.
    """
    x1, y1, x2, y2 = box
    center_x, center_y = (x1 + x2) / 2, (y1 + y2) / 2
    x, y, *_ = _round_to_thousandths((center_x, center_y, center_x, center_y), image_size)
    return f'<points coords="1 1 {x:03d} {y:03d}">region</points>'


def _round_to_thousandths(box: Box, image_size: tuple[int, int]) -> list[int]:
    """Return the coordinates of a box from 0 to 1,000."""
    width, height = image_size
    sides = (width, height, width, height)
    return [min(max(round(1000 * value / side), 0), 1000) for value, side in zip(box, sides, strict=True)]


def _scale_box(box: Box, image_size: tuple[int, int], num_bins: int) -> list[int]:
    """Return the bins of the coordinates of a box, from 0 to `num_bins` - 1."""
    width, height = image_size
    sides = (width, height, width, height)
    return [min(max(int(value / side * num_bins), 0), num_bins - 1) for value, side in zip(box, sides, strict=True)]


def _dilate_mask(mask: np.ndarray, distance: int) -> np.ndarray:
    """Return the pixels of a mask and those at most `distance` pixels from them along each axis."""
    for axis in (0, 1):
        padding = [(distance + 1, distance) if each == axis else (0, 0) for each in (0, 1)]
        counts = np.pad(mask.astype(np.int32), padding).cumsum(axis)
        length = mask.shape[axis]
        ends = np.take(counts, range(2 * distance + 1, 2 * distance + 1 + length), axis)
        mask = ends > np.take(counts, range(length), axis)
    return mask


def _compute_line_width(image: Image.Image) -> int:
    return max(2, round(max(image.size) / LINE_WIDTH_DIVISOR))


COORDINATE_FORMATS = {  # by model type of transformers
    "florence2": CoordinateFormat(_format_florence2_box),
    "internvl": CoordinateFormat(
        _format_internvl_box, re.compile(rf"\[\s*{BOX_LIST}(?:\s*,\s*{BOX_LIST})*\s*\]|{BOX_LIST}")
    ),
    "kosmos-2": CoordinateFormat(_format_kosmos2_box),
    "molmo2": CoordinateFormat(
        _format_molmo2_point, re.compile(r"<points\b[^<>]*>region</points>|</?points?\b[^<>]*>")
    ),
    "paligemma": CoordinateFormat(_format_paligemma_box),
    "qwen2_vl": CoordinateFormat(
        _format_qwen2_box, re.compile(r"\(\s*\d+\s*,\s*\d+\s*\)\s*,\s*\(\s*\d+\s*,\s*\d+\s*\)")
    ),
    "qwen2_5_vl": CoordinateFormat(_format_qwen2_5_box, re.compile(BOX_LIST), Resizing()),
    "qwen3_vl": CoordinateFormat(_format_qwen3_box, re.compile(BOX_LIST)),
    "qwen3_vl_moe": CoordinateFormat(_format_qwen3_box, re.compile(BOX_LIST)),
}
