"""Compare two runs on the same regions: score differences, their intervals, and the captions that changed most."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from sca_registry.contracts import MetricOutput

from sca.evaluation.bootstrap import MIN_IMAGES, bootstrap_scores, compute_interval, has_enough_images
from sca.evaluation.evaluate import EvaluationReport, score_file
from sca.evaluation.predictions_file import hash_truth
from sca.evaluation.records import Record
from sca.evaluation.scoring import get_bootstrap_inputs
from sca.io.errors import InputError
from sca.io.paths import distinguish_paths
from sca.io.score_format import PRINT_NOTE, format_interval, format_score
from sca.io.text import format_count

if TYPE_CHECKING:
    from sca.io.terminal import Table

SCORE_PRIORITY = ("cider-d", "attributes/all", "meteor", "rouge-l", "cider", "class/accuracy", "mask-iou/mean")
COMPARED_RUN_KEYS = ("prompt_type", "proposer", "generation", "zoom", "seed", "max_images")


@dataclass(frozen=True)
class ScoreDifference:
    """A score of both runs; `difference` is second minus first, with its 95% bootstrap interval over images."""

    name: str
    first: float
    second: float
    difference: float
    ci_low: float | None
    ci_high: float | None


class RegionChange(NamedTuple):
    """One score of one region in both runs."""

    first: Record
    second: Record
    values: tuple[float, float]

    @property
    def change(self) -> float:
        """Second value minus first value."""
        return self.values[1] - self.values[0]


@dataclass(frozen=True)
class RunComparison:
    """Two runs on the same regions.

    Attributes:
        first: The first run.
        second: The second run.
        differences: Scores that both runs have.
        notes: Differences between the runs other than the model.
        sorted_by: Score that sorts `changes`; None if no region has a score.
        changes: Regions whose score differs, greatest gain first.
    """

    first: EvaluationReport
    second: EvaluationReport
    differences: tuple[ScoreDifference, ...]
    notes: tuple[str, ...]
    sorted_by: str | None
    changes: list[RegionChange] = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values with raw scores; NaN becomes None."""
        return {
            "first": dict(self.first.run),
            "second": dict(self.second.run),
            "differences": [
                {key: None if value != value else value for key, value in asdict(each).items()}
                for each in self.differences
            ],
            "notes": list(self.notes),
        }

    def build_table(self) -> Table:
        """Build a terminal table with scores times 100. A star marks a difference whose interval excludes 0."""
        from sca.io.terminal import Table

        notes = [PRINT_NOTE, "* the confidence interval of the difference excludes 0", *self.notes]
        numeric_columns = (self.first.name, self.second.name, "difference", "95% CI")
        table = Table(
            ("score", *numeric_columns), f"{self.first.title}  →  {self.second.title}", numeric_columns, notes
        )
        for each in self.differences:
            interval, star = format_interval(each.ci_low, each.ci_high, signed=True), ""
            if each.ci_low is not None and each.ci_high is not None:
                star = " *" if each.ci_low > 0 or each.ci_high < 0 else ""
            values = [format_score(value) for value in (each.first, each.second)]
            table.add_row(each.name, *values, f"{format_score(each.difference, signed=True)}{star}", interval)
        return table


def compare_runs(
    first: str | Path,
    second: str | Path,
    metrics: Sequence[str] | None = None,
    metric_options: Mapping[str, Any] | None = None,
    sort_by: str | None = None,
) -> RunComparison:
    """Score two predictions files with the same settings and compare them.

    Args:
        first: Predictions file or folder of the first run.
        second: Predictions file or folder of a second run on the same regions.
        metrics: See `sca.evaluation.scoring.score_records`.
        metric_options: See `sca.evaluation.scoring.score_records`.
        sort_by: Score that ranks the regions. Defaults to the most informative one available.

    Returns:
        The paired differences of the scores, and the ranked regions.

    Raises:
        InputError: The runs have different regions or ground truth.
        ValueError: The score `sort_by` does not exist.
    """
    reports = label_reports([score_file(path, metrics, metric_options) for path in (first, second)])
    _check_same_regions(reports, (str(first), str(second)))
    share_scores = [
        {name: value for name, value in report.scores.items() if isinstance(value, float)} for report in reports
    ]
    bootstrap_inputs = [collect_bootstrap_inputs(report) for report in reports]
    differences = []
    for name in (name for name in share_scores[0] if name in share_scores[1]):
        first_value, second_value = (share[name] for share in share_scores)
        bounds = None
        if all(name in each for each in bootstrap_inputs):
            (first_statistics, first_groups), (second_statistics, second_groups) = (
                each[name] for each in bootstrap_inputs
            )
            # the bootstrap pairs the same images
            has_same_images = np.array_equal(np.unique(first_groups), np.unique(second_groups))
            if has_same_images and has_enough_images(first_groups):
                bounds = compute_interval(
                    bootstrap_scores(second_statistics, second_groups)
                    - bootstrap_scores(first_statistics, first_groups)
                )
        low, high = bounds or (None, None)
        differences.append(ScoreDifference(name, first_value, second_value, second_value - first_value, low, high))
    region_outputs = [collect_region_outputs(report) for report in reports]
    sort_by = choose_score(sort_by, [name for name in region_outputs[0] if name in region_outputs[1]])
    changes = (
        _collect_changes(reports, [get_region_scores(each[sort_by], sort_by) for each in region_outputs], sort_by)
        if sort_by
        else []
    )
    first_report, second_report = reports
    remarks = _describe_run_differences(reports)
    return RunComparison(first_report, second_report, tuple(differences), remarks, sort_by, changes)


