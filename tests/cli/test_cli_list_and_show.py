"""`sca list`, `sca show` and shell completion: fast, without importing torch."""

import json
import re
import subprocess
import sys

import catalogue
import pytest
import sca_registry
from sca_registry import zoo

from sca.cli import COMMANDS as COMMANDS_BY_PANEL

LIGHTWEIGHT_COMMANDS = (
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
CHECK_IMPORTS_PROGRAM = """
import json, sys
from sca.cli import run_command
for command in json.loads(sys.argv[1]):
    run_command(command)
    heavy = {"torch", "transformers", "numpy", "jinja2", "rich"} & set(sys.modules)
    assert not heavy, f"sca {' '.join(command)} imported {heavy}"
"""


@pytest.mark.slow
def test_help_list_and_show_import_no_heavy_modules():
    completed = subprocess.run(
        [sys.executable, "-c", CHECK_IMPORTS_PROGRAM, json.dumps(LIGHTWEIGHT_COMMANDS)], capture_output=True, text=True
    )
    assert completed.returncode == 0, completed.stderr


@pytest.mark.parametrize(("command", "max_modules"), [("--help", 400), ("list", 280)])
@pytest.mark.slow
def test_help_and_list_import_few_modules(command, max_modules):
    call_code = f"from sca.cli import run_command; run_command([{command!r}])"
    program = f"import sys; {call_code}; print(len(sys.modules), file=sys.stderr)"
    completed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert int(completed.stderr.split()[-1]) < max_modules


def test_help_lists_commands_and_each_command_has_help(run_sca):
    help_text = run_sca("--help").out
    for command in ("list", "show", "caption", "train", "evaluate", "data"):
        assert f"\n  {command} " in help_text
        assert run_sca(command, "--help").status == 0


def test_help_groups_the_commands_and_fits_a_screen(run_sca, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    lines = run_sca("--help").out.splitlines()
    panels = [line.removesuffix(":") for line in lines if line.endswith(":")]
    assert panels == ["Options", *COMMANDS_BY_PANEL]
    assert len(lines) <= 41
    assert max(map(len, lines)) <= 80
    assert not [line for line in lines if line.endswith("...") and not line.startswith("Usage")]


@pytest.mark.parametrize(
    ("command", "usage"),
    [
        (("caption",), "sca caption [OPTIONS] IMAGE..."),
        (("convert",), "sca convert [OPTIONS] CAPTIONS OUT"),
        (("view",), "sca view [OPTIONS] CAPTIONS [OTHER]"),
        (("plan",), "sca plan [OPTIONS] MODEL [KEY=VALUE]..."),
        (("report",), "sca report [OPTIONS] PREDICTIONS... [KEY=VALUE]..."),
        (("bench", "run"), "sca bench run [OPTIONS] SWEEP [KEY=VALUE]..."),
    ],
)
def test_help_shows_arguments_in_capitals_and_no_python_types(run_sca, monkeypatch, command, usage):
    monkeypatch.setenv("COLUMNS", "80")
    text = run_sca(*command, "--help").out
    assert text.splitlines()[0] == f"Usage: {usage}"
    assert not re.search(r"<(?!region \d>)\w+.*>", text)


@pytest.mark.parametrize(
    ("command_line", "expected"),
    [
        ("sca ca", ["caption", "calibrate"]),
        ("sca caption --max-n", ["--max-new-tokens"]),
        ("sca data vi", ["view"]),
        ("sca bench ru", ["run"]),
    ],
)
@pytest.mark.slow
def test_shell_completion_completes_commands_and_options(start_sca, monkeypatch, command_line, expected):
    for name, value in {
        "_SCA_COMPLETE": "complete_bash",
        "COMP_WORDS": command_line,
        "COMP_CWORD": command_line.count(" "),
    }.items():
        monkeypatch.setenv(name, str(value))
    out, _ = start_sca().communicate()
    assert out.split() == expected


def test_sca_without_arguments_prints_usage(run_sca):
    result = run_sca()
    assert result.status == 2
    assert result.err[0].startswith("Usage: sca")


@pytest.mark.slow
def test_python_module_runs_sca_command(start_sca):
    out, _ = start_sca("--version").communicate()
    assert out.startswith("sca ")


def test_list_json_rows_have_all_fields_and_valid_states(run_sca):
    for kind in ("encoders", "segmenter", "language-models", "models", "recipes"):
        rows = json.loads(run_sca("list", kind, "--json").out)
        assert rows
        for row in rows:
            required_fields = {"name", "summary", "source", "license", "parameters", "distribution", "version", "state"}
            assert required_fields <= row.keys()
            assert row["state"] == "ok" or row["reason"].startswith("pip install 'segment-caption-anything[")
            assert row["summary"]


def test_list_and_show_report_model_without_weights_as_broken(run_sca, working_folder, monkeypatch):
    monkeypatch.setattr(zoo.ZooEntry, "folder", working_folder / "gone")
    for row in json.loads(run_sca("list", "models", "--json").out):
        assert row["state"] == "broken"
        assert row["reason"].startswith(f"no weights in {working_folder / 'gone'}; restore")
    assert "state:        broken" in run_sca("show", "model", "sca-tiny").out


def test_list_without_kind_lists_all_kinds_and_names(run_sca):
    rows = json.loads(run_sca("list", "--json").out)
    assert {"encoder", "segmenter", "mixer", "language_model", "dataset", "metric", "model", "recipe"} <= {
        row["kind"] for row in rows
    }
    table = run_sca("list").out
    for row in rows:
        assert row["name"] in table
    assert "Apache-2.0" not in table
    assert "Apache-2.0" in run_sca("list", "mixers", "--long").out


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["*sam2.1*tiny"], {"sam2.1-hiera-tiny"}),
        (["encoders", "SAM-VIT-?"], {"sam-vit-b", "sam-vit-l", "sam-vit-h"}),
        (["mixer", "query"], {"query"}),
        (["mixers", "--search", "OSPREY"], {"masked-pool"}),
        (["encoders", "sam3*", "--search", "sam license"], {"sam3-tracker"}),
        (["models", "--search", "street"], {"sca-street"}),
    ],
)
def test_list_filters_by_wildcard_and_text(run_sca, arguments, names):
    assert {row["name"] for row in json.loads(run_sca("list", *arguments, "--json").out)} == names


