"""Effects of settings on a score: paired differences with intervals, and the variance that each axis explains."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist, mean, median
from typing import Any

import numpy as np

from sca.evaluation.bootstrap import MIN_IMAGES, ScoreStatistics, bootstrap_scores
from sca_bench.image_scores import stack_image_scores
from sca_bench.summary import get_score
from sca_bench.sweep import Combination, Comparison, Study, Sweep, matches_settings

REPEATS, DOES_NOT_REPEAT, UNDECIDED = "repeats", "does not repeat", "undecided"
SEED_AXIS = "seed"
POWER, SIGNIFICANCE = 0.8, 0.05  # of a two-sided paired test
NUM_T_SAMPLES = 200_000  # of Student's t distribution, for its quantile
MAX_FREEDOM = 200  # degrees of freedom above which the normal distribution is used


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
        """The word "repeats" if the interval is above 0, "does not repeat" if it is below 0, otherwise "undecided"."""
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
    pairs = [tuple(get_score(row, score) for row in pair) for pair in row_pairs]
    values = [(better, worse) for better, worse in pairs if better is not None and worse is not None]
    if not values or len(values) < len(pairs):
        return None
    sums = stack_image_scores([pair[side] for side in (0, 1) for pair in row_pairs], score)
    interval, image_std = None, None
    if sums is not None:
        better_sums, worse_sums = np.split(sums, 2)
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


def compute_paired_interval(first: np.ndarray, second: np.ndarray) -> tuple[float, float] | None:
    """Compute the 95% interval of the difference of a score, averaged over seeds.

    The variance of the mean is that between seeds, plus that over images by a bootstrap that draws the same images for
    all rows. The quantile is that of Student's t distribution with the degrees of freedom of Welch and Satterthwaite,
    because few seeds estimate their variance badly. With one seed, the interval describes this pair of models only.

    Args:
        first: (seeds, images, 2) sums and counts of a score.
        second: The same of the rows to subtract.

    Returns:
        The bounds; None with fewer than `MIN_IMAGES` images, or if the score of a row or of all resamples is undefined.
    """
    num_seeds, num_images, _ = first.shape
    if num_images < MIN_IMAGES:
        return None
    totals = first.sum(axis=1), second.sum(axis=1)  # (seeds, 2)
    seed_differences = np.subtract(*(_compute_ratios(each[:, 0], each[:, 1]) for each in totals))
    difference = float(seed_differences.mean())
    rows = np.stack((first, second)).transpose(2, 0, 1, 3).reshape(num_images, -1)  # (images, 2 sides x seeds x 2)

    def compute_scores(sums: np.ndarray) -> np.ndarray:
        sides = sums.reshape(*sums.shape[:-1], 2, num_seeds, 2)
        ratios = _compute_ratios(sides[..., 0], sides[..., 1])
        return (ratios[..., 0, :] - ratios[..., 1, :]).mean(axis=-1)

    resampled = bootstrap_scores(ScoreStatistics(rows, compute_scores), np.arange(num_images))
    image_variance = float(np.nanvar(resampled)) if np.isfinite(resampled).any() else math.nan
    if not math.isfinite(difference + image_variance):
        return None
    seed_variance = float(seed_differences.var(ddof=1)) / num_seeds if num_seeds > 1 else 0.0
    variance = seed_variance + image_variance
    freedom = (num_seeds - 1) * (variance / seed_variance) ** 2 if seed_variance else math.inf
    half_width = compute_t_quantile(freedom) * math.sqrt(variance)
    return difference - half_width, difference + half_width


def compute_t_quantile(degrees_of_freedom: float) -> float:
    """Return the value that |t| of Student's t distribution exceeds with a probability of `SIGNIFICANCE`, simulated."""
    if degrees_of_freedom > MAX_FREEDOM:
        return NormalDist().inv_cdf(1 - SIGNIFICANCE / 2)
    samples = np.random.default_rng(0).standard_t(degrees_of_freedom, size=NUM_T_SAMPLES)
    return float(np.quantile(np.abs(samples), 1 - SIGNIFICANCE))


def _compute_ratios(numerators: np.ndarray, denominators: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore", divide="ignore"):
        return numerators / denominators


def _compute_image_std(first: np.ndarray, second: np.ndarray) -> float | None:
    """Return the standard deviation of the difference over images, linearized as that of a ratio of sums."""
    if first.shape[1] < MIN_IMAGES:
        return None
    influences = []
    for sums in (first, second):
        totals = sums.sum(axis=1)  # (seeds, 2)
        ratios = _compute_ratios(totals[:, :1], totals[:, 1:])
        influences.append(_compute_ratios(sums[..., 0] - ratios * sums[..., 1], totals[:, 1:] / sums.shape[1]))
    value = float((influences[0] - influences[1]).mean(axis=0).std(ddof=1))
    return value if math.isfinite(value) else None


def explain_variance(
    sweep: Sweep, study: Study, rows: Iterable[Mapping[str, Any]], score: str | None
) -> dict[str, float]:
    """Return the fraction of the variance of a score that each axis explains alone, the largest first.

    The fraction is the variance of the mean score by value of the axis, weighted by the number of rows, divided by the
    variance over all rows (eta squared). The seed is an axis. The rest is interactions, including those with the seed.
    If rows are missing, the fractions can overlap.

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
        value = None if row is None or score is None else get_score(row, score)
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
