"""Effects of settings on a score: paired differences with intervals, and the variance that each axis explains."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist, mean, median
from typing import Any

import numpy as np

from sca.evaluation.bootstrap import NUM_RESAMPLES, compute_interval
from sca_bench.image_scores import stack_image_scores
from sca_bench.sweep import Combination, Comparison, Study, Sweep, matches_settings

REPEATS, DOES_NOT_REPEAT, UNDECIDED = "repeats", "does not repeat", "undecided"
SEED_AXIS = "seed"
POWER, SIGNIFICANCE = 0.8, 0.05  # of a two-sided paired test
MAX_WEIGHTS = 1 << 24  # elements of resampling weights at a time


@dataclass(frozen=True)
class Effect:
    """A measured difference: rows with the settings `better` minus rows with the settings `worse` of a comparison.

    Attributes:
        comparison: The comparison.
        settings: Values of the other axes, the same in both.
        score: Name of the score.
        values: Mean score over seeds of the better and of the worse rows.
        difference: Mean difference over seeds.
        ci_low: Lower bound of its 95% interval; None with too few images.
        ci_high: Upper bound.
        seed_differences: Difference by seed.
        image_std: Standard deviation over images of the difference, averaged over seeds; None with too few images.
    """

    comparison: Comparison
    settings: Mapping[str, Any]
    score: str
    values: tuple[float, float]
    difference: float
    ci_low: float | None
    ci_high: float | None
    seed_differences: tuple[float, ...]
    image_std: float | None

    @property
    def verdict(self) -> str:
        """Whether the interval is above 0, the effect repeats; below 0, it does not; otherwise it is undecided."""
        if self.ci_low is not None and self.ci_low > 0:
            return REPEATS
        return DOES_NOT_REPEAT if self.ci_high is not None and self.ci_high < 0 else UNDECIDED

    def count_images_needed(self, difference: float) -> int | None:
        """Return the number of images in which a paired test detects a difference with a power of 80%.

        Args:
            difference: Difference of the score.

        Returns:
            The number; None if the variation over images is unknown.
        """
        if self.image_std is None:
            return None
        normal = NormalDist()
        quantiles = normal.inv_cdf(1 - SIGNIFICANCE / 2) + normal.inv_cdf(POWER)
        return max(1, math.ceil((quantiles * self.image_std / difference) ** 2))


def measure_effects(
    sweep: Sweep, study: Study, rows: Iterable[Mapping[str, Any]], default_score: str | None
) -> list[Effect]:
    """Measure every comparison of a study on the rows that are finished.

    Args:
        sweep: Sweep of the rows.
        study: One of its studies.
        rows: Rows of the results file.
        default_score: Score of comparisons that name none.

    Returns:
        One effect per comparison and per value of the axes that the comparison does not fix.
    """
    rows_by_key = {row["key"]: row for row in rows if row["state"] == "done"}
    combinations = [each for each in sweep.list_combinations(study) if each.row.key in rows_by_key]
    effects = []
    for comparison in study.comparisons:
        score = comparison.score or default_score
        for settings, pairs in _pair_combinations(comparison, combinations):
            row_pairs = [tuple(rows_by_key[each.row.key] for each in pair) for pair in pairs]
            if score is not None and (effect := _measure_effect(comparison, settings, row_pairs, score)) is not None:
                effects.append(effect)
    return effects


def _pair_combinations(
    comparison: Comparison, combinations: Sequence[Combination]
) -> Iterator[tuple[dict[str, Any], list[tuple[Combination, Combination]]]]:
    """Yield the values of the other axes, and the pairs of rows by seed that have them."""
    fixed = {*comparison.better, *comparison.worse}
    groups: dict[str, dict[int, Combination]] = {}
    for each in combinations:
        if matches_settings(each.settings, comparison.worse):
            groups.setdefault(_hash_others(each, fixed), {})[each.row.config["seed"]] = each
    pairs_by_group: dict[str, list[tuple[Combination, Combination]]] = {}
    for each in combinations:
        if matches_settings(each.settings, comparison.better):
            group = _hash_others(each, fixed)
            other = groups.get(group, {}).get(each.row.config["seed"])
            if other is not None:
                pairs_by_group.setdefault(group, []).append((each, other))
    for pairs in pairs_by_group.values():
        yield {axis: value for axis, value in pairs[0][0].settings.items() if axis not in fixed}, pairs


def _hash_others(combination: Combination, fixed: set[str]) -> str:
    others = {axis: value for axis, value in combination.settings.items() if axis not in fixed}
    return json.dumps(others, sort_keys=True)


def _measure_effect(
    comparison: Comparison, settings: Mapping[str, Any], row_pairs: Sequence[tuple[Any, ...]], score: str
) -> Effect | None:
    """Measure one effect; None if a row lacks the score."""
    pairs = [tuple(_get_score(row, score) for row in pair) for pair in row_pairs]
    values = [(better, worse) for better, worse in pairs if better is not None and worse is not None]
    if not values or len(values) < len(pairs):
        return None
    stacks = [stack_image_scores([pair[side] for pair in row_pairs], score) for side in (0, 1)]
    better_sums, worse_sums = stacks
    interval, image_std = None, None
    if better_sums is not None and worse_sums is not None and better_sums.shape == worse_sums.shape:
        interval = compute_paired_interval(better_sums, worse_sums)
        image_std = _compute_image_std(better_sums, worse_sums)
    seed_differences = tuple(better - worse for better, worse in values)
    return Effect(
        comparison=comparison,
        settings=settings,
        score=score,
        values=(mean(better for better, _ in values), mean(worse for _, worse in values)),
        difference=mean(seed_differences),
        ci_low=interval[0] if interval else None,
        ci_high=interval[1] if interval else None,
        seed_differences=seed_differences,
        image_std=image_std,
    )


def compute_paired_interval(
    first: np.ndarray, second: np.ndarray, num_resamples: int = NUM_RESAMPLES, random_seed: int = 0
) -> tuple[float, float] | None:
    """Compute the 95% bootstrap interval of the difference of a score, averaged over seeds.

    Seeds and images are both resampled, because both vary: an interval over images alone would describe these trained
    models, not the settings. Both rows of a seed stay together, and so do the images of all rows.

    Args:
        first: (seeds, images, 2) sums and counts of a score.
        second: The same of the rows to subtract.
        num_resamples: Number of resamples.
        random_seed: Random seed.

    Returns:
        The bounds; None if no resample has a score.
    """
    rng = np.random.default_rng(random_seed)
    num_seeds, num_images, _ = first.shape
    differences = np.empty(num_resamples)
    block_size = max(1, MAX_WEIGHTS // num_images)
    for start in range(0, num_resamples, block_size):
        size = min(block_size, num_resamples - start)
        image_counts = rng.multinomial(num_images, np.full(num_images, 1 / num_images), size=size).astype(float)
        seed_weights = rng.multinomial(num_seeds, np.full(num_seeds, 1 / num_seeds), size=size) / num_seeds
        by_seed = _compute_ratios(image_counts, first) - _compute_ratios(image_counts, second)  # (size, seeds)
        differences[start : start + size] = (seed_weights * by_seed).sum(axis=1)
    return compute_interval(differences)


def _compute_ratios(image_counts: np.ndarray, sums: np.ndarray) -> np.ndarray:
    """Return the score of each resample and seed: (resamples, images) and (seeds, images, 2) -> (resamples, seeds)."""
    totals = np.einsum("ri,sif->rsf", image_counts, sums)
    with np.errstate(invalid="ignore", divide="ignore"):
        return totals[..., 0] / totals[..., 1]


def _compute_image_std(first: np.ndarray, second: np.ndarray) -> float | None:
    """Return the standard deviation of the difference over images, linearized as that of a ratio of sums."""
    if first.shape[1] < 2:
        return None
    influences = []
    for sums in (first, second):
        totals = sums.sum(axis=1)  # (seeds, 2)
        ratios = totals[:, :1] / totals[:, 1:]
        influences.append((sums[..., 0] - ratios * sums[..., 1]) / (totals[:, 1:] / sums.shape[1]))
    value = float((influences[0] - influences[1]).mean(axis=0).std(ddof=1))
    return value if math.isfinite(value) else None


def explain_variance(
    sweep: Sweep, study: Study, rows: Iterable[Mapping[str, Any]], score: str | None
) -> dict[str, float]:
    """Return the fraction of the variance of a score that each axis explains alone, the largest first.

    The fraction is the variance of the mean score by value of the axis, weighted by the number of rows, divided by the
    variance over all rows (eta squared). The seed is an axis. What is missing to 1 are interactions.

    Args:
        sweep: Sweep of the rows.
        study: One of its studies.
        rows: Rows of the results file.
        score: Name of the score.

    Returns:
        Axis -> fraction; empty if fewer than two rows have the score, or all have the same value.
    """
    rows_by_key = {row["key"]: row for row in rows if row["state"] == "done"}
    settings: list[dict[str, Any]] = []
    values: list[float] = []
    for combination in sweep.list_combinations(study):
        row = rows_by_key.get(combination.row.key)
        value = None if row is None or score is None else _get_score(row, score)
        if value is not None:
            settings.append({**combination.settings, SEED_AXIS: combination.row.config["seed"]})
            values.append(value)
    variance = float(np.var(values)) if len(values) > 1 else 0.0
    if not variance:
        return {}
    fractions = {}
    for axis in settings[0]:
        groups: dict[str, list[float]] = {}
        for each, value in zip(settings, values, strict=True):
            groups.setdefault(json.dumps(each[axis], sort_keys=True), []).append(value)
        if len(groups) > 1:
            total = mean(values)
            between = sum(len(group) * (mean(group) - total) ** 2 for group in groups.values()) / len(values)
            fractions[axis] = between / variance
    return dict(sorted(fractions.items(), key=lambda item: -item[1]))


def count_images_needed(effects: Sequence[Effect], difference: float) -> int | None:
    """Return the median over effects of the number of images that a difference needs; None without any effect."""
    counts = [count for effect in effects if (count := effect.count_images_needed(difference)) is not None]
    return round(median(counts)) if counts else None


def _get_score(row: Mapping[str, Any], name: str) -> float | None:
    """Return the value of a score of a row; None if it has none."""
    return next(
        (each["value"] for each in row.get("scores") or () if each["name"] == name and each["control"] is None), None
    )
