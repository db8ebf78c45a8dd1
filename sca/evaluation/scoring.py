"""Compute scores from prediction records. Nothing else is read, so stored records can be scored again."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, cast

import numpy as np
import sca_registry
from PIL import Image
from sca_registry.contracts import Metric, MetricOutput
from sca_registry.errors import make_unknown_name_error
from sca_registry.plugins import BUILTIN_DISTRIBUTION

from sca.evaluation.bootstrap import (
    MIN_IMAGES,
    ScoreStatistics,
    bootstrap_scores,
    compute_interval,
    has_enough_images,
    make_mean_statistics,
)
from sca.evaluation.predictions import CONTROLS
from sca.evaluation.records import Record, describe_missing_needs, filter_records
from sca.evaluation.tokenization import choose_default_tokenizer
from sca.io.errors import InputError

SHARED_OPTIONS = ("references", "tokenizer")  # options passed to every metric that accepts them
COMPARABLE_RUN_KEYS = (  # settings of the run that two comparable scores must share
    *("dataset", "split", "ground_truth_hash", "prompt_type", "seed", "generation", "proposer"),
)
OPTIONAL_RUN_KEYS = ("search_version", "proposer_hash", "zoom")  # such settings, which only some runs have

ImageLoader = Callable[[Record], Image.Image]
BuiltMetrics = Mapping[str, tuple[Metric, dict[str, Any]]]  # metrics by name, with their values of the shared options


@dataclass(frozen=True)
class Score:
    """One score and the conditions under which it is comparable.

    Attributes:
        name: Name, such as "attributes/color".
        metric: Registered name of the metric.
        value: A fraction (NaN if nothing could be scored) or an integer count.
        ci_low: Lower bound of the 95% bootstrap confidence interval over images; None without an interval.
        ci_high: Upper bound of the interval.
        num_samples: Number of judgments behind the value.
        control: Adversarial control, see `sca.evaluation.predictions.CONTROLS`; None for the regular predictions.
        references: Shared option `references`, if the metric has it.
        tokenizer: Shared option `tokenizer`, if the metric has it.
        implementation: Package and version that computed the score.
        protocol_id: Hash of the settings, except the model, that two comparable scores must share.
        note: Why the value is NaN or has no interval; else empty.
    """

    name: str
    metric: str
    value: float
    ci_low: float | None
    ci_high: float | None
    num_samples: int
    control: str | None
    references: str | None
    tokenizer: str | None
    implementation: str
    protocol_id: str
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values; NaN becomes None."""
        return {key: None if value != value else value for key, value in asdict(self).items()}


@dataclass(frozen=True)
class ScoringResult:
    """Scores of all metrics.

    Attributes:
        scores: All scores.
        skipped_metrics: Metrics that were not computed -> the reason.
        outputs: (metric, control) -> output of the metric.
        details: Metric -> its further facts, if it has any, such as the URL of a server.
    """

    scores: tuple[Score, ...]
    skipped_metrics: dict[str, str]
    outputs: dict[tuple[str, str | None], MetricOutput] = field(repr=False)
    details: dict[str, dict[str, Any]] = field(default_factory=dict)

    def summarize_skipped_metrics(self) -> list[str]:
        """Return at most one line about the metrics that were not computed."""
        count = len(self.skipped_metrics)
        if not count:
            return []
        message = f"{count} metric{'s' * (count > 1)} skipped"
        return [f"{message}; request one with --metrics to see the reason"]

    def get_values(self, control: str | None = None) -> dict[str, float]:
        """Return the values by score name for a control, or for the regular predictions."""
        return {score.name: score.value for score in self.scores if score.control == control}


