"""Two runs of a sweep: whether timings are as before, and what scores have changed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any


@dataclass(frozen=True)
class Diff:
    """rows: that both have made. timings: how many were compared; inside: the share of the second's medians that lie
    between the first's least and most; width: the median of (most - least) / median of the first's timings. changed: a
    line for each state or score that is another. only: how many rows the first and the second have alone.
    """

    rows: int
    timings: int
    inside: float
    width: float
    ratio: float  # the median of the second's medians by the first's
    changed: tuple[str, ...]
    only: tuple[int, int]

    def lines(self) -> list[str]:
        """What is to be printed, a line each."""
        told = [f"{self.rows} rows in both, {self.only[0]} only in the first, {self.only[1]} only in the second"]
        if self.timings:
            told.append(
                f"{self.timings} timings: {self.inside:.1%} of the second's medians lie between the first's least and "
                f"most, whose median width is {self.width:.1%}; the second takes {self.ratio:.3f} times as long"
            )
        return [*told, *self.changed]


def diff(first: Sequence[Mapping[str, Any]], second: Sequence[Mapping[str, Any]]) -> Diff:
    rows = [{row["key"]: row for row in each} for each in (first, second)]
    both = [key for key in rows[0] if key in rows[1]]
    inside, widths, ratios, changed = [], [], [], []
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
        values = [{each["name"]: each["value"] for each in row.get("scores") or ()} for row in (one, other)]
        changed += [
            f"{one['label']}: {name} {value}, then {values[1][name]}"
            for name, value in values[0].items()
            if name in values[1] and values[1][name] != value
        ]
    return Diff(
        rows=len(both),
        timings=len(inside),
        inside=sum(inside) / len(inside) if inside else 0.0,
        width=median(widths) if widths else 0.0,
        ratio=median(ratios) if ratios else 0.0,
        changed=tuple(changed),
        only=tuple(len(each) - len(both) for each in rows),
    )


def _timings(row: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, float]]]:
    for point in row.get("curve") or ():
        for name in ("whole", "first_caption"):
            yield f"{point['regions']} {name}", point[name]
        for stage, timing in point["stages"].items():
            yield f"{point['regions']} {stage}", timing
    if row.get("training_step"):
        yield "step", row["training_step"]
