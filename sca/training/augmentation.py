"""Photographs changed at random together with their boxes, masks and words."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageEnhance
from sca_registry.contracts import Region, Sample

from sca.io.masks import area, box_of, decode, encode

SIDE = re.compile(r"\b(left|right)(?=(?:most|wards?|hand|handed|side)?\b)", re.IGNORECASE)
PADDING = (124, 116, 104)  # the mean of ImageNet, about zero for most encoders
OTHER = {"left": "right", "right": "left"}


@dataclass(frozen=True)
class Augmentation:
    """flip: how often left and right are exchanged. sides: "swap" exchanges them in the words too, "drop" leaves out
    the regions of a flipped picture whose words or attributes name one. crop: least share of each side that a random
    crop keeps. scale: least and greatest factor of large-scale jitter (arXiv 2012.07177), after which the picture is a
    square of its longer side: cut at random where it has grown, padded at the right and below where it has shrunk.
    colour: how far brightness, contrast and saturation stray from 1. keep: a region that lost more than `1 - keep` of
    its area is dropped.
    """

    flip: float = 0.5
    sides: str = "swap"
    crop: float = 1.0
    scale: Sequence[float] = ()
    colour: float = 0.0
    keep: float = 0.4

    def __call__(self, sample: Sample, draw: np.random.Generator) -> Sample:
        image, regions = sample.image, list(sample.regions)
        whole = {region.id: _area(region) for region in regions}
        if self.crop < 1:
            image, regions = self._cropped(image, regions, whole, draw)
        if draw.random() < self.flip:
            if self.sides == "drop":
                regions = [region for region in regions if not names_side(region)]
            image, regions = flipped(image, regions)
        if self.colour:
            for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
                image = enhance(image).enhance(draw.uniform(1 - self.colour, 1 + self.colour))
        if self.scale:
            image, regions = self._jittered(image, regions, whole, draw)
        return Sample(image, sample.image_id, tuple(regions))

    def _cropped(
        self, image: Image.Image, regions: list[Region], whole: dict[int, float], draw: np.random.Generator
    ) -> tuple[Image.Image, list[Region]]:
        share = draw.uniform(self.crop, 1)
        width, height = max(1, round(image.width * share)), max(1, round(image.height * share))
        left, top = int(draw.integers(image.width - width + 1)), int(draw.integers(image.height - height + 1))
        window = (left, top, left + width, top + height)
        found = [cropped(region, window, whole[region.id], self.keep) for region in regions]
        return image.crop(window), [region for region in found if region is not None]

    def _jittered(
        self, image: Image.Image, regions: list[Region], whole: dict[int, float], draw: np.random.Generator
    ) -> tuple[Image.Image, list[Region]]:
        side, factor = max(image.size), draw.uniform(*self.scale)
        width, height = (min(length, max(1, round(side / factor))) for length in image.size)  # of what is seen
        left, top = int(draw.integers(image.width - width + 1)), int(draw.integers(image.height - height + 1))
        window = (left, top, left + width, top + height)
        size = (min(side, max(1, round(width * factor))), min(side, max(1, round(height * factor))))
        square = Image.new("RGB", (side, side), PADDING)
        square.paste(image.crop(window).resize(size, Image.Resampling.BILINEAR))
        seen = [cropped(region, window, whole[region.id], self.keep) for region in regions]
        found = [scaled(region, (width, height), size, (side, side)) for region in seen if region is not None]
        return square, [region for region in found if region is not None]


def flipped(image: Image.Image, regions: list[Region]) -> tuple[Image.Image, list[Region]]:
    """Mirrored left to right; "left" and "right" change places in the phrases and in attributes that are text."""

    def mirrored(region: Region) -> Region:
        x1, y1, x2, y2 = region.box
        return replace(
            region,
            box=(image.width - x2, y1, image.width - x1, y2),
            mask=None if region.mask is None else encode(decode(region.mask)[:, ::-1]),
            phrases=tuple(map(_swapped, region.phrases)),
            attributes={k: _swapped(v) if isinstance(v, str) else v for k, v in region.attributes.items()},
        )

    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), [mirrored(region) for region in regions]


def names_side(region: Region) -> bool:
    """Whether its words, or attributes that are text, say left or right."""
    told = (*region.phrases, *(value for value in region.attributes.values() if isinstance(value, str)))
    return any(SIDE.search(text) for text in told)


def _swapped(text: str) -> str:
    def other(found: re.Match[str]) -> str:
        word, side = found[0], OTHER[found[0].lower()]
        return side.upper() if word.isupper() else side.capitalize() if word[0].isupper() else side

    return SIDE.sub(other, text)


def _area(region: Region) -> float:
    """Of its mask, or else of its box, in pixels."""
    x1, y1, x2, y2 = region.box
    return (x2 - x1) * (y2 - y1) if region.mask is None else area(region.mask)


def cropped(region: Region, window: tuple[int, int, int, int], whole: float, keep: float) -> Region | None:
    """The region as seen through a window x1 y1 x2 y2, or None if less than `keep` of its `whole` area is left."""
    left, top, right, bottom = window
    x1, y1, x2, y2 = region.box
    box = (max(x1, left) - left, max(y1, top) - top, min(x2, right) - left, min(y2, bottom) - top)
    if box[2] <= box[0] or box[3] <= box[1]:
        return None
    if region.mask is None:
        left_over = (box[2] - box[0]) * (box[3] - box[1]) / whole
        return replace(region, box=box) if left_over >= keep else None
    mask = decode(region.mask)[top:bottom, left:right]
    if mask.sum() < keep * whole or not mask.any():
        return None
    code = encode(mask)
    return replace(region, box=box_of(code), mask=code)


def scaled(region: Region, size: tuple[int, int], new: tuple[int, int], frame: tuple[int, int]) -> Region | None:
    """The region of a picture of `size` (width, height) that is resized to `new` and lies in the corner of a `frame`;
    None if its mask is left without a pixel.
    """
    x1, y1, x2, y2 = region.box
    across, down = new[0] / size[0], new[1] / size[1]
    if region.mask is None:
        return replace(region, box=(x1 * across, y1 * down, x2 * across, y2 * down))
    picture = Image.fromarray(decode(region.mask).astype(np.uint8) * 255)
    mask = np.zeros((frame[1], frame[0]), dtype=bool)
    mask[: new[1], : new[0]] = np.asarray(picture.resize(new, Image.Resampling.BILINEAR)) > 127
    if not mask.any():
        return None
    code = encode(mask)
    return replace(region, box=box_of(code), mask=code)
