"""How far a score may be off for the choice of images: bootstrap intervals (Efron, 1979) over whole images.

Regions of one image are alike, so that images are drawn again and not regions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

DRAWS = 1000
LEVEL = 0.95
CHUNK = 1 << 24  # numbers of one block of weights
MIN_IMAGES = 5  # with fewer the draws repeat each other, and the interval says nothing of other images


class Sums(NamedTuple):
    """What a score is made of: `score(rows.sum(0))`, where rows may be counted several times or not at all."""

    rows: np.ndarray  # (R, F) what each thing that was judged adds
    score: Callable[[np.ndarray], np.ndarray]  # (..., F) -> (...)


def mean_of(values: np.ndarray) -> Sums:
    """The mean of (R,) values over those that are not NaN."""
    counted = ~np.isnan(values)
    return Sums(np.stack((np.where(counted, values, 0.0), counted), axis=1).astype(float), _ratio)


def resample(sums: Sums, groups: np.ndarray, draws: int = DRAWS, seed: int = 0) -> np.ndarray:
    """(draws,) scores of as many images, drawn with replacement; groups: (R,) the image of each row.

    The same groups and seed draw the same images, so that the scores of two models can be subtracted pair by pair.
    """
    images, place = np.unique(groups, return_inverse=True)
    totals = np.zeros((len(images), sums.rows.shape[1]))
    np.add.at(totals, place.ravel(), sums.rows)
    return np.concatenate([sums.score(weights @ totals) for weights in _weights(len(images), draws, seed)])


def has_enough_images(groups: np.ndarray) -> bool:
    """Whether there is an interval over these images.

    Args:
        groups: (R,) the image of each row.
    """
    return len(np.unique(groups)) >= MIN_IMAGES


def interval(scores: np.ndarray, level: float = LEVEL) -> tuple[float, float] | None:
    """The middle `level` of resampled scores; None where none is a number."""
    known = scores[~np.isnan(scores)]
    if not len(known):
        return None
    low, high = np.quantile(known, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _weights(images: int, draws: int, seed: int) -> Iterator[np.ndarray]:
    """How often each image is drawn, (D, images) at a time."""
    draw = np.random.default_rng(seed)
    share = np.full(images, 1 / images)
    block = max(1, CHUNK // images)
    for start in range(0, draws, block):
        yield draw.multinomial(images, share, size=min(block, draws - start)).astype(float)


def _ratio(sums: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore", divide="ignore"):
        return sums[..., 0] / sums[..., 1]
