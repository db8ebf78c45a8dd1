"""The site: it is built from what is written elsewhere, whole, and loads nothing from other places."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parent.parent
pytest.importorskip("mkdocs", reason="the site is made by mkdocs-material")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    return {path.name: path.read_text("utf-8") for path in folder.glob("*.html")}


def test_every_page_is_there_and_every_chapter_of_the_readme_on_one(site):
    whole = "".join(site.values())
    for title in re.findall(r"^### (.+)$|^## (.+)$", (ROOT / "README.md").read_text("utf-8"), re.MULTILINE):
        name = next(filter(None, title))
        if name not in ("What is where", "License and citation"):
            assert f">{name}<" in whole, name
    for name in ("sca caption", "sam-vit-b", "Predictor", "Mixer"):
        assert name in whole


def test_pages_load_nothing_from_elsewhere(site):
    for name, page in site.items():
        loaded = re.findall(r"<(?:script|link|img|iframe)[^>]*(?:src|href)=[\"']?(https?:[^\"' >]+)", page)
        assert not [each for each in loaded if "canonical" not in each], (name, loaded)
