"""A sweep whose processes are killed at any time ends with the rows of an undisturbed sweep."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from sca_bench.store import ResultStore
from sca_bench.sweep import Sweep

pytestmark = pytest.mark.slow

TINY_SWEEP = """
seeds = [0]
[model]
encoder = { name = "tiny-vit", image_size = 64, hidden_size = 32, depth = 1, output_channels = 32, \
stem_channels = [8, 16] }
language_model = { name = "tiny-gpt2", hidden_size = 32, depth = 1, num_heads = 2, max_positions = 40 }
task_tokens = 2
trainable = ["encoder", "segmenter", "mixer", "projection", "task_tokens", "language_model"]
[axes]
mixer = [{ name = "query", num_queries = 2, depth = 1, num_heads = 2, mlp_dim = 64 }, "mask-tokens", "roi-pool"]
segmenter = [{ name = "sam", depth = 1, num_heads = 2, mlp_dim = 64 }, "box"]
[evaluate]
dataset = { name = "scenes", num_images = 2, image_size = 64 }
metrics = ["attributes", "class"]
[benchmark]
regions_per_image = [1]
max_new_tokens = 2
num_repeats = 5
"""


def start_sweep(sweep, folder, mark):
    """Start `sca bench run` in a process whose children carry a mark."""
    command = [sys.executable, "-m", "sca", "bench", "run", sweep, "num_workers=2", "--out", folder, "--quiet"]
    environment = {**os.environ, "SCA_MARK": mark}
    discard_output = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen(list(map(str, command)), env=environment, **discard_output)


def find_marked_processes(mark):
    """Return the processes that carry the mark."""
    process_ids = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                if f"SCA_MARK={mark}".encode() in (folder / "environ").read_bytes():
                    process_ids.append(int(folder.name))
            except OSError:
                continue
    return process_ids


def select_reproducible_fields(rows):
    """Return rows without timings: keys, states, reasons, parameters, operations and scores."""
    fields = ("label", "state", "reason", "config", "parameters", "flops", "scores")
    return {row["key"]: {name: row.get(name) for name in fields} for row in rows}


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds processes in /proc")
@pytest.mark.parametrize(("name", "num_kills"), [("tiny", 1), pytest.param("smoke", 200, marks=pytest.mark.all)])
def test_sweep_loses_and_duplicates_no_rows_when_processes_are_killed(tmp_path, name, num_kills):
    sweep = name
    if name == "tiny":
        sweep = tmp_path / "tiny.toml"
        sweep.write_text(TINY_SWEEP)
    uninterrupted, start_time = start_sweep(sweep, tmp_path / "whole", "whole"), time.monotonic()
    while not (tmp_path / "whole/results.jsonl").exists() and uninterrupted.poll() is None:
        time.sleep(0.1)
    seconds_to_first_row = time.monotonic() - start_time  # seconds, which depend on the machine
    assert uninterrupted.wait() == 0
    expected_rows = ResultStore(tmp_path / "whole").read_rows()
    rng, folder, num_killed, num_killed_before_first_row = random.Random(0), tmp_path / "killed", 0, 0
    runner = start_sweep(sweep, folder, "killed")
    while num_killed < num_kills:
        # some while it starts, some while it runs
        time.sleep(rng.random() * rng.choice((0.1, 1.6)) * seconds_to_first_row)
        if runner.poll() is not None:
            if runner.returncode == 0:  # all rows exist: restart, so that a process can be killed
                assert select_reproducible_fields(ResultStore(folder).read_rows()) == select_reproducible_fields(
                    expected_rows
                )
                (folder / "results.jsonl").unlink()
            runner = start_sweep(sweep, folder, "killed")
            continue
        victims = find_marked_processes("killed")
        if victims:
            victim = runner.pid if rng.random() < 0.2 else rng.choice(victims)
            try:
                os.kill(victim, signal.SIGKILL)
                num_killed += 1
                num_killed_before_first_row += not (folder / "results.jsonl").exists()
            except ProcessLookupError:
                continue
            ResultStore(folder).read_rows()  # is readable at any time
    assert num_killed_before_first_row < num_kills / 2 or name == "tiny"
    runner.wait()
    while start_sweep(sweep, folder, "killed").wait():
        pass
    lines = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    assert len({row["key"] for row in lines}) == len(lines) == len(Sweep.read(str(sweep)).list_rows())
    assert select_reproducible_fields(lines) == select_reproducible_fields(expected_rows)
    deadline = time.monotonic() + 60
    while (
        find_marked_processes("killed") and time.monotonic() < deadline
    ):  # a process that is importing ends after its imports
        time.sleep(0.2)
    assert not find_marked_processes("killed")  # no process is left
