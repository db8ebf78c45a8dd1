"""Every block of every page runs; the shell blocks of a page run one after the other, as a reader runs them."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from contextlib import ExitStack

import pytest
import typer
from pages import PAGES, ROOT, list_commands, read_blocks, read_page
from sca_bench.sweep import Sweep
from sca_registry.cards import Card, parse_cards
from world import SKIPPED_LINES, list_runnable_lines, open_world

from sca import cli
from sca.training.recipe import Recipe

pytestmark = pytest.mark.slow

QUICK_LINE = re.compile(
    r"^(sca (list|show|data stats scenes|data view scenes|data export)|sca check .*--against|make |pip )"
)
PLUGIN_PAGE = "docs/plugins.md"
RUN_PAGES = """
import json, sys
for page, program in json.load(sys.stdin).items():
    exec(compile(program, page, "exec"), {"__name__": page})
"""


def is_quick(page, block):
    """Return whether a block runs in seconds; of the blocks that train, that is the one that most readers run."""
    if page == "README.md" and "sca train own-data" in block:
        return True
    return all(QUICK_LINE.match(line) and "runs/" not in line for line in block.splitlines())


def iter_shell_blocks():
    for page in PAGES:
        for number, block in enumerate(read_blocks(page, "sh")):
            if "mixer=mean" in block or not list_runnable_lines(block):  # the plugin `mean` is tested below
                continue
            marks = [] if is_quick(page, block) else [pytest.mark.all]
            yield pytest.param(page, block, marks=marks, id=f"{page}-{number}")


@pytest.fixture(scope="module")
def open_page_world(tmp_path_factory, sam_folder):
    """A function that returns the world of a page, created when it is first needed."""
    worlds = {}
    with ExitStack() as stack:

        def open_once(page):
            if page not in worlds:
                worlds[page] = stack.enter_context(open_world(tmp_path_factory.mktemp("reader"), sam_folder))
            return worlds[page]

        yield open_once


@pytest.mark.parametrize(("page", "block"), [*iter_shell_blocks()])
def test_shell_block_runs(open_page_world, page, block):
    open_page_world(page).run(block)


def test_python_blocks_run_page_by_page(tmp_path):
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    programs = {page: "\n".join(blocks) for page in PAGES if (blocks := read_blocks(page, "python"))}
    process = subprocess.run(
        [sys.executable, "-c", RUN_PAGES], input=json.dumps(programs), capture_output=True, text=True, cwd=tmp_path
    )
    assert process.returncode == 0, process.stderr
    assert "370.0, 434.0, 448.0, 512.0" in process.stdout
    assert {"README.md", "docs/python.md", PLUGIN_PAGE} <= programs.keys()


@pytest.mark.parametrize("command", list_commands("sca"))
def test_command_has_known_options_of_the_right_type(command):
    _, *arguments = shlex.split(command)
    parser = typer.main.get_command(cli.build_app())
    with parser.make_context("sca", [*arguments]) as context:
        _, parser, arguments = parser.resolve_command(context, arguments)
    while hasattr(parser, "commands"):
        parser = parser.commands[arguments.pop(0)]
    parser.make_context("sca", arguments)


@pytest.mark.parametrize(
    ("page", "block"),
    [(page, block) for page in PAGES for block in read_blocks(page, "toml")],
)
def test_toml_block_is_valid(page, block, tmp_path):
    tables = tomllib.loads(block)
    if "axes" in tables:
        (tmp_path / "sweep.toml").write_text(block)
        assert Sweep.read(str(tmp_path / "sweep.toml")).list_rows()
    elif "train" in tables:
        assert Recipe.from_dict("block", tables).data
    elif any(isinstance(table, dict) and "factory" in table for table in tables.values()):
        assert all(isinstance(card, Card) and card.summary for card in parse_cards(block).values())


def test_plugin_of_the_manual_installs_is_listed_and_trains(tmp_path):
    (code,) = (block for block in read_blocks(PLUGIN_PAGE, "python") if "class MeanMixer" in block)
    (project,) = (block for block in read_blocks(PLUGIN_PAGE, "toml") if "my_mixers:MeanMixer" in block)
    (tmp_path / "plugin").mkdir()
    (tmp_path / "plugin" / "my_mixers.py").write_text(code, "utf-8")
    (tmp_path / "plugin" / "pyproject.toml").write_text(project, "utf-8")
    site = tmp_path / "site"
    flags = ["--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--target", str(site)]
    environment = {**os.environ, "PYTHONPATH": str(site), "XDG_CACHE_HOME": str(tmp_path / "cache")}

    def run(*command):
        process = subprocess.run(
            [sys.executable, "-m", *command], capture_output=True, text=True, cwd=tmp_path, env=environment
        )
        assert process.returncode == 0, process.stderr
        return process.stdout

    run("pip", "install", *flags, "./plugin")
    rows = {row["name"]: row for row in json.loads(run("sca", "list", "mixers", "--json"))}
    assert rows["mean"]["distribution"] == "my-mixers"
    (training,) = (command for command in list_commands("sca") if "mixer=mean" in command)
    overrides = ["train.steps=1", "train.batch_size=2", "train.num_processes=1"]
    run(*shlex.split(training), *overrides, "--quiet")
    assert (tmp_path / "runs/mean/model/spec.json").is_file()


def test_every_skipped_line_occurs_in_a_page():
    lines = "".join(block for page in PAGES for block in read_blocks(page, "sh")).splitlines()
    for pattern, reason in SKIPPED_LINES:
        assert any(re.search(pattern, line) for line in lines), f"{pattern}: {reason}"


def test_every_installed_extra_exists():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    for page in PAGES:
        for names in re.findall(r"\.\[([\w,]+)\]|anything\[([\w,]+)\]", read_page(page)):
            assert set(next(filter(None, names)).split(",")) <= set(extras), page


def test_documents_install_from_clone_only_in_editable_mode():
    lines = [line for page in PAGES for block in read_blocks(page, "sh") for line in block.splitlines()]
    installs = [line for line in lines if re.match(r"pip install -c constraints.txt .*\.(\[|$| )", line)]
    assert len(installs) > 5
    for line in installs:
        assert re.match(r"pip install -c constraints.txt -e ('\.\[[\w,]+\]'|\.)( |$)", line), line


def test_every_make_target_exists():
    rules = re.findall(r"^([\w -]+):(?!=)", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
    targets = {target for rule in rules for target in rule.split()}
    mentioned = {name for page in PAGES for name in re.findall(r"(?:`|^)make ([a-z-]+)", read_page(page), re.MULTILINE)}
    assert mentioned - targets == set()
