"""How far a score may be off for the choice of images: bootstrap intervals (Efron, 1979) over whole images.

Regions of one image are alike, so that images are drawn again and not regions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

NUM_RESAMPLES = 1000
CONFIDENCE_LEVEL = 0.95
MAX_WEIGHTS_PER_BLOCK = 1 << 24  # numbers of one block of weights
MIN_IMAGES = 5  # with fewer the draws repeat each other, and the interval says nothing of other images


class ScoreStatistics(NamedTuple):
    """What a score is made of: `score(rows.sum(0))`, where rows may be counted several times or not at all."""

    rows: np.ndarray  # (R, F) what each thing that was judged adds
    compute_scores: Callable[[np.ndarray], np.ndarray]  # (..., F) -> (...)


def make_mean_statistics(values: np.ndarray) -> ScoreStatistics:
    """The mean of (R,) values over those that are not NaN."""
    is_number = ~np.isnan(values)
    return ScoreStatistics(np.stack((np.where(is_number, values, 0.0), is_number), axis=1).astype(float), _divide_sums)


def bootstrap_scores(
    statistics: ScoreStatistics, groups: np.ndarray, num_resamples: int = NUM_RESAMPLES, seed: int = 0
) -> np.ndarray:
    """(draws,) scores of as many images, drawn with replacement; groups: (R,) the image of each row.

    The same groups and seed draw the same images, so that the scores of two models can be subtracted pair by pair.
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
    """Whether there is an interval over these images.

    Args:
        groups: (R,) the image of each row.
    """
    return len(np.unique(groups)) >= MIN_IMAGES


def compute_interval(scores: np.ndarray, level: float = CONFIDENCE_LEVEL) -> tuple[float, float] | None:
    """The middle `level` of resampled scores; None where none is a number."""
    numbers = scores[~np.isnan(scores)]
    if not len(numbers):
        return None
    low, high = np.quantile(numbers, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _iter_image_counts(num_images: int, num_resamples: int, seed: int) -> Iterator[np.ndarray]:
    """How often each image is drawn, (D, images) at a time."""
    rng = np.random.default_rng(seed)
    probabilities = np.full(num_images, 1 / num_images)
    block_size = max(1, MAX_WEIGHTS_PER_BLOCK // num_images)
    for start in range(0, num_resamples, block_size):
        yield rng.multinomial(num_images, probabilities, size=min(block_size, num_resamples - start)).astype(float)


def _divide_sums(sums: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore", divide="ignore"):
        return sums[..., 0] / sums[..., 1]
