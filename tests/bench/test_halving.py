"""Successive halving: which combinations are dropped, what is recommended, and resumption after an interruption."""

import itertools
import re

import numpy as np
import pytest
from sca_bench.halving import halve_combinations, list_candidates, make_rung_row
from sca_bench.runner import IncompleteRungError, RunSettings, run_halving, run_sweep
from sca_bench.store import ResultStore
from sca_bench.sweep import Sweep
from sca_registry import RegistryError
from tiny import TINY_VIT_OPTIONS

NUM_IMAGES = 200
MIXER = {"name": "query", "num_queries": 2, "depth": 1, "num_heads": 2, "mlp_dim": 32}
TABLE = {
    "model": {
        "encoder": {"name": "tiny-vit", **TINY_VIT_OPTIONS},
        "segmenter": "box",
        "mixer": MIXER,
        "language_model": {"name": "tiny-gpt2", "hidden_size": 32, "depth": 1, "num_heads": 2},
        "task_tokens": 2,
        "trainable": ["mixer", "projection", "task_tokens", "language_model"],
    },
    "axes": {"mixer.depth": [1, 2, 3, 4, 5, 6, 7, 8]},
    "train": {
        "steps": 8,
        "batch_size": 2,
        "warmup_steps": 1,
        "prompt_weights": {"box": 1.0},
        "loss": {"caption": 1.0},
        "data": {"scenes": {"name": "scenes", "num_images": 4, "image_size": 64}},
        "cache_features": True,
    },
    "evaluate": {"dataset": {"name": "scenes", "num_images": 6, "image_size": 64}, "metrics": ["class"]},
}


@pytest.fixture
def sweep():
    return Sweep.from_dict(TABLE, "mine")


def make_run_rows(scores, calls, noise=0.02):
    """Return a function that replays `scores`: depth of the mixer -> final score, reached linearly."""

    def run_rows(rows):
        calls.append([(row.config["model"]["mixer"]["depth"], row.stop_step) for row in rows])
        results = []
        for row in rows:
            depth = row.config["model"]["mixer"]["depth"]
            if scores[depth] is None:
                results.append({"state": "failed", "config": row.config, "seconds": {"total": 1.0}})
                continue
            value = scores[depth] * row.stop_step / 8
            values = value + np.random.default_rng([depth, row.config["seed"]]).normal(0, noise, NUM_IMAGES)
            score = {"name": "class/accuracy", "value": float(values.mean()), "control": None}
            table = {"image_ids": [*range(NUM_IMAGES)], "sums": values.tolist(), "counts": [1] * NUM_IMAGES}
            results.append(
                {
                    "state": "done",
                    "config": row.config,
                    "scores": [score],
                    "image_scores": {"class/accuracy": table},
                    "seconds": {"total": 60.0 * row.stop_step / 8},
                    "flops": {"encode": 1.2e9, "mix": 4e9 * depth, "batch_size": 4, "regions_per_image": 2},
                    "memory": {"estimated": 5_000_000},
                }
            )
        return results

    return run_rows


def get_depth(candidate):
    return candidate.rows[0].config["model"]["mixer"]["depth"]


def test_halving_finds_the_best_of_similar_combinations(sweep):
    calls = []
    scores = {depth: 0.9 - 0.03 * abs(depth - 5) for depth in range(1, 9)}
    result = halve_combinations(sweep.list_rows("listed"), make_run_rows(scores, calls))
    assert (get_depth(result.best), result.best.step) == (5, 8)
    assert [len(call) for call in calls][:2] == [8, 3]
    assert all(len(later) < len(earlier) for earlier, later in itertools.pairwise(calls))


def test_halving_keeps_the_best_third_of_combinations_that_look_alike(sweep):
    calls = []
    result = halve_combinations(sweep.list_rows("listed"), make_run_rows(dict.fromkeys(range(1, 9), 0.5), calls))
    assert [len(call) for call in calls] == [8, 3, 2, 1]
    assert [call[0][1] for call in calls] == [1, 2, 4, 8]
    assert len(result.dropped_early) == 5
    assert len(result.not_ruled_out) + len(result.ruled_out) == 2
    assert result.format_lines()[-2].split("; ")[1] == "dropped after the first rung: 5"
    assert result.seconds == pytest.approx(60 * (8 / 8 + 3 * 2 / 8 + 2 * 4 / 8 + 1))


