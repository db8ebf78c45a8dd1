"""Expected effects: paired differences, their intervals and verdicts, and the variance that axes explain."""

import re

import numpy as np
import pytest
from sca_bench import effects, report
from sca_bench.image_scores import collect_image_scores, stack_image_scores
from sca_bench.sweep import Sweep

NUM_IMAGES = 200
TABLE = {
    "model": {"encoder": "tiny-vit", "language_model": "tiny-gpt2"},
    "seeds": [0, 1, 2],
    "studies": {
        "mixers": {
            "summary": "Mixers.",
            "axes": {"mixer": ["query", {"name": "roi-pool"}], "task_tokens": [2, 4]},
            "comparisons": [
                {
                    "claim": "A query mixer is better than ROI pooling",
                    "source": "a paper: +1",
                    "better": {"mixer": "query"},
                    "worse": {"mixer": "roi-pool"},
                }
            ],
        }
    },
}


def make_rows(sweep, gain, noise=0.1):
    """Return finished rows in which the query mixer scores `gain` higher, with noise that both mixers share."""
    rows = []
    for combination in sweep.list_combinations(sweep.studies[0]):
        config = combination.row.config
        rng = np.random.default_rng([config["seed"], config["model"]["task_tokens"]])
        shared = rng.normal(0.5, 0.3, NUM_IMAGES)
        own = np.random.default_rng([config["seed"], config["model"]["mixer"]["name"] == "query"])
        values = shared + own.normal(0, noise, NUM_IMAGES) + gain * (config["model"]["mixer"]["name"] == "query")
        value = float(values.mean())
        score = {"name": "cider-d", "value": value, "ci_low": value, "ci_high": value, "control": None}
        image_scores = {
            "cider-d": {"image_ids": [*range(NUM_IMAGES)], "sums": values.tolist(), "counts": [1] * NUM_IMAGES}
        }
        rows.append(
            {
                "key": combination.row.key,
                "label": combination.row.label,
                "state": "done",
                "reason": "",
                "config": config,
                "scores": [score],
                "image_scores": image_scores,
                "seconds": {"total": 60.0, "process": 90.0},
            }
        )
    return rows


@pytest.fixture
def sweep():
    return Sweep.from_dict(TABLE, "mine")


@pytest.mark.parametrize(
    ("gain", "verdict"), [(0.1, effects.REPEATS), (-0.1, effects.DOES_NOT_REPEAT), (0.0, effects.UNDECIDED)]
)
def test_measure_effects_decides_by_the_paired_interval(sweep, gain, verdict):
    measured = effects.measure_effects(sweep, sweep.studies[0], make_rows(sweep, gain), "cider-d")
    assert [each.settings for each in measured] == [{"task_tokens": 2}, {"task_tokens": 4}]
    for each in measured:
        assert each.verdict == verdict
        assert each.ci_low < each.difference < each.ci_high
        assert abs(each.difference - gain) < 0.03
        assert len(each.seed_differences) == 3


def test_paired_interval_is_narrower_than_that_of_permuted_images(sweep):
    rows = [row for row in make_rows(sweep, 0.0) if row["config"]["model"]["task_tokens"] == 2]
    first, second = np.split(stack_image_scores(rows, "cider-d"), 2)
    paired = effects.compute_paired_interval(first, second)
    unpaired = effects.compute_paired_interval(first, second[:, ::-1])
    assert paired[1] - paired[0] < 0.7 * (unpaired[1] - unpaired[0])


@pytest.mark.parametrize("num_seeds", [2, 3, 5])
def test_paired_interval_rarely_excludes_zero_if_only_seeds_differ(num_seeds):
    rng = np.random.default_rng(0)
    num_excluded = 0
    for _ in range(400):
        first, second = np.ones((num_seeds, 20, 2)), np.ones((num_seeds, 20, 2))
        first[:, :, 0] += rng.normal(0, 0.1, (num_seeds, 1))
        first[:, :, 0] += rng.normal(0, 0.001, (num_seeds, 20))
        low, high = effects.compute_paired_interval(first, second)
        num_excluded += low > 0 or high < 0
    assert 0.02 < num_excluded / 400 < 0.08


def test_t_quantile_equals_published_values():
    for freedom, quantile in ((1, 12.706), (2, 4.303), (10, 2.228), (1000, 1.962)):
        assert effects.compute_t_quantile(freedom) == pytest.approx(quantile, rel=0.02)


def make_sums(num_images, value):
    return np.stack((np.full((3, num_images), value), np.ones((3, num_images))), axis=-1)


