"""Compare two runs of a sweep: timings, states and scores."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from sca.io.score_format import PRINT_FACTOR
from sca_bench.summary import average_scores, format_score_name

MAX_DIGITS = 17  # distinguishes any two floats


@dataclass(frozen=True)
class SweepDiff:
    """The differences between two runs of a sweep.

    Attributes:
        num_rows: Rows in both runs.
        num_timings: Compared timings.
        share_inside: Fraction of the second run's medians that are between the first run's minimum and maximum.
        median_width: Median of (maximum - minimum) / median of the first run's timings.
        median_ratio: Median of the second run's medians divided by the first run's.
        change_lines: One line per state or score that differs.
        score_lines: One line per score, over all rows.
        num_unmatched: Rows that are only in the first run, and only in the second.
    """

    num_rows: int
    num_timings: int
    share_inside: float
    median_width: float
    median_ratio: float
    change_lines: tuple[str, ...]
    score_lines: tuple[str, ...]
    num_unmatched: tuple[int, int]

    def format_lines(self) -> list[str]:
        """Return the differences as lines to print."""
        output_lines = [
            f"{self.num_rows} rows in both, {self.num_unmatched[0]} only in the first, "
            f"{self.num_unmatched[1]} only in the second"
        ]
        if self.num_timings:
            output_lines.append(
                f"{self.num_timings} timings: {self.share_inside:.1%} of the second run's medians are within the first "
                f"run's min-max range (median relative width {self.median_width:.1%}); time ratio "
                f"{self.median_ratio:.3f}x"
            )
        return [*output_lines, *self.score_lines, *self.change_lines]


def diff_rows(first: Sequence[Mapping[str, Any]], second: Sequence[Mapping[str, Any]]) -> SweepDiff:
    """Compare the rows of two runs, matched by key."""
    rows = [{row["key"]: row for row in each} for each in (first, second)]
    common_keys = [key for key in rows[0] if key in rows[1]]
    is_inside, widths, ratios, change_lines = [], [], [], []
    scores: dict[str, list[tuple[float | None, float | None]]] = {}
    for key in common_keys:
        first_row, second_row = rows[0][key], rows[1][key]
        if first_row["state"] != second_row["state"]:
            change_lines.append(f"{first_row['label']}: {first_row['state']}, then {second_row['state']}")
        before, after = dict(_iter_timings(first_row)), dict(_iter_timings(second_row))
        for name in before.keys() & after.keys():
            is_inside.append(before[name]["min"] <= after[name]["median"] <= before[name]["max"])
            if before[name]["median"]:
                widths.append((before[name]["max"] - before[name]["min"]) / before[name]["median"])
                ratios.append(after[name]["median"] / before[name]["median"])
        pairs = _pair_scores(first_row, second_row)
        change_lines += [
            f"{first_row['label']}: {name} {_format_change(*pair)}"
            for name, pair in pairs.items()
            if pair[0] != pair[1]
        ]
        for name, pair in pairs.items():
            scores.setdefault(name, []).append(pair)
    return SweepDiff(
        num_rows=len(common_keys),
        num_timings=len(is_inside),
        share_inside=sum(is_inside) / len(is_inside) if is_inside else 0.0,
        median_width=median(widths) if widths else 0.0,
        median_ratio=median(ratios) if ratios else 0.0,
        change_lines=tuple(change_lines),
        score_lines=tuple(_summarize_score(name, pairs) for name, pairs in scores.items()),
        num_unmatched=(len(rows[0]) - len(common_keys), len(rows[1]) - len(common_keys)),
    )


def _pair_scores(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, tuple[float | None, float | None]]:
    """Return the values of each score in both rows, None where a row lacks it."""
    first_scores, second_scores = (
        {format_score_name(each): each["value"] for each in scores}
        for scores in (row.get("scores") or () for row in (first, second))
    )
    return {name: (first_scores.get(name), second_scores.get(name)) for name in {**first_scores, **second_scores}}


def _summarize_score(name: str, pairs: Sequence[tuple[float | None, float | None]]) -> str:
    """Return one line about a score: its means over the rows in which both runs have it, and the number that differ."""
    complete_pairs = [(first, second) for first, second in pairs if first is not None and second is not None]
    num_incomplete = len(pairs) - len(complete_pairs)
    suffix = f"; missing in {num_incomplete} of them" if num_incomplete else ""
    if not complete_pairs:
        return f"{name}: in no row of both runs"
    before, after = (average_scores(values) for values in zip(*complete_pairs, strict=True))
    num_differing = sum(first != second for first, second in pairs)
    return f"{name}: {num_differing} of {len(pairs)} rows differ, mean {_format_change(before, after)}{suffix}"


def _format_change(before: float | None, after: float | None) -> str:
    """Format two scores times 100 (counts unchanged) with at least 4 digits, more if they differ and look equal."""
    before, after = (value * PRINT_FACTOR if isinstance(value, float) else value for value in (before, after))
    for digits in range(4, MAX_DIGITS + 1):
        formatted = ["none" if value is None else f"{value:.{digits}g}" for value in (before, after)]
        if before == after or formatted[0] != formatted[1]:
            break
    return f"{formatted[0]}, then {formatted[1]}"


def _iter_timings(row: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, float]]]:
    for point in row.get("throughput") or ():
        for name in ("total", "time_to_first_token"):
            yield f"{point['regions_per_image']} {name}", point[name]
        for stage, timing in point["stages"].items():
            yield f"{point['regions_per_image']} {stage}", timing
    if row.get("training_step"):
        yield "step", row["training_step"]
