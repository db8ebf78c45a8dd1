"""What a dataset holds: counted over its annotations, without opening pictures where it has a table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from sca_registry.contracts import Dataset, Region

SIZES = {"small": 32**2, "medium": 96**2}  # areas that these are below, in pixels, as COCO counts them
COMMON = 10  # how many of the commonest names and phrases are told


def stats(dataset: Dataset, pictures: bool = False) -> dict[str, Any]:
    """Numbers of images, regions, phrases and words; how they are spread; the commonest names; what was left out and
    why, with examples. Plain JSON.

    pictures: open every picture too, without which those that are damaged are not known of.
    """
    names: Counter[str] = Counter()
    phrases: Counter[str] = Counter()
    words: set[str] = set()
    lengths: Counter[int] = Counter()  # words of phrases
    counts: Counter[int] = Counter()  # regions of images
    sizes = dict.fromkeys((*SIZES, "large"), 0)
    masks = without = 0
    for regions in annotations(dataset, pictures):
        counts[len(regions)] += 1
        for region in regions:
            x1, y1, x2, y2 = region.box
            area = (x2 - x1) * (y2 - y1)
            sizes[next((size for size, limit in SIZES.items() if area < limit), "large")] += 1
            masks += region.mask is not None
            without += not region.phrases
            names.update([region.name] if region.name else [])
            for phrase in region.phrases:
                told = phrase.split()
                lengths[len(told)] += 1
                words.update(word.lower() for word in told)
                phrases[phrase] += 1
    return {
        "split": getattr(dataset, "split", None),
        "hash": getattr(dataset, "hash", None),
        "images": counts.total(),
        "regions": sum(number * times for number, times in counts.items()),
        "regions_an_image": _spread(counts),
        "regions_by_size": sizes,
        "regions_with_mask": masks,
        "regions_without_phrase": without,
        "classes": len(names),
        "commonest_classes": dict(names.most_common(COMMON)),
        "phrases": phrases.total(),
        "different_phrases": len(phrases),
        "commonest_phrases": dict(phrases.most_common(COMMON)),
        "words": sum(number * times for number, times in lengths.items()),
        "different_words": len(words),
        "words_a_phrase": _spread(lengths),
        "skipped": dict(getattr(dataset, "skipped", {})),
        "examples": dict(getattr(dataset, "examples", {})),
    }


def annotations(dataset: Dataset, pictures: bool) -> Iterator[tuple[Region, ...]]:
    """The regions of each image."""
    if not pictures and hasattr(dataset, "annotations_of_all"):
        return dataset.annotations_of_all()
    samples = iter(dataset) if hasattr(dataset, "__iter__") else map(dataset.__getitem__, range(len(dataset)))
    return (sample.regions for sample in samples)


def _spread(counts: Counter[int]) -> dict[str, float] | None:
    if not counts:
        return None
    whole = counts.total()
    mean = sum(number * times for number, times in counts.items()) / whole
    middle, seen = 0, 0
    for number in sorted(counts):
        seen += counts[number]
        if 2 * seen >= whole:
            middle = number
            break
    return {"least": min(counts), "median": middle, "mean": round(mean, 3), "most": max(counts)}
