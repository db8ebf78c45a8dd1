"""What is written for other tools, read by their own packages, in an environment of theirs."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from sca_registry.contracts import Caption, Prompt

from sca import masks
from sca.output import Writers
from sca.output.label_studio import CONFIG

PACKAGES = ("label-studio-sdk", "labelme", "shapely", "pycocotools")


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """An interpreter beside which the tools are installed."""
    folder = tmp_path_factory.mktemp("tools")
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    python = folder / "bin" / "python"
    install = subprocess.run([python, "-m", "pip", "install", "--quiet", *PACKAGES], capture_output=True, text=True)
    if install.returncode:
        pytest.skip(f"{' '.join(PACKAGES)} cannot be installed here: {install.stderr.strip().splitlines()[-1]}")
    return python


@pytest.mark.all
def test_other_tools_read_what_is_written_for_them(tmp_path, monkeypatch, picture, captions, python):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    with Writers("out", ("jsonl", "label-studio", "labelme", "geojson"), model="m") as writers:
        for name, size in (("a.png", (40, 30)), ("deep/b.png", (301, 177)), ("c d é.png", (33, 9))):
            path = Path(name)
            path.parent.mkdir(exist_ok=True)
            drawn = picture.resize(size)
            drawn.save(path)
            width, height = size
            noise = [rng.random((height, width)) < share for share in (0.02, 0.5, 0.98)]
            full = np.ones((height, width), bool)
            regions = [
                Caption(f"{n} of {name}", 0.5, masks.box_of(mask), masks.encode(mask), 0.5, Prompt(mask=mask), n)
                for n, mask in enumerate((*noise, full))
            ]
            writers.add(name, drawn, captions if name == "a.png" else regions)
        writers.add("none.png", picture, [])
    picture.save("none.png")
    script = Path(__file__).with_name("own_readers.py")
    ran = subprocess.run([python, script, "out", ".", CONFIG], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert json.loads(ran.stdout) == {"label-studio": 12, "labelme": 12, "geojson": 12}
