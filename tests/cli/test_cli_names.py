"""What can be named is told at once, without importing anything heavy."""

import json
import re
import subprocess
import sys

import pytest
from sca_registry import zoo

from sca.cli import COMMANDS as COMMANDS_BY_PANEL

COMMANDS = (
    ["--help"],
    ["--version"],
    ["list"],
    ["list", "--json"],
    ["list", "models"],
    ["list", "recipes"],
    ["list", "encodrs"],
    ["show", "encoder", "tiny-vit"],
    ["show", "segmenter", "sam"],
    ["show", "mixer", "query"],
    ["show", "language-model", "tiny-gpt2"],
    ["show", "dataset", "scenes"],
    ["show", "metric", "class"],
    ["show", "model", "sca-tiny"],
    ["show", "recipe", "sca-tiny"],
    *([command, "--help"] for command in ("list", "show", "caption", "train", "evaluate", "data")),
    ["data", "export", "--help"],
)
PROBE = """
import json, sys
from sca.cli import run_command
for command in json.loads(sys.argv[1]):
    run_command(command)
    heavy = {"torch", "transformers", "numpy", "jinja2"} & set(sys.modules)
    assert not heavy, f"sca {' '.join(command)} imported {heavy}"
"""


@pytest.mark.slow
def test_looking_around_imports_no_torch():
    done = subprocess.run([sys.executable, "-c", PROBE, json.dumps(COMMANDS)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("command", "most"), [("--help", 400), ("list", 550)])
@pytest.mark.slow
def test_help_and_list_import_few_modules(command, most):
    call = f"from sca.cli import run_command; run_command([{command!r}])"
    program = f"import sys; {call}; print(len(sys.modules), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert int(done.stderr.split()[-1]) < most


def test_every_command_tells_what_it_does(shell):
    whole = shell("--help").out
    for command in ("list", "show", "caption", "train", "evaluate", "data"):
        assert f"\n  {command} " in whole
        assert shell(command, "--help").status == 0


def test_help_groups_the_commands_and_fits_a_screen(shell, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    lines = shell("--help").out.splitlines()
    panels = [line.removesuffix(":") for line in lines if line.endswith(":")]
    assert panels == ["Options", *COMMANDS_BY_PANEL]
    assert len(lines) < 40
    assert max(map(len, lines)) <= 80
    assert not [line for line in lines if line.endswith("...") and not line.startswith("Usage")]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("sca ca", ["caption"]),
        ("sca caption --max-n", ["--max-new-tokens"]),
        ("sca data vi", ["view"]),
        ("sca bench ru", ["run"]),
    ],
)
def test_shell_completion_completes_commands_and_options(started, monkeypatch, words, expected):
    for name, value in {"_SCA_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": words.count(" ")}.items():
        monkeypatch.setenv(name, str(value))
    out, _ = started().communicate()
    assert out.split() == expected


def test_nothing_asked_is_answered_with_the_help(shell):
    result = shell()
    assert result.status == 2
    assert result.err[0].startswith("Usage: sca")


@pytest.mark.slow
def test_the_module_is_the_command(started):
    out, _ = started("--version").communicate()
    assert out.startswith("sca ")


def test_a_listing_has_what_a_chooser_wants(shell):
    for kind in ("encoders", "segmenter", "language-models", "models", "recipes"):
        rows = json.loads(shell("list", kind, "--json").out)
        assert rows
        for row in rows:
            facts = {"name", "summary", "source", "license", "parameters", "distribution", "version", "state"}
            assert facts <= row.keys()
            assert row["state"] == "ok" or row["reason"].startswith("pip install 'segment-caption-anything[")
            assert row["summary"]


def test_a_model_whose_weights_are_gone_is_listed_as_broken(shell, here, monkeypatch):
    monkeypatch.setattr(zoo.ZooEntry, "folder", here / "gone")
    for row in json.loads(shell("list", "models", "--json").out):
        assert row["state"] == "broken"
        assert row["reason"].startswith(f"no weights in {here / 'gone'}; restore")
    assert "state:        broken" in shell("show", "model", "sca-tiny").out