def label_reports(reports: Sequence[EvaluationReport]) -> list[EvaluationReport]:
    """Label each report with its model. Reports of the same model also get the distinguishing part of their paths."""
    by_model: dict[str, list[int]] = {}
    for index, report in enumerate(reports):
        by_model.setdefault(report.run.get("model", "predictions"), []).append(index)
    labeled_reports = list(reports)
    for model, indices in by_model.items():
        suffixes = distinguish_paths([reports[index].path or Path() for index in indices]) if len(indices) > 1 else [""]
        for index, suffix in zip(indices, suffixes, strict=True):
            labeled_reports[index] = replace(reports[index], label=f"{model} ({suffix})" if suffix else model)
    return labeled_reports


def choose_score(score_name: str | None, available: Sequence[str]) -> str | None:
    """Return the requested score, or by default the first available one.

    Args:
        score_name: Requested score; None for the default.
        available: Available scores, the most informative first.

    Returns:
        The name of the score; None if none is available.

    Raises:
        ValueError: The requested score is not available.
    """
    if score_name is not None and score_name not in available:
        raise ValueError(f"no score {score_name!r} of single regions; choose from {', '.join(available) or 'none'}")
    return score_name or next(iter(available), None)


def collect_region_outputs(report: EvaluationReport) -> dict[str, MetricOutput]:
    """Return the scores with one row per region and the output of their metric, most informative first."""
    outputs: dict[str, MetricOutput] = {}
    for (_, control), output in report.scoring.outputs.items():
        if control is None and output.per_record is not None and "region_id" in output.per_record:
            region_keys = np.stack([output.per_record["image_id"], output.per_record["region_id"]])
            if len(np.unique(region_keys, axis=1)[0]) == region_keys.shape[1]:
                outputs |= {name: output for name, v in output.values.items() if name in output.per_record and v == v}
    return {
        name: outputs[name]
        for name in (*(n for n in SCORE_PRIORITY if n in outputs), *(n for n in outputs if n not in SCORE_PRIORITY))
    }


def get_region_scores(output: MetricOutput, name: str) -> dict[tuple[int, int], float]:
    """Return the values of a score by (image_id, region_id), without NaN."""
    assert output.per_record is not None
    keys = zip(output.per_record["image_id"].tolist(), output.per_record["region_id"].tolist(), strict=True)
    values = np.asarray(output.per_record[name], dtype=float).tolist()
    return {key: value for key, value in zip(keys, values, strict=True) if value == value}


def find_scored_records(report: EvaluationReport, score_name: str) -> dict[tuple[int, int], Record]:
    """Return the record behind each region's score by (image_id, region_id)."""
    task = "recognition" if score_name.startswith("class") or score_name.endswith("/recognition") else "caption"
    records: dict[tuple[int, int], Record] = {}
    for record in report.records:
        key = record["image_id"], record["region_id"]
        if record["control"] is None and (record["task"] == task or key not in records):
            records[key] = record
    return records


def _check_same_regions(reports: Sequence[EvaluationReport], paths: Sequence[str]) -> None:
    record_keys = [
        {(r["image_id"], r["region_id"], r["task"]) for r in each.records if r["control"] is None} for each in reports
    ]
    for name, unmatched_keys in zip(
        paths, (record_keys[0] - record_keys[1], record_keys[1] - record_keys[0]), strict=True
    ):
        if unmatched_keys:
            image, region, task = min(unmatched_keys, key=str)
            raise InputError(
                f"{format_count(len(unmatched_keys), 'prediction')} in {name} only (first: region {region} of image "
                f"{image}, task {task}); compare runs on the same regions"
            )
    if hash_truth(reports[0].records) != hash_truth(reports[1].records):
        raise InputError(
            f"{paths[0]} and {paths[1]} have different ground truth; compare runs on the same version of the dataset"
        )


def _describe_run_differences(reports: Sequence[EvaluationReport]) -> tuple[str, ...]:
    runs = [report.run for report in reports]
    differing = [key for key in COMPARED_RUN_KEYS if runs[0].get(key) != runs[1].get(key)]
    notes = [f"{key} differs: {runs[0].get(key)!r} and {runs[1].get(key)!r}" for key in differing]
    if len({record["image_id"] for record in reports[0].records}) < MIN_IMAGES:
        notes.append(f"no intervals over fewer than {MIN_IMAGES} images")
    return tuple(notes)


def collect_bootstrap_inputs(report: EvaluationReport) -> dict[str, Any]:
    """Return the arguments of `bootstrap_scores` for every score that can be resampled."""
    return {
        name: inputs
        for (_, control), output in report.scoring.outputs.items()
        if control is None
        for name, inputs in get_bootstrap_inputs(output).items()
    }


def _collect_changes(
    reports: Sequence[EvaluationReport], values: Sequence[Mapping[tuple[int, int], float]], score_name: str
) -> list[RegionChange]:
    """Return the regions whose value differs, greatest gain first."""
    scored_records = [find_scored_records(report, score_name) for report in reports]
    changes = [
        RegionChange(scored_records[0][key], scored_records[1][key], (value, values[1][key]))
        for key, value in values[0].items()
        if key in values[1] and values[1][key] != value
    ]
    return sorted(changes, key=lambda each: -each.change)
