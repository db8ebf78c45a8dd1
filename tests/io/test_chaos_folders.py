"""Whatever happens to a command, what is finished stays, and the same command ends as an uninterrupted one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

KINDS = ("caption", "evaluate", "train", "bench", "convert", "import")
FEW, MANY = (2, 1, 1, 1), (20, 5, 5, 3)  # kills, full disks, torn tails, pairs at once
CASES = [("caption,convert", FEW)]  # for the others see tests of theirs
CASES += [pytest.param(kind, MANY, marks=pytest.mark.all) for kind in KINDS]


@pytest.mark.skipif(sys.platform != "linux", reason="forks processes with threads")
@pytest.mark.parametrize(("kinds", "counts"), CASES)
def test_run_folders_survive_what_ends_a_run(tmp_path, kinds, counts):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, Path(__file__).with_name("chaos.py"), kinds, *map(str, counts)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=3000)
    assert done.returncode == 0, done.stderr[-5000:]
    assert done.stdout.strip().endswith("nothing was lost")
