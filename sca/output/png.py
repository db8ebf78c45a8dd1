"""Pictures with masks, boxes, points and captions drawn on them."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from sca_registry.contracts import Caption

from sca.io import masks
from sca.output.colours import INSIDE, OUTSIDE, colour, readable_on
from sca.output.files import FilePerImage
from sca.output.labels import Block, Placement

SIDE = 512  # the longest side of a small picture is brought to this or more, in pixels
LEAST = (320, 96)  # width and height that leave room for words; a smaller picture gets a margin right and below
MARGIN = (128, 128, 128)
OPACITY = 0.3


class Png:
    """One picture an image, in `folder`, as soon as it is done: `STEM.captions.png`, or `STEM-2.captions.png` where the
    stem has been used for another image of the run."""

    def __init__(self, folder: Path, model: str | None = None):
        self._files = FilePerImage(folder, ".captions.png")

    def add(self, path: str, image: Image.Image, captions: Sequence[Caption]) -> None:
        content = io.BytesIO()
        draw(image, captions).save(content, "PNG", compress_level=4)
        self._files.write(path, content.getvalue())

    def close(self, finished: bool = True) -> None:
        """Every picture is complete already."""
        self._files.close()


def draw(image: Image.Image, captions: Sequence[Caption]) -> Image.Image:
    """The picture with its captions, RGB. Small pictures are enlarged by a whole factor, so that words can be read."""
    factor = max(1, math.ceil(SIDE / max(image.size)))
    large = image.convert("RGB").resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    canvas = large
    if large.width < LEAST[0] or large.height < LEAST[1]:
        canvas = Image.new("RGB", (max(large.width, LEAST[0]), max(large.height, LEAST[1])), MARGIN)
        canvas.paste(large)
    unit = min(max(large.size), 4 * min(canvas.size))  # what words and lines are measured by
    font_size = min(max(14, round(unit / 45)), 64)
    line = max(2, round(unit / 400))

    by_size = sorted(range(len(captions)), key=lambda place: -_area(captions[place]))
    for number in by_size:
        if mask := captions[number].mask:
            _tint(canvas, masks.decode(mask), factor, colour(number), line)
    pen = ImageDraw.Draw(canvas)
    for number in by_size:
        if (box := captions[number].box) is not None:
            x1, y1, x2, y2 = _scaled(box, factor, canvas.size)
            pen.rectangle((x1, y1, max(x1, x2 - 1), max(y1, y2 - 1)), outline=colour(number), width=line)
    _write(canvas, pen, captions, factor, font_size, line)
    return canvas


def _tint(canvas: Image.Image, mask: np.ndarray, factor: int, tint: tuple[int, int, int], line: int) -> None:
    """Lays a colour over the mask, (height, width) of the small picture, and a line along its inner edge."""
    box = masks.box_of(mask)
    if box is None:
        return
    x1, y1, x2, y2 = (int(value) for value in box)
    inside = np.pad(mask[y1:y2, x1:x2].repeat(factor, 0).repeat(factor, 1), line)
    core = inside
    for _ in range(line):
        core = core[1:-1, 1:-1] & core[:-2, 1:-1] & core[2:, 1:-1] & core[1:-1, :-2] & core[1:-1, 2:]
    inside = inside[line:-line, line:-line]
    weight = np.where(core, OPACITY, inside.astype(np.float32))[..., None]
    area = (x1 * factor, y1 * factor, x2 * factor, y2 * factor)
    under = np.asarray(canvas.crop(area), np.float32)
    over = under + (np.array(tint, np.float32) - under) * weight
    canvas.paste(Image.fromarray(np.rint(over).astype(np.uint8)), area[:2])


def _dot(pen: ImageDraw.ImageDraw, x: float, y: float, radius: float, fill: tuple[int, int, int]) -> None:
    pen.circle((x, y), radius * 1.5, fill="white")
    pen.circle((x, y), radius, fill=fill)


def _write(
    canvas: Image.Image, pen: ImageDraw.ImageDraw, captions: Sequence[Caption], factor: int, font_size: int, line: int
) -> None:
    """Points and captions, the smallest region's placed first; a line leads from a label to a region elsewhere."""
    width = min(canvas.width, max(LEAST[0], round(canvas.width * 0.4)))
    taken = [_around(point, factor, 4 * line) for caption in captions for point in caption.prompt.points]
    shown = [_where(caption, factor, 4 * line, canvas.size) for caption in captions]
    placement = Placement(canvas.size, taken, shown)
    labels = []
    for number in sorted(range(len(captions)), key=lambda place: _area(captions[place])):
        block = Block(captions[number].text, font_size, width)
        spot = placement.place(block.size, shown[number])
        labels.append((number, block, shown[number], spot))
    for number, _, near, spot in labels:
        if spot[0] > near[2] or spot[2] < near[0] or spot[1] > near[3] or spot[3] < near[1]:
            ends = [((a[0] + a[2]) / 2, (a[1] + a[3]) / 2) for a in (near, spot)]
            pen.line(ends, fill=colour(number), width=line)
    for caption in captions:
        for x, y, label in caption.prompt.points:
            _dot(pen, (x + 0.5) * factor, (y + 0.5) * factor, 2.5 * line, INSIDE if label else OUTSIDE)
    for number, block, _, spot in labels:
        block.draw(pen, spot[0], spot[1], readable_on(colour(number)), colour(number))


def _where(caption: Caption, factor: int, reach: int, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """The rectangle of the canvas that a caption speaks of."""
    if caption.box is not None:
        return _scaled(caption.box, factor, size)
    if caption.prompt.points:
        return _around(caption.prompt.points[0], factor, reach)
    return 0, 0, 0, 0


def _around(point: tuple[float, float, int], factor: int, reach: int) -> tuple[int, int, int, int]:
    x, y = round((point[0] + 0.5) * factor), round((point[1] + 0.5) * factor)
    return x - reach, y - reach, x + reach, y + reach


def _scaled(box: Sequence[float], factor: int, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """A box of the small picture on the canvas, in whole pixels, clipped."""
    x1, y1, x2, y2 = (round(value * factor) for value in box)
    clip = (lambda x: min(max(x, 0), size[0])), (lambda y: min(max(y, 0), size[1]))
    return clip[0](x1), clip[1](y1), clip[0](x2), clip[1](y2)


def _area(caption: Caption) -> float:
    if caption.mask:
        return masks.area(caption.mask)
    x1, y1, x2, y2 = caption.box or (0, 0, 0, 0)
    return (x2 - x1) * (y2 - y1)
