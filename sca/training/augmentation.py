"""Random augmentation of images with their boxes, masks and phrases."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageEnhance
from sca_registry.contracts import Region, Sample

from sca.io.masks import compute_mask_area, decode_rle, encode_rle, mask_to_box

Box = tuple[float, float, float, float]  # x1 y1 x2 y2
SIDE_PATTERN = re.compile(r"\b(left|right)(?=(?:most|wards?|hand|handed|side)?\b)", re.IGNORECASE)
PADDING_COLOR = (124, 116, 104)  # ImageNet mean, close to zero after normalization
OPPOSITE_SIDE = {"left": "right", "right": "left"}


@dataclass(frozen=True)
class Augmentation:
    """Random augmentation of samples.

    Args:
        flip_prob: Probability of a horizontal flip.
        side_words: "swap" exchanges "left" and "right" in the phrases and text attributes of a flipped image; "drop"
            removes the regions of a flipped image that mention either.
        min_crop_fraction: Minimum fraction of each side that a random crop keeps; 1 for no crop.
        scale_range: Minimum and maximum factor of large-scale jitter (arXiv 2012.07177); empty for none. The result is
            a square with the longer side of the image: randomly cropped if enlarged, padded at the right and bottom if
            reduced.
        color_jitter: Maximum deviation of the brightness, contrast and saturation factors from 1.
        min_visibility: Minimum fraction of a region's area that must remain; other regions are dropped.
    """

    flip_prob: float = 0.5
    side_words: str = "swap"
    min_crop_fraction: float = 1.0
    scale_range: Sequence[float] = ()
    color_jitter: float = 0.0
    min_visibility: float = 0.4

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        """Return a randomly augmented copy of a sample."""
        return self.augment_with_box(sample, rng)[0]

    def augment_with_box(self, sample: Sample, rng: np.random.Generator) -> tuple[Sample, Box]:
        """Augment a sample, and track the box of its image.

        Args:
            sample: Sample.
            rng: Generator of all random draws.

        Returns:
            A randomly augmented copy, and the box x1 y1 x2 y2 of the whole original image in pixels of its image; the
            box is larger than a crop.
        """
        image, regions, questions = sample.image, list(sample.regions), list(sample.questions)
        whole_image: Box = (0.0, 0.0, float(image.width), float(image.height))
        original_areas = {region.id: _compute_area(region) for region in regions}
        if self.min_crop_fraction < 1:
            image, regions, whole_image = self._crop_randomly(image, regions, original_areas, rng)
        if rng.random() < self.flip_prob:
            if self.side_words == "drop":
                questions = [each for each in questions if not SIDE_PATTERN.search(f"{each.text} {each.answer}")]
                regions = [region for region in regions if not has_side_word(region)]
            image, regions = flip_horizontally(image, regions)
            questions = [
                replace(each, text=_swap_sides(each.text), answer=_swap_sides(each.answer)) for each in questions
            ]
            whole_image = _flip_box(whole_image, image.width)
        if self.color_jitter:
            for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
                image = enhance(image).enhance(rng.uniform(1 - self.color_jitter, 1 + self.color_jitter))
        if self.scale_range:
            image, regions, whole_image = self._jitter_scale(image, regions, whole_image, original_areas, rng)
        remaining_ids = {region.id for region in regions}
        has_all_regions = len(regions) == len(sample.regions)
        questions = [
            each
            for each in questions
            if remaining_ids.issuperset(each.region_ids) and (has_all_regions or not each.is_about_image)
        ]
        return Sample(image, sample.image_id, tuple(regions), tuple(questions)), whole_image

    def _crop_randomly(
        self, image: Image.Image, regions: list[Region], original_areas: dict[int, float], rng: np.random.Generator
    ) -> tuple[Image.Image, list[Region], Box]:
        """Return a crop, its regions, and the box of the image in pixels of the crop."""
        fraction = rng.uniform(self.min_crop_fraction, 1)
        width, height = max(1, round(image.width * fraction)), max(1, round(image.height * fraction))
        left, top = int(rng.integers(image.width - width + 1)), int(rng.integers(image.height - height + 1))
        window = (left, top, left + width, top + height)
        cropped_regions = [
            crop_region(region, window, original_areas[region.id], self.min_visibility) for region in regions
        ]
        whole_image = (-left, -top, image.width - left, image.height - top)
        return image.crop(window), [region for region in cropped_regions if region is not None], whole_image

    def _jitter_scale(
        self,
        image: Image.Image,
        regions: list[Region],
        whole_image: Box,
        original_areas: dict[int, float],
        rng: np.random.Generator,
    ) -> tuple[Image.Image, list[Region], Box]:
        """Return a square image, its regions, and the box of the whole image in its pixels."""
        side, (min_factor, max_factor) = max(image.size), self.scale_range
        factor = rng.uniform(min_factor, max_factor)
        width, height = (min(length, max(1, round(side / factor))) for length in image.size)  # visible window
        left, top = int(rng.integers(image.width - width + 1)), int(rng.integers(image.height - height + 1))
        window = (left, top, left + width, top + height)
        size = (min(side, max(1, round(width * factor))), min(side, max(1, round(height * factor))))
        canvas = Image.new("RGB", (side, side), PADDING_COLOR)
        canvas.paste(image.crop(window).resize(size, Image.Resampling.BILINEAR))
        cropped_regions = [
            crop_region(region, window, original_areas[region.id], self.min_visibility) for region in regions
        ]
        resized_regions = [
            resize_region(region, (width, height), size, (side, side))
            for region in cropped_regions
            if region is not None
        ]
        scale_x, scale_y = size[0] / width, size[1] / height
        x1, y1, x2, y2 = whole_image
        whole_image = ((x1 - left) * scale_x, (y1 - top) * scale_y, (x2 - left) * scale_x, (y2 - top) * scale_y)
        return canvas, [region for region in resized_regions if region is not None], whole_image


def flip_horizontally(image: Image.Image, regions: list[Region]) -> tuple[Image.Image, list[Region]]:
    """Flip an image and its regions horizontally; swap "left" and "right" in phrases and text attributes."""

    def flip_region(region: Region) -> Region:
        return replace(
            region,
            box=_flip_box(region.box, image.width),
            mask=None if region.mask is None else encode_rle(decode_rle(region.mask)[:, ::-1]),
            phrases=tuple(map(_swap_sides, region.phrases)),
            attributes={k: _swap_sides(v) if isinstance(v, str) else v for k, v in region.attributes.items()},
        )

    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), [flip_region(region) for region in regions]


def _flip_box(box: Box, width: float) -> Box:
    x1, y1, x2, y2 = box
    return width - x2, y1, width - x1, y2


def has_side_word(region: Region) -> bool:
    """Return whether a phrase or a text attribute of a region mentions left or right."""
    texts = (*region.phrases, *(value for value in region.attributes.values() if isinstance(value, str)))
    return any(SIDE_PATTERN.search(text) for text in texts)


def _swap_sides(text: str) -> str:
    def swap_side(match: re.Match[str]) -> str:
        word, side = match[0], OPPOSITE_SIDE[match[0].lower()]
        return side.upper() if word.isupper() else side.capitalize() if word[0].isupper() else side

    return SIDE_PATTERN.sub(swap_side, text)


def _compute_area(region: Region) -> float:
    """Return the area of a region's mask, else of its box, in pixels."""
    x1, y1, x2, y2 = region.box
    return (x2 - x1) * (y2 - y1) if region.mask is None else compute_mask_area(region.mask)


