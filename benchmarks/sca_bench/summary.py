"""Summarize the rows of a sweep: one summary per combination, over its seeds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, median, stdev
from typing import Any

from sca_registry.overrides import MODEL_COMPONENTS

from sca_bench.row import SweepRow

QUALITY_SCORES = ("cider-d", "attributes/all", "meteor", "class/accuracy", "mask-iou/mean", "densecap-map")


@dataclass(frozen=True)
class CombinationSummary:
    """Results of one combination over its seeds; None where nothing was measured.

    `quality` is the mean score over seeds. `ci_low` and `ci_high` are the outermost bounds of the 95% bootstrap
    intervals over images. `seed_scores` contains the score of each seed, and `scores` the mean of every score over
    seeds, with controls as "NAME, CONTROL".
    """

    label: str
    rows: Sequence[Mapping[str, Any]]
    parameters: int | None
    trainable_parameters: int | None
    flops: Mapping[str, float] | None  # by stage, for the largest number of regions
    quality: float | None
    ci_low: float | None
    ci_high: float | None
    seed_scores: tuple[float, ...]
    scores: Mapping[str, float]
    regions_per_second: Mapping[int, float]  # regions per image -> regions per second, image encoding included
    stages: Mapping[str, float]  # seconds by stage at the largest number of regions
    time_to_first_token: float | None  # seconds at the smallest number of regions
    training_step: float | None  # seconds
    memory: int | None  # bytes: measured peak while captioning, else as estimated
    cost: float | None  # mean seconds of a row, from the start of its process
    command: str

    @classmethod
    def from_rows(cls, rows: Sequence[Mapping[str, Any]], score_name: str | None) -> CombinationSummary:
        """Summarize rows that differ only in their seed."""
        first = rows[0]
        scores = [
            each
            for row in rows
            for each in row.get("scores") or ()
            if (each["name"], each["control"]) == (score_name, None)
        ]
        values = [each["value"] for each in scores if each["value"] is not None]
        bounds = [(each["ci_low"], each["ci_high"]) for each in scores if each["ci_low"] is not None]
        throughput_curves = [row["throughput"] for row in rows if row.get("throughput")]
        region_counts = sorted({point["regions_per_image"] for curve in throughput_curves for point in curve})
        largest_points = [
            point for curve in throughput_curves for point in curve if point["regions_per_image"] == region_counts[-1]
        ]
        smallest_points = [
            point for curve in throughput_curves for point in curve if point["regions_per_image"] == region_counts[0]
        ]
        step_seconds = [row["training_step"]["median"] for row in rows if row.get("training_step")]
        memory_bytes = [
            row["memory"].get("captioning") or row["memory"].get("estimated") for row in rows if row.get("memory")
        ]
        memory_bytes = [each for each in memory_bytes if each is not None]
        parameters = first.get("parameters") or {}
        return cls(
            label=first["label"].rpartition(" seed=")[0],
            rows=rows,
            parameters=parameters.get("total"),
            trainable_parameters=parameters.get("trainable"),
            flops=first.get("flops"),
            quality=average_scores(values) if values else None,
            ci_low=min(low for low, _ in bounds) if bounds else None,
            ci_high=max(high for _, high in bounds) if bounds else None,
            seed_scores=tuple(values),
            scores=_average_scores(rows),
            regions_per_second={
                regions: median(
                    p["regions_per_second"]
                    for curve in throughput_curves
                    for p in curve
                    if p["regions_per_image"] == regions
                )
                for regions in region_counts
            },
            stages={
                stage: median(point["stages"][stage]["median"] for point in largest_points)
                for stage in (largest_points[0]["stages"] if largest_points else ())
            },
            time_to_first_token=median(point["time_to_first_token"]["median"] for point in smallest_points)
            if smallest_points
            else None,
            training_step=median(step_seconds) if step_seconds else None,
            memory=max(memory_bytes) if memory_bytes else None,
            cost=mean(costs) if (costs := [cost for row in rows if (cost := get_cost(row)) is not None]) else None,
            command=SweepRow(first["config"]).command,
        )

    @property
    def config(self) -> Mapping[str, Any]:
        """Configuration of the first row."""
        return self.rows[0]["config"]

    @property
    def seed_std(self) -> float | None:
        """Sample standard deviation of the score over seeds; None for a single seed."""
        return stdev(self.seed_scores) if len(self.seed_scores) > 1 else None

    @property
    def max_regions_per_second(self) -> float | None:
        """Regions per second at the largest number of regions."""
        return self.regions_per_second[max(self.regions_per_second)] if self.regions_per_second else None


def get_own_seconds(row: Mapping[str, Any]) -> float | None:
    """Return the seconds of a row from the start of its process; None if they are unknown."""
    seconds = row.get("seconds") or {}
    own_seconds: float | None = seconds.get("process", seconds.get("total"))
    return own_seconds


def get_cost(row: Mapping[str, Any]) -> float | None:
    """Return the seconds of a row from the start of its process, and those of training that it reused from other rows.

    Args:
        row: Row of the results file.

    Returns:
        The seconds; None if they are unknown.
    """
    own_seconds = get_own_seconds(row)
    return None if own_seconds is None else own_seconds + row["seconds"].get("reused_training", 0.0)


def summarize_rows(rows: Iterable[Mapping[str, Any]], score_name: str | None) -> list[CombinationSummary]:
    """Summarize every combination with a finished row, best first and those without a score last."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        if row["state"] == "done":
            groups.setdefault(SweepRow(row["config"]).combination_key, []).append(row)
    summaries = [
        CombinationSummary.from_rows(sorted(each, key=lambda row: row["config"]["seed"]), score_name)
        for each in groups.values()
    ]
    return sorted(summaries, key=lambda line: (-(line.quality if line.quality is not None else -1), line.label))


