"""Ways to show a region to a vision-language model: crops, drawings, coordinates and alpha channels."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw
from sca_registry.contracts import Prompt
from transformers.models.kosmos2.processing_kosmos2 import coordinate_to_patch_index
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from sca.captioners.region_captioner import RegionView, box_to_pixels, crop_image
from sca.io.coordinates import Box
from sca.io.masks import decode_rle, resize_rle

MARK_COLOR = (255, 0, 0)
LINE_WIDTH_DIVISOR = 150  # line width of a drawn region: the image's longer side divided by this
QUESTIONS = {  # by region format: for recognition, and for a caption; "{region}" is replaced by the coordinates
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


class CoordinateFormat(NamedTuple):
    """Notation of boxes that a family of models was trained on.

    Attributes:
        format_box: Function of a box in pixels of an image, and of the size of that image.
        resize_factor: Multiple of the sides of images, if the coordinates are pixels of a resized image.
    """

    format_box: Callable[[Box, tuple[int, int]], str]
    resize_factor: int | None = None


def crop_region(view: RegionView, context: float = 1.0) -> Image.Image:
    """Crop the box of a region.

    Args:
        view: Region. Its box is the box prompt, else the tight box of its mask.
        context: Sides of the crop as multiples of those of the box; the crop is clipped to the image.

    Returns:
        The RGB crop.
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
    """
    image, (x1, y1, x2, y2) = view.image, get_box(view)
    if coordinate_format.resize_factor is not None:
        height, width = smart_resize(image.height, image.width, coordinate_format.resize_factor)
        x_scale, y_scale = width / image.width, height / image.height
        x1, y1, x2, y2 = x1 * x_scale, y1 * y_scale, x2 * x_scale, y2 * y_scale
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    return image, coordinate_format.format_box((x1, y1, x2, y2), image.size)


def limit_size(image: Image.Image, max_side: int) -> Image.Image:
    """Return an image whose longer side is at most `max_side`, scaled down if necessary."""
    scale = max_side / max(image.size)
    if scale >= 1:
        return image
    width, height = (max(1, round(side * scale)) for side in image.size)
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


def format_florence2_box(box: Box, image_size: tuple[int, int]) -> str:
    """Return Florence-2's location tokens of a box: thousandths of the image sides (arXiv 2311.06242)."""
    return "".join(f"<loc_{part}>" for part in _scale_box(box, image_size, 1000))


def format_kosmos2_box(box: Box, image_size: tuple[int, int]) -> str:
    """Return Kosmos-2's location tokens: the cells of a 32 x 32 grid that contain the corners (arXiv 2306.14824)."""
    x1, y1, x2, y2 = box_to_pixels(box, image_size)
    width, height = image_size
    first, last = coordinate_to_patch_index((x1 / width, y1 / height, x2 / width, y2 / height), 32)
    return f"<object><patch_index_{first:04d}><patch_index_{last:04d}></object>"


def _format_paligemma_box(box: Box, image_size: tuple[int, int]) -> str:
    """Return PaliGemma's location tokens: y1, x1, y2, x2 from 0 to 1,023 (arXiv 2407.07726)."""
    x1, y1, x2, y2 = _scale_box(box, image_size, 1024)
    return "".join(f"<loc{part:04d}>" for part in (y1, x1, y2, x2))


def _format_qwen3_box(box: Box, image_size: tuple[int, int]) -> str:
    """Return x1, y1, x2, y2 from 0 to 1,000, as Qwen3-VL (arXiv 2511.21631) writes them."""
    width, height = image_size
    sides = (width, height, width, height)
    return str([min(max(round(1000 * value / side), 0), 1000) for value, side in zip(box, sides, strict=True)])


def _format_pixels(box: Box, image_size: tuple[int, int]) -> str:
    """Return x1, y1, x2, y2 in pixels, as Qwen2.5-VL (arXiv 2502.13923) writes them."""
    return str([*box_to_pixels(box, image_size)])


def _format_server_box(box: Box, image_size: tuple[int, int]) -> str:
    """Return the box as the chat route of `sca serve` reads it."""
    return f"box={','.join(f'{value:g}' for value in box)}"


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


COORDINATE_FORMATS = {
    "qwen2.5-vl": CoordinateFormat(_format_pixels, resize_factor=28),
    "qwen3-vl": CoordinateFormat(_format_qwen3_box),
    "paligemma": CoordinateFormat(_format_paligemma_box),
    "kosmos-2": CoordinateFormat(format_kosmos2_box),
    "florence-2": CoordinateFormat(format_florence2_box),
    "sca": CoordinateFormat(_format_server_box),
}
