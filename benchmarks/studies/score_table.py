"""Scores of several methods in a Markdown table, with the differences between them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import mean
from typing import Any

import numpy as np

from sca.io.score_format import UNDEFINED_SCORE, format_interval, format_score


def compute_differences(first: Sequence[Any], second: Sequence[Any], names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Compute how much one method scores above another on the same images.

    Args:
        first: Evaluation report of the first method, one per seed.
        second: Evaluation report of the second method, one per seed.
        names: Names of the scores.

    Returns:
        For each score that all reports have: `mean`, the mean difference over seeds; `ci_low` and `ci_high`, the
        bounds of its 95% interval; and `per_seed`, the difference of each seed.
    """
    from sca.evaluation.bootstrap import bootstrap_scores, compute_interval
    from sca.evaluation.comparison import collect_bootstrap_inputs

    differences = {}
    inputs = [[collect_bootstrap_inputs(report) for report in reports] for reports in (first, second)]
    for name in names:
        if not all(name in each for report_inputs in inputs for each in report_inputs):
            continue  # such as the correctness of relations where no caption states one
        values = [a.scores[name] - b.scores[name] for a, b in zip(first, second, strict=True)]
        resampled = [bootstrap_scores(*a[name]) - bootstrap_scores(*b[name]) for a, b in zip(*inputs, strict=True)]
        low, high = compute_interval(np.mean(resampled, axis=0)) or (None, None)
        differences[name] = {"mean": mean(values), "ci_low": low, "ci_high": high, "per_seed": values}
    return differences


def format_difference(difference: Mapping[str, float]) -> str:
    """Format a difference with its 95% interval, times 100.

    Args:
        difference: `mean`, `ci_low` and `ci_high`.

    Returns:
        The cell of a table.
    """
    interval = format_interval(difference["ci_low"], difference["ci_high"], True)
    return f"{format_score(difference['mean'], True)} ({interval})"


def render_table(
    labels: Mapping[str, str],
    scores: Mapping[str, Mapping[str, float]],
    differences: Mapping[str, Mapping[str, Mapping[str, Any]]],
) -> str:
    """Render a Markdown table, with scores times 100.

    Args:
        labels: Label of each score by its name.
        scores: Scores of each method by name.
        differences: Differences of each score, as `compute_differences` returns them, by the label of their row.

    Returns:
        The table.
    """
    rows = [f"| | {' | '.join(labels.values())} |", "| --- |" + " ---: |" * len(labels)]
    for method, values in scores.items():
        rows.append(f"| {method} | {' | '.join(format_score(values[name]) for name in labels)} |")
    for label, values_by_name in differences.items():
        cells = (
            format_difference(values_by_name[name]) if name in values_by_name else UNDEFINED_SCORE for name in labels
        )
        rows.append(f"| {label} (95% CI) | {' | '.join(cells)} |")
    return "\n".join(rows)
