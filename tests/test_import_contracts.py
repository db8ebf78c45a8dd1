"""Imports point downward, and no package is part of a cycle."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
PACKAGE_BY_FOLDER = {"": "sca", "registry": "sca_registry", "benchmarks": "sca_bench"}  # folders of the packages
LINT_IMPORTS = Path(sys.executable).with_name("lint-imports")


def run_lint_imports(folder):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(str(folder / parent) for parent in PACKAGE_BY_FOLDER)}
    return subprocess.run([LINT_IMPORTS, "--no-cache"], cwd=folder, env=environment, capture_output=True, text=True)


@pytest.mark.skipif(not LINT_IMPORTS.exists(), reason="import-linter is not installed")
def test_import_linter_passes_contracts_in_pyproject():
    completed = run_lint_imports(ROOT)
    assert completed.returncode == 0, completed.stdout


@pytest.mark.skipif(not LINT_IMPORTS.exists(), reason="import-linter is not installed")
def test_import_linter_rejects_upward_import(tmp_path):
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for parent, package in PACKAGE_BY_FOLDER.items():
        shutil.copytree(ROOT / parent / package, tmp_path / parent / package, ignore=shutil.ignore_patterns("sca-*"))
    path = tmp_path / "sca/io/text.py"
    path.write_text(path.read_text() + "\n\ndef late():\n    import sca.cli\n")
    completed = run_lint_imports(tmp_path)
    assert completed.returncode == 1
    assert "sca.io.text -> sca.cli" in completed.stdout
