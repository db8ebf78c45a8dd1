"""A new plugin from its template to its use, and the messages about broken plugins."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sca.testing.scaffold import TEMPLATE_KINDS

pytestmark = pytest.mark.slow

PIP_FLAGS = ["--quiet", "--no-deps", "--no-index", "--no-build-isolation"]


@pytest.fixture
def isolated_site(tmp_path):
    """Installs packages into a folder of their own and runs commands that find them."""
    folder, cache_folder = tmp_path / "site", tmp_path / "cache"
    environment = {
        **os.environ,
        "PYTHONPATH": str(folder),
        "SCA_CACHE": str(cache_folder),
        "MARKS": str(tmp_path / "marks"),
    }

    class Site:
        def install_package(self, package):
            flags = [*PIP_FLAGS, "--upgrade", "--target", str(folder), str(package)]
            subprocess.run([sys.executable, "-m", "pip", "install", *flags], check=True, capture_output=True)

        def write(self, name, entry_points, **modules):
            """Write a distribution as pip installs it, without a build."""
            dist_info = folder / f"{name.replace('-', '_')}-1.0.dist-info"
            dist_info.mkdir(parents=True)
            (dist_info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
            (dist_info / "entry_points.txt").write_text(entry_points)
            (dist_info / "RECORD").write_text("")
            for module, module_source in modules.items():
                (folder / f"{module}.py").write_text(module_source)

        def run(self, *command):
            return subprocess.run(
                [sys.executable, "-m", *command], capture_output=True, text=True, cwd=tmp_path, env=environment
            )

    return Site()


AMBIGUOUS_NAME_BY_KIND = {
    "segmenter": "regions",
    "dataset": "sample",
    "proposer": "prompt",
    "mixer": "v1.2",
}  # that could be confused


@pytest.mark.parametrize(
    "kind", [kind if kind == "mixer" else pytest.param(kind, marks=pytest.mark.all) for kind in TEMPLATE_KINDS]
)
def test_plugin_new_creates_plugin_that_installs_and_passes_its_checks(kind, isolated_site, tmp_path):
    name = AMBIGUOUS_NAME_BY_KIND.get(kind, "my-part")
    distribution = f"sca-{name.replace('.', '-')}"
    scaffold_result = isolated_site.run("sca", "plugin", "new", kind, name)
    assert scaffold_result.returncode == 0, scaffold_result.stderr
    isolated_site.install_package(tmp_path / distribution)
    (row,) = [row for row in json.loads(isolated_site.run("sca", "list", kind, "--json").stdout) if row["name"] == name]
    assert (row["distribution"], row["state"]) == (distribution, "unchecked")
    check_result = isolated_site.run("sca", "check", kind, name)
    assert check_result.returncode == 0, check_result.stdout + check_result.stderr
    (test_file,) = (tmp_path / distribution).glob("test_*.py")
    test_result = isolated_site.run("pytest", "-q", "-p", "no:cacheprovider", str(test_file))
    assert test_result.returncode == 0, test_result.stdout


@pytest.mark.all  # tests/manuals does the same with the plugin of the manual
def test_new_mixer_plugin_can_be_trained_and_used_for_captions(isolated_site, tmp_path):
    from PIL import Image

    isolated_site.run("sca", "plugin", "new", "mixer", "shade")
    isolated_site.install_package(tmp_path / "sca-shade")
    short_run_overrides = ["train.steps=1", "train.batch_size=2", "train.num_processes=1", "data.scenes.num_images=4"]
    train_result = isolated_site.run(
        "sca", "train", "sca-tiny", "mixer=shade", *short_run_overrides, "--out", "runs/shade", "--quiet"
    )
    assert train_result.returncode == 0, train_result.stderr
    Image.new("RGB", (40, 30), "red").save(tmp_path / "a.png")
    caption_result = isolated_site.run(
        "sca", "caption", "a.png", "--box", "1,1,20,20", "--model", "runs/shade/model", "--out", "-"
    )
    assert json.loads(caption_result.stdout)["model"] == "runs/shade/model"


def test_plugin_new_rejects_existing_folders_unknown_kinds_and_used_names(isolated_site, tmp_path):
    (tmp_path / "sca-mine").mkdir()
    (tmp_path / "sca-mine" / "work.py").write_text("mine")
    result = isolated_site.run("sca", "plugin", "new", "mixer", "mine")
    assert result.returncode == 2
    assert "not a new or empty folder" in result.stderr
    assert (tmp_path / "sca-mine" / "work.py").read_text() == "mine"
    assert "Did you mean 'mixers'" in isolated_site.run("sca", "plugin", "new", "mixr", "mine").stderr
    assert "no template for a launcher" in isolated_site.run("sca", "plugin", "new", "launcher", "mine").stderr
    error = isolated_site.run("sca", "plugin", "new", "mixer", "query").stderr
    assert "the mixer 'query' already exists in segment-caption-anything" in error
    isolated_site.write("sca-shade", "", hostile=MIXER_SOURCE)
    error = isolated_site.run("sca", "plugin", "new", "mixer", "shade").stderr
    assert "a package sca-shade is already installed; choose another name" in error


@pytest.mark.all
def test_check_reports_failed_check_with_expected_behavior(isolated_site):
    invalid_mixer_source = (
        "from torch import nn\n\n\nclass Wrong(nn.Module):\n    num_queries, uses_grid = 2, False\n\n"
    )
    invalid_mixer_source += "    def __init__(self, segmenter):\n        super().__init__()\n"
    invalid_mixer_source += "        self.hidden_size = segmenter.channels\n\n"
    invalid_mixer_source += "    def forward(self, regions):\n        return regions.tokens.mean(1, keepdim=True)\n"
    isolated_site.write("wrong", "[sca_mixers]\nwrong = wrong:Wrong\n", wrong=invalid_mixer_source)
    result = isolated_site.run("sca", "check", "mixer", "wrong", "--quiet")
    assert result.returncode == 1
    assert "FAILED  output-shape: queries has shape (5, 1, 32), not (5, 2, 32)" in result.stdout
    assert "sca_registry.contracts.Mixer" in result.stdout


RECORD_IMPORT_SOURCE = "import os; open(os.environ['MARKS'], 'a').write(__name__ + chr(10))\n"
MIXER_SOURCE = """
import torch
from torch import nn

