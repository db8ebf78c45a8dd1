"""A plugin from its first line to its use, and what is told of those that do not work."""

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

QUIET = ["--quiet", "--no-deps", "--no-index", "--no-build-isolation"]


@pytest.fixture
def site(tmp_path):
    """Installs packages beside the others and runs commands that see them."""
    folder, cache = tmp_path / "site", tmp_path / "cache"
    environment = {**os.environ, "PYTHONPATH": str(folder), "SCA_CACHE": str(cache), "MARKS": str(tmp_path / "marks")}

    class Site:
        def install(self, package):
            flags = [*QUIET, "--upgrade", "--target", str(folder), str(package)]
            subprocess.run([sys.executable, "-m", "pip", "install", *flags], check=True, capture_output=True)

        def write(self, name, entry_points, **modules):
            """A distribution as pip leaves it, without building one."""
            info = folder / f"{name.replace('-', '_')}-1.0.dist-info"
            info.mkdir(parents=True)
            (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
            (info / "entry_points.txt").write_text(entry_points)
            (info / "RECORD").write_text("")
            for module, text in modules.items():
                (folder / f"{module}.py").write_text(text)

        def run(self, *command):
            return subprocess.run(
                [sys.executable, "-m", *command], capture_output=True, text=True, cwd=tmp_path, env=environment
            )

    return Site()


NAMES = {"segmenter": "regions", "dataset": "sample", "proposer": "prompt", "mixer": "v1.2"}  # that could be confused


@pytest.mark.parametrize(
    "kind", [kind if kind == "mixer" else pytest.param(kind, marks=pytest.mark.all) for kind in TEMPLATE_KINDS]
)
def test_a_new_plugin_installs_is_listed_and_keeps_its_promises_as_it_is(kind, site, tmp_path):
    name = NAMES.get(kind, "my-part")
    distribution = f"sca-{name.replace('.', '-')}"
    made = site.run("sca", "plugin", "new", kind, name)
    assert made.returncode == 0, made.stderr
    site.install(tmp_path / distribution)
    (row,) = [row for row in json.loads(site.run("sca", "list", kind, "--json").stdout) if row["name"] == name]
    assert (row["distribution"], row["state"]) == (distribution, "unchecked")
    checked = site.run("sca", "check", kind, name)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    (test,) = (tmp_path / distribution).glob("test_*.py")
    tested = site.run("pytest", "-q", "-p", "no:cacheprovider", str(test))
    assert tested.returncode == 0, tested.stdout


@pytest.mark.all  # tests/manuals does the same with the plugin of the manual
def test_the_whole_way_from_a_new_plugin_to_captions(site, tmp_path):
    from PIL import Image

    site.run("sca", "plugin", "new", "mixer", "shade")
    site.install(tmp_path / "sca-shade")
    short = ["train.steps=1", "train.batch_size=2", "train.num_processes=1", "data.scenes.num_images=4"]
    trained = site.run("sca", "train", "sca-tiny", "mixer=shade", *short, "--out", "runs/shade", "--quiet")
    assert trained.returncode == 0, trained.stderr
    Image.new("RGB", (40, 30), "red").save(tmp_path / "a.png")
    told = site.run("sca", "caption", "a.png", "--box", "1,1,20,20", "--model", "runs/shade/model", "--out", "-")
    assert json.loads(told.stdout)["model"] == "runs/shade/model"


def test_a_plugin_that_exists_is_not_written_over_and_a_wrong_kind_is_told(site, tmp_path):
    (tmp_path / "sca-mine").mkdir()
    (tmp_path / "sca-mine" / "work.py").write_text("mine")
    refused = site.run("sca", "plugin", "new", "mixer", "mine")
    assert refused.returncode == 2
    assert "not a new or empty folder" in refused.stderr
    assert (tmp_path / "sca-mine" / "work.py").read_text() == "mine"
    assert "Did you mean 'mixers'" in site.run("sca", "plugin", "new", "mixr", "mine").stderr
    assert "no template for a launcher" in site.run("sca", "plugin", "new", "launcher", "mine").stderr
    taken = site.run("sca", "plugin", "new", "mixer", "query").stderr
    assert "the mixer 'query' already exists in segment-caption-anything" in taken
    site.write("sca-shade", "", hostile=MIXER)
    assert "sca-shade is installed already" in site.run("sca", "plugin", "new", "mixer", "shade").stderr


@pytest.mark.all
def test_a_broken_promise_is_told_with_what_was_expected(site):
    wrong = "from torch import nn\n\n\nclass Wrong(nn.Module):\n    num_queries, uses_grid = 2, False\n\n"
    wrong += "    def __init__(self, segmenter):\n        super().__init__()\n"
    wrong += "        self.hidden_size = segmenter.channels\n\n"
    wrong += "    def forward(self, regions):\n        return regions.tokens.mean(1, keepdim=True)\n"
    site.write("wrong", "[sca_mixers]\nwrong = wrong:Wrong\n", wrong=wrong)
    checked = site.run("sca", "check", "mixer", "wrong", "--quiet")
    assert checked.returncode == 1
    assert "FAILED  output-shape: expected:" in checked.stdout
    assert "sca_registry.contracts.Mixer" in checked.stdout


MARK = "import os; open(os.environ['MARKS'], 'a').write(__name__ + chr(10))\n"
MIXER = """
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
HOSTILE = {  # distribution: its entry points, its module, and what is said of the one part that it has
    "import-error": ("ill = hostile_import_error:Mixer", "import nothing_of_that_name", "nothing_of_that_name"),
    "exit": ("gone = hostile_exit:Mixer", "import sys; sys.exit(3)", "SystemExit: 3"),
    "hard-exit": ("killed = hostile_hard_exit:Mixer", "import os; os._exit(7)", "ended with status 7"),
    "signal": ("dead = hostile_signal:Mixer", "import os; os.kill(os.getpid(), 9)", "was killed"),
    "soft-exit": ("quit = hostile_soft_exit:Mixer", "import os; os._exit(0)", "ended with status 0"),
    "slow": ("slow = hostile_slow:Mixer", "import time; time.sleep(90)", "more than 20 s"),
    "shadow": ("query = hostile_shadow:Mixer", MIXER, ""),
    "twin-a": ("twin = hostile_twin_a:Mixer", MIXER, ""),
    "twin-b": ("twin = hostile_twin_b:Mixer", MIXER, ""),
    "old": ("old = hostile_old:Mixer\n[sca_api]\nversion = v0", MIXER, "v0"),
    "raises": (
        "raises = hostile_raises:Mixer",
        MIXER.replace("super().__init__()", "raise RuntimeError('not today')"),
        "not today",
    ),
    "shape": (
        "shape = hostile_shape:Mixer",
        MIXER.replace("keepdim=True", "keepdim=False"),
        "failed checks: output-shape",
    ),
    "nothing": ("nothing = hostile_nothing:Absent", MIXER, "no attribute 'Absent'"),
    "nowhere": ("nowhere = hostile_no_such_module:Mixer", MIXER, "hostile_no_such_module"),
    "cards": ("cards = hostile_cards:mixers.toml", "", "not a card file"),
    "unicode": ("mischer-ü = hostile_unicode:Mixer", MIXER, "cannot be a name"),
    "empty": ("= hostile_empty:Mixer", MIXER, "cannot be a name"),
    "fine": ("fine = hostile_fine:Mixer", MIXER, ""),
}


def test_no_plugin_breaks_anything_and_the_doctor_says_what_is_wrong_with_each(site, tmp_path):
    from sca_registry import mixers

    builtins = set(mixers.list_names())
    for name, (entry_points, module, _) in HOSTILE.items():
        site.write(name, f"[sca_mixers]\n{entry_points}\n", **{f"hostile_{name.replace('-', '_')}": MARK + module})
    package = tmp_path / "site" / "hostile_cards"
    package.mkdir()
    package.with_suffix(".py").rename(package / "__init__.py")
    (package / "mixers.toml").write_text("[this is = not TOML")

    def listed(*options):
        rows = json.loads(site.run("sca", "list", "mixers", *options, "--json").stdout)
        return {(row["distribution"], row["name"]): row for row in rows}

    before = listed()
    assert not (tmp_path / "marks").exists()  # nothing was imported
    assert {name for distribution, name in before if distribution == "segment-caption-anything"} == builtins
    assert site.run("sca", "show", "mixer", "query").returncode == 0
    assert "Did you mean 'query'" in site.run("sca", "show", "mixer", "qurey").stderr

    refusing = MIXER.replace("super().__init__()", "raise ValueError('give me weights')")
    site.write("refuses", "[sca_mixers]\nrefuses = hostile_refuses:Mixer\n", hostile_refuses=refusing)
    site.write("astray", "[sca_mixer]\nastray = hostile_astray:Mixer\n", hostile_astray=MIXER)
    told = site.run("sca", "doctor", "--timeout", "20")
    assert told.returncode == 1, told.stderr
    assert "'sca_mixer'. Did you mean 'sca_mixers'?" in told.stdout
    assert "python:" in told.stdout
    assert "6 of kind mixer" in told.stdout
    lines = told.stdout.splitlines()
    found = {name: lines[lines.index(f"{name} 1.0") + 1] for name in (*HOSTILE, "refuses")}  # each has one part
    for name, (_, _, reason) in HOSTILE.items():
        state = r"broken: .*" + re.escape(reason) if reason else "ok$"
        assert re.search(rf"^  mixer .* {state}", found[name]), (name, found[name])
        assert (f"pip uninstall {name}" in told.stdout) == bool(reason)
    assert " ok: imported, not tried: give me weights" in found["refuses"]  # whoever lacks what it needs is at fault
    assert " shadow:query " in found["shadow"]
    assert " twin-a:twin " in found["twin-a"]
    assert " twin-b:twin " in found["twin-b"]
    after = listed()
    assert {key: row for key, row in after.items() if key in before} == before  # the doctor leaves nothing behind
    assert {row["state"] for (distribution, _), row in after.items() if distribution in HOSTILE} == {
        "unchecked",
        "broken",
    }
    broken = {distribution for distribution, _ in listed("--state", "broken")}
    assert broken == {"old", "cards", "unicode", "empty"}  # what metadata shows
    needing = json.loads(site.run("sca", "list", "language-models", "--extra", "gguf", "--json").stdout)
    assert [row["name"] for row in needing] == ["gguf"]


PLUGINS = Path(__file__).resolve().parents[2] / "plugins"
STANDS_ON = {"sca-mmdet": "mmdet", "sca-mobilesam": "timm"}  # what is installed for `make test-all`


@pytest.mark.parametrize(
    "package",
    [
        pytest.param(folder.name, marks=() if folder.name == "sca-hello" else pytest.mark.all)
        for folder in sorted(PLUGINS.iterdir())
        if folder.is_dir()
    ],
)
def test_each_plugin_here_is_a_distribution_that_passes_its_own_tests(package, site, tmp_path):
    if package in STANDS_ON:
        pytest.importorskip(STANDS_ON[package], reason=f"{STANDS_ON[package]} is not installed", exc_type=Exception)
    shutil.copytree(PLUGINS / package, tmp_path / package)
    site.install(tmp_path / package)
    tested = site.run("pytest", "-q", "-p", "no:cacheprovider", str(tmp_path / package))
    assert tested.returncode == 0, tested.stdout
    listed = [row for row in json.loads(site.run("sca", "list", "--json").stdout) if row.get("distribution") == package]
    assert listed
    assert not [row for row in listed if row["state"] == "broken"]


@pytest.mark.all
def test_the_plugin_of_the_tutorial_is_short_and_keeps_its_promises(site, tmp_path):
    written = (PLUGINS / "sca-hello" / "sca_hello.py").read_text().splitlines()
    assert len(written) < 30
    site.install(PLUGINS / "sca-hello")
    checked = site.run("sca", "check", "mixer", "hello")
    assert checked.returncode == 0, checked.stdout