def test_few_images_have_no_interval():
    assert effects.compute_paired_interval(make_sums(4, 1.0), make_sums(4, 0.0)) is None
    assert effects.compute_paired_interval(make_sums(5, 1.0), make_sums(5, 0.0)) == (1.0, 1.0)


def test_count_images_needed_matches_the_noise_of_the_images(sweep):
    (effect, _) = effects.measure_effects(sweep, sweep.studies[0], make_rows(sweep, 0.0, noise=0.2), "cider-d")
    std = 0.2 * 2**0.5 / 3**0.5  # of the difference of two means over three seeds
    assert effect.image_std == pytest.approx(std, rel=0.15)
    expected = ((1.960 + 0.842) * effect.image_std / 0.02) ** 2
    assert effect.count_images_needed(0.02) == pytest.approx(expected, rel=0.01)


def test_explain_variance_finds_the_axis_that_matters(sweep):
    fractions = effects.explain_variance(sweep, sweep.studies[0], make_rows(sweep, 1.0), "cider-d")
    assert next(iter(fractions)) == "mixer"
    assert fractions["mixer"] > 0.9
    assert set(fractions) == {"mixer", "task_tokens", "seed"}
    assert sum(fractions.values()) <= 1 + 1e-9


def test_explain_variance_of_two_axes_adds_up(sweep):
    rows = make_rows(sweep, 0.0)
    for row in rows:
        model = row["config"]["model"]
        row["scores"][0]["value"] = 3.0 * (model["mixer"]["name"] == "query") + 1.0 * (model["task_tokens"] == 4)
    fractions = effects.explain_variance(sweep, sweep.studies[0], rows, "cider-d")
    assert fractions == pytest.approx({"mixer": 0.9, "task_tokens": 0.1, "seed": 0.0})


def test_effects_skip_unfinished_rows_and_seeds_without_a_partner(sweep):
    rows = make_rows(sweep, 0.1)
    for row in rows:
        model = row["config"]["model"]
        if model["task_tokens"] == 4 or (model["mixer"]["name"] == "query" and row["config"]["seed"] == 2):
            row["state"] = "failed"
    (effect,) = effects.measure_effects(sweep, sweep.studies[0], rows, "cider-d")
    assert (effect.settings, len(effect.seed_differences)) == ({"task_tokens": 2}, 2)


def test_rows_of_different_images_have_no_interval(sweep):
    rows = make_rows(sweep, 0.1)
    rows[0]["image_scores"]["cider-d"]["image_ids"] = [*range(1, NUM_IMAGES + 1)]
    assert stack_image_scores(rows, "cider-d") is None
    first, second = effects.measure_effects(sweep, sweep.studies[0], rows, "cider-d")
    assert first.ci_low is None
    assert first.verdict == effects.UNDECIDED
    assert second.ci_low is not None


def test_report_of_studies_starts_with_the_effects(sweep, tmp_path):
    rows = make_rows(sweep, 0.1)
    markdown = report.render_markdown(rows, sweep=sweep)
    first_line, _, effect, *_ = markdown.splitlines()
    assert first_line.startswith("| claim | source | settings | score |")
    assert effect.startswith("| A query mixer is better than ROI pooling | a paper: +1 | task_tokens 2 | cider-d |")
    assert effect.endswith("| repeats |")
    assert "## mixers\n\nMixers.\n\n| mixer | task_tokens | seeds |" in markdown
    assert "each axis explains alone: mixer" in markdown
    assert "with a power of 80%" in markdown
    assert re.search(r": 1 point: [\d,]+, 2 points: [\d,]+, 5 points: [\d,]+\.", markdown)
    page = report.render_sweep_page(rows, "sweep mine", sweep=sweep)
    assert "A query mixer is better than ROI pooling" in page
    assert "<h2>mixers</h2>" in page
    assert "mixer query, task_tokens 2</td>" in page
    file = tmp_path / "report.md"
    file.write_text(markdown)
    assert report.is_table_of_report(file)


@pytest.mark.slow
def test_image_scores_are_the_summands_of_the_scores():
    import sca

    result = sca.evaluate(
        "sca-tiny", {"name": "scenes", "num_images": 6}, metrics=["attributes", "class", "cider-d", "mask-iou"]
    )
    image_scores = collect_image_scores(result)
    assert {"attributes/all", "class/accuracy", "cider-d", "mask-iou/mean"} <= set(image_scores)
    for name, table in image_scores.items():
        assert len(table["image_ids"]) == len(table["sums"]) == len(table["counts"]) == 6
        assert sum(table["sums"]) / sum(table["counts"]) == pytest.approx(result.scores[name], abs=1e-5)
