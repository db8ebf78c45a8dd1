"""Bootstrap confidence intervals of scores over images (Efron, 1979).

Whole images are resampled, not regions, because the regions of one image are correlated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

NUM_RESAMPLES = 1000
CONFIDENCE_LEVEL = 0.95
MAX_WEIGHTS_PER_BLOCK = 1 << 24  # elements per block of resampling weights
MIN_IMAGES = 5  # with fewer images, resamples repeat and the interval is meaningless


class ScoreStatistics(NamedTuple):
    """Additive statistics of a score. The score of a resample is `compute_scores` of its summed rows."""

    rows: np.ndarray  # (R, F) summands of each judged unit
    compute_scores: Callable[[np.ndarray], np.ndarray]  # (..., F) -> (...)


def make_mean_statistics(values: np.ndarray) -> ScoreStatistics:
    """Return the statistics of the mean of (R,) values, ignoring NaN."""
    is_number = ~np.isnan(values)
    return ScoreStatistics(np.stack((np.where(is_number, values, 0.0), is_number), axis=1).astype(float), _divide_sums)


def is_ratio(statistics: ScoreStatistics) -> bool:
    """Return whether a score is the sum of the first summands divided by the sum of the second ones."""
    return statistics.compute_scores is _divide_sums


def bootstrap_scores(
    statistics: ScoreStatistics, groups: np.ndarray, num_resamples: int = NUM_RESAMPLES, seed: int = 0
) -> np.ndarray:
    """Compute a score on resampled sets of images.

    The same groups and seed draw the same images, so the scores of two models can be subtracted pairwise.

    Args:
        statistics: Statistics of the score, with R rows.
        groups: (R,) image of each row.
        num_resamples: Resamples; each draws the original number of images with replacement.
        seed: Random seed.

    Returns:
        (num_resamples,) scores.
    """
    unique_images, image_index = np.unique(groups, return_inverse=True)
    totals = np.zeros((len(unique_images), statistics.rows.shape[1]))
    np.add.at(totals, image_index.ravel(), statistics.rows)
    return np.concatenate(
        [
            statistics.compute_scores(weights @ totals)
            for weights in _iter_image_counts(len(unique_images), num_resamples, seed)
        ]
    )


def has_enough_images(groups: np.ndarray) -> bool:
    """Return whether there are enough images for an interval.

    Args:
        groups: (R,) image of each row.

    Returns:
        True if the number of different images suffices.
    """
    return len(np.unique(groups)) >= MIN_IMAGES


def compute_interval(scores: np.ndarray, level: float = CONFIDENCE_LEVEL) -> tuple[float, float] | None:
    """Return the central `level` interval of resampled scores, ignoring NaN; None if all are NaN."""
    numbers = scores[~np.isnan(scores)]
    if not len(numbers):
        return None
    low, high = np.quantile(numbers, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _iter_image_counts(num_images: int, num_resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Yield how often each image is drawn, (resamples, images) per block."""
    rng = np.random.default_rng(seed)
    probabilities = np.full(num_images, 1 / num_images)
    block_size = max(1, MAX_WEIGHTS_PER_BLOCK // num_images)
    for start in range(0, num_resamples, block_size):
        yield rng.multinomial(num_images, probabilities, size=min(block_size, num_resamples - start)).astype(float)


def _divide_sums(sums: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore", divide="ignore"):
        return sums[..., 0] / sums[..., 1]
