"""Files of the project that repeat its version, its supported versions of Python or its checks."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]


def read_text(path: str) -> str:
    return (ROOT / path).read_text("utf-8")


def read_yaml(path: str):
    return yaml.safe_load(read_text(path))


def test_citation_and_changelog_have_the_version_of_the_package():
    assert read_yaml("CITATION.cff")["version"] == PROJECT["version"]
    versions = re.findall(
        r"^## \[([\d.]+)\] - (?:unreleased|\d{4}-\d\d-\d\d)$", read_text("CHANGELOG.md"), re.MULTILINE
    )
    assert versions[0] == PROJECT["version"]


def test_citation_has_the_authors_of_the_package():
    assert read_yaml("CITATION.cff")["authors"] == PROJECT["authors"]


def test_workflow_runs_every_python_of_the_classifiers():
    jobs = read_yaml(".github/workflows/ci.yml")["jobs"]
    classifiers = "\n".join(PROJECT["classifiers"])
    assert jobs["test"]["strategy"]["matrix"]["python-version"] == re.findall(r"Python :: (3\.\d+)", classifiers)


def test_workflow_and_ci_script_run_the_same_commands():
    steps = read_yaml(".github/workflows/ci.yml")["jobs"]["test"]["steps"]
    workflow_commands = [step["run"] for step in steps if "run" in step]
    script_commands = re.findall(r"make --no-print-directory (.*) </dev/null", read_text(".ci/run"))
    assert workflow_commands == [f"make {command}" for command in script_commands]


def test_pre_commit_runs_the_programs_of_make_check_and_make_vocabulary():
    (repository,) = read_yaml(".pre-commit-config.yaml")["repos"]
    makefile = read_text("Makefile").replace("$(BIN)", ".venv/bin")
    for hook in repository["hooks"]:
        program = hook["entry"].split(" --")[0]
        assert program in makefile, hook["id"]
