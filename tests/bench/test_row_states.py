"""Every final state of a row, provoked by a real failure."""

import json
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import sca_registry
from sca_bench.row import SweepRow
from sca_bench.row_training import train_stages
from sca_bench.runner import RunSettings, run_sweep
from sca_bench.store import ResultStore
from sca_bench.sweep import Sweep

from sca.launchers.local import LocalLauncher
from sca.launchers.task import Task

pytestmark = pytest.mark.slow

HOSTILE_MIXERS = """
import ctypes, os, signal, time
import torch
from sca.mixers.roi_pool import RoiPoolMixer as RoiPool


class Segfaults(RoiPool):
    def forward(self, regions):
        ctypes.string_at(0)


class Leaves(RoiPool):
    def forward(self, regions):
        os._exit(3)


class Exits(RoiPool):
    def __init__(self, segmenter):
        raise SystemExit(4)


class Sleeps(RoiPool):
    def __init__(self, segmenter):
        time.sleep(600)


class Eats(RoiPool):
    def __init__(self, segmenter):
        super().__init__(segmenter)
        self.large = torch.empty(1 << 48)


class Raises(RoiPool):
    def __init__(self, segmenter):
        raise KeyError("chalk")
"""
JOB = "sca_bench.worker:run_row"
BASE_MODEL = {
    "encoder": {
        "name": "tiny-vit",
        "image_size": 64,
        "hidden_size": 32,
        "depth": 1,
        "output_channels": 32,
        "stem_channels": [8, 16],
    },
    "segmenter": "box",
    "mixer": "roi-pool",
    "language_model": {"name": "tiny-gpt2", "hidden_size": 32, "depth": 1, "num_heads": 2, "max_positions": 96},
    "task_tokens": 2,
    "trainable": ["encoder", "segmenter", "mixer", "projection", "task_tokens", "language_model"],
}
EXPECTED_STATES = {
    "segfaults": ("crashed", "SIGSEGV"),
    "leaves": ("crashed", "status 3"),
    "exits": ("failed", "SystemExit: 4"),
    "sleeps": ("timed-out", "exceeded the timeout of 25 s"),
    "eats": ("out-of-memory", "memory"),
    "raises": ("failed", "chalk"),
    "absent": ("import-error", "no_such_package"),
}


@pytest.fixture
def hostile_plugin(tmp_path, monkeypatch):
    """Install a plugin whose mixers fail, as a distribution on the path of this process and its children."""
    site = tmp_path / "site"
    folder = site / "hostile-1.0.dist-info"
    folder.mkdir(parents=True)
    (site / "hostile_mixers.py").write_text(HOSTILE_MIXERS)
    (site / "hostile_absent.py").write_text("import no_such_package\n")
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: hostile\nVersion: 1.0\n")
    points = [f"{name} = hostile_mixers:{name.capitalize()}" for name in EXPECTED_STATES if name != "absent"]
    points.append("absent = hostile_absent:Absent")
    (folder / "entry_points.txt").write_text("[sca_mixers]\n" + "\n".join(points) + "\n")
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setenv("PYTHONPATH", str(site))
    return site


def make_task(folder, timeout=120.0, **model):
    config = {
        "model": {**BASE_MODEL, **model},
        "seed": 0,
        "num_threads": 1,
        "device": "cpu",
        "benchmark": {"regions_per_image": [1], "max_new_tokens": 2},
    }
    row = SweepRow(json.loads(json.dumps(config)))
    return Task(row.key, JOB, row.config, str(folder / row.key), timeout)


def test_failed_rows_have_their_state_and_other_rows_continue(hostile_plugin, tmp_path):
    from multiprocessing import forkserver

    forkserver._forkserver._stop()  # an existing server does not have the plugin
    tasks = {name: make_task(tmp_path, 25.0 if name == "sleeps" else 120.0, mixer=name) for name in EXPECTED_STATES}
    tasks["good"] = make_task(tmp_path)
    try:
        rows_by_key = {
            outcome.task.key: outcome.result for outcome in LocalLauncher(num_workers=2).run_tasks(list(tasks.values()))
        }
    finally:
        forkserver._forkserver._stop()
    for name, (state, reason) in EXPECTED_STATES.items():
        row = rows_by_key[tasks[name].key]
        assert (row["state"], reason in row["reason"]) == (state, True), (name, row["state"], row["reason"])
    assert rows_by_key[tasks["good"].key]["state"] == "done"


@pytest.mark.all
def test_row_of_diverging_training_is_not_finite(tmp_path):
    config = dict(make_task(tmp_path, segmenter={"name": "sam", "depth": 1, "num_heads": 2, "mlp_dim": 64}).config)
    config["train"] = {"recipe": "sca-tiny", "steps": 3, "batch_size": 1, "learning_rate": 1e38, "warmup_steps": 1}
    row = SweepRow(config)
    (outcome,) = LocalLauncher(num_workers=1).run_tasks([Task(row.key, JOB, config, str(tmp_path / "row"), 300.0)])
    assert outcome.result["state"] == "non-finite", outcome.result["reason"]