def crop_region(
    region: Region, window: tuple[int, int, int, int], original_area: float, min_visibility: float
) -> Region | None:
    """Crop a region to a window.

    Args:
        region: Region in image pixels.
        window: x1 y1 x2 y2 in image pixels.
        original_area: Area of the region before augmentation, in pixels.
        min_visibility: Minimum fraction of `original_area` that must remain.

    Returns:
        The region in pixels of the window; None if too little of it remains.
    """
    left, top, right, bottom = window
    x1, y1, x2, y2 = region.box
    box = (max(x1, left) - left, max(y1, top) - top, min(x2, right) - left, min(y2, bottom) - top)
    if box[2] <= box[0] or box[3] <= box[1]:
        return None
    if region.mask is None:
        remaining_fraction = (box[2] - box[0]) * (box[3] - box[1]) / original_area
        return replace(region, box=box) if remaining_fraction >= min_visibility else None
    mask = decode_rle(region.mask)[top:bottom, left:right]
    if mask.sum() < min_visibility * original_area or not mask.any():
        return None
    rle = encode_rle(mask)
    mask_box = mask_to_box(rle)
    return None if mask_box is None else replace(region, box=mask_box, mask=rle)


def resize_region(
    region: Region, size: tuple[int, int], new_size: tuple[int, int], frame_size: tuple[int, int]
) -> Region | None:
    """Resize a region together with its image.

    Args:
        region: Region in pixels of an image of `size`.
        size: Width and height of the image.
        new_size: Width and height of the resized image.
        frame_size: Width and height of the frame with the resized image in its top left corner.

    Returns:
        The region in pixels of the frame; None if its mask has no pixels left.
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
    mask_box = mask_to_box(rle)
    return None if mask_box is None else replace(region, box=mask_box, mask=rle)
