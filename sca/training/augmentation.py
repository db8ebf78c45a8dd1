"""Photographs changed at random together with their boxes, masks and words."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageEnhance
from sca_registry.contracts import Region, Sample

from sca.io.masks import compute_mask_area, decode_rle, encode_rle, mask_to_box

SIDE_PATTERN = re.compile(r"\b(left|right)(?=(?:most|wards?|hand|handed|side)?\b)", re.IGNORECASE)
PADDING_COLOR = (124, 116, 104)  # the mean of ImageNet, about zero for most encoders
OPPOSITE_SIDE = {"left": "right", "right": "left"}


@dataclass(frozen=True)
class Augmentation:
    """flip: how often left and right are exchanged. sides: "swap" exchanges them in the words too, "drop" leaves out
    the regions of a flipped picture whose words or attributes name one. crop: least share of each side that a random
    crop keeps. scale: least and greatest factor of large-scale jitter (arXiv 2012.07177), after which the picture is a
    square of its longer side: cut at random where it has grown, padded at the right and below where it has shrunk.
    color: how far brightness, contrast and saturation stray from 1. keep: a region that lost more than `1 - keep` of
    its area is dropped.
    """

    flip: float = 0.5
    sides: str = "swap"
    crop: float = 1.0
    scale: Sequence[float] = ()
    color: float = 0.0
    keep: float = 0.4

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        image, regions = sample.image, list(sample.regions)
        original_areas = {region.id: _compute_area(region) for region in regions}
        if self.crop < 1:
            image, regions = self._crop_randomly(image, regions, original_areas, rng)
        if rng.random() < self.flip:
            if self.sides == "drop":
                regions = [region for region in regions if not has_side_word(region)]
            image, regions = flip_horizontally(image, regions)
        if self.color:
            for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
                image = enhance(image).enhance(rng.uniform(1 - self.color, 1 + self.color))
        if self.scale:
            image, regions = self._jitter_scale(image, regions, original_areas, rng)
        return Sample(image, sample.image_id, tuple(regions))

    def _crop_randomly(
        self, image: Image.Image, regions: list[Region], original_areas: dict[int, float], rng: np.random.Generator
    ) -> tuple[Image.Image, list[Region]]:
        fraction = rng.uniform(self.crop, 1)
        width, height = max(1, round(image.width * fraction)), max(1, round(image.height * fraction))
        left, top = int(rng.integers(image.width - width + 1)), int(rng.integers(image.height - height + 1))
        window = (left, top, left + width, top + height)
        cropped_regions = [crop_region(region, window, original_areas[region.id], self.keep) for region in regions]
        return image.crop(window), [region for region in cropped_regions if region is not None]

    def _jitter_scale(
        self, image: Image.Image, regions: list[Region], original_areas: dict[int, float], rng: np.random.Generator
    ) -> tuple[Image.Image, list[Region]]:
        side, factor = max(image.size), rng.uniform(*self.scale)
        width, height = (min(length, max(1, round(side / factor))) for length in image.size)  # of what is seen
        left, top = int(rng.integers(image.width - width + 1)), int(rng.integers(image.height - height + 1))
        window = (left, top, left + width, top + height)
        size = (min(side, max(1, round(width * factor))), min(side, max(1, round(height * factor))))
        canvas = Image.new("RGB", (side, side), PADDING_COLOR)
        canvas.paste(image.crop(window).resize(size, Image.Resampling.BILINEAR))
        cropped_regions = [crop_region(region, window, original_areas[region.id], self.keep) for region in regions]
        resized_regions = [
            resize_region(region, (width, height), size, (side, side))
            for region in cropped_regions
            if region is not None
        ]
        return canvas, [region for region in resized_regions if region is not None]


def flip_horizontally(image: Image.Image, regions: list[Region]) -> tuple[Image.Image, list[Region]]:
    """Mirrored left to right; "left" and "right" change places in the phrases and in attributes that are text."""

    def flip_region(region: Region) -> Region:
        x1, y1, x2, y2 = region.box
        return replace(
            region,
            box=(image.width - x2, y1, image.width - x1, y2),
            mask=None if region.mask is None else encode_rle(decode_rle(region.mask)[:, ::-1]),
            phrases=tuple(map(_swap_sides, region.phrases)),
            attributes={k: _swap_sides(v) if isinstance(v, str) else v for k, v in region.attributes.items()},
        )

    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), [flip_region(region) for region in regions]


def has_side_word(region: Region) -> bool:
    """Whether its words, or attributes that are text, say left or right."""
    texts = (*region.phrases, *(value for value in region.attributes.values() if isinstance(value, str)))
    return any(SIDE_PATTERN.search(text) for text in texts)


def _swap_sides(text: str) -> str:
    def swap_side(match: re.Match[str]) -> str:
        word, side = match[0], OPPOSITE_SIDE[match[0].lower()]
        return side.upper() if word.isupper() else side.capitalize() if word[0].isupper() else side

    return SIDE_PATTERN.sub(swap_side, text)


def _compute_area(region: Region) -> float:
    """Of its mask, or else of its box, in pixels."""
    x1, y1, x2, y2 = region.box
    return (x2 - x1) * (y2 - y1) if region.mask is None else compute_mask_area(region.mask)


def crop_region(
    region: Region, window: tuple[int, int, int, int], original_area: float, min_area_fraction: float
) -> Region | None:
    """The region as seen through a window x1 y1 x2 y2, or None if less than `min_area_fraction` of
    its `original_area` is left."""
    left, top, right, bottom = window
    x1, y1, x2, y2 = region.box
    box = (max(x1, left) - left, max(y1, top) - top, min(x2, right) - left, min(y2, bottom) - top)
    if box[2] <= box[0] or box[3] <= box[1]:
        return None
    if region.mask is None:
        remaining_fraction = (box[2] - box[0]) * (box[3] - box[1]) / original_area
        return replace(region, box=box) if remaining_fraction >= min_area_fraction else None
    mask = decode_rle(region.mask)[top:bottom, left:right]
    if mask.sum() < min_area_fraction * original_area or not mask.any():
        return None
    rle = encode_rle(mask)
    return replace(region, box=mask_to_box(rle), mask=rle)


def resize_region(
    region: Region, size: tuple[int, int], new_size: tuple[int, int], frame_size: tuple[int, int]
) -> Region | None:
    """The region of a picture of `size` (width, height) that is resized to `new_size` and placed in the corner of
    `frame_size`; None if its mask is left without a pixel.
    """
    x1, y1, x2, y2 = region.box
    scale_x, scale_y = new_size[0] / size[0], new_size[1] / size[1]
    if region.mask is None:
        return replace(region, box=(x1 * scale_x, y1 * scale_y, x2 * scale_x, y2 * scale_y))
    mask_image = Image.fromarray(decode_rle(region.mask).astype(np.uint8) * 255)
    mask = np.zeros((frame_size[1], frame_size[0]), dtype=bool)
    mask[: new_size[1], : new_size[0]] = np.asarray(mask_image.resize(new_size, Image.Resampling.BILINEAR)) > 127
    if not mask.any():
        return None
    rle = encode_rle(mask)
    return replace(region, box=mask_to_box(rle), mask=rle)
