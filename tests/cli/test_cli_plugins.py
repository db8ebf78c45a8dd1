"""A plugin from its first line to its use, and what is told of those that do not work."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from sca.scaffold import KINDS

QUIET = ["--quiet", "--no-deps", "--no-index", "--no-build-isolation"]


@pytest.fixture
def site(tmp_path):
    """Installs packages beside the others and runs commands that see them."""
    folder, cache = tmp_path / "site", tmp_path / "cache"
    environment = {**os.environ, "PYTHONPATH": str(folder), "SCA_CACHE": str(cache)}

    class Site:
        def install(self, package):
            flags = [*QUIET, "--upgrade", "--target", str(folder), str(package)]
            subprocess.run([sys.executable, "-m", "pip", "install", *flags], check=True, capture_output=True)

        def write(self, name, entry_points, **modules):
            """A distribution as pip leaves it, without building one."""
            info = folder / f"{name}-1.0.dist-info"
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


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_plugin_installs_is_listed_and_keeps_its_promises_as_it_is(kind, site, tmp_path):
    assert site.run("sca", "plugin", "new", kind, "my-part").returncode == 0
    folder = tmp_path / "sca-my-part"
    site.install(folder)
    (row,) = [row for row in json.loads(site.run("sca", "list", kind, "--json").stdout) if row["name"] == "my-part"]
    assert (row["distribution"], row["state"]) == ("sca-my-part", "unchecked")
    checked = site.run("sca", "check", kind, "my-part")
    assert checked.returncode == 0, checked.stdout + checked.stderr
    tested = site.run("pytest", "-q", "-p", "no:cacheprovider", str(folder / "test_sca_my_part.py"))
    assert tested.returncode == 0, tested.stdout
    (row,) = [row for row in json.loads(site.run("sca", "list", kind, "--json").stdout) if row["name"] == "my-part"]
    assert row["state"] == "ok"


def test_the_whole_way_from_a_new_plugin_to_captions(site, tmp_path):
    from PIL import Image

    site.run("sca", "plugin", "new", "mixer", "shade")
    site.install(tmp_path / "sca-shade")
    short = ["train.steps=1", "train.images=2", "train.processes=1", "data.scenes.count=4"]
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


def test_a_broken_promise_is_told_with_what_was_expected(site):
    wrong = "from torch import nn\n\n\nclass Wrong(nn.Module):\n    queries, uses_grid = 2, False\n\n"
    wrong += (
        "    def __init__(self, segmenter):\n        super().__init__()\n        self.width = segmenter.channels\n\n"
    )
    wrong += "    def forward(self, regions):\n        return regions.tokens.mean(1, keepdim=True)\n"
    site.write("wrong", "[sca_mixers]\nwrong = wrong:Wrong\n", wrong=wrong)
    checked = site.run("sca", "check", "mixer", "wrong", "--quiet")
    assert checked.returncode == 1
    assert "FAILED  queries-shape: expected:" in checked.stdout
    assert "sca_registry.contracts.Mixer" in checked.stdout


HOSTILE = {
    "raises": "raise RuntimeError('not today')",
    "exits": "import sys; sys.exit(3)",
    "kills": "import os; os._exit(7)",
    "dies": "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
    "sleeps": "import time; time.sleep(60)",
    "absent": "",
}


def test_the_doctor_tries_each_plugin_by_itself_and_names_what_is_wrong(site):
    entry_points = "[sca_mixers]\n" + "".join(f"{name} = hostile_{name}:Mixer\n" for name in HOSTILE)
    entry_points += "fine = fine:Mixer\n"
    modules = {f"hostile_{name}": text for name, text in HOSTILE.items()}
    site.write("hostile", entry_points, **modules, fine="class Mixer: pass")
    told = site.run("sca", "doctor", "--timeout", "8")
    assert told.returncode == 1
    assert "python:" in told.stdout
    assert "devices:" in told.stdout
    lines = {line.split()[1]: line for line in told.stdout.splitlines() if line.startswith("  mixer ")}
    assert "ok" in lines["fine"]
    assert "ok" in lines["query"]
    for name, reason in {
        "raises": "not today",
        "exits": "SystemExit: 3",
        "kills": "status 7",
        "dies": "status -9",
        "sleeps": "more than 8 s",
        "absent": "no attribute 'Mixer'",
    }.items():
        assert "broken" in lines[name]
        assert reason in lines[name]
    listed = {row["name"]: row for row in json.loads(site.run("sca", "list", "mixers", "--json").stdout)}
    assert listed["sleeps"]["state"] == "broken"
    assert listed["fine"]["state"] == "ok"
    broken = json.loads(site.run("sca", "list", "mixers", "--state", "broken", "--json").stdout)
    assert {row["name"] for row in broken} == set(HOSTILE)
    needing = json.loads(site.run("sca", "list", "language-models", "--extra", "gguf", "--json").stdout)
    assert [row["name"] for row in needing] == ["gguf"]


def test_the_plugin_of_the_tutorial_is_a_distribution_that_passes_its_own_test(site, tmp_path):
    from pathlib import Path

    source = Path(__file__).resolve().parents[2] / "plugins" / "sca-hello"
    shutil.copytree(source, tmp_path / "sca-hello")
    site.install(tmp_path / "sca-hello")
    assert site.run("sca", "check", "mixer", "hello").returncode == 0
    tested = site.run("pytest", "-q", "-p", "no:cacheprovider", str(tmp_path / "sca-hello"))
    assert tested.returncode == 0, tested.stdout
