"""Statistics of a dataset's annotations; images of converted tables are not opened."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from sca_registry.contracts import Dataset, Question, Region

MAX_AREA_BY_SIZE = {"small": 32**2, "medium": 96**2}  # exclusive bounds in square pixels, as in COCO
NUM_MOST_COMMON = 10  # names and phrases


def compute_dataset_stats(dataset: Dataset, check_images: bool = False) -> dict[str, Any]:
    """Compute statistics of a dataset.

    Args:
        dataset: Any dataset.
        check_images: Whether to open every image, which finds damaged ones.

    Returns:
        JSON-serializable counts of images, regions, phrases, words and questions; their distributions; the most common
        class names, phrases and answers; and the skipped records by reason, with examples.
    """
    names: Counter[str] = Counter()
    phrases: Counter[str] = Counter()
    words: set[str] = set()
    phrase_lengths: Counter[int] = Counter()  # in words
    region_counts: Counter[int] = Counter()  # per image
    sizes = dict.fromkeys((*MAX_AREA_BY_SIZE, "large"), 0)
    num_with_mask = num_without_phrase = 0
    question_kinds: Counter[str] = Counter()
    answers: Counter[str] = Counter()
    questions: set[str] = set()
    for regions, image_questions in iter_image_annotations(dataset, check_images):
        question_kinds.update(question.kind for question in image_questions)
        answers.update(question.answer for question in image_questions)
        questions.update(question.text for question in image_questions)
        region_counts[len(regions)] += 1
        for region in regions:
            x1, y1, x2, y2 = region.box
            area = (x2 - x1) * (y2 - y1)
            sizes[next((size for size, limit in MAX_AREA_BY_SIZE.items() if area < limit), "large")] += 1
            num_with_mask += region.mask is not None
            num_without_phrase += not region.phrases
            names.update([region.name] if region.name else [])
            for phrase in region.phrases:
                phrase_words = phrase.split()
                phrase_lengths[len(phrase_words)] += 1
                words.update(word.lower() for word in phrase_words)
                phrases[phrase] += 1
    return {
        "split": getattr(dataset, "split", None),
        "hash": getattr(dataset, "content_hash", None),
        "num_images": region_counts.total(),
        "num_regions": sum(number * times for number, times in region_counts.items()),
        "regions_per_image": _summarize_distribution(region_counts),
        "regions_by_size": sizes,
        "num_regions_with_mask": num_with_mask,
        "num_regions_without_phrase": num_without_phrase,
        "num_classes": len(names),
        "most_common_classes": dict(names.most_common(NUM_MOST_COMMON)),
        "num_phrases": phrases.total(),
        "num_unique_phrases": len(phrases),
        "most_common_phrases": dict(phrases.most_common(NUM_MOST_COMMON)),
        "num_words": sum(number * times for number, times in phrase_lengths.items()),
        "num_unique_words": len(words),
        "words_per_phrase": _summarize_distribution(phrase_lengths),
        "num_questions": question_kinds.total(),
        "num_unique_questions": len(questions),
        "questions_by_kind": dict(question_kinds.most_common()),
        "num_unique_answers": len(answers),
        "most_common_answers": dict(answers.most_common(NUM_MOST_COMMON)),
        "skipped": dict(getattr(dataset, "skipped", {})),
        "skipped_examples": dict(getattr(dataset, "examples", {})),
    }


def iter_image_annotations(
    dataset: Dataset, check_images: bool
) -> Iterator[tuple[tuple[Region, ...], tuple[Question, ...]]]:
    """Iterate over the regions of each image and the questions about it."""
    if not check_images and hasattr(dataset, "iter_annotations"):
        if not hasattr(dataset, "iter_questions"):
            return ((regions, ()) for regions in dataset.iter_annotations())
        return zip(dataset.iter_annotations(), dataset.iter_questions(), strict=True)
    samples = iter(dataset) if hasattr(dataset, "__iter__") else map(dataset.__getitem__, range(len(dataset)))
    return ((sample.regions, sample.questions) for sample in samples)


def _summarize_distribution(counts: Counter[int]) -> dict[str, float] | None:
    if not counts:
        return None
    total = counts.total()
    mean = sum(number * times for number, times in counts.items()) / total
    median, cumulative = 0, 0
    for number in sorted(counts):
        cumulative += counts[number]
        if 2 * cumulative >= total:
            median = number
            break
    return {"min": min(counts), "median": median, "mean": round(mean, 3), "max": max(counts)}