def test_list_reports_a_filter_without_a_match(get_sca_error):
    assert get_sca_error(2, "list", "foo*").startswith("nothing matches 'foo*'")
    assert get_sca_error(2, "list", "encoders", "--search", "no such text").startswith("nothing matches 'no such")


@pytest.mark.parametrize(
    ("kind", "name", "line"),
    [
        ("encoder", "sam2.1-hiera-tiny", "default segmenter: sam2"),
        ("segmenter", "sam", "provides: masks, boxes, grid"),
        ("segmenter", "box", "requires: none"),
        ("mixer", "mask-tokens", "requires: masks, grid"),
        ("mixer", "query", "requires: none; masks with mask_pooling"),
    ],
)
def test_show_prints_what_a_component_provides_and_requires(run_sca, kind, name, line):
    lines = [re.sub(" +", " ", each) for each in run_sca("show", kind, name).out.splitlines()]
    assert line in lines


def test_show_prints_what_a_registered_component_requires(run_sca, monkeypatch):
    monkeypatch.setattr(catalogue, "REGISTRY", dict(catalogue.REGISTRY))

    class Demanding:
        requires = ("masks",)

        def __init__(self, segmenter):
            pass

    sca_registry.mixers.register("demanding", func=Demanding)
    assert "requires:     masks" in run_sca("show", "mixer", "demanding").out


def test_list_of_one_kind_fits_80_columns(run_sca, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "80")
    lines = run_sca("list", "mixers").out.splitlines()
    assert max(map(len, lines)) <= 80
    assert any(line.startswith("query ") for line in lines)


def test_show_prints_options_with_defaults(run_sca):
    lines = run_sca("show", "mixers", "query").out.splitlines()
    assert "  num_queries = 8" in lines
    assert not any("segmenter" in line for line in lines[lines.index("options:") :])
    assert "  image_size = 128" in run_sca("show", "dataset", "scenes").out.splitlines()  # a constant of its module


@pytest.mark.slow
def test_show_prints_exactly_the_constructor_options_of_every_component(run_sca):
    import inspect

    import sca_registry

    for kind in ("encoders", "segmenters", "mixers", "language_models", "datasets", "metrics"):
        registry = sca_registry.get_registry(kind)
        for name in registry.list_names():
            has_upstream_parameter = kind in ("segmenters", "mixers", "datasets")
            parameters = list(inspect.signature(registry.get(name)).parameters.values())[has_upstream_parameter:]
            lines = run_sca("show", kind, name).out.splitlines()
            printed_options = (
                [line.strip() for line in lines[lines.index("options:") + 1 :]] if "options:" in lines else []
            )
            assert printed_options == [f"{each.name} = {format_default(each)}" for each in parameters]