@pytest.mark.all
def test_row_of_incompatible_or_oversized_model_is_impossible_or_skipped(tmp_path):
    incompatible, oversized = make_task(tmp_path, mixer="mask-tokens"), make_task(tmp_path)
    oversized = replace(
        oversized,
        config={
            **oversized.config,
            "benchmark": {"regions_per_image": [1], "max_new_tokens": 2, "batch_size": 1 << 22},
        },
        key="large",
    )
    rows_by_key = {
        outcome.task.key: outcome.result
        for outcome in LocalLauncher(num_workers=1).run_tasks(
            [incompatible, replace(oversized, folder=str(tmp_path / "l"))]
        )
    }
    assert rows_by_key[incompatible.key]["state"] == "incompatible"
    assert "needs masks" in rows_by_key[incompatible.key]["reason"]
    assert rows_by_key["large"]["state"] == "skipped"
    assert "run it anyway with --force" in rows_by_key["large"]["reason"]


def test_row_contains_all_requested_measurements(tmp_path):
    config = dict(make_task(tmp_path, lora=2).config)
    config["benchmark"] = {"regions_per_image": [1, 3], "max_new_tokens": 2, "num_repeats": 5, "training_step": True}
    config["evaluate"] = {"dataset": {"name": "scenes", "num_images": 2, "image_size": 64}, "metrics": ["class"]}
    config["model"] = sca_registry.spec.ModelSpec.from_dict(config["model"]).to_dict()
    row = SweepRow(config)
    (outcome,) = LocalLauncher(num_workers=1).run_tasks([Task(row.key, JOB, config, str(tmp_path / "row"))])
    row_result = outcome.result
    assert row_result["state"] == "done", row_result["reason"]
    assert [point["regions_per_image"] for point in row_result["throughput"]] == [1, 3]
    for point in row_result["throughput"]:
        for timing in (*point["stages"].values(), point["total"], point["time_to_first_token"]):
            assert timing["num_repeats"] == 5
            assert 0 <= timing["min"] <= timing["median"] <= timing["max"]
        assert point["regions_per_second"] > 0
    assert row_result["training_step"]["regions_per_image"] == 3
    assert row_result["flops"]["encode"] > 0
    assert (
        row_result["parameters"]["trainable"] < row_result["parameters"]["total"]
        or row_result["parameters"]["trainable"] > 0
    )
    assert row_result["memory"]["estimated"] > 0
    assert row_result["memory"]["host"] > 0
    assert {"class/accuracy"} <= {score["name"] for score in row_result["scores"]}
    assert all(score["protocol_id"] for score in row_result["scores"])
    assert row_result["environment"]["versions"]["torch"]
    assert row_result["seconds"]["process"] >= row_result["seconds"]["total"]
    assert "sca bench row" in (tmp_path / "row/log.txt").read_text()


@pytest.mark.all
def test_local_launcher_num_workers_does_not_change_rows(tmp_path):
    sweep = Sweep.from_dict(
        {
            "model": BASE_MODEL,
            "axes": {"encoder.image_size": [64, 96]},
            "seeds": [0, 1],
            "benchmark": {"regions_per_image": [1], "max_new_tokens": 2},
        },
        "two",
    )
    row_states = []
    for num_workers in (1, 2, 4):
        tasks = [
            Task(row.key, JOB, row.config, str(tmp_path / f"{num_workers}-{row.key}")) for row in sweep.list_rows()
        ]
        row_states.append(
            sorted(
                (outcome.task.key, outcome.result["state"])
                for outcome in LocalLauncher(num_workers=num_workers).run_tasks(tasks)
            )
        )
    assert row_states[0] == row_states[1] == row_states[2]
    assert len(row_states[0]) == 4


