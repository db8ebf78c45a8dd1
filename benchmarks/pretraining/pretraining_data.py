"""Images and texts for pretraining: scenes, drawn on access, and optionally street photographs, kept in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image
from sca_registry.contracts import Dataset, Region, Sample
from torch import Tensor

from sca.data.coco import Coco
from sca.data.scenes import Scenes
from sca.encoders.tiny_vit import TinyVit
from sca.inference.processor import Processor
from sca.training.template_phrases import add_template_phrases

STREET_FRACTION = 0.3  # of the samples
REGION_CROP_FRACTIONS = (0.375, 0.625)  # minimum side of a crop around a region, of the shorter side of the image


class PretrainingData:
    """Random samples of the training splits of scenes and of street photographs.

    Args:
        street: Folder with `train.json` and `train/`, in COCO's format; None for scenes only.
    """

    def __init__(self, street: Path | None = None):
        self.scenes: Dataset = Scenes("train")
        self.street: list[Sample] = load_street_photographs(street, "train") if street else []

    def draw_sample(self, rng: np.random.Generator) -> Sample:
        """Draw a scene or a photograph."""
        if self.street and rng.random() < STREET_FRACTION:
            return self.street[rng.integers(len(self.street))]
        return self.scenes[int(rng.integers(len(self.scenes)))]

    def draw_images(self, rng: np.random.Generator, count: int) -> list[Image.Image]:
        """Draw the images of `count` samples."""
        return [self.draw_sample(rng).image for _ in range(count)]

    def draw_region_crop(self, rng: np.random.Generator) -> tuple[Image.Image, Region]:
        """Draw a crop around a random region that has texts."""
        sample = self.draw_sample(rng)
        regions = [region for region in sample.regions if region.name and region.phrases]
        region = regions[rng.integers(len(regions))]
        side = rng.uniform(*REGION_CROP_FRACTIONS) * min(sample.image.size)
        return crop_region(sample.image, region, side, rng), region

    def describe_sources(self) -> dict[str, str]:
        """Return the sources, for the facts of a checkpoint."""
        sources = {"scenes": "split train"}
        return sources | {"street": f"{len(self.street)} photographs of CamVid"} if self.street else sources


def load_street_photographs(street: Path, split: str) -> list[Sample]:
    """Load a split of the street photographs with template phrases for their regions."""
    dataset = Coco(split, street)
    return [add_template_phrases(sample, sample) for sample in (dataset[index] for index in range(len(dataset)))]


def crop_square(image: Image.Image, center: Sequence[float], side: float) -> Image.Image:
    """Crop a square of `side` pixels, at most the shorter side of the image, moved inside the image."""
    side = max(1, round(min(side, *image.size)))
    left, top = (
        round(min(max(position - side / 2, 0), length - side))
        for position, length in zip(center, image.size, strict=True)
    )
    return image.crop((left, top, left + side, top + side))


def crop_randomly(image: Image.Image, fractions: tuple[float, float], rng: np.random.Generator) -> Image.Image:
    """Crop a random square whose side is a random fraction of the shorter side, and flip it at random."""
    side = rng.uniform(*fractions) * min(image.size)
    crop = crop_square(image, rng.uniform(side / 2, np.array(image.size) - side / 2), side)
    return crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else crop


def crop_region(image: Image.Image, region: Region, side: float, rng: np.random.Generator) -> Image.Image:
    """Crop a square of at least `side` pixels that contains a region at a random position."""
    x1, y1, x2, y2 = region.box
    side = max(side, 1.2 * max(x2 - x1, y2 - y1))
    slack = (side - np.array((x2 - x1, y2 - y1))) / 2
    center = np.array(((x1 + x2) / 2, (y1 + y2) / 2)) + rng.uniform(-0.8, 0.8, size=2) * slack
    return crop_square(image, center, side)


def preprocess_images(encoder: TinyVit, images: Sequence[Image.Image], size: int) -> Tensor:
    """Resize and normalize images as for the encoder, but to `size`: (B, 3, size, size)."""
    return Processor(replace(encoder.image_format, size=size), size // encoder.stride).preprocess_images(images)