def score_records(
    records: Sequence[Record],
    metrics: Sequence[str] | None = None,
    metric_options: Mapping[str, Any] | None = None,
    run: Mapping[str, Any] | None = None,
    load_image: ImageLoader | None = None,
    built_metrics: BuiltMetrics | None = None,
) -> ScoringResult:
    """Compute the scores of each metric, for the predictions and for each control.

    Args:
        records: Prediction records.
        metrics: Registered names. Defaults to every metric that can be built and whose inputs are in the records.
        metric_options: `references` and `tokenizer` for every metric that has them, and options of one metric as
            NAME.OPTION (`semantic.model`).
        run: The run header of the predictions file, for the protocol of the scores.
        load_image: Returns the image of a record, for metrics that need it.
        built_metrics: Metrics that `check_metrics` built with these options; others are built.

    Returns:
        The scores, and the reasons for skipped metrics.

    Raises:
        ValueError: An input of a metric in `metrics` is missing.
        RegistryError: An unknown metric or option.
    """
    metric_options = _check_metric_options(metric_options or {}, metrics)
    scores: list[Score] = []
    skipped_metrics: dict[str, str] = {}
    outputs: dict[tuple[str, str | None], MetricOutput] = {}
    details: dict[str, dict[str, Any]] = {}
    recorded_controls = dict.fromkeys(each for record in records if (each := record.get("control")) is not None)
    controls = [
        None,
        *(each for each in CONTROLS if each in recorded_controls),
        *(each for each in recorded_controls if each not in CONTROLS),
    ]
    for name in sca_registry.metrics.list_names() if metrics is None else dict.fromkeys(metrics):
        try:
            metric, shared_options = (built_metrics or {}).get(name) or _build_metric(name, metric_options)
        except sca_registry.RegistryError as error:
            if metrics is not None:
                raise
            skipped_metrics[name] = str(error)
            continue
        includes_controls = getattr(metric, "includes_controls", False)
        for control in [None] if includes_controls else controls:
            scored_records = (
                records if includes_controls else [record for record in records if record.get("control") == control]
            )
            taken_names = [each.name for each in scores if each.control == control]
            reason = _find_missing_inputs(metric, scored_records, load_image)
            if reason is None:
                try:
                    output = _compute_metric(metric, scored_records, load_image, taken_names)
                except ModuleNotFoundError as error:
                    extra = sca_registry.metrics.get_card(name).extra
                    install_hint = f"pip install 'segment-caption-anything[{extra}]'" if extra else "install it"
                    reason = f"needs {error.name}: {install_hint}"
                except InputError as error:  # the records do not contain what the metric measures
                    reason = str(error)
                except Exception as error:  # a failing plugin must not affect other metrics
                    reason = f"failed with {type(error).__name__}: {error}; run `sca check metric {name}` for details"
            if reason is None:
                outputs[name, control] = output
                if facts := getattr(metric, "details", None):
                    details[name] = dict(facts)
                scores += _make_scores(name, control, metric, output, shared_options, run or {})
            elif control is None and metrics is not None:
                raise ValueError(f"metric {name!r}: {reason}")
            elif control is None:
                skipped_metrics[name] = reason
                break
    return ScoringResult(tuple(scores), skipped_metrics, outputs, details)


def check_metrics(metrics: Sequence[str] | None, metric_options: Mapping[str, Any] | None) -> BuiltMetrics:
    """Check metric names, options and installed packages before predicting, as `score_records` does.

    Args:
        metrics: See `score_records`.
        metric_options: See `score_records`.

    Returns:
        The built metrics, so that `score_records` does not load their models again.

    Raises:
        RegistryError: An unknown metric or option, or a metric that cannot be built.
    """
    metric_options = _check_metric_options(metric_options or {}, metrics)
    built_metrics = {}
    for name in metrics or ():
        sca_registry.metrics.check(name)
        built_metrics[name] = _build_metric(name, metric_options)
    return built_metrics


def get_bootstrap_inputs(output: MetricOutput) -> dict[str, tuple[ScoreStatistics, np.ndarray]]:
    """Return the statistics and the image of each row, for every score that can be recomputed on resampled images."""
    if output.per_record is None or "image_id" not in output.per_record:
        return {}
    groups = np.asarray(output.per_record["image_id"])
    inputs = {}
    for name, value in output.values.items():
        if output.statistics and name in output.statistics:
            inputs[name] = ScoreStatistics(*output.statistics[name]), groups
        elif name in output.per_record and isinstance(value, float) and len(groups):
            values = np.asarray(output.per_record[name], dtype=float)
            mean = np.nanmean(values) if (~np.isnan(values)).any() else math.nan
            if math.isclose(mean, value, rel_tol=1e-6, abs_tol=1e-9):
                inputs[name] = make_mean_statistics(values), groups
    return inputs


