"""Intervals hold the truth as often as they say."""

import numpy as np
import pytest

from sca.evaluation.intervals import interval, mean_of, resample

DRAWS = [
    pytest.param(lambda draw: draw.normal(0, 1, 200), 0.0, id="normal"),
    pytest.param(lambda draw: draw.beta(0.5, 0.5, 200), 0.5, id="right or wrong"),
    pytest.param(lambda draw: draw.exponential(1, 300), 1.0, id="skewed"),
]


@pytest.mark.parametrize(("draw", "mean"), DRAWS)
@pytest.mark.parametrize("times", [100, pytest.param(1000, marks=pytest.mark.all)])
def test_nineteen_of_twenty_intervals_hold_the_mean(draw, mean, times):
    held = 0
    for number in range(times):
        values = draw(np.random.default_rng([7, number]))
        low, high = interval(resample(mean_of(values), np.arange(len(values)), seed=number))
        held += low <= mean <= high
    margin = 0.02 if times == 1000 else 0.06
    assert 0.95 - margin <= held / times <= 0.95 + margin


@pytest.mark.parametrize("times", [100, pytest.param(1000, marks=pytest.mark.all)])
def test_regions_of_one_image_are_drawn_together(times):
    """Ten regions an image that are all alike tell no more than one."""
    held, groups = 0, np.repeat(np.arange(150), 10)
    for number in range(times):
        values = np.random.default_rng([8, number]).normal(0, 1, 150).repeat(10)
        low, high = interval(resample(mean_of(values), groups, seed=number))
        held += low <= 0 <= high
    assert 0.95 - (0.02 if times == 1000 else 0.06) <= held / times


def test_the_same_seed_draws_the_same_images_for_two_models():
    values, groups = np.random.default_rng(0).random(50), np.arange(50) // 2
    first, second = (resample(mean_of(each), groups, draws=200) for each in (values, values + 0.25))
    assert np.allclose(second - first, 0.25)


def test_what_is_not_a_number_is_not_counted():
    values = np.array([1.0, np.nan, 0.0, np.nan])
    assert resample(mean_of(values), np.zeros(4), draws=3).tolist() == [0.5] * 3
    assert interval(resample(mean_of(np.full(3, np.nan)), np.arange(3))) is None
