"""Intervals hold the truth as often as they say."""

import json
import math

import numpy as np
import pytest

from sca.evaluation.bootstrap import bootstrap_scores, compute_interval, make_mean_statistics
from sca.evaluation.comparison import compare_runs
from sca.evaluation.evaluate import score_file
from sca.evaluation.scoring import score_records

DRAWS = [
    pytest.param(lambda draw: draw.normal(0, 1, 200), 0.0, id="normal"),
    pytest.param(lambda draw: draw.beta(0.5, 0.5, 200), 0.5, id="right or wrong"),
    pytest.param(lambda draw: draw.exponential(1, 300), 1.0, id="skewed"),
]


@pytest.mark.parametrize(("draw", "mean"), DRAWS)
@pytest.mark.parametrize("times", [100, pytest.param(1000, marks=pytest.mark.all)])
@pytest.mark.slow
def test_nineteen_of_twenty_intervals_hold_the_mean(draw, mean, times):
    held = 0
    for number in range(times):
        values = draw(np.random.default_rng([7, number]))
        low, high = compute_interval(
            bootstrap_scores(make_mean_statistics(values), np.arange(len(values)), seed=number)
        )
        held += low <= mean <= high
    margin = 0.02 if times == 1000 else 0.06
    assert 0.95 - margin <= held / times <= 0.95 + margin


@pytest.mark.parametrize("times", [100, pytest.param(1000, marks=pytest.mark.all)])
@pytest.mark.slow
def test_regions_of_one_image_are_drawn_together(times):
    """Ten regions an image that are all alike tell no more than one."""
    held, groups = 0, np.repeat(np.arange(150), 10)
    for number in range(times):
        values = np.random.default_rng([8, number]).normal(0, 1, 150).repeat(10)
        low, high = compute_interval(bootstrap_scores(make_mean_statistics(values), groups, seed=number))
        held += low <= 0 <= high
    assert 0.95 - (0.02 if times == 1000 else 0.06) <= held / times


def test_the_same_seed_draws_the_same_images_for_two_models():
    values, groups = np.random.default_rng(0).random(50), np.arange(50) // 2
    first, second = (
        bootstrap_scores(make_mean_statistics(each), groups, num_resamples=200) for each in (values, values + 0.25)
    )
    assert np.allclose(second - first, 0.25)


def test_what_is_not_a_number_is_not_counted():
    values = np.array([1.0, np.nan, 0.0, np.nan])
    assert bootstrap_scores(make_mean_statistics(values), np.zeros(4), num_resamples=3).tolist() == [0.5] * 3
    assert compute_interval(bootstrap_scores(make_mean_statistics(np.full(3, np.nan)), np.arange(3))) is None


@pytest.mark.parametrize(("images", "enough"), [(1, False), (4, False), (5, True)])
def test_there_is_no_interval_over_fewer_than_five_images(images, enough):
    records = [record(image, region) for image in range(images) for region in range(3)]
    (found,) = score_records(records, ["rouge-l"], {"tokenizer": "plain"}).scores
    assert (found.low is not None) == (found.high is not None) == enough
    assert found.note == ("" if enough else "no interval over fewer than 5 images")


def record(image, region, caption="a red dog"):
    truth = {
        "phrases": [f"a red dog {region}"],
        "name": None,
        "attributes": {},
        "mask": None,
        "box": None,
        "area": None,
    }
    ids = {"image_id": image, "region_id": 10 * image + region}
    return {**ids, "task": "caption", "caption": caption, "control": None, "truth": truth}


@pytest.mark.parametrize("name", ["cider", "cider-d"])
def test_cider_of_a_single_region_is_no_number_and_says_why(name, tmp_path):
    single = score_records([record(0, 0)], [name], {"tokenizer": "plain"})
    (found,) = single.scores
    assert math.isnan(found.value)
    assert found.note.startswith("not a number for a single region")
    (found,) = score_records([record(0, 0, "a red dog 0"), record(0, 1)], [name], {"tokenizer": "plain"}).scores
    assert found.value > 0
    line = {"image_id": 1, "region_id": 2, "caption": "a dog", "references": ["a dog"]}
    (tmp_path / "one.jsonl").write_text(json.dumps(line))
    report = score_file(tmp_path / "one.jsonl", [name, "rouge-l"], {"tokenizer": "plain"})
    assert report.to_dict()["scores"] == {name: None, "rouge-l": 1.0}
    assert any(name in note and "single region" in note for note in report.notes)
    assert "rouge-l: no interval over fewer than 5 images" in report.notes
    assert set(report.notes) <= set(report.build_table().notes)


def test_a_comparison_over_few_images_has_no_intervals_and_says_so(tmp_path):
    for name, caption in (("a", "a red dog"), ("b", "a blue cat")):
        lines = [
            {"image_id": n, "region_id": n, "caption": caption, "references": [f"a red dog {n}"]} for n in range(4)
        ]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    found = compare_runs(tmp_path / "a.jsonl", tmp_path / "b.jsonl", ["rouge-l"], {"tokenizer": "plain"})
    assert found.differences[0].low is None
    assert "no intervals over fewer than 5 images" in found.remarks
