"""Imports point downward, and no package is part of a cycle."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
PLACES = {"": "sca", "registry": "sca_registry", "benchmarks": "sca_bench"}  # folders of the packages
PROGRAM = Path(sys.executable).with_name("lint-imports")


def check_imports(folder):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(str(folder / place) for place in PLACES)}
    return subprocess.run([PROGRAM, "--no-cache"], cwd=folder, env=environment, capture_output=True, text=True)


@pytest.mark.skipif(not PROGRAM.exists(), reason="import-linter is not installed")
def test_imports_keep_the_contracts_of_pyproject():
    checked = check_imports(ROOT)
    assert checked.returncode == 0, checked.stdout


@pytest.mark.skipif(not PROGRAM.exists(), reason="import-linter is not installed")
def test_import_that_points_upward_breaks_a_contract(tmp_path):
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for place, package in PLACES.items():
        shutil.copytree(ROOT / place / package, tmp_path / place / package, ignore=shutil.ignore_patterns("sca-*"))
    path = tmp_path / "sca/io/text.py"
    path.write_text(path.read_text() + "\n\ndef late():\n    import sca.cli\n")
    checked = check_imports(tmp_path)
    assert checked.returncode == 1
    assert "sca.io.text -> sca.cli" in checked.stdout