def test_halving_keeps_a_slow_starter_in_the_first_rung(sweep):
    calls = []
    early_scores = {depth: {1: 0.9, 2: 0.8, 5: 0.7}.get(depth, 0.1) for depth in range(1, 9)}
    run_early_rows = make_run_rows(early_scores, calls)
    run_late_rows = make_run_rows({depth: 0.9 if depth == 5 else 0.5 for depth in range(1, 9)}, calls)
    result = halve_combinations(
        sweep.list_rows("listed"), lambda rows: (run_early_rows if rows[0].stop_step == 1 else run_late_rows)(rows)
    )
    assert get_depth(result.best) == 5


def test_halving_compares_two_combinations_until_half_of_the_steps(sweep):
    calls = []
    table = {**TABLE, "axes": {"mixer.depth": [1, 2]}}
    halve_combinations(Sweep.from_dict(table, "mine").list_rows("listed"), make_run_rows({1: 0.5, 2: 0.5}, calls))
    assert [len(call) for call in calls] == [2, 2, 2, 1]


def test_halving_stops_early_if_one_combination_is_clearly_best(sweep):
    calls, lines = [], []
    scores = {depth: 0.9 if depth == 3 else 0.1 for depth in range(1, 9)}
    result = halve_combinations(sweep.list_rows("listed"), make_run_rows(scores, calls), report=lines.append)
    assert [len(call) for call in calls] == [8, 3, 1]
    assert (get_depth(result.best), result.best.step) == (3, 8)
    assert (len(result.ruled_out), len(result.dropped_early), len(result.failed)) == (2, 5, 0)
    assert result.format_lines()[0].startswith("recommended: mixer query(num_queries=2,depth=3,")
    assert "class/accuracy 90." in result.format_lines()[0]
    assert result.format_lines()[0].endswith("; estimated 3.30 GFLOPs per image with 2 regions, 5 MB peak memory")
    assert result.format_lines()[-1].startswith("reproduce the recommendation (seed 0): sca bench row ")
    assert lines[0].startswith("rung 1 of 4, 1 step: 3 of 8 combinations left; best: mixer query(")
    assert lines[1].startswith("rung 2 of 4, 2 steps: 1 of 3 combinations left; best: mixer query(")


def test_halving_ranks_failed_combinations_last(sweep):
    scores = {depth: None if depth < 5 else depth / 10 for depth in range(1, 9)}
    result = halve_combinations(sweep.list_rows("listed"), make_run_rows(scores, []))
    assert get_depth(result.best) == 8
    assert {get_depth(each) for each in result.failed} == {1, 2, 3, 4}
    assert "; failed: 4; " in result.format_lines()[-2]


def test_halving_reports_when_every_combination_fails(sweep):
    scores = {depth: 0.9 if depth == 3 else 0.1 for depth in range(1, 9)}
    run_rows = make_run_rows(scores, [])

    def fail_last_rung(rows):
        return [row if len(rows) > 1 else {**row, "scores": []} for row in run_rows(rows)]

    with pytest.raises(ValueError, match=r"every combination of this rung \(8 steps\) failed"):
        halve_combinations(sweep.list_rows("listed"), fail_last_rung)
    with pytest.raises(ValueError, match=r"every combination of this rung \(1 step\) failed"):
        halve_combinations(sweep.list_rows("listed"), make_run_rows(dict.fromkeys(range(1, 9)), []))
    with pytest.raises(ValueError, match=r"has the score 'cidr'; choose from class/accuracy"):
        halve_combinations(sweep.list_rows("listed"), run_rows, "cidr")


def test_candidates_are_named_by_what_distinguishes_them():
    table = {**TABLE, "axes": {"train.learning_rate": [0.1, 0.2], "mixer.depth": [1]}}
    labels = [each.label for each in list_candidates(Sweep.from_dict(table, "mine").list_rows("listed"))]
    assert labels == ["train.learning_rate 0.1", "train.learning_rate 0.2"]


