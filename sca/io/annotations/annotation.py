"""What a labeling tool records of an image and its regions, and a count of what could not be kept."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from sca.io.coordinates import Box

ImageSize = tuple[int, int]  # width, height
SkipCallback = Callable[[str, str], None]  # counts a reason, with the place of the record
MAX_EXAMPLES = 5  # places that are remembered per reason
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
    """Return what to count for a caption under a key that is not read; None if there is none, or one that is read.

    Args:
        record: That may have captions.
        read_keys: Keys of captions that are read.
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
    """A region in pixels of the upright image.

    Args:
        location: The file and the record, for messages.
        box: x1, y1, x2, y2. It may reach over the edges of the image.
        mask: COCO RLE of the image's size.
        point: x, y of a region that has neither box nor mask.
        label: Its class.
        captions: Its texts, the first one first.
        score: The confidence that the file records.
        predicted_iou: The predicted IoU that the file records.
        unread_caption: What to count for a caption under a key that is not read, see `describe_unread_caption`.
    """

    location: str
    box: Box | None = None
    mask: Mapping[str, Any] | None = None
    point: tuple[float, float] | None = None
    label: str | None = None
    captions: tuple[str, ...] = ()
    score: Any = None
    predicted_iou: Any = None
    unread_caption: str | None = None

    @property
    def texts(self) -> tuple[str, ...]:
        """Its captions, or its label where it has none."""
        return self.captions or ((self.label,) if self.label else ())


class AnnotatedImage(NamedTuple):
    """An image of a labeling tool.

    Args:
        location: The file and the record, for messages.
        name: What the file calls it.
        size: Width and height; None where they are unknown.
        annotations: Its regions.
        model: What the file says has made them.
        is_size_recorded: Whether the file records the size; otherwise the image file has it.
    """

    location: str
    name: str
    size: ImageSize | None
    annotations: list[Annotation]
    model: str | None = None
    is_size_recorded: bool = True


class SkipCounter:
    """Count what could not be kept: `skip(reason, location)`. `skipped` and `examples` are those of a dataset."""

    def __init__(self, skipped: Mapping[str, int] | None = None, examples: dict[str, list[str]] | None = None) -> None:
        self.counts: Counter[str] = Counter(skipped or {})
        self.examples: dict[str, list[str]] = examples or {}

    def __call__(self, reason: str, location: str) -> None:
        self.counts[reason] += 1
        examples = self.examples.setdefault(reason, [])
        if len(examples) < MAX_EXAMPLES:
            examples.append(location)

    def summarize(self) -> str:
        """Return one line with each reason, its count and its first place; empty if nothing was counted."""
        parts = [f"{reason}: {n} (first: {self.examples[reason][0]})" for reason, n in self.counts.items()]
        return f"changed or left out: {'; '.join(parts)}" if parts else ""
