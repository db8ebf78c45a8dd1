"""Draw masks, boxes, points and captions on images."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import numpy as np
from PIL import Image, ImageDraw
from sca_registry.contracts import Caption

from sca.io import masks
from sca.output.captioned_image import ImageOrSize
from sca.output.colors import BACKGROUND_COLOR, FOREGROUND_COLOR, choose_text_color, get_region_color
from sca.output.image_files import FilePerImage
from sca.output.label_layout import LabelBlock, LabelPlacer

MIN_ENLARGED_SIDE = 512  # minimum longest side in pixels to which small images are enlarged
# Width and height that leave room for text. A smaller image is padded right and below.
MIN_CANVAS_SIZE = (320, 96)
MARGIN_COLOR = (128, 128, 128)
MASK_OPACITY = 0.3


class PngWriter:
    """Writer of one drawn image per image in `folder`, written immediately: `STEM.captions.png`.

    If another image of the run has the same stem, the name is `STEM-2.captions.png`.
    """

    def __init__(self, folder: Path, model: str | None = None):
        self._files = FilePerImage(folder, ".captions.png")

    def add(self, path: str, image: ImageOrSize, captions: Sequence[Caption]) -> None:
        content = io.BytesIO()
        draw_captions(cast("Image.Image", image), captions).save(content, "PNG", compress_level=4)
        self._files.write(path, content.getvalue())

    def close(self, finished: bool = True) -> None:
        """Sync the file names; every file is complete already."""
        self._files.close()


def draw_captions(image: Image.Image, captions: Sequence[Caption]) -> Image.Image:
    """Draw captions on an image. Small images are enlarged by an integer factor, so that text is legible."""
    scale = max(1, math.ceil(MIN_ENLARGED_SIDE / max(image.size)))
    enlarged = image.convert("RGB").resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
    canvas = enlarged
    if enlarged.width < MIN_CANVAS_SIZE[0] or enlarged.height < MIN_CANVAS_SIZE[1]:
        canvas = Image.new(
            "RGB", (max(enlarged.width, MIN_CANVAS_SIZE[0]), max(enlarged.height, MIN_CANVAS_SIZE[1])), MARGIN_COLOR
        )
        canvas.paste(enlarged)
    reference_size = min(max(enlarged.size), 4 * min(canvas.size))  # reference for text size and line width
    font_size = min(max(14, round(reference_size / 45)), 64)
    line_width = max(2, round(reference_size / 400))

    draw_order = sorted(range(len(captions)), key=lambda caption_index: -_compute_caption_area(captions[caption_index]))
    for index in draw_order:
        if mask := captions[index].mask:
            _draw_mask(canvas, masks.decode_rle(mask), scale, get_region_color(index), line_width)
    pen = ImageDraw.Draw(canvas)
    for index in draw_order:
        if (box := captions[index].box) is not None:
            x1, y1, x2, y2 = _scale_box(box, scale, canvas.size)
            pen.rectangle((x1, y1, max(x1, x2 - 1), max(y1, y2 - 1)), outline=get_region_color(index), width=line_width)
    _draw_labels(canvas, pen, captions, scale, font_size, line_width)
    return canvas


def _draw_mask(canvas: Image.Image, mask: np.ndarray, scale: int, color: tuple[int, int, int], line_width: int) -> None:
    """Blend a color over a mask (height, width) of the original image, and draw its inner edge."""
    box = masks.mask_to_box(mask)
    if box is None:
        return
    x1, y1, x2, y2 = (int(value) for value in box)
    mask_pixels = np.pad(mask[y1:y2, x1:x2].repeat(scale, 0).repeat(scale, 1), line_width)
    interior = mask_pixels
    for _ in range(line_width):
        interior = (
            interior[1:-1, 1:-1] & interior[:-2, 1:-1] & interior[2:, 1:-1] & interior[1:-1, :-2] & interior[1:-1, 2:]
        )
    mask_pixels = mask_pixels[line_width:-line_width, line_width:-line_width]
    opacity = np.where(interior, MASK_OPACITY, mask_pixels.astype(np.float32))[..., None]
    canvas_box = (x1 * scale, y1 * scale, x2 * scale, y2 * scale)
    background = np.asarray(canvas.crop(canvas_box), np.float32)
    blended = background + (np.array(color, np.float32) - background) * opacity
    canvas.paste(Image.fromarray(np.rint(blended).astype(np.uint8)), canvas_box[:2])


def _draw_point(pen: ImageDraw.ImageDraw, x: float, y: float, radius: float, fill: tuple[int, int, int]) -> None:
    pen.circle((x, y), radius * 1.5, fill="white")
    pen.circle((x, y), radius, fill=fill)


def _draw_labels(
    canvas: Image.Image,
    pen: ImageDraw.ImageDraw,
    captions: Sequence[Caption],
    scale: int,
    font_size: int,
    line_width: int,
) -> None:
    """Draw points and captions, smallest region first; a line connects a distant label with its region."""
    max_label_width = min(canvas.width, max(MIN_CANVAS_SIZE[0], round(canvas.width * 0.4)))
    point_boxes = [
        _get_box_around_point(point, scale, 4 * line_width) for caption in captions for point in caption.prompt.points
    ]
    region_boxes = [_get_region_box(caption, scale, 4 * line_width, canvas.size) for caption in captions]
    placer = LabelPlacer(canvas.size, point_boxes, region_boxes)
    labels = []
    for index in sorted(range(len(captions)), key=lambda caption_index: _compute_caption_area(captions[caption_index])):
        block = LabelBlock(captions[index].text, font_size, max_label_width)
        label_box = placer.place_label(block.size, region_boxes[index])
        labels.append((index, block, region_boxes[index], label_box))
    for index, _, region_box, label_box in labels:
        if (
            label_box[0] > region_box[2]
            or label_box[2] < region_box[0]
            or label_box[1] > region_box[3]
            or label_box[3] < region_box[1]
        ):
            ends = [((a[0] + a[2]) / 2, (a[1] + a[3]) / 2) for a in (region_box, label_box)]
            pen.line(ends, fill=get_region_color(index), width=line_width)
    for caption in captions:
        for x, y, label in caption.prompt.points:
            _draw_point(
                pen,
                (x + 0.5) * scale,
                (y + 0.5) * scale,
                2.5 * line_width,
                FOREGROUND_COLOR if label else BACKGROUND_COLOR,
            )
    for index, block, _, label_box in labels:
        block.draw(pen, label_box[0], label_box[1], choose_text_color(get_region_color(index)), get_region_color(index))


def _get_region_box(
    caption: Caption, scale: int, radius: int, canvas_size: tuple[int, int]
) -> tuple[int, int, int, int]:
    """Return the rectangle of a caption's region on the canvas: the whole canvas for one without coordinates."""
    if caption.box is not None:
        return _scale_box(caption.box, scale, canvas_size)
    if caption.prompt.points:
        return _get_box_around_point(caption.prompt.points[0], scale, radius)
    return 0, 0, *canvas_size


def _get_box_around_point(point: tuple[float, float, int], scale: int, radius: int) -> tuple[int, int, int, int]:
    x, y = round((point[0] + 0.5) * scale), round((point[1] + 0.5) * scale)
    return x - radius, y - radius, x + radius, y + radius


def _scale_box(box: Sequence[float], scale: int, canvas_size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Scale a box of the original image to the canvas, in integer pixels, clipped."""
    x1, y1, x2, y2 = (round(value * scale) for value in box)
    clip = (lambda x: min(max(x, 0), canvas_size[0])), (lambda y: min(max(y, 0), canvas_size[1]))
    return clip[0](x1), clip[1](y1), clip[0](x2), clip[1](y2)


def _compute_caption_area(caption: Caption) -> float:
    if caption.mask:
        return masks.compute_mask_area(caption.mask)
    x1, y1, x2, y2 = caption.box or (0, 0, 0, 0)
    return (x2 - x1) * (y2 - y1)