def test_local_launcher_leaks_no_semaphores(tmp_path):
    (tmp_path / "progress_task.py").write_text(
        "from tqdm import tqdm\n"
        "def run(config, folder):\n"
        "    return {'state': 'done', 'steps': len(list(tqdm('abc')))}\n"
    )
    (tmp_path / "launch.py").write_text(
        "from sca.launchers.local import LocalLauncher\n"
        "from sca.launchers.task import Task\n"
        "if __name__ == '__main__':\n"
        "    task = Task('a', 'progress_task:run', {'device': 'cpu'}, 'row')\n"
        "    print([outcome.result['steps'] for outcome in LocalLauncher(1).run_tasks([task])])\n"
    )
    run = subprocess.run([sys.executable, "launch.py"], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (run.stdout, run.stderr) == ("[3]\n", "")


def test_row_survives_deletion_of_its_folder(tmp_path):
    running_task = make_task(tmp_path)

    def delete_row_folder():
        while not (tmp_path / running_task.key / "log.txt").is_file():
            time.sleep(0.01)
        shutil.rmtree(tmp_path / running_task.key)

    threading.Thread(target=delete_row_folder, daemon=True).start()
    (outcome,) = LocalLauncher(num_workers=1).run_tasks([running_task])
    assert outcome.result["state"] == "done", outcome.result["reason"]


@pytest.mark.slow
def test_row_trains_in_stages_with_shared_features_and_keeps_its_model(tmp_path):
    import sca

    mixer = {"name": "query", "num_queries": 2, "depth": 1, "num_heads": 2, "mlp_dim": 32}
    model = {**BASE_MODEL, "mixer": mixer, "trainable": ["mixer", "projection", "task_tokens", "language_model"]}
    names = {"names": {"name": "scenes", "num_images": 3, "image_size": 64}}
    train = {"steps": 2, "batch_size": 2, "warmup_steps": 1, "prompt_weights": {"box": 1.0}, "loss": {"caption": 1.0}}
    train |= {"data": {"scenes": {"name": "scenes", "num_images": 2, "seed": 1, "image_size": 64}}}
    train |= {"cache_features": True, "keep_models": True, "stages": [{"class_name_prob": 1.0, "data": names}, {}]}
    table = {
        "model": model,
        "train": train,
        "evaluate": {"dataset": {"name": "scenes", "num_images": 6, "image_size": 64}, "metrics": ["attributes"]},
        "variants": {
            "model": {},
            "points": {"evaluate": {"prompt_type": "center"}},
            "baseline": {"captioner": {"name": "most-frequent", "dataset": "scenes"}},
        },
    }
    sweep = Sweep.from_dict(table, "stages")
    run_sweep(sweep, tmp_path, RunSettings(report=lambda line: None))
    rows = {each["key"]: each for each in ResultStore(tmp_path).read_rows()}
    assert {row["state"] for row in rows.values()} == {"done"}, [row["reason"] for row in rows.values()]
    trained, points, baseline = (rows[row.key] for row in sweep.list_rows("listed"))
    assert trained["model"] == points["model"]
    assert len([*tmp_path.glob("models/*")]) == 2
    assert (trained["seconds"]["reused_training"] == 0) != (points["seconds"]["reused_training"] == 0)
    assert trained["losses"] == points["losses"]
    assert [step for step, _ in trained["losses"]] == [1, 2, 3, 4]
    assert len([*tmp_path.glob("features/*/*/*.npy")]) == 3 + 2
    assert sca.load(str(tmp_path / trained["model"])).spec.mixer.name == "query"
    assert len(trained["image_scores"]["attributes/all"]["image_ids"]) == 6
    assert baseline["scores"][0]["name"].startswith("attributes/")
    assert ResultStore(tmp_path).read_sweep().list_rows() == sweep.list_rows()


def test_row_that_waits_for_a_shared_training_counts_it_once(tmp_path):
    mixer = {"name": "query", "num_queries": 2, "depth": 1, "num_heads": 2, "mlp_dim": 32}
    model = {**BASE_MODEL, "mixer": mixer, "trainable": ["mixer", "projection", "task_tokens", "language_model"]}
    train = {"steps": 20, "batch_size": 2, "warmup_steps": 1, "loss": {"caption": 1.0}, "keep_models": True}
    train |= {"data": {"scenes": {"name": "scenes", "num_images": 2, "image_size": 64}}}
    (row,) = Sweep.from_dict({"model": model, "train": train}, "shared").list_rows()
    with ThreadPoolExecutor(2) as pool:
        calls = [pool.submit(train_stages, row, tmp_path / f"work-{index}", tmp_path) for index in range(2)]
        stages = [call.result()[0] for call in calls]
    assert stages[0].folder == stages[1].folder
    for stage in stages:
        assert stage.seconds - stage.own_seconds < 0.5 * stage.seconds  # reused_training of the row


def test_training_that_continues_counts_its_earlier_steps(tmp_path):
    mixer = {"name": "query", "num_queries": 2, "depth": 1, "num_heads": 2, "mlp_dim": 32}
    model = {**BASE_MODEL, "mixer": mixer, "trainable": ["mixer", "projection", "task_tokens", "language_model"]}
    train = {"steps": 4, "batch_size": 2, "warmup_steps": 1, "loss": {"caption": 1.0}}
    train |= {"data": {"scenes": {"name": "scenes", "num_images": 2, "image_size": 64}}}
    sweep = Sweep.from_dict({"model": model, "train": train, "axes": {"train.stop_step": [2, 4]}}, "stops")
    first, second = (train_stages(row, tmp_path / "work", tmp_path)[0] for row in sweep.list_rows("listed"))
    assert [step for step, _ in first.losses] == [1, 2]
    assert [step for step, _ in second.losses] == [1, 2, 3, 4]
    assert second.seconds > first.seconds