def format_default(parameter):
    return "(required)" if parameter.default is parameter.empty else parameter.default


def test_commands_suggest_closest_name_for_typos(get_sca_error):
    assert "Did you mean 'encoders'?" in get_sca_error(2, "list", "encodrs")
    assert "Did you mean 'models'?" in get_sca_error(2, "list", "modles")
    assert "Did you mean 'query'?" in get_sca_error(2, "show", "mixer", "qurey")
    assert "Did you mean 'sca-tiny'?" in get_sca_error(2, "show", "model", "sca-tniy")
    assert "Did you mean 'sca-tiny'?" in get_sca_error(2, "show", "recipe", "sca-tniy")
    assert "Did you mean 'sca-tiny'?" in get_sca_error(2, "train", "sca-tniy")
    assert "Did you mean 'steps'?" in get_sca_error(2, "train", "sca-tiny", "train.stesp=3")
    assert "'caption'" in get_sca_error(2, "captoin", "a.png")


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("tiny-vit", "the kind of 'tiny-vit' is missing; use `sca show encoder tiny-vit`"),
        ("sca-tiny", "the kind of 'sca-tiny' is missing; use `sca show model sca-tiny` or `sca show recipe sca-tiny`"),
        ("tiny-gpt2", "the kind of 'tiny-gpt2' is missing; use `sca show language-model tiny-gpt2`"),
        ("language-model", "the name of the language model is missing; `sca list language_models` lists all names"),
        ("mixers", "the name of the mixer is missing; `sca list mixers` lists all names"),
    ],
)
def test_show_with_one_argument_names_the_missing_one(get_sca_error, argument, message):
    assert get_sca_error(2, "show", argument) == message


def test_show_with_one_unknown_argument_suggests_a_kind(get_sca_error):
    assert get_sca_error(2, "show", "encodr").startswith("unknown kind 'encodr'. Did you mean 'encoders'?")


@pytest.mark.parametrize(
    ("command", "replacement"),
    [
        ("sweep", "`sca bench run FILE.toml`, with the values to compare in [axes] of that file"),
        ("finetune", "`sca train own-data`"),
        ("push-to-hub", "`sca push`"),
        ("segment", "`sca caption IMAGE --model NAME+none` for masks without captions"),
    ],
)
def test_unknown_command_names_what_to_use(get_sca_error, command, replacement):
    assert get_sca_error(2, command, "x").startswith(f"No such command {command!r}; use {replacement}")


def test_help_of_bench_names_sweeps(run_sca):
    (line,) = [line for line in run_sca("--help").out.splitlines() if line.split()[:1] == ["bench"]]
    assert "sweep" in line


def test_data_export_writes_dataset_and_leaves_nothing_after_errors(run_sca, get_sca_error, working_folder):
    assert run_sca("data", "export", "scenes", "out", "num_images=2").status == 0
    assert len(json.loads((working_folder / "out" / "val.json").read_text())["images"]) == 2
    assert "not a new or empty folder" in get_sca_error(2, "data", "export", "scenes", "out", "num_images=2")
    assert "Did you mean 'coco'?" in get_sca_error(2, "data", "export", "scenes", "new", "--format", "cocoa")
    assert "Did you mean 'num_images'?" in get_sca_error(2, "data", "export", "scenes", "new", "num_image=2")
    assert [path.name for path in working_folder.iterdir()] == ["out"]


def test_list_and_show_print_model_domains_and_models_for_photographs(run_sca):
    list_result = run_sca("list", "models")
    assert "synthetic scenes" in list_result.out
    (line,) = list_result.err
    assert line.startswith("sca: for photographs: ")
    assert run_sca("list", "models", "--json").err == []
    show_result = run_sca("show", "model", "sca-street")
    assert re.search("^domain: +street photographs$", show_result.out, re.M)
    assert show_result.err == [f"sca: {zoo.describe_domain('sca-street')}"]
    published_result = run_sca("show", "model", "sca-gpt2-large-vg")
    assert re.search("^download: +5.7 GB$", published_result.out, re.M)
    assert published_result.err == []
