"""Whatever happens to a command, what is finished stays, and the same command ends as an uninterrupted one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

KINDS = ("caption", "evaluate", "train", "bench", "convert", "import")
FEW, MANY = (2, 1, 1, 1), (20, 5, 5, 3)  # kills, full disks, torn tails, pairs at once
FORKS = pytest.mark.skipif(sys.platform != "linux", reason="forks processes with threads")


def survives(kind, counts, folder):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, Path(__file__).with_name("chaos.py"), kind, *map(str, counts)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=3000)
    assert done.returncode == 0, done.stderr[-5000:]
    assert done.stdout.strip().endswith("nothing was lost")


@FORKS
@pytest.mark.parametrize("kind", [pytest.param(kind, marks=[pytest.mark.all] * (kind == "bench")) for kind in KINDS])
def test_run_folder_survives_what_ends_a_run(tmp_path, kind):
    survives(kind, FEW, tmp_path)


@FORKS
@pytest.mark.all
@pytest.mark.parametrize("kind", KINDS)
def test_run_folder_survives_many_ends(tmp_path, kind):
    survives(kind, MANY, tmp_path)
