"""Accuracy of the positions in the image that captions state."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from sca_registry.contracts import MetricOutput

from sca.evaluation.records import Record, collect_region_ids, compute_nanmean, require_records
from sca.io.errors import InputError

WORDS = "left|right|top|bottom|upper|lower|middle|cent(?:er|re)"
IMAGE = "of the (?:image|photo|photograph|frame|scene)"
FOLLOWING_WORDS = "and|with|in|on|at|next|near|behind|under|above|below|that|which|who|is|are|wearing|holding"
POSITION_PATTERN = re.compile(
    rf"\b(?:on|at|in|to|toward|towards|near) the (?:far |very )?((?:{WORDS})(?:[ -](?:{WORDS}))*+)"
    rf"(?:[ -]hand)?+(?: (?:side|half|part|edge|corner|end))?+(?= (?:{IMAGE}|{FOLLOWING_WORDS})\b|[.,;:!?)]|$)",
    re.IGNORECASE,
)
MIDDLE = (0.25, 0.75)  # fractions of a side


class PositionAccuracy:
    """Fraction of captions that state a position in the image, `stated`, and how many of those are `correct`.

    A position is a phrase such as "on the left", "at the top right" or "in the middle of the image"; a position
    relative to another object, such as "on the left of a car", is not one. Left, right, top and bottom are halves of
    the image, and the middle is its central half; the center of the true box counts.
    """

    required_fields: tuple[str, ...] = ("task=caption", "caption", "truth.box", "truth.mask or mask")

    def __call__(self, records: Sequence[Record]) -> MetricOutput:
        scored_records = require_records(records, self.required_fields, "positions")
        stated, correct = np.zeros(len(scored_records)), np.full(len(scored_records), np.nan)
        for row, record in enumerate(scored_records):
            words = parse_position(record["caption"])
            if words:
                height, width = (record["truth"].get("mask") or record["mask"])["size"]
                x1, y1, x2, y2 = record["truth"]["box"]
                stated[row] = 1
                correct[row] = is_position_true(words, (x1 + x2) / 2 / width, (y1 + y2) / 2 / height)
        if not stated.any():
            raise InputError("no caption states a position in the image")
        per_record = {"positions/correct": correct, "positions/stated": stated}
        values = {name: compute_nanmean(each) for name, each in per_record.items()}
        return MetricOutput(
            values | {"positions/captions": len(scored_records)}, per_record | collect_region_ids(scored_records)
        )


def parse_position(caption: str) -> set[str]:
    """Return the position that a caption states.

    Args:
        caption: Caption.

    Returns:
        Any of "left", "right", "top", "bottom" and "middle"; empty if the caption states no position in the image.
    """
    match = POSITION_PATTERN.search(" ".join(caption.split()))
    synonyms = {"upper": "top", "lower": "bottom"}
    words = re.split("[ -]", match[1].lower()) if match else []
    return {"middle" if word.startswith("cent") else synonyms.get(word, word) for word in words}


def is_position_true(words: set[str], x: float, y: float) -> bool:
    """Return whether a position is true.

    Args:
        words: Result of `parse_position`.
        x: Horizontal center of the region as a fraction of the image.
        y: Vertical center.

    Returns:
        True if every stated word is true. "middle" refers to the axes that no other word refers to.
    """
    halves = {"left": x <= 0.5, "right": x >= 0.5, "top": y <= 0.5, "bottom": y >= 0.5}
    is_true = all(halves[word] for word in words - {"middle"})
    if "middle" in words:
        axes = [x] * (not words & {"left", "right"}) + [y] * (not words & {"top", "bottom"})
        is_true = is_true and all(MIDDLE[0] <= each <= MIDDLE[1] for each in axes)
    return is_true
