"""One line about a dataset that is about to be used: what it holds, and what was left out of it and why."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from textwrap import shorten

from sca_registry.contracts import Dataset

from sca.data.conversion import BAD_IMAGES
from sca.data.fields import EmptyDatasetError
from sca.io.text import format_count

NOUNS = {
    **{word: f"{word}s" for word in ("image", "region", "phrase", "crowd", "mask", "polygon", "caption", "segment")},
    **{"box": "boxes", "category": "categories", "pixels": "pixels"},
}  # what is counted: the first of them in a reason
NOUN = re.compile(rf"\b({'|'.join(NOUNS)})\b")
SHOWN = 3  # examples of a reason
WIDTH = 160  # characters of an example at most


def summarize_dataset(dataset: Dataset) -> str:
    """Summarize a dataset in one line, without opening its images.

    Args:
        dataset: Any dataset; those that are read from files say more.

    Returns:
        Such as "721 regions, 680 with captions, 11 class names, 39 images; 1 image missing: x.jpg (looked in photos)".
    """
    about = getattr(dataset, "about", None)
    parts = [format_count(len(dataset), "image")]
    if about is not None:
        captioned = f"{about['captioned']:,} with captions"
        names = format_count(len(about["names"]), "class name")
        parts = [format_count(about["regions"], "region"), captioned, names, *parts]
    remarks = getattr(dataset, "remarks", ())
    return "; ".join([", ".join(parts), *remarks, *_left_out(dataset)])


def count_left_out(dataset: Dataset) -> dict[str, int]:
    """Count what was left out of a dataset so far, by reason."""
    return {reason: count for reason, count in getattr(dataset, "skipped", {}).items() if count}


def check_not_empty(dataset: Dataset, what: str) -> None:
    """Check that a dataset has images.

    Args:
        dataset: Any dataset.
        what: What the message calls it, such as "data.own (train)".

    Raises:
        EmptyDatasetError: If it has none. One line that says what was left out, and where images were looked for.
    """
    if not len(dataset):
        left_out = "; ".join([*getattr(dataset, "remarks", ()), *_left_out(dataset)])
        raise EmptyDatasetError(f"{what} has no image that can be used: {left_out or 'it contains no images'}")


def name_some(names: Iterable[str], total: int) -> str:
    """The first few of `total` names, each shortened, and how many more there are."""
    shown = [shorten(name, WIDTH, placeholder="...") for name in names][:SHOWN]
    more = total - len(shown)
    return ", ".join(shown) + (f" and {more:,} more" if more > 0 and shown else "")


def _left_out(dataset: Dataset) -> list[str]:
    """A phrase for each reason for which something was left out, images first."""
    skipped = count_left_out(dataset)
    examples: Mapping[str, list[str]] = getattr(dataset, "examples", {})
    ordered = [*(each for each in skipped if each in BAD_IMAGES), *(each for each in skipped if each not in BAD_IMAGES)]
    found = []
    for reason in ordered:
        total = skipped[reason]
        named = name_some(_short(dataset, examples.get(reason, ())), total)
        counted = reason if total == 1 else NOUN.sub(lambda match: NOUNS[match[0]], reason, count=1)
        place = f" (looked in {dataset.images})" if reason == "image missing" else ""
        found.append(f"{total:,} {counted}" + (f": {named}" if named else "") + place)
    return found


def _short(dataset: Dataset, examples: Iterable[str]) -> list[str]:
    """Examples without the path of the file that most of them are of."""
    path = str(next(iter(getattr(dataset, "sources", ())), ""))
    return [example.removeprefix(f"{path}: ") for example in examples]
