"""From records to scores: nothing else is read, so that records that were stored can be scored again."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import sca_registry
from PIL import Image
from sca_registry.contracts import Metric, MetricOutput
from sca_registry.plugins import BUILTIN

from sca.evaluation.intervals import MIN_IMAGES, Sums, has_enough_images, interval, mean_of, resample
from sca.evaluation.predictions import CONTROLS
from sca.evaluation.records import Record, lack, meeting
from sca.evaluation.texts import default_tokenizer

SHARED = ("references", "tokenizer")  # options that go to every metric that has them
PLACES = ("image_id", "region_id")

Images = Callable[[Record], Image.Image]


@dataclass(frozen=True)
class Score:
    """One number, and what it has to be compared with.

    name: such as "attributes/colour". value: a share (NaN where nothing was there to be counted) or a count. low, high:
    the 95 % interval over the choice of images, where there is one. n: how many judgements it is made of. control: what
    was done to mislead, if something was. references, tokenizer: where the metric takes them. implementation: whose
    code, with its version. protocol: short for all that two scores must have in common to be compared, the model aside.
    note: why the value is not a number, or why it has no interval; empty otherwise.
    """

    name: str
    metric: str
    value: float
    low: float | None
    high: float | None
    n: int
    control: str | None
    references: str | None
    tokenizer: str | None
    implementation: str
    protocol: str
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON; NaN is None."""
        return {key: None if value != value else value for key, value in asdict(self).items()}


@dataclass(frozen=True)
class Scored:
    """Every score, why metrics were left out, and what each metric gave: by its name, or by (name, control)."""

    scores: tuple[Score, ...]
    left_out: dict[str, str]
    metrics: dict[tuple[str, str | None], MetricOutput] = field(repr=False)

    def summarize_left_out(self) -> list[str]:
        """Return at most one line about the metrics that were not computed; naming one states its reason."""
        count = len(self.left_out)
        if not count:
            return []
        counted = f"{count} metric{'s' * (count > 1)} left out"
        return [f"{counted}; see `sca list metrics`, or name one with --metrics for the reason"]

    def values(self, control: str | None = None) -> dict[str, float]:
        return {score.name: score.value for score in self.scores if score.control == control}


def score(
    records: Sequence[Record],
    metrics: Sequence[str] | None = None,
    settings: Mapping[str, Any] | None = None,
    run: Mapping[str, Any] | None = None,
    images: Images | None = None,
) -> Scored:
    """The scores of each metric, for what was asked and for each control that was asked besides.

    metrics: registered names; each must find what it needs in the records, or ValueError says what is missing. None:
    every registered metric that does, and that can be built. settings: `references` and `tokenizer` for every metric
    that has them, and options of one by NAME.OPTION (`semantic.model`). run: what the protocol has besides, as a
    predictions file says it. images: the picture of a record, for metrics that look at it.

    RegistryError for a name or an option that there is not.
    """
    settings = _checked(settings or {}, metrics)
    scores: list[Score] = []
    left_out: dict[str, str] = {}
    found: dict[tuple[str, str | None], MetricOutput] = {}
    given = dict.fromkeys(each for record in records if (each := record.get("control")) is not None)
    controls = [None, *(each for each in CONTROLS if each in given), *(each for each in given if each not in CONTROLS)]
    for name in sca_registry.metrics.names() if metrics is None else dict.fromkeys(metrics):
        try:
            metric, used = _built(name, settings)
        except sca_registry.RegistryError as error:
            if metrics is not None:
                raise
            left_out[name] = str(error)
            continue
        whole = getattr(metric, "whole", False)
        for control in [None] if whole else controls:
            about = records if whole else [record for record in records if record.get("control") == control]
            taken = [each.name for each in scores if each.control == control]
            reason = _lack(metric, about, images)
            if reason is None:
                try:
                    told = _scores(metric, about, images, taken)
                except ModuleNotFoundError as error:
                    extra = sca_registry.metrics.card(name).extra
                    install = f"pip install 'segment-caption-anything[{extra}]'" if extra else "install it"
                    reason = f"needs {error.name}: {install}"
                except Exception as error:  # a plugin's metric that fails costs its own scores and nothing else
                    reason = f"it failed: {type(error).__name__}: {error}; `sca check metric {name}` may tell more"
            if reason is None:
                found[name, control] = told
                scores += _rows(name, control, metric, told, used, run or {})
            elif control is None and metrics is not None:
                raise ValueError(f"metric {name!r}: {reason}")
            elif control is None:
                left_out[name] = reason
                break
    return Scored(tuple(scores), left_out, found)


def ready(metrics: Sequence[str] | None, settings: Mapping[str, Any] | None) -> None:
    """Raises what `score` would raise of the names, the options and what is installed, before hours are spent on
    answers.
    """
    settings = _checked(settings or {}, metrics)
    for name in metrics or ():
        sca_registry.metrics.check(name)
        _built(name, settings)


