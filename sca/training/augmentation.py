"""Photographs changed at random together with their boxes, masks and words."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageEnhance
from sca_registry.contracts import Region, Sample

from sca.masks import area, box_of, decode, encode

SWAPPED = {"left": "right", "right": "left", "Left": "Right", "Right": "Left"}


@dataclass(frozen=True)
class Augmentation:
    """flip: how often left and right are exchanged, in the words too. crop: least share of each side that a random crop
    keeps. colour: how far brightness, contrast and saturation stray from 1. keep: a region that lost more than
    `1 - keep` of its area to the crop is dropped.
    """

    flip: float = 0.5
    crop: float = 1.0
    colour: float = 0.0
    keep: float = 0.4

    def __call__(self, sample: Sample, draw: np.random.Generator) -> Sample:
        image, regions = sample.image, list(sample.regions)
        if self.crop < 1:
            image, regions = self._cropped(image, regions, draw)
        if draw.random() < self.flip:
            image, regions = flipped(image, regions)
        if self.colour:
            for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
                image = enhance(image).enhance(draw.uniform(1 - self.colour, 1 + self.colour))
        return Sample(image, sample.image_id, tuple(regions))

    def _cropped(
        self, image: Image.Image, regions: list[Region], draw: np.random.Generator
    ) -> tuple[Image.Image, list[Region]]:
        share = draw.uniform(self.crop, 1)
        width, height = max(1, round(image.width * share)), max(1, round(image.height * share))
        left, top = int(draw.integers(image.width - width + 1)), int(draw.integers(image.height - height + 1))
        window = (left, top, left + width, top + height)
        found = [cropped(region, window, self.keep) for region in regions]
        return image.crop(window), [region for region in found if region is not None]


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


def _swapped(text: str) -> str:
    return re.sub(r"\b([Ll]eft|[Rr]ight)\b", lambda found: SWAPPED[found[0]], text)


def cropped(region: Region, window: tuple[int, int, int, int], keep: float) -> Region | None:
    """The region as seen through a window x1 y1 x2 y2, or None if less than `keep` of it is left."""
    left, top, right, bottom = window
    x1, y1, x2, y2 = region.box
    box = (max(x1, left) - left, max(y1, top) - top, min(x2, right) - left, min(y2, bottom) - top)
    if box[2] <= box[0] or box[3] <= box[1]:
        return None
    if region.mask is None:
        left_over = (box[2] - box[0]) * (box[3] - box[1]) / ((x2 - x1) * (y2 - y1))
        return replace(region, box=box) if left_over >= keep else None
    mask = decode(region.mask)[top:bottom, left:right]
    if mask.sum() < keep * area(region.mask) or not mask.any():
        return None
    code = encode(mask)
    return replace(region, box=box_of(code), mask=code)
