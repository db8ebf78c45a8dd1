"""Whatever is killed, and whenever, a sweep ends with the rows of one that was left alone."""

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

TINY = """
seeds = [0, 1]
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
[measure]
regions = [1]
words = 2
repeats = 5
"""


def started(sweep, folder, mark):
    """`sca bench run` in a process whose children carry a mark."""
    command = [sys.executable, "-m", "sca", "bench", "run", sweep, "num_workers=2", "--out", folder, "--quiet"]
    environment = {**os.environ, "SCA_MARK": mark}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen(list(map(str, command)), env=environment, **quiet)


def marked(mark):
    """The processes that carry it."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                if f"SCA_MARK={mark}".encode() in (folder / "environ").read_bytes():
                    found.append(int(folder.name))
            except OSError:
                continue
    return found


def lasting(rows):
    """What of rows is no timing: keys, states, reasons, parameters, operations and scores."""
    kept = ("label", "state", "reason", "config", "parameters", "flops", "scores")
    return {row["key"]: {name: row.get(name) for name in kept} for row in rows}


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds processes in /proc")
@pytest.mark.parametrize(("name", "kills"), [("tiny", 1), pytest.param("smoke", 200, marks=pytest.mark.all)])
def test_nothing_is_lost_or_doubled_when_runner_and_workers_are_killed(tmp_path, name, kills):
    sweep = name
    if name == "tiny":
        sweep = tmp_path / "tiny.toml"
        sweep.write_text(TINY)
    uninterrupted, begun = started(sweep, tmp_path / "whole", "whole"), time.monotonic()
    while not (tmp_path / "whole/results.jsonl").exists() and uninterrupted.poll() is None:
        time.sleep(0.1)
    first_row = time.monotonic() - begun  # seconds, which depend on the machine
    assert uninterrupted.wait() == 0
    whole = ResultStore(tmp_path / "whole").read_rows()
    draw, folder, done, early = random.Random(0), tmp_path / "killed", 0, 0
    runner = started(sweep, folder, "killed")
    while done < kills:
        time.sleep(draw.random() * draw.choice((0.1, 1.6)) * first_row)  # some while it starts, some while it works
        if runner.poll() is not None:
            if runner.returncode == 0:  # all is there: from the beginning, so that there is something to kill
                assert lasting(ResultStore(folder).read_rows()) == lasting(whole)
                (folder / "results.jsonl").unlink()
            runner = started(sweep, folder, "killed")
            continue
        victims = marked("killed")
        if victims:
            victim = runner.pid if draw.random() < 0.2 else draw.choice(victims)
            try:
                os.kill(victim, signal.SIGKILL)
                done += 1
                early += not (folder / "results.jsonl").exists()
            except ProcessLookupError:
                continue
            ResultStore(folder).read_rows()  # can be read at any instant
    assert early < kills / 2 or name == "tiny"
    runner.wait()
    while started(sweep, folder, "killed").wait():
        pass
    lines = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    assert len({row["key"] for row in lines}) == len(lines) == len(Sweep.read(str(sweep)).list_rows())
    assert lasting(lines) == lasting(whole)
    deadline = time.monotonic() + 60
    while marked("killed") and time.monotonic() < deadline:  # one that was importing ends when it has imported
        time.sleep(0.2)
    assert not marked("killed")  # nobody was left behind