def resamplable(scores: MetricOutput) -> dict[str, tuple[Sums, np.ndarray]]:
    """The scores whose value for other images can be told: what they are made of, and the image of each row."""
    if scores.per_record is None or "image_id" not in scores.per_record:
        return {}
    groups = np.asarray(scores.per_record["image_id"])
    found = {}
    for name, value in scores.values.items():
        if scores.statistics and name in scores.statistics:
            found[name] = Sums(*scores.statistics[name]), groups
        elif name in scores.per_record and isinstance(value, float) and len(groups):
            values = np.asarray(scores.per_record[name], dtype=float)
            mean = np.nanmean(values) if (~np.isnan(values)).any() else math.nan
            if math.isclose(mean, value, rel_tol=1e-6, abs_tol=1e-9):
                found[name] = mean_of(values), groups
    return found


def protocol_id(*facts: Any) -> str:
    """Twelve hexadecimal digits that differ where the facts do."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]


def _checked(settings: Mapping[str, Any], metrics: Sequence[str] | None) -> Mapping[str, Any]:
    names = sca_registry.metrics.names()
    for key in settings:
        metric, _, option = key.partition(".")
        if option and metric not in names:
            raise sca_registry.messages.unknown(f"no metric {metric!r} for {key}", metric, names)
        if not option and key not in SHARED:
            raise sca_registry.messages.unknown(f"scores have no option {key!r}", key, SHARED)
        if option and metrics is not None and metric not in metrics:
            raise sca_registry.RegistryError(f"{key} is given, and {metric!r} is not among the metrics")
    return settings


def _built(name: str, settings: Mapping[str, Any]) -> tuple[Metric, dict[str, Any]]:
    """A metric, and what it was given of the options that all share."""
    known = sca_registry.metrics.describe(name).options
    shared = {key: value for key, value in settings.items() if key in SHARED and key in known}
    own = {key.partition(".")[2]: value for key, value in settings.items() if key.partition(".")[0] == name != key}
    if "tokenizer" in known and not shared.get("tokenizer"):
        shared["tokenizer"] = default_tokenizer()
    if "references" in known:
        shared.setdefault("references", known["references"])
    metric = sca_registry.metrics.build(name, **{**shared, **own})
    return metric, {key: own.get(key, shared.get(key)) for key in SHARED}


def _lack(metric: Metric, records: Sequence[Record], images: Images | None) -> str | None:
    if "image" in metric.needs and images is None:
        return "needs the pictures, and the predictions do not say where they are"
    return lack(records, [need for need in metric.needs if need != "image"])


def _scores(metric: Metric, records: Sequence[Record], images: Images | None, taken: Sequence[str]) -> MetricOutput:
    """What a metric gives. Raises TypeError or ValueError for what is no `Scores`, or has another metric's names."""
    found = metric(records, images) if "image" in metric.needs else metric(records)
    if not isinstance(found, MetricOutput):
        raise TypeError(f"it gives a {type(found).__name__}, not Scores")
    for key, value in found.values.items():
        if key in taken:
            raise ValueError(f"the score {key!r} is another metric's")
        float(value)
    return found


def _rows(
    name: str, control: str | None, metric: Metric, found: MetricOutput, used: Mapping[str, Any], run: Mapping[str, Any]
) -> list[Score]:
    entry = sca_registry.metrics.describe(name)
    own = "sca" if entry.distribution == BUILTIN else entry.distribution
    implementation = getattr(metric, "implementation", own)
    implementation = f"{implementation} {entry.version}".rstrip() if implementation == own else implementation
    asked = {key: run.get(key) for key in ("dataset", "split", "truth", "prompt", "seed", "generation", "proposer")}
    asked |= {"search": run["search"]} if "search" in run else {}
    protocol = protocol_id(asked, name, control, used, implementation)
    sums = resamplable(found)
    enough = {key: has_enough_images(groups) for key, (_, groups) in sums.items()}
    intervals = {key: interval(resample(*made)) for key, made in sums.items() if enough[key]}
    notes = {key: f"no interval over fewer than {MIN_IMAGES} images" for key in sums if not enough[key]}
    notes |= found.notes or {}
    counted = {key: _count(found, key) for key in found.values}
    return [
        Score(
            name=key,
            metric=name,
            value=value if isinstance(value, int) else float(value),
            low=intervals[key][0] if intervals.get(key) else None,
            high=intervals[key][1] if intervals.get(key) else None,
            n=counted[key],
            control=control,
            references=used["references"],
            tokenizer=used["tokenizer"],
            implementation=implementation,
            protocol=protocol,
            note=notes.get(key, ""),
        )
        for key, value in found.values.items()
    ]


def _count(found: MetricOutput, name: str) -> int:
    """How many judgements a score is made of."""
    if found.per_record and name in found.per_record:
        return int((~np.isnan(np.asarray(found.per_record[name], dtype=float))).sum())
    return len(found.per_record["image_id"]) if found.per_record and "image_id" in found.per_record else 0


def regions_of(records: Sequence[Record]) -> int:
    """How many regions were asked for."""
    return len({(record["image_id"], record["region_id"]) for record in meeting(records, ("region_id",))})