def get_score(row: Mapping[str, Any], name: str | None) -> float | None:
    """Return the value of a score of a row without a control; None if it has none."""
    scores = row.get("scores") or ()
    return next((each["value"] for each in scores if (each["name"], each["control"]) == (name, None)), None)


def list_scores(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the names of the scores that are a number for some row."""
    scores = [each for row in rows for each in row.get("scores") or ()]
    return list(dict.fromkeys(each["name"] for each in scores if each["value"] is not None))


def choose_quality_score(rows: Iterable[Mapping[str, Any]]) -> str | None:
    """Return the most informative score that is a number for some row."""
    available = list_scores(rows)
    return next((name for name in QUALITY_SCORES if name in available), next(iter(available), None))


def find_varying_settings(configs: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Return the settings that differ between configurations, each with its value in every configuration.

    Settings are the fields of the model, such as "encoder", and fields of other tables, such as "train.steps".
    """
    tables = [_list_settings(config) for config in configs]
    names = dict.fromkeys(name for table in tables for name in table)
    columns = {name: [table.get(name, "") for table in tables] for name in names}
    return {name: column for name, column in columns.items() if len(set(column)) > 1}


def find_shared_components(configs: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Return the components that are the same in all configurations."""
    tables = [_list_settings(config) for config in configs]
    components = {name: {table.get(name, "") for table in tables} for name in MODEL_COMPONENTS}
    return {name: value for name, values in components.items() for value in values if len(values) == 1 and value}


def _list_settings(config: Mapping[str, Any]) -> dict[str, str]:
    settings = {name: format_setting(value) for name, value in config.get("model", {}).items()}
    for name, value in config.items():
        if name == "captioner":
            settings[name] = format_setting(value)
        elif isinstance(value, Mapping) and name != "model":
            settings |= {f"{name}.{key}": format_setting(each) for key, each in value.items()}
        elif name not in ("model", "seed"):
            settings[name] = format_setting(value)
    return settings


def format_setting(value: Any) -> str:
    """Format a value for a table; a component becomes NAME(OPTION=VALUE,...)."""
    if isinstance(value, Mapping):
        options = ",".join(f"{key}={format_setting(each)}" for key, each in value.items() if key != "name")
        name = str(value.get("name", ""))
        return f"{name}({options})" if name and options else name or options
    return " ".join(map(format_setting, value)) if isinstance(value, list) else "" if value is None else str(value)


def format_score_name(score: Mapping[str, Any]) -> str:
    """Return the name of a score in tables; that of a control is "NAME, CONTROL"."""
    return f"{score['name']}, {score['control']}" if score["control"] else str(score["name"])


def _average_scores(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    values: dict[str, list[float]] = {}
    for score in (score for row in rows for score in row.get("scores") or ()):
        if score["value"] is not None:
            values.setdefault(format_score_name(score), []).append(score["value"])
    return {name: average_scores(each) for name, each in values.items()}


def average_scores(values: Sequence[float]) -> float:
    """Return the mean of scores; the mean of counts is rounded to a count."""
    average = mean(values)
    return round(average) if all(isinstance(value, int) for value in values) else average


def find_pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Return the indices of points that no other point dominates (larger is better), by descending first coordinate."""
    best_second = float("-inf")
    front_indices = []
    for index in sorted(range(len(points)), key=lambda index: (-points[index][0], -points[index][1])):
        if points[index][1] > best_second:
            best_second = points[index][1]
            front_indices.append(index)
    return front_indices
