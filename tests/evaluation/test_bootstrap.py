"""Confidence intervals have their nominal coverage."""

import json
import math

import numpy as np
import pytest

from sca.evaluation.bootstrap import bootstrap_scores, compute_interval, make_mean_statistics
from sca.evaluation.comparison import compare_runs
from sca.evaluation.evaluate import score_file
from sca.evaluation.scoring import score_records

DISTRIBUTIONS = [
    pytest.param(lambda rng: rng.normal(0, 1, 200), 0.0, id="normal"),
    pytest.param(lambda rng: rng.beta(0.5, 0.5, 200), 0.5, id="bimodal"),
    pytest.param(lambda rng: rng.exponential(1, 300), 1.0, id="skewed"),
]


@pytest.mark.parametrize(("draw_values", "mean"), DISTRIBUTIONS)
@pytest.mark.parametrize("num_trials", [100, pytest.param(1000, marks=pytest.mark.all)])
@pytest.mark.slow
def test_interval_contains_the_mean_in_95_percent_of_trials(draw_values, mean, num_trials):
    num_covered = 0
    for trial in range(num_trials):
        values = draw_values(np.random.default_rng([7, trial]))
        low, high = compute_interval(bootstrap_scores(make_mean_statistics(values), np.arange(len(values)), seed=trial))
        num_covered += low <= mean <= high
    margin = 0.02 if num_trials == 1000 else 0.06
    assert 0.95 - margin <= num_covered / num_trials <= 0.95 + margin


@pytest.mark.parametrize("num_trials", [100, pytest.param(1000, marks=pytest.mark.all)])
@pytest.mark.slow
def test_bootstrap_resamples_regions_of_an_image_together(num_trials):
    """Ten equal regions per image carry no more information than one."""
    num_covered, groups = 0, np.repeat(np.arange(150), 10)
    for trial in range(num_trials):
        values = np.random.default_rng([8, trial]).normal(0, 1, 150).repeat(10)
        low, high = compute_interval(bootstrap_scores(make_mean_statistics(values), groups, seed=trial))
        num_covered += low <= 0 <= high
    assert 0.95 - (0.02 if num_trials == 1000 else 0.06) <= num_covered / num_trials


def test_bootstrap_resamples_the_same_images_for_the_same_seed():
    values, groups = np.random.default_rng(0).random(50), np.arange(50) // 2
    first, second = (
        bootstrap_scores(make_mean_statistics(each), groups, num_resamples=200) for each in (values, values + 0.25)
    )
    assert np.allclose(second - first, 0.25)


def test_bootstrap_ignores_nan():
    values = np.array([1.0, np.nan, 0.0, np.nan])
    assert bootstrap_scores(make_mean_statistics(values), np.zeros(4), num_resamples=3).tolist() == [0.5] * 3
    assert compute_interval(bootstrap_scores(make_mean_statistics(np.full(3, np.nan)), np.arange(3))) is None


@pytest.mark.parametrize(("num_images", "has_interval"), [(1, False), (4, False), (5, True)])
def test_score_records_omits_interval_below_five_images(num_images, has_interval):
    records = [make_caption_record(image, region) for image in range(num_images) for region in range(3)]
    (score,) = score_records(records, ["rouge-l"], {"tokenizer": "plain"}).scores
    assert (score.ci_low is not None) == (score.ci_high is not None) == has_interval
    assert score.note == ("" if has_interval else "no interval over fewer than 5 images")


def make_caption_record(image, region, caption="a red dog"):
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
def test_cider_of_a_single_region_is_nan_with_a_note(name, tmp_path):
    scored = score_records([make_caption_record(0, 0)], [name], {"tokenizer": "plain"})
    (score,) = scored.scores
    assert math.isnan(score.value)
    assert score.note.startswith("undefined for a single region")
    (score,) = score_records(
        [make_caption_record(0, 0, "a red dog 0"), make_caption_record(0, 1)], [name], {"tokenizer": "plain"}
    ).scores
    assert score.value > 0
    line = {"image_id": 1, "region_id": 2, "caption": "a dog", "references": ["a dog"]}
    (tmp_path / "one.jsonl").write_text(json.dumps(line))
    report = score_file(tmp_path / "one.jsonl", [name, "rouge-l"], {"tokenizer": "plain"})
    assert report.to_dict()["scores"] == {name: None, "rouge-l": 1.0}
    assert any(name in note and "single region" in note for note in report.notes)
    assert "rouge-l: no interval over fewer than 5 images" in report.notes
    assert set(report.notes) <= set(report.build_table().notes)


def test_compare_runs_omits_intervals_below_five_images(tmp_path):
    for name, caption in (("a", "a red dog"), ("b", "a blue cat")):
        lines = [
            {"image_id": n, "region_id": n, "caption": caption, "references": [f"a red dog {n}"]} for n in range(4)
        ]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    comparison = compare_runs(tmp_path / "a.jsonl", tmp_path / "b.jsonl", ["rouge-l"], {"tokenizer": "plain"})
    assert comparison.differences[0].ci_low is None
    assert "no intervals over fewer than 5 images" in comparison.notes