def test_a_listing_of_everything_has_every_kind_and_every_name_a_line(shell):
    rows = json.loads(shell("list", "--json").out)
    assert {"encoder", "segmenter", "mixer", "language_model", "dataset", "metric", "model", "recipe"} <= {
        row["kind"] for row in rows
    }
    table = shell("list").out
    for row in rows:
        assert row["name"] in table
    assert "Apache-2.0" not in table
    assert "Apache-2.0" in shell("list", "mixers", "--long").out


def test_a_listing_of_one_kind_fits_80_columns(shell, monkeypatch):
    from rich.console import Console

    monkeypatch.setattr(Console, "is_terminal", True)
    monkeypatch.setenv("COLUMNS", "80")
    lines = re.sub(r"\x1b\[[\d;]*m", "", shell("list", "mixers").out).splitlines()
    assert max(map(len, lines)) <= 80
    assert any(line.startswith("query ") for line in lines)


def test_a_part_is_shown_with_its_options_and_their_defaults(shell):
    lines = shell("show", "mixers", "query").out.splitlines()
    assert "  num_queries = 8" in lines
    assert not any("segmenter" in line for line in lines[lines.index("options:") :])
    assert "  image_size = 128" in shell("show", "dataset", "scenes").out.splitlines()  # a constant of its module


@pytest.mark.slow
def test_a_shown_part_has_the_options_that_it_takes(shell):
    import inspect

    import sca_registry

    for kind in ("encoders", "segmenters", "mixers", "language_models", "datasets", "metrics"):
        registry = sca_registry.get_registry(kind)
        for name in registry.list_names():
            upstream = kind in ("segmenters", "mixers", "datasets")
            taken = list(inspect.signature(registry.get(name)).parameters.values())[upstream:]
            lines = shell("show", kind, name).out.splitlines()
            shown = [line.strip() for line in lines[lines.index("options:") + 1 :]] if "options:" in lines else []
            assert shown == [f"{each.name} = {_default(each)}" for each in taken]


def _default(parameter):
    return "(required)" if parameter.default is parameter.empty else parameter.default


def test_a_typo_is_answered_with_the_closest_name(refused):
    assert "Did you mean 'encoders'?" in refused(2, "list", "encodrs")
    assert "Did you mean 'models'?" in refused(2, "list", "modles")
    assert "Did you mean 'query'?" in refused(2, "show", "mixer", "qurey")
    assert "Did you mean 'sca-tiny'?" in refused(2, "show", "model", "sca-tniy")
    assert "Did you mean 'sca-tiny'?" in refused(2, "show", "recipe", "sca-tniy")
    assert "Did you mean 'sca-tiny'?" in refused(2, "train", "sca-tniy")
    assert "Did you mean 'steps'?" in refused(2, "train", "sca-tiny", "train.stesp=3")
    assert "'caption'" in refused(2, "captoin", "a.png")


def test_a_dataset_is_exported_and_a_mistake_leaves_nothing(shell, refused, here):
    assert shell("data", "export", "scenes", "out", "num_images=2").status == 0
    assert len(json.loads((here / "out" / "val.json").read_text())["images"]) == 2
    assert "not a new or empty folder" in refused(2, "data", "export", "scenes", "out", "num_images=2")
    assert "Did you mean 'coco'?" in refused(2, "data", "export", "scenes", "new", "--format", "cocoa")
    assert "Did you mean 'num_images'?" in refused(2, "data", "export", "scenes", "new", "num_image=2")
    assert [path.name for path in here.iterdir()] == ["out"]


def test_list_and_show_name_the_domain_of_models_and_those_for_photographs(shell):
    listed = shell("list", "models")
    assert "drawn scenes" in listed.out
    (line,) = listed.err
    assert line.startswith("sca: for photographs: ")
    assert shell("list", "models", "--json").err == []
    shown = shell("show", "model", "sca-street")
    assert re.search("^domain: +street photographs$", shown.out, re.M)
    assert shown.err == [f"sca: {zoo.describe_domain('sca-street')}"]
    published = shell("show", "model", "sca-gpt2-large-vg")
    assert re.search("^download: +5.7 GB$", published.out, re.M)
    assert published.err == []