def compute_protocol_id(*facts: Any) -> str:
    """Return a hash of the facts as twelve hexadecimal digits."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]


def _check_metric_options(metric_options: Mapping[str, Any], metrics: Sequence[str] | None) -> Mapping[str, Any]:
    names = sca_registry.metrics.list_names()
    for key in metric_options:
        metric, _, option = key.partition(".")
        if option and metric not in names:
            raise make_unknown_name_error(f"{key}: unknown metric {metric!r}", metric, names)
        if not option and key not in SHARED_OPTIONS:
            raise make_unknown_name_error(f"unknown metric option {key!r}", key, SHARED_OPTIONS)
        if option and metrics is not None and metric not in metrics:
            raise sca_registry.RegistryError(
                f"{key} is set, and {metric!r} is not among the metrics; add it, or remove the option"
            )
    return metric_options


def _build_metric(name: str, metric_options: Mapping[str, Any]) -> tuple[Metric, dict[str, Any]]:
    """Build a metric; also return its values of the shared options."""
    accepted_options = sca_registry.metrics.load_entry(name).options
    shared_options = {
        key: value for key, value in metric_options.items() if key in SHARED_OPTIONS and key in accepted_options
    }
    own_options = {
        key.partition(".")[2]: value for key, value in metric_options.items() if key.partition(".")[0] == name != key
    }
    if "tokenizer" in accepted_options and not shared_options.get("tokenizer"):
        shared_options["tokenizer"] = choose_default_tokenizer()
    if "references" in accepted_options:
        shared_options.setdefault("references", accepted_options["references"])
    metric = sca_registry.metrics.build(name, **{**shared_options, **own_options})
    return metric, {key: own_options.get(key, shared_options.get(key)) for key in SHARED_OPTIONS}


def _find_missing_inputs(metric: Metric, records: Sequence[Record], load_image: ImageLoader | None) -> str | None:
    if "image" in metric.required_fields and load_image is None:
        return "needs the images, and the predictions do not contain their location"
    return describe_missing_needs(records, [need for need in metric.required_fields if need != "image"])


def _compute_metric(
    metric: Metric, records: Sequence[Record], load_image: ImageLoader | None, taken_names: Sequence[str]
) -> MetricOutput:
    """Compute a metric. Raises TypeError for a wrong output type, ValueError for a duplicate score name."""
    if "image" in metric.required_fields:
        image_metric = cast(Callable[[Sequence[Record], ImageLoader | None], MetricOutput], metric)
        output = image_metric(records, load_image)
    else:
        output = metric(records)
    if not isinstance(output, MetricOutput):
        raise TypeError(f"returned a {type(output).__name__} instead of a MetricOutput")
    for key, value in output.values.items():
        if key in taken_names:
            raise ValueError(f"the score name {key!r} is already used by a different metric; rename the score")
        float(value)
    return output


def _make_scores(
    name: str,
    control: str | None,
    metric: Metric,
    output: MetricOutput,
    shared_options: Mapping[str, Any],
    run: Mapping[str, Any],
) -> list[Score]:
    entry = sca_registry.metrics.load_entry(name)
    default_implementation = "sca" if entry.distribution == BUILTIN_DISTRIBUTION else entry.distribution
    implementation = getattr(metric, "implementation", default_implementation)
    implementation = (
        f"{implementation} {entry.version}".rstrip() if implementation == default_implementation else implementation
    )
    run_facts = {key: run.get(key) for key in COMPARABLE_RUN_KEYS}
    run_facts |= {key: run[key] for key in OPTIONAL_RUN_KEYS if key in run}
    protocol_id = compute_protocol_id(run_facts, name, control, shared_options, implementation)
    bootstrap_inputs = get_bootstrap_inputs(output)
    enough_images = {key: has_enough_images(groups) for key, (_, groups) in bootstrap_inputs.items()}
    intervals = {
        key: compute_interval(bootstrap_scores(*inputs))
        for key, inputs in bootstrap_inputs.items()
        if enough_images[key]
    }
    notes = {
        key: f"no interval over fewer than {MIN_IMAGES} images" for key in bootstrap_inputs if not enough_images[key]
    }
    notes |= output.notes or {}
    counts = {key: _count_judgments(output, key) for key in output.values}
    return [
        Score(
            name=key,
            metric=name,
            value=value if isinstance(value, int) else float(value),
            ci_low=interval[0] if (interval := intervals.get(key)) else None,
            ci_high=interval[1] if interval else None,
            num_samples=counts[key],
            control=control,
            references=shared_options["references"],
            tokenizer=shared_options["tokenizer"],
            implementation=implementation,
            protocol_id=protocol_id,
            note=notes.get(key, ""),
        )
        for key, value in output.values.items()
    ]


def _count_judgments(output: MetricOutput, name: str) -> int:
    """Return the number of judgments behind a score."""
    if output.per_record and name in output.per_record:
        return int((~np.isnan(np.asarray(output.per_record[name], dtype=float))).sum())
    return len(output.per_record["image_id"]) if output.per_record and "image_id" in output.per_record else 0


def count_regions(records: Sequence[Record]) -> int:
    """Return the number of distinct prompted regions."""
    return len({(record["image_id"], record["region_id"]) for record in filter_records(records, ("region_id",))})
