"""Template phrases for data with class names but no captions."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

from sca_registry.contracts import Sample

Box = tuple[float, float, float, float]  # x1 y1 x2 y2, pixels


def add_template_phrases(sample: Sample, original: Sample, whole_image: Box | None = None) -> Sample:
    """Add template phrases to each region with a class name and no phrase.

    The phrases are, in this order and without duplicates:

        ARTICLE [SIZE] NAME
        ARTICLE NAME PLACE
        ARTICLE [SIZE] NAME PLACE

    - ARTICLE is "the" for the only region of its class in `original`, else "a" or "an" by the next letter.
    - SIZE is "large" for a box that covers at least 1/8 of the image, "small" for at most 1/100, else empty.
    - PLACE is the cell of a 3 x 3 grid over the image that contains the box center: "at the top left", "at the top",
      "on the right", "in the middle", ...

    Examples: "a car on the left", "a large building at the top right", "the road at the bottom".

    Args:
        sample: Sample, possibly augmented.
        original: Sample before augmentation, without the crowds that the dataset skips.
        whole_image: x1 y1 x2 y2, in pixels of `sample`, of the image that size and place refer to. Defaults to `sample`
            itself, because a crop changes both.

    Returns:
        The sample with added phrases.
    """
    names = Counter(region.name for region in original.regions)
    left, top, right, bottom = whole_image or (0, 0, *sample.image.size)
    regions = tuple(
        replace(
            region,
            phrases=make_template_phrases(
                region.name,
                (region.box[0] - left, region.box[1] - top, region.box[2] - left, region.box[3] - top),
                (right - left, bottom - top),
                is_unique=names[region.name] == 1,
            ),
        )
        if region.name and not region.phrases
        else region
        for region in sample.regions
    )
    return sample._replace(regions=regions)


def make_template_phrases(name: str, box: Box, size: tuple[float, float], is_unique: bool) -> tuple[str, ...]:
    """Create the template phrases of one region.

    Args:
        name: Class name.
        box: x1 y1 x2 y2 in image pixels.
        size: Width and height of the image.
        is_unique: Whether the region is the only one of its class, which selects the article "the".

    Returns:
        The phrases, without duplicates.
    """
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
