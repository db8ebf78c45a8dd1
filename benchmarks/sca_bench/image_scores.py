"""Scores of single images, stored with each row, for paired intervals over the images of two rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sca.evaluation.bootstrap import is_ratio
from sca.evaluation.comparison import collect_bootstrap_inputs
from sca.evaluation.evaluate import EvaluationReport

DIGITS = 6  # of stored sums


def collect_image_scores(report: EvaluationReport) -> dict[str, dict[str, list[Any]]]:
    """Return the sums behind every score that is a ratio of sums over images.

    Args:
        report: Report of an evaluation.

    Returns:
        For each score: `image_ids`, sorted, and by image the summands of the numerator, `sums`, and of the denominator,
        `counts`.
    """
    image_scores = {}
    for name, (statistics, groups) in collect_bootstrap_inputs(report).items():
        if not is_ratio(statistics):
            continue
        image_ids, image_index = np.unique(groups, return_inverse=True)
        totals = np.zeros((len(image_ids), 2))
        np.add.at(totals, image_index.ravel(), statistics.rows)
        image_scores[name] = {
            "image_ids": image_ids.tolist(),
            "sums": _to_numbers(totals[:, 0]),
            "counts": _to_numbers(totals[:, 1]),
        }
    return image_scores


def stack_image_scores(rows: Sequence[Mapping[str, Any]], score_name: str) -> np.ndarray | None:
    """Return the sums of a score in several rows.

    Args:
        rows: Rows of the results file.
        score_name: Score.

    Returns:
        (rows, images, 2) sums and counts; None if a row does not have them, or the rows have different images.
    """
    tables = [(row.get("image_scores") or {}).get(score_name) for row in rows]
    if not tables or any(table is None for table in tables):
        return None
    present = [table for table in tables if table is not None]
    if any(table["image_ids"] != present[0]["image_ids"] for table in present):
        return None
    return np.array([[table["sums"], table["counts"]] for table in present], dtype=float).transpose(0, 2, 1)


def _to_numbers(values: np.ndarray) -> list[float | int]:
    """Return numbers for JSON: rounded, and integers where they are whole."""
    return [int(value) if value == int(value) else round(value, DIGITS) for value in values.tolist()]
