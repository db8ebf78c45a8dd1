"""What the README says works, word by word."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer

import model_table
import results_table
from markers import read_between
from sca import cli

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text("utf-8")
GUIDE = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
MANUALS = [path.read_text("utf-8") for path in sorted((ROOT / "plugins").rglob("README.md"))]
DOCS = [path.read_text("utf-8") for path in sorted((ROOT / "docs").glob("*.md"))]


def blocks(language: str, text: str = TEXT) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def commands(program: str, *texts: str) -> list[str]:
    """The lines of the shell blocks that start with a program."""
    told = "".join(block for text in texts for block in blocks("sh", text))
    lines = told.replace("\\\n", " ").splitlines()
    return list(dict.fromkeys(line for line in lines if line.split()[:1] == [program]))


@pytest.fixture
def checkout(tmp_path, monkeypatch) -> Path:
    """A folder with the examples, as a person in a clone has it."""
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_every_python_block_runs(checkout):
    program = "\n".join(blocks("python"))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=checkout)
    assert done.returncode == 0, done.stderr
    assert "370.0, 434.0, 448.0, 512.0" in done.stdout


@pytest.mark.parametrize("command", commands("sca", TEXT, GUIDE, *MANUALS, *DOCS))
@pytest.mark.slow
def test_every_command_is_understood(command):
    _, *arguments = shlex.split(command)
    parser = typer.main.get_command(cli.app)
    with parser.make_context("sca", [*arguments]) as context:
        _, parser, arguments = parser.resolve_command(context, arguments)
    while hasattr(parser, "commands"):
        parser = parser.commands[arguments.pop(0)]
    parser.make_context("sca", arguments)  # an unknown option or a value of the wrong type raises


def test_every_make_target_is_there():
    rules = re.findall(r"^([\w -]+):(?!=)", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
    targets = {target for rule in rules for target in rule.split()}
    asked = {name for text in (TEXT, GUIDE) for name in re.findall(r"(?:`|^)make ([a-z-]+)", text, re.MULTILINE)}
    assert asked - targets == set()


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\(([^):]+)\)", TEXT + GUIDE))))
def test_every_file_that_is_linked_is_there(link):
    assert (ROOT / link).is_file(), "run: make scene" if link.endswith(".png") else link


def test_the_folders_of_the_tree_are_there():
    (tree,) = (block for block in blocks("text") if "registry/" in block)
    folders, parent = [], ""
    for line in tree.splitlines():
        folder = line.split()[0]
        parent = parent if line.startswith(" ") else folder
        folders.append(f"{parent}{folder}" if line.startswith(" ") else folder)
    assert all((ROOT / folder).is_dir() for folder in folders)
    shown = {folder for folder in folders if folder.startswith("sca/")}
    assert shown >= {f"sca/{each.name}/" for each in (ROOT / "sca").iterdir() if (each / "__init__.py").exists()}


@pytest.mark.slow
def test_the_plugin_of_the_readme_installs_is_listed_and_trains(tmp_path):
    (code,) = (block for block in blocks("python") if "class MeanMixer" in block)
    (project,) = blocks("toml")
    (tmp_path / "plugin").mkdir()
    (tmp_path / "plugin" / "my_mixers.py").write_text(code, "utf-8")
    (tmp_path / "plugin" / "pyproject.toml").write_text(project, "utf-8")
    site = tmp_path / "site"
    flags = ["--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--target", str(site)]
    environment = {**os.environ, "PYTHONPATH": str(site), "XDG_CACHE_HOME": str(tmp_path / "cache")}

    def run(*command: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", *command], capture_output=True, text=True, cwd=tmp_path, env=environment
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    run("pip", "install", *flags, "./plugin")
    listed = {row["name"]: row for row in json.loads(run("sca", "list", "mixers", "--json"))}
    assert listed["mean"]["distribution"] == "my-mixers"
    (training,) = (command for command in commands("sca", TEXT) if "mixer=mean" in command)
    short = ["train.steps=1", "train.batch_size=2", "train.num_processes=1"]
    run(*shlex.split(training), *short, "--quiet")
    assert (tmp_path / "runs/mean/model/spec.json").is_file()


def test_the_table_is_the_one_that_the_measured_results_give():
    shown = read_between(TEXT, results_table.START, results_table.END)
    reports = results_table.read_reports(ROOT / "benchmarks" / "results")
    assert shown == (results_table.render_results_table(reports) if reports else ""), "run: make results-table"


def test_results_become_a_table_between_the_markers(tmp_path):
    report = {"model": "m", "dataset": "d", "split": "test", "prompt": "box", "images": 3, "regions": 7}
    scored = report | {"scores": {"mask-iou/mean": 0.8765, "attributes/all": 0.5, "mask-iou/regions": 7}}
    other = report | {"model": "n", "scores": {"mask-iou/mean": None, "attributes/all": None, "class/area": 0.25}}
    (tmp_path / "results.json").write_text(json.dumps([scored, other]), "utf-8")
    page = tmp_path / "README.md"
    page.write_text(f"before\n{results_table.START}\nold\n{results_table.END}\nafter\n", "utf-8")
    for _ in range(2):
        results_table.main(str(page), str(tmp_path))
    head, rule, first, second = page.read_text("utf-8").splitlines()[2:-2]
    assert head.endswith("| size, texture, color and form all right | class right, by area | mask IoU |")
    assert rule.count("|") == head.count("|")
    assert first == "| m | 3 of d test | box | 7 | 50.0 % | – | 0.876 |"
    assert second == "| n | 3 of d test | box | 7 | – | 25.0 % | – |"
    assert page.read_text("utf-8").startswith("before\n")
    assert page.read_text("utf-8").endswith("\nafter\n")


def test_a_page_without_markers_or_a_folder_without_reports_is_refused_in_one_line(tmp_path):
    page = tmp_path / "README.md"
    page.write_text("nothing\n", "utf-8")
    with pytest.raises(SystemExit, match="error: no report in"):
        results_table.main(str(page), str(tmp_path))
    (tmp_path / "results.json").write_text('{"scores": {}}', "utf-8")
    with pytest.raises(SystemExit, match=r"error: .*results.json is neither the output of `sca evaluate --json`"):
        results_table.main(str(page), str(tmp_path))
    report = {"model": "m", "dataset": "d", "split": "test", "prompt": "box", "images": 3, "regions": 7, "scores": {}}
    (tmp_path / "results.json").write_text(json.dumps(report), "utf-8")
    with pytest.raises(SystemExit, match=r"error: .*README.md: the page has no <!-- results -->"):
        results_table.main(str(page), str(tmp_path))


@pytest.mark.slow
def test_the_table_of_combinations_is_what_is_planned():
    pytest.importorskip("open_clip", reason="the extra clip is not installed", exc_type=Exception)
    assert read_between(TEXT, model_table.START, model_table.END) == model_table.render_model_table(), (
        "run: make model-table"
    )
