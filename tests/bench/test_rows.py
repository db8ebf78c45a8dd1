"""Every way in which a row can end, provoked for real and typed right."""

import json
import shutil
import threading
import time
from dataclasses import replace

import pytest
import sca_registry
from sca_bench.sweep import Sweep, SweepRow

from sca.launchers.local import Local
from sca.launchers.task import Task

pytestmark = pytest.mark.slow

HOSTILE = """
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
JOB = "sca_bench.worker:work"
BASE = {
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
EXPECTED = {
    "segfaults": ("crashed", "SIGSEGV"),
    "leaves": ("crashed", "status 3"),
    "exits": ("failed", "SystemExit: 4"),
    "sleeps": ("timed-out", "more than"),
    "eats": ("out-of-memory", "memory"),
    "raises": ("failed", "chalk"),
    "absent": ("import-error", "no_such_package"),
}


@pytest.fixture
def hostile(tmp_path, monkeypatch):
    """A plugin whose mixers end badly, as a distribution on the path of this process and its children."""
    site = tmp_path / "site"
    folder = site / "hostile-1.0.dist-info"
    folder.mkdir(parents=True)
    (site / "hostile_mixers.py").write_text(HOSTILE)
    (site / "hostile_absent.py").write_text("import no_such_package\n")
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: hostile\nVersion: 1.0\n")
    points = [f"{name} = hostile_mixers:{name.capitalize()}" for name in EXPECTED if name != "absent"]
    points.append("absent = hostile_absent:Absent")
    (folder / "entry_points.txt").write_text("[sca_mixers]\n" + "\n".join(points) + "\n")
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setenv("PYTHONPATH", str(site))
    return site


def task(folder, timeout=120.0, **model):
    config = {
        "model": {**BASE, **model},
        "seed": 0,
        "threads": 1,
        "device": "cpu",
        "measure": {"regions": [1], "words": 2},
    }
    row = SweepRow(json.loads(json.dumps(config)))
    return Task(row.key, JOB, row.config, str(folder / row.key), timeout)


def test_each_end_of_a_row_is_typed_and_the_others_go_on(hostile, tmp_path):
    from multiprocessing import forkserver

    forkserver._forkserver._stop()  # one that was started before knows nothing of the plugin
    tasks = {name: task(tmp_path, 25.0 if name == "sleeps" else 120.0, mixer=name) for name in EXPECTED}
    tasks["good"] = task(tmp_path)
    try:
        found = {outcome.task.key: outcome.result for outcome in Local(num_workers=2).run_tasks(list(tasks.values()))}
    finally:
        forkserver._forkserver._stop()
    for name, (state, said) in EXPECTED.items():
        row = found[tasks[name].key]
        assert (row["state"], said in row["reason"]) == (state, True), (name, row["state"], row["reason"])
    assert found[tasks["good"].key]["state"] == "done"


@pytest.mark.all
def test_a_model_that_becomes_infinite_is_told(tmp_path):
    config = dict(task(tmp_path, segmenter={"name": "sam", "depth": 1, "num_heads": 2, "mlp_dim": 64}).config)
    config["train"] = {"recipe": "sca-tiny", "steps": 3, "batch_size": 1, "learning_rate": 1e38, "warmup_steps": 1}
    row = SweepRow(config)
    (outcome,) = Local(num_workers=1).run_tasks([Task(row.key, JOB, config, str(tmp_path / "row"), 300.0)])
    assert outcome.result["state"] == "not-finite", outcome.result["reason"]


@pytest.mark.all
def test_what_does_not_fit_together_or_into_memory_is_no_failure(tmp_path):
    small, large = task(tmp_path, mixer="mask-tokens"), task(tmp_path)
    large = replace(
        large, config={**large.config, "measure": {"regions": [1], "words": 2, "images": 1 << 22}}, key="large"
    )
    found = {
        outcome.task.key: outcome.result
        for outcome in Local(num_workers=1).run_tasks([small, replace(large, folder=str(tmp_path / "l"))])
    }
    assert found[small.key]["state"] == "impossible"
    assert "needs masks" in found[small.key]["reason"]
    assert found["large"]["state"] == "skipped"
    assert "--force tries it" in found["large"]["reason"]


def test_a_row_has_all_that_was_asked(tmp_path):
    config = dict(task(tmp_path, lora=2).config)
    config["measure"] = {"regions": [1, 3], "words": 2, "repeats": 5, "training": True}
    config["evaluate"] = {"dataset": {"name": "scenes", "num_images": 2, "image_size": 64}, "metrics": ["class"]}
    config["model"] = sca_registry.spec.ModelSpec.from_dict(config["model"]).to_dict()
    row = SweepRow(config)
    (outcome,) = Local(num_workers=1).run_tasks([Task(row.key, JOB, config, str(tmp_path / "row"))])
    made = outcome.result
    assert made["state"] == "done", made["reason"]
    assert [point["regions"] for point in made["curve"]] == [1, 3]
    for point in made["curve"]:
        for timing in (*point["stages"].values(), point["whole"], point["first_caption"]):
            assert timing["repeats"] == 5
            assert 0 <= timing["low"] <= timing["median"] <= timing["high"]
        assert point["regions_per_second"] > 0
    assert made["training_step"]["regions"] == 3
    assert made["flops"]["encode"] > 0
    assert made["parameters"]["trainable"] < made["parameters"]["whole"] or made["parameters"]["trainable"] > 0
    assert made["memory"]["planned"] > 0
    assert made["memory"]["host"] > 0
    assert {"class/count"} <= {score["name"] for score in made["scores"]}
    assert all(score["protocol"] for score in made["scores"])
    assert made["environment"]["versions"]["torch"]
    assert made["seconds"]["process"] >= made["seconds"]["whole"]
    assert "sca bench row" in (tmp_path / "row/log.txt").read_text()


@pytest.mark.all
def test_workers_change_nothing_but_how_many_go_together(tmp_path):
    sweep = Sweep("two", BASE, {"encoder.image_size": [64, 96]}, seeds=(0, 1), measure={"regions": [1], "words": 2})
    keys = []
    for workers in (1, 2, 4):
        tasks = [Task(row.key, JOB, row.config, str(tmp_path / f"{workers}-{row.key}")) for row in sweep.list_rows()]
        keys.append(sorted((o.task.key, o.result["state"]) for o in Local(num_workers=workers).run_tasks(tasks)))
    assert keys[0] == keys[1] == keys[2]
    assert len(keys[0]) == 4


def test_a_folder_that_is_tidied_up_meanwhile_loses_the_log_and_not_the_row(tmp_path):
    asked = task(tmp_path)

    def tidy():
        while not (tmp_path / asked.key / "log.txt").is_file():
            time.sleep(0.01)
        shutil.rmtree(tmp_path / asked.key)

    threading.Thread(target=tidy, daemon=True).start()
    (outcome,) = Local(num_workers=1).run_tasks([asked])
    assert outcome.result["state"] == "done", outcome.result["reason"]