class Mixer(nn.Module):
    num_queries, uses_grid = 1, False

    def __init__(self, segmenter):
        super().__init__()
        self.hidden_size = segmenter.channels

    def forward(self, regions):
        return regions.tokens.mean(1, keepdim=True)
"""
HOSTILE_PLUGINS = {  # distribution: its entry points, its module, and the message about its one component
    "import-error": ("ill = hostile_import_error:Mixer", "import nothing_of_that_name", "nothing_of_that_name"),
    "exit": ("gone = hostile_exit:Mixer", "import sys; sys.exit(3)", "SystemExit: 3"),
    "hard-exit": ("killed = hostile_hard_exit:Mixer", "import os; os._exit(7)", "exited with status 7"),
    "signal": ("dead = hostile_signal:Mixer", "import os; os.kill(os.getpid(), 9)", "was killed"),
    "soft-exit": ("quit = hostile_soft_exit:Mixer", "import os; os._exit(0)", "exited with status 0"),
    "slow": ("slow = hostile_slow:Mixer", "import time; time.sleep(90)", "exceeded the timeout of 20 s"),
    "shadow": ("query = hostile_shadow:Mixer", MIXER_SOURCE, ""),
    "twin-a": ("twin = hostile_twin_a:Mixer", MIXER_SOURCE, ""),
    "twin-b": ("twin = hostile_twin_b:Mixer", MIXER_SOURCE, ""),
    "old": ("old = hostile_old:Mixer\n[sca_api]\nversion = v0", MIXER_SOURCE, "v0"),
    "raises": (
        "raises = hostile_raises:Mixer",
        MIXER_SOURCE.replace("super().__init__()", "raise RuntimeError('not today')"),
        "not today",
    ),
    "shape": (
        "shape = hostile_shape:Mixer",
        MIXER_SOURCE.replace("keepdim=True", "keepdim=False"),
        "failed checks: output-shape",
    ),
    "nothing": ("nothing = hostile_nothing:Absent", MIXER_SOURCE, "no attribute 'Absent'"),
    "nowhere": ("nowhere = hostile_no_such_module:Mixer", MIXER_SOURCE, "hostile_no_such_module"),
    "cards": ("cards = hostile_cards:mixers.toml", "", "invalid TOML in the card file"),
    "unicode": ("mischer-ü = hostile_unicode:Mixer", MIXER_SOURCE, "cannot be a name"),
    "empty": ("= hostile_empty:Mixer", MIXER_SOURCE, "cannot be a name"),
    "fine": ("fine = hostile_fine:Mixer", MIXER_SOURCE, ""),
}


def test_doctor_reports_each_hostile_plugin_and_list_is_unaffected(isolated_site, tmp_path):
    from sca_registry import mixers

    builtin_names = set(mixers.list_names())
    for name, (entry_points, module, _) in HOSTILE_PLUGINS.items():
        isolated_site.write(
            name,
            f"[sca_mixers]\n{entry_points}\n",
            **{f"hostile_{name.replace('-', '_')}": RECORD_IMPORT_SOURCE + module},
        )
    cards_package = tmp_path / "site" / "hostile_cards"
    cards_package.mkdir()
    cards_package.with_suffix(".py").rename(cards_package / "__init__.py")
    (cards_package / "mixers.toml").write_text("[this is = not valid TOML")

    def list_mixers(*options):
        rows = json.loads(isolated_site.run("sca", "list", "mixers", *options, "--json").stdout)
        return {(row["distribution"], row["name"]): row for row in rows}

    original_rows = list_mixers()
    assert not (tmp_path / "marks").exists()  # nothing was imported
    assert {name for distribution, name in original_rows if distribution == "segment-caption-anything"} == builtin_names
    assert isolated_site.run("sca", "show", "mixer", "query").returncode == 0
    assert "Did you mean 'query'" in isolated_site.run("sca", "show", "mixer", "qurey").stderr

    refusing_mixer_source = MIXER_SOURCE.replace("super().__init__()", "raise ValueError('give me weights')")
    isolated_site.write(
        "refuses", "[sca_mixers]\nrefuses = hostile_refuses:Mixer\n", hostile_refuses=refusing_mixer_source
    )
    isolated_site.write("astray", "[sca_mixer]\nastray = hostile_astray:Mixer\n", hostile_astray=MIXER_SOURCE)
    doctor_result = isolated_site.run("sca", "doctor", "--timeout", "20")
    assert doctor_result.returncode == 1, doctor_result.stderr
    assert "'sca_mixer'. Did you mean 'sca_mixers'?" in doctor_result.stdout
    assert "python:" in doctor_result.stdout
    assert "8 of kind mixer" in doctor_result.stdout
    lines = doctor_result.stdout.splitlines()
    report_line_by_plugin = {
        name: lines[lines.index(f"{name} 1.0") + 1] for name in (*HOSTILE_PLUGINS, "refuses")
    }  # each has one component
    for name, (_, _, reason) in HOSTILE_PLUGINS.items():
        state = r"broken: .*" + re.escape(reason) if reason else "ok$"
        assert re.search(rf"^  mixer .* {state}", report_line_by_plugin[name]), (name, report_line_by_plugin[name])
        assert (f"pip uninstall {name}" in doctor_result.stdout) == bool(reason)
    assert (
        " ok: imported, not checked (give me weights)" in report_line_by_plugin["refuses"]
    )  # the fault is that of the plugin whose requirement is missing
    assert " shadow:query " in report_line_by_plugin["shadow"]
    assert " twin-a:twin " in report_line_by_plugin["twin-a"]
    assert " twin-b:twin " in report_line_by_plugin["twin-b"]
    final_rows = list_mixers()
    assert {
        key: row for key, row in final_rows.items() if key in original_rows
    } == original_rows  # the doctor leaves nothing behind
    assert {row["state"] for (distribution, _), row in final_rows.items() if distribution in HOSTILE_PLUGINS} == {
        "unchecked",
        "broken",
    }
    broken_distributions = {distribution for distribution, _ in list_mixers("--state", "broken")}
    assert broken_distributions == {"old", "cards", "unicode", "empty"}  # what metadata shows
    gguf_rows = json.loads(isolated_site.run("sca", "list", "language-models", "--extra", "gguf", "--json").stdout)
    assert [row["name"] for row in gguf_rows] == ["gguf"]


PLUGINS_FOLDER = Path(__file__).resolve().parents[2] / "plugins"
REQUIRED_MODULE_BY_PLUGIN = {"sca-mmdet": "mmdet", "sca-mobilesam": "timm"}  # what is installed for `make test-all`
ADAPTERS = ("sca-lmms-eval",)  # add this package to other tools, and no components to it


@pytest.mark.parametrize(
    "package",
    [
        pytest.param(folder.name, marks=() if folder.name == "sca-hello" else pytest.mark.all)
        for folder in sorted(PLUGINS_FOLDER.iterdir())
        if folder.is_dir()
    ],
)
def test_repository_plugin_installs_is_listed_and_passes_its_tests(package, isolated_site, tmp_path):
    if package in REQUIRED_MODULE_BY_PLUGIN:
        pytest.importorskip(
            REQUIRED_MODULE_BY_PLUGIN[package],
            reason=f"{REQUIRED_MODULE_BY_PLUGIN[package]} is not installed",
            exc_type=Exception,
        )
    shutil.copytree(PLUGINS_FOLDER / package, tmp_path / package)
    isolated_site.install_package(tmp_path / package)
    test_result = isolated_site.run("pytest", "-q", "-p", "no:cacheprovider", str(tmp_path / package))
    assert test_result.returncode == 0, test_result.stdout
    rows = [
        row
        for row in json.loads(isolated_site.run("sca", "list", "--json").stdout)
        if row.get("distribution") == package
    ]
    assert bool(rows) == (package not in ADAPTERS)
    assert not [row for row in rows if row["state"] == "broken"]


@pytest.mark.all
def test_tutorial_plugin_is_short_and_passes_its_checks(isolated_site, tmp_path):
    source_lines = (PLUGINS_FOLDER / "sca-hello" / "sca_hello.py").read_text().splitlines()
    assert len(source_lines) < 30
    isolated_site.install_package(PLUGINS_FOLDER / "sca-hello")
    result = isolated_site.run("sca", "check", "mixer", "hello")
    assert result.returncode == 0, result.stdout
