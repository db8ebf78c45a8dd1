"""Run folders after faults: finished results are kept, and a repeated command ends as an uninterrupted one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

COMMAND_NAMES = ("caption", "evaluate", "train", "bench", "convert", "import")
QUICK_COUNTS, FULL_COUNTS = (2, 1, 1, 1), (20, 5, 5, 3)  # kills, full disks, torn journals, concurrent pairs
CASES = [pytest.param("caption,convert", QUICK_COUNTS, id="caption+convert")]  # other tests cover the other commands
CASES += [pytest.param(name, FULL_COUNTS, marks=pytest.mark.all, id=name) for name in COMMAND_NAMES]


@pytest.mark.skipif(sys.platform != "linux", reason="forks processes with threads")
@pytest.mark.parametrize(("command_names", "counts"), CASES)
def test_run_folders_survive_kills_full_disks_torn_files_and_concurrent_runs(tmp_path, command_names, counts):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, Path(__file__).with_name("fault_injection.py"), command_names, *map(str, counts)]
    process = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=3000)
    assert process.returncode == 0, process.stderr[-5000:]
    assert process.stdout.strip().endswith("nothing was lost")
