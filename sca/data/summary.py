"""One-line summary of a dataset: its content, and the skipped records by reason."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from textwrap import shorten

from sca_registry.contracts import Dataset

from sca.data.conversion import BAD_IMAGE_REASONS
from sca.data.record_parsing import EmptyDatasetError
from sca.io.text import format_count

PLURALS = {
    **{word: f"{word}s" for word in ("image", "region", "phrase", "crowd", "mask", "polygon", "caption", "segment")},
    **{"box": "boxes", "category": "categories", "pixels": "pixels"},
}
NOUN_PATTERN = re.compile(rf"\b({'|'.join(PLURALS)})\b")
MAX_EXAMPLES_SHOWN = 3  # per reason
MAX_EXAMPLE_LENGTH = 160  # characters


def summarize_dataset(dataset: Dataset) -> str:
    """Summarize a dataset in one line without opening its images.

    Args:
        dataset: Any dataset. Only datasets with a table have counts of regions, captions and class names.

    Returns:
        Such as "721 regions, 680 with captions, 11 class names, 39 images; 1 image missing: x.jpg (looked in photos)".
    """
    metadata = getattr(dataset, "metadata", None)
    parts = [format_count(len(dataset), "image")]
    if metadata is not None:
        captioned = f"{metadata['captioned_regions']:,} with captions"
        names = format_count(len(metadata["class_names"]), "class name")
        parts = [format_count(metadata["regions"], "region"), captioned, names, *parts]
    remarks = getattr(dataset, "remarks", ())
    return "; ".join([", ".join(parts), *remarks, *_describe_skipped(dataset)])


def count_skipped(dataset: Dataset) -> dict[str, int]:
    """Count the skipped records of a dataset by reason."""
    return {reason: count for reason, count in getattr(dataset, "skipped", {}).items() if count}


def check_dataset_not_empty(dataset: Dataset, subject: str) -> None:
    """Check that a dataset has images.

    Args:
        dataset: Any dataset.
        subject: Name of the dataset in the error message, such as "data.own (train)".

    Raises:
        EmptyDatasetError: The dataset is empty. The message has the skipped records by reason and the image folder.
    """
    if not len(dataset):
        skipped = "; ".join([*getattr(dataset, "remarks", ()), *_describe_skipped(dataset)])
        raise EmptyDatasetError(f"{subject} has no usable image: {skipped or 'it contains no images'}")


def format_examples(names: Iterable[str], total: int) -> str:
    """Format the first few names, each shortened, and the number of the others.

    Args:
        names: Names, of which the first `MAX_EXAMPLES_SHOWN` are shown.
        total: Total number of names.

    Returns:
        Text such as "a.png, b.png and 3 more".
    """
    shown = [shorten(name, MAX_EXAMPLE_LENGTH, placeholder="...") for name in names][:MAX_EXAMPLES_SHOWN]
    num_more = total - len(shown)
    return ", ".join(shown) + (f" and {num_more:,} more" if num_more > 0 and shown else "")


def _describe_skipped(dataset: Dataset) -> list[str]:
    """Describe the skipped records in one phrase per reason, images first."""
    skipped = count_skipped(dataset)
    examples: Mapping[str, list[str]] = getattr(dataset, "examples", {})
    ordered = [
        *(each for each in skipped if each in BAD_IMAGE_REASONS),
        *(each for each in skipped if each not in BAD_IMAGE_REASONS),
    ]
    phrases = []
    for reason in ordered:
        total = skipped[reason]
        example_text = format_examples(_shorten_examples(dataset, examples.get(reason, ())), total)
        reason_text = reason if total == 1 else NOUN_PATTERN.sub(lambda match: PLURALS[match[0]], reason, count=1)
        image_root = getattr(dataset, "image_root", "the image folder")
        folder_text = f" (looked in {image_root})" if reason == "image missing" else ""
        phrases.append(f"{total:,} {reason_text}" + (f": {example_text}" if example_text else "") + folder_text)
    return phrases


def _shorten_examples(dataset: Dataset, examples: Iterable[str]) -> list[str]:
    """Remove the path of the first source from examples."""
    path = str(next(iter(getattr(dataset, "sources", ())), ""))
    return [example.removeprefix(f"{path}: ") for example in examples]
