"""Write JSON Lines: one line per region."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from sca_registry.contracts import Caption, Prompt

from sca.io import masks
from sca.io.atomic import AtomicFile, make_write_error
from sca.output.captioned_image import ImageOrSize

OPTIONAL_SCORE_FIELDS = ("proposal_score", "confidence", "ood_score")  # omitted if they are unknown


class Sink(Protocol):
    """Destination of a document: a file or a stream."""

    replaces_file: bool

    def write(self, text: str) -> None: ...

    def commit(self) -> None: ...

    def discard(self) -> None: ...


class StreamSink:
    """Sink for a text stream that the caller closes, such as standard output; writes are flushed."""

    replaces_file = False

    def __init__(self, stream: Any):
        self._stream = stream

    def write(self, text: str) -> None:
        """Write text. A closed pipe raises BrokenPipeError, other failures raise OutputError."""
        try:
            self._stream.write(text)
            self._stream.flush()
        except BrokenPipeError:
            raise
        except OSError as error:
            raise make_write_error(getattr(self._stream, "name", "the stream"), error) from error

    def commit(self) -> None:
        """Do nothing: everything is written already."""

    def discard(self) -> None:
        """Do nothing: written text cannot be removed."""


class JsonlWriter:
    """Writer that appends the lines of each image immediately; an older file is kept until the run has finished.

    A line has `image` (its path as passed), `width`, `height`, `region_id` (the index of the prompt in the request),
    `prompt`, `box` (x1, y1, x2, y2), `mask` (COCO RLE), `caption`, `score`, `predicted_iou` and `model`. With several
    captions per region, `alternatives` contains the others, best first. For a region of a proposer, `name` (a class or
    a phrase) and `proposal_score` are those of the proposal. For a region that a search for a text found, they are the
    text and its score. `question` is the question, or the request for a length, that `caption` responds to. With a
    calibrated model, `confidence` is the probability that the caption is correct, and
    `ood_score` the distance of the image to the training images, above 1 for an image that is unlike them. Coordinates
    are in pixels of the upright image; unknown values are null. The output is ASCII, so that any terminal, locale and
    line reader works.
    """

    def __init__(self, target: Path | StreamSink, model: str | None = None):
        self._target = target
        self._sink: Sink | None = None
        self._model = model

    def add(self, path: str, image: ImageOrSize, captions: Sequence[Caption]) -> None:
        records = ({**caption_to_record(path, image, caption), "model": self._model} for caption in captions)
        self._get_sink().write("".join(f"{json.dumps(each, allow_nan=False)}\n" for each in records))

    def close(self, finished: bool = True) -> None:
        """Finish the file with the completed images. An unfinished run leaves an older file unchanged."""
        if finished or (self._sink and not self._sink.replaces_file):
            self._get_sink().commit()
        elif self._sink:
            self._sink.discard()

    def _get_sink(self) -> Sink:
        if self._sink is None:
            self._sink = AtomicFile(self._target, visible=True) if isinstance(self._target, Path) else self._target
        return self._sink


def caption_to_record(path: str, image: ImageOrSize, caption: Caption) -> dict[str, Any]:
    """Convert a caption to a JSON-serializable record."""
    mask = caption.mask
    alternatives = [{"caption": text, "score": replace_non_finite(score)} for text, score in caption.alternatives]
    return {
        "image": path,
        "width": image.width,
        "height": image.height,
        "region_id": int(caption.region_id),
        "prompt": prompt_to_dict(caption.prompt),
        "box": None if caption.box is None else [float(value) for value in caption.box],
        "mask": None if mask is None else {"size": [int(side) for side in mask["size"]], "counts": mask["counts"]},
        "caption": caption.text,
        "score": replace_non_finite(caption.score),
        "predicted_iou": replace_non_finite(caption.predicted_iou),
        **({"alternatives": alternatives} if alternatives else {}),
        **({"name": caption.name} if caption.name is not None else {}),
        **({"question": caption.question} if caption.question is not None else {}),
        **{
            field: replace_non_finite(value)
            for field in OPTIONAL_SCORE_FIELDS
            if (value := getattr(caption, field)) is not None
        },
    }


def prompt_to_dict(prompt: Prompt) -> dict[str, Any]:
    """Convert a prompt to plain values: any of `box` [x1, y1, x2, y2], `points` [[x, y, label]] and `mask` (RLE)."""
    prompt_fields: dict[str, Any] = {}
    if prompt.box is not None:
        prompt_fields["box"] = [float(value) for value in prompt.box]
    if prompt.points:
        prompt_fields["points"] = [[float(x), float(y), int(label)] for x, y, label in prompt.points]
    if prompt.mask is not None:
        prompt_fields["mask"] = masks.encode_rle(prompt.mask)
    return prompt_fields


def replace_non_finite(value: float | None) -> float | None:
    """Return a score for JSON: None for NaN and infinite values."""
    return float(value) if value is not None and math.isfinite(value) else None