def test_halving_averages_seeds(sweep):
    rows = Sweep.from_dict({**TABLE, "seeds": [0, 1, 2]}, "mine").list_rows("listed")
    assert [len(candidate.rows) for candidate in list_candidates(rows)] == [3] * 8
    calls = []
    halve_combinations(rows, make_run_rows({depth: depth / 10 for depth in range(1, 9)}, calls))
    assert len(calls[0]) == 24


def test_halving_rejects_rows_without_training_or_with_stages(sweep):
    for changes in ({"train": None}, {"train": {**TABLE["train"], "stages": [{}, {}]}}, {"evaluate": None}):
        table = {key: value for key, value in {**TABLE, **changes}.items() if value is not None}
        (row, *_) = Sweep.from_dict(table, "mine").list_rows()
        with pytest.raises(RegistryError, match="--halving requires rows with one training stage"):
            make_rung_row(row, 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stop_step": 3}, "--halving sets train.stop_step; remove it from the sweep"),
        ({"steps": 7}, "train.steps is 7; --halving requires at least 8, for 4 rungs"),
    ],
)
def test_halving_rejects_stops_and_too_few_steps(changes, message):
    (row, *_) = Sweep.from_dict({**TABLE, "train": {**TABLE["train"], **changes}}, "mine").list_rows()
    with pytest.raises(RegistryError, match=message):
        make_rung_row(row, 3)


@pytest.mark.slow
def test_run_halving_resumes_training_runs_and_rungs(tmp_path):
    sweep = Sweep.from_dict({**TABLE, "axes": {"mixer.depth": [1, 2]}}, "mine")
    messages = []
    settings = RunSettings(launcher_options={"num_workers": 1}, report=messages.append)
    with pytest.raises(IncompleteRungError, match="2 of 2 rows of this rung have no result yet; run the same command"):
        run_halving(sweep, tmp_path, RunSettings(report=messages.append, time_budget=0.0))
    result = run_halving(sweep, tmp_path, settings)
    rows = ResultStore(tmp_path).read_rows()
    assert {row["state"] for row in rows} == {"done"}, [row["reason"] for row in rows]
    steps = [row["config"]["train"]["stop_step"] for row in rows]
    assert steps[:2] == [1, 1]
    assert steps[-1] == result.best.step == 8
    rows_of_best = [row for row in rows if row["config"]["model"] == rows[-1]["config"]["model"]]
    logs = [(tmp_path / "rows" / row["key"] / "log.txt").read_text("utf-8") for row in rows_of_best]
    assert re.findall(r"^step +(\d+)/8 ", "".join(logs), re.MULTILINE) == [*map(str, range(1, 9))]  # each one once
    for row in rows_of_best:
        stop_step = row["config"]["train"]["stop_step"]
        assert [step for step, _ in row["losses"]] == [*range(1, stop_step + 1)]
        assert (row["seconds"]["reused_training"] > 0) == (stop_step > 1)
    messages.clear()
    assert run_halving(sweep, tmp_path, settings).format_lines() == result.format_lines()
    assert not [line for line in messages if ": done in" in line]


@pytest.mark.slow
def test_rows_that_stop_share_a_run_and_equal_one_that_does_not_stop(tmp_path):
    weights = {}
    axes = {"mixer.depth": [1], "train.stop_step": [3, 8], "evaluate.prompt_type": ["box", "center"]}
    for name, stop_steps in (("stopped", [3, 8]), ("whole", [8])):
        sweep = Sweep.from_dict({**TABLE, "axes": {**axes, "train.stop_step": stop_steps}}, name)
        settings = RunSettings(launcher_options={"num_workers": 2}, report=lambda line: None)
        run_sweep(sweep, tmp_path / name, settings, order="listed")
        rows = ResultStore(tmp_path / name).read_rows()
        assert {row["state"] for row in rows} == {"done"}, [row["reason"] for row in rows]
        models = {row["config"]["train"]["stop_step"]: row["model"] for row in rows}
        assert {row["model"] for row in rows} == {*models.values()}  # prompt types share models
        weights[name] = (tmp_path / name / models[8] / "weights.safetensors").read_bytes()
        if name == "stopped":
            assert (tmp_path / name / models[3] / "weights.safetensors").read_bytes() != weights[name]
    assert weights["stopped"] == weights["whole"]
