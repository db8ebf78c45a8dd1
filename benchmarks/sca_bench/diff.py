"""Two runs of a sweep: whether timings are as before, and what scores have changed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, median
from typing import Any

from sca_bench.summary import name_score

MAX_DIGITS = 17  # by which any two floats differ


@dataclass(frozen=True)
class Diff:
    """rows: that both have made. timings: how many were compared; inside: the share of the second's medians that lie
    between the first's least and most; width: the median of (most - least) / median of the first's timings. changed: a
    line for each state or score that is another. scores: a line about each score, over all rows. only: how many rows
    the first and the second have alone.
    """

    rows: int
    timings: int
    inside: float
    width: float
    ratio: float  # the median of the second's medians by the first's
    changed: tuple[str, ...]
    scores: tuple[str, ...]
    only: tuple[int, int]

    def lines(self) -> list[str]:
        """What is to be printed, a line each."""
        told = [f"{self.rows} rows in both, {self.only[0]} only in the first, {self.only[1]} only in the second"]
        if self.timings:
            told.append(
                f"{self.timings} timings: {self.inside:.1%} of the second's medians lie between the first's least and "
                f"most, whose median width is {self.width:.1%}; the second takes {self.ratio:.3f} times as long"
            )
        return [*told, *self.scores, *self.changed]


def diff(first: Sequence[Mapping[str, Any]], second: Sequence[Mapping[str, Any]]) -> Diff:
    rows = [{row["key"]: row for row in each} for each in (first, second)]
    both = [key for key in rows[0] if key in rows[1]]
    inside, widths, ratios, changed = [], [], [], []
    scores: dict[str, list[tuple[float | None, float | None]]] = {}
    for key in both:
        one, other = rows[0][key], rows[1][key]
        if one["state"] != other["state"]:
            changed.append(f"{one['label']}: {one['state']}, then {other['state']}")
        before, after = dict(_timings(one)), dict(_timings(other))
        for name in before.keys() & after.keys():
            inside.append(before[name]["low"] <= after[name]["median"] <= before[name]["high"])
            if before[name]["median"]:
                widths.append((before[name]["high"] - before[name]["low"]) / before[name]["median"])
                ratios.append(after[name]["median"] / before[name]["median"])
        pairs = _pair_scores(one, other)
        changed += [
            f"{one['label']}: {name} {_show_change(*pair)}" for name, pair in pairs.items() if pair[0] != pair[1]
        ]
        for name, pair in pairs.items():
            scores.setdefault(name, []).append(pair)
    return Diff(
        rows=len(both),
        timings=len(inside),
        inside=sum(inside) / len(inside) if inside else 0.0,
        width=median(widths) if widths else 0.0,
        ratio=median(ratios) if ratios else 0.0,
        changed=tuple(changed),
        scores=tuple(_summarize_score(name, pairs) for name, pairs in scores.items()),
        only=tuple(len(each) - len(both) for each in rows),
    )


def _pair_scores(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, tuple[float | None, float | None]]:
    """Return the values of each score in both rows, None where a row lacks it."""
    one, other = (
        {name_score(each): each["value"] for each in scores}
        for scores in (row.get("scores") or () for row in (first, second))
    )
    return {name: (one.get(name), other.get(name)) for name in {**one, **other}}


def _summarize_score(name: str, pairs: Sequence[tuple[float | None, float | None]]) -> str:
    """Return one line about a score: its means, over the rows in which both runs have it, and how many differ."""
    both = [(first, second) for first, second in pairs if first is not None and second is not None]
    alone = len(pairs) - len(both)
    missing = f"; missing in {alone} of them" if alone else ""
    if not both:
        return f"{name}: no row has it in both runs"
    before, after = (mean(values) for values in zip(*both, strict=True))
    differing = sum(first != second for first, second in pairs)
    return f"{name}: {differing} of {len(pairs)} rows differ, mean {_show_change(before, after)}{missing}"


def _show_change(before: float | None, after: float | None) -> str:
    """Return two values with at least 4 digits, and as many more as it takes for values that differ to look it."""
    for digits in range(4, MAX_DIGITS + 1):
        shown = ["nothing" if value is None else f"{value:.{digits}g}" for value in (before, after)]
        if before == after or shown[0] != shown[1]:
            break
    return f"{shown[0]}, then {shown[1]}"


def _timings(row: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, float]]]:
    for point in row.get("curve") or ():
        for name in ("whole", "first_caption"):
            yield f"{point['regions']} {name}", point[name]
        for stage, timing in point["stages"].items():
            yield f"{point['regions']} {stage}", timing
    if row.get("training_step"):
        yield "step", row["training_step"]
