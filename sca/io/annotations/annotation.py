"""Annotated images and regions of labeling tools, and counts of the contents that could not be kept."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from sca.io.coordinates import Box

ImageSize = tuple[int, int]  # width, height
SkipCallback = Callable[[str, str], None]  # counts a reason, with the location of the record
MAX_EXAMPLES = 5  # locations stored per reason
CAPTION_KEYS = (
    "caption",
    "captions",
    "phrase",
    "phrases",
    "text",
    "description",
    "sentence",
    "sentences",
    "expression",
)


def describe_unread_caption(record: Mapping[str, Any], read_keys: Sequence[str]) -> str | None:
    """Return the skip reason for a caption under a key that is not read; None without one, or if a caption is read.

    Args:
        record: Record that may contain captions.
        read_keys: Caption keys that are read.

    Returns:
        The reason, or None.
    """
    if any(record.get(key) for key in read_keys):
        return None
    for key, value in record.items():
        texts = value if isinstance(value, list) else [value]
        is_key = str(key).lower() in CAPTION_KEYS and key not in read_keys
        if is_key and any(isinstance(text, str) and text.strip() for text in texts):
            return f"caption under {key!r}, which is not read (the key is {' or '.join(map(repr, read_keys))})"
    return None


class Annotation(NamedTuple):
    """Annotated region in pixels of the upright image.

    Attributes:
        location: File and record, for messages.
        box: x1, y1, x2, y2. It may exceed the image.
        mask: COCO RLE in the size of the image.
        point: x, y of a region with neither box nor mask.
        label: Class label.
        captions: Captions in order.
        score: Confidence recorded in the file.
        predicted_iou: Predicted IoU recorded in the file.
        unread_caption: Skip reason of a caption under a key that is not read, see `describe_unread_caption`.
        proposal_score: Score of the proposal recorded in the file.
        separate_labels: Class labels that are joined in `label`; empty for formats with one label per region.
    """

    location: str
    box: Box | None = None
    mask: dict[str, Any] | None = None
    point: tuple[float, float] | None = None
    label: str | None = None
    captions: tuple[str, ...] = ()
    score: Any = None
    predicted_iou: Any = None
    unread_caption: str | None = None
    proposal_score: Any = None
    separate_labels: tuple[str, ...] = ()

    @property
    def texts(self) -> tuple[str, ...]:
        """Captions, or the label if there are none."""
        return self.captions or ((self.label,) if self.label else ())


class AnnotatedImage(NamedTuple):
    """Annotated image of a labeling tool.

    Attributes:
        location: File and record, for messages.
        name: Name of the image in the file.
        size: Width and height; None if unknown.
        annotations: Regions.
        model: Model that created the annotations, according to the file.
        is_size_recorded: Whether the file records the size. Otherwise it comes from the image file.
    """

    location: str
    name: str
    size: ImageSize | None
    annotations: list[Annotation]
    model: str | None = None
    is_size_recorded: bool = True


class SkipCounter:
    """Counter of contents that could not be kept; call it as `skip(reason, location)`.

    Args:
        skipped: Initial counts by reason, such as those of a dataset.
        examples: Initial locations by reason.
    """

    def __init__(self, skipped: Mapping[str, int] | None = None, examples: dict[str, list[str]] | None = None) -> None:
        self.counts: Counter[str] = Counter(skipped or {})
        self.examples: dict[str, list[str]] = examples or {}

    def __call__(self, reason: str, location: str) -> None:
        self.counts[reason] += 1
        examples = self.examples.setdefault(reason, [])
        if len(examples) < MAX_EXAMPLES:
            examples.append(location)

    def summarize(self) -> str:
        """Return one line with each reason, its count and its first location; empty if nothing was counted."""
        parts = [f"{reason}: {n} (first: {self.examples[reason][0]})" for reason, n in self.counts.items()]
        return f"changed or skipped: {'; '.join(parts)}" if parts else ""
