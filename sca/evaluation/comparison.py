"""Two runs on the same regions: how much better the one is, how sure that is, and which answers changed most."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from sca_registry.contracts import MetricOutput

from sca.evaluation.evaluate import Report, score_file
from sca.evaluation.intervals import MIN_IMAGES, has_enough_images, interval, resample
from sca.evaluation.journal import truth_hash
from sca.evaluation.records import Record
from sca.evaluation.scoring import resamplable
from sca.io.errors import InputError
from sca.io.paths import distinguish_paths

if TYPE_CHECKING:
    from sca.io.terminal import Table

TELLING = ("cider-d", "attributes/all", "meteor", "rouge-l", "cider", "class/count", "mask-iou/mean")
PROTOCOL = ("prompt", "proposer", "generation", "seed", "limit")


@dataclass(frozen=True)
class Difference:
    """A score of both runs; `difference` is second less first, with its 95 % interval over the choice of images."""

    name: str
    first: float
    second: float
    difference: float
    low: float | None
    high: float | None


class Judged(NamedTuple):
    """One region by one score, in both runs."""

    first: Record
    second: Record
    values: tuple[float, float]

    @property
    def change(self) -> float:
        return self.values[1] - self.values[0]


@dataclass(frozen=True)
class Comparison:
    """remarks: what differs besides the model. by: the score that `judged` is by, the greatest gain first."""

    first: Report
    second: Report
    differences: tuple[Difference, ...]
    remarks: tuple[str, ...]
    by: str | None
    judged: list[Judged] = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        return {
            "first": dict(self.first.run),
            "second": dict(self.second.run),
            "differences": [
                {key: None if value != value else value for key, value in asdict(each).items()}
                for each in self.differences
            ],
            "remarks": list(self.remarks),
        }

    def table(self) -> Table:
        """For a terminal. A difference whose interval does not hold 0 is marked with a star."""
        from sca.io.terminal import Table

        below = ["* the interval of the difference does not hold 0", *self.remarks]
        figures = (self.first.name, self.second.name, "difference", "95 % interval")
        table = Table(("score", *figures), f"{self.first.title}  →  {self.second.title}", figures, below)
        for each in self.differences:
            between, star = "", ""
            if each.low is not None and each.high is not None:
                between = f"{each.low:+.3f} to {each.high:+.3f}"
                star = " *" if each.low > 0 or each.high < 0 else ""
            values = [f"{value:.3f}" for value in (each.first, each.second)]
            table.add_row(each.name, *values, f"{each.difference:+.3f}{star}", between)
        return table


def compare(
    first: str | Path,
    second: str | Path,
    metrics: Sequence[str] | None = None,
    settings: Mapping[str, Any] | None = None,
    by: str | None = None,
) -> Comparison:
    """Scores two predictions files alike and subtracts, image by image.

    metrics, settings: see `sca.evaluation.scoring.score`. by: the score by which the answers that changed most are
    found (default: the most telling that there is).

    InputError unless both were asked about the same regions with the same truth; ValueError if there is no score
    `by`.
    """
    reports = label_reports([score_file(path, metrics, settings) for path in (first, second)])
    _check(reports, (str(first), str(second)))
    shares = [{name: value for name, value in report.scores.items() if isinstance(value, float)} for report in reports]
    sums = [sums_of(report) for report in reports]
    differences = []
    for name in (name for name in shares[0] if name in shares[1]):
        values = [share[name] for share in shares]
        between = None
        if all(name in each for each in sums):
            (ours, groups), (theirs, others) = (each[name] for each in sums)
            same = np.array_equal(np.unique(groups), np.unique(others))  # then the same draws are the same images
            if same and has_enough_images(groups):
                between = interval(resample(theirs, others) - resample(ours, groups))
        differences.append(Difference(name, *values, values[1] - values[0], *(between or (None, None))))
    single = [judgements(report) for report in reports]
    by = chosen(by, [name for name in single[0] if name in single[1]])
    judged = _judged(reports, [single_scores(each[by], by) for each in single], by) if by else []
    return Comparison(*reports, tuple(differences), _remarks(reports), by, judged)


def label_reports(reports: Sequence[Report]) -> list[Report]:
    """Label each report by its model, and reports of the same model also by what distinguishes their paths."""
    by_model: dict[str, list[int]] = {}
    for index, report in enumerate(reports):
        by_model.setdefault(report.run.get("model", "predictions"), []).append(index)
    labeled = list(reports)
    for model, indices in by_model.items():
        parts = distinguish_paths([reports[index].path or Path() for index in indices]) if len(indices) > 1 else [""]
        for index, part in zip(indices, parts, strict=True):
            labeled[index] = replace(reports[index], label=f"{model} ({part})" if part else model)
    return labeled


def chosen(by: str | None, known: Sequence[str]) -> str | None:
    """The score that was asked for, or the first there is. ValueError if it is not among those that there are."""
    if by is not None and by not in known:
        raise ValueError(f"no score {by!r} of single regions: there are {', '.join(known) or 'none'}")
    return by or next(iter(known), None)


def judgements(report: Report) -> dict[str, MetricOutput]:
    """The scores that single regions have, each with the metric's arrays; the most telling first."""
    found = {}
    for (_, control), scores in report.scored.metrics.items():
        if control is None and scores.per_record is not None and "region_id" in scores.per_record:
            places = np.stack([scores.per_record["image_id"], scores.per_record["region_id"]])
            if len(np.unique(places, axis=1)[0]) == places.shape[1]:
                found |= {name: scores for name, v in scores.values.items() if name in scores.per_record and v == v}
    return {
        name: found[name] for name in (*(n for n in TELLING if n in found), *(n for n in found if n not in TELLING))
    }


