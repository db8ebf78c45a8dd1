"""Phrases made by rule, for data that has class names and no captions."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

from sca_registry.contracts import Sample


def add_template_phrases(sample: Sample, original: Sample) -> Sample:
    """The sample with phrases for each region that has a name and no phrase:

        ARTICLE [SIZE] NAME;  ARTICLE NAME PLACE;  ARTICLE [SIZE] NAME PLACE         each once, in this order

    ARTICLE is "the" for the only one of its class in `original` (the sample before augmentation, without the
    crowds that the dataset leaves out), else "a" or "an" by the next letter. SIZE is "large" for a box that covers at
    least an eighth of the image, "small" for at most a hundredth, nothing between. PLACE is where the box's center is
    on the image cut into three by three: "at the top left", "at the top", "on the right", "in the middle", ... So: "a
    car on the left", "a large building at the top right", "the road at the bottom". Size and place are those in
    `sample`: what is true of an image need not be true of a crop of it.
    """
    names = Counter(region.name for region in original.regions)
    regions = tuple(
        replace(
            region,
            phrases=make_template_phrases(
                region.name, region.box, sample.image.size, is_unique=names[region.name] == 1
            ),
        )
        if region.name and not region.phrases
        else region
        for region in sample.regions
    )
    return Sample(sample.image, sample.image_id, regions)


def make_template_phrases(name: str, box: tuple[float, ...], size: tuple[int, int], is_unique: bool) -> tuple[str, ...]:
    """The phrases of one region: its box is x1 y1 x2 y2 in an image of `size` (width, height)."""
    area_fraction = (box[2] - box[0]) * (box[3] - box[1]) / math.prod(size)
    adjective = "large" if area_fraction >= 1 / 8 else "small" if area_fraction <= 1 / 100 else None
    column, row = (
        0 if center < limit / 3 else 2 if center > limit * 2 / 3 else 1
        for center, limit in zip(((box[0] + box[2]) / 2, (box[1] + box[3]) / 2), size, strict=True)
    )
    side, level = ("left", None, "right")[column], ("top", None, "bottom")[row]
    if level:
        location = f"at the {level} {side}" if side else f"at the {level}"
    else:
        location = f"on the {side}" if side else "in the middle"

    def format_phrase(*words: str | None) -> str:
        description = " ".join(word for word in words if word)
        article = "the" if is_unique else "an" if description[0].lower() in "aeiou" else "a"
        return f"{article} {description}"

    return tuple(
        dict.fromkeys(
            (format_phrase(adjective, name), format_phrase(name, location), format_phrase(adjective, name, location))
        )
    )