def single_scores(scores: MetricOutput, name: str) -> dict[tuple[int, int], float]:
    """A score by (image_id, region_id), of those regions that have it."""
    assert scores.per_record is not None
    keys = zip(scores.per_record["image_id"].tolist(), scores.per_record["region_id"].tolist(), strict=True)
    values = np.asarray(scores.per_record[name], dtype=float).tolist()
    return {key: value for key, value in zip(keys, values, strict=True) if value == value}


def answers(report: Report, score: str) -> dict[tuple[int, int], Record]:
    """The record that a score is about, by (image_id, region_id)."""
    task = "recognition" if score.startswith("class") or score.endswith("/recognition") else "caption"
    found = {}
    for record in report.records:
        key = record["image_id"], record["region_id"]
        if record["control"] is None and (record["task"] == task or key not in found):
            found[key] = record
    return found


def _check(reports: Sequence[Report], names: Sequence[str]) -> None:
    asked = [
        {(r["image_id"], r["region_id"], r["task"]) for r in each.records if r["control"] is None} for each in reports
    ]
    for name, only in zip(names, (asked[0] - asked[1], asked[1] - asked[0]), strict=True):
        if only:
            image, region, task = min(only, key=str)
            raise InputError(
                f"{len(only)} answers are only in {name}, the first for region {region} of image {image} ({task}): "
                "runs are compared on the same regions"
            )
    if truth_hash(reports[0].records) != truth_hash(reports[1].records):
        raise InputError(
            f"{names[0]} and {names[1]} have the same regions with another truth: two datasets, or two versions"
        )


def _remarks(reports: Sequence[Report]) -> tuple[str, ...]:
    runs = [report.run for report in reports]
    differing = [key for key in PROTOCOL if runs[0].get(key) != runs[1].get(key)]
    remarks = [f"{key} differs: {runs[0].get(key)!r} and {runs[1].get(key)!r}" for key in differing]
    if len({record["image_id"] for record in reports[0].records}) < MIN_IMAGES:
        remarks.append(f"no intervals over fewer than {MIN_IMAGES} images")
    return tuple(remarks)


def sums_of(report: Report) -> dict[str, Any]:
    """Of each score that is a mean over regions, what `resample` takes."""
    return {
        name: made
        for (_, control), scores in report.scored.metrics.items()
        if control is None
        for name, made in resamplable(scores).items()
    }


def _judged(reports: Sequence[Report], values: Sequence[Mapping[tuple[int, int], float]], by: str) -> list[Judged]:
    """Regions with another value, the greatest gain first."""
    told = [answers(report, by) for report in reports]
    judged = [
        Judged(told[0][key], told[1][key], (value, values[1][key]))
        for key, value in values[0].items()
        if key in values[1] and values[1][key] != value
    ]
    return sorted(judged, key=lambda each: -each.change)
