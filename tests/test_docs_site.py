"""Links lead to files and headings, pages name everything that exists, and the site loads no remote content."""

import inspect
import os
import re
import subprocess
import sys
import tomllib
from dataclasses import fields
from pathlib import Path

import pytest
import typer
from sca_bench.sections import SECTION_KEYS
from sca_bench.sweep import COMPARISON_KEYS, STUDY_KEYS, list_sweeps
from sca_registry import get_registry, zoo
from sca_registry.contracts import COMPONENT_KINDS
from sca_registry.spec import ModelSpec

import sca
from sca.cli import build_app
from sca.evaluation.predictions import CONTROLS, PROMPT_TYPES
from sca.evaluation.protocol import list_protocols
from sca.output.formats import OUTPUT_FORMATS
from sca.training.augmentation import Augmentation
from sca.training.recipe import DEFAULT_LOSS_WEIGHTS, TrainOptions, ValidationOptions, list_recipes

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parent.parent
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [*sorted(ROOT.glob("*.md")), *DOCS, *sorted(ROOT.glob("plugins/**/*.md")), ROOT / "benchmarks" / "README.md"]
LINK_PATTERN = re.compile(r"\]\(([^)\s]+)\)|<img src=\"([^\"]+)\"")


def read_prose(path):
    """Return a page without its code blocks."""
    return re.sub(r"^ *```.*?^ *```", "", path.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)


def list_anchors(path):
    """Return the anchors of the headings of a page, as code hosts derive them."""
    headings = re.findall(r"^#+ (.+)$", read_prose(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def iter_links():
    for page in PAGES:
        for link, image in LINK_PATTERN.findall(read_prose(page)):
            if "://" not in (link or image):
                yield pytest.param(page, link or image, id=f"{page.relative_to(ROOT)}->{link or image}")


@pytest.mark.parametrize(("page", "link"), [*iter_links()])
def test_link_leads_to_an_existing_file_and_heading(page, link):
    name, _, anchor = link.partition("#")
    target = (page.parent / name).resolve() if name else page
    assert target.is_file()
    assert target.is_relative_to(ROOT)
    assert not anchor or anchor in list_anchors(target)


def list_names(kind):
    registry = get_registry(kind)
    return [name for name in registry.list_names() if registry.get_card(name) and not is_plugin(registry, name)]


def is_plugin(registry, name):
    return registry.load_entry(name).distribution != "segment-caption-anything"


def list_commands():
    parser = typer.main.get_command(build_app())
    return [f"sca {name}" for name in parser.commands if name not in ("data", "bench", "plugin")]


def iter_documented_names():
    """Yield pages with the names that they must contain as code."""
    train_keys = [each.name for each in fields(TrainOptions)]
    sweep_keys = ["seeds", "num_threads", "studies", *STUDY_KEYS, *COMPARISON_KEYS]
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    yield "models.md", [*list_names("encoders"), *list_names("language_models"), *list_names("captioners")]
    yield "models.md", zoo.list_names()
    yield "concepts.md", [*list_names("mixers"), *(each.name for each in fields(ModelSpec))]
    yield "cards.md", [f"sca_{kind}" for kind in COMPONENT_KINDS]
    yield "cards.md", [*list_names("segmenters"), *list_names("proposers"), *list_names("launchers")]
    yield "own-data.md", list_names("datasets")
    yield "evaluation.md", [*list_names("metrics"), *list_protocols(), *PROMPT_TYPES, *CONTROLS]
    yield "training.md", [*list_recipes(), *train_keys, *(each.name for each in fields(ValidationOptions))]
    yield "training.md", [*DEFAULT_LOSS_WEIGHTS, *(each.name for each in fields(Augmentation))]
    yield "sweeps.md", [*list_sweeps(), *sweep_keys, *(key for keys in SECTION_KEYS.values() for key in keys)]
    yield "captioning.md", OUTPUT_FORMATS
    yield "quickstart.md", extras
    yield "api.md", sca.__all__
    yield "cli.md", list_commands()


@pytest.mark.parametrize(("page", "names"), [*iter_documented_names()])
def test_page_names_everything_that_exists(page, names):
    code = " ".join(re.findall(r"`([^`]+)`", read_prose(ROOT / "docs" / page)))
    missing = [name for name in names if not re.search(rf"(?<![\w.-]){re.escape(name)}(?![\w-])", code)]
    assert names
    assert missing == []


# --- site


@pytest.fixture(scope="module")
def site_pages(tmp_path_factory):
    """The built pages by name."""
    pytest.importorskip("mkdocs", reason="mkdocs-material is not installed")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert "WARNING" not in process.stderr
    return {path.name: path.read_text("utf-8") for path in folder.glob("*.html")}


@pytest.mark.slow
def test_site_has_every_page_in_its_navigation(site_pages):
    for path in DOCS:
        name = f"{path.stem}.html"
        assert name in site_pages
        assert f'href="{name}"' in site_pages["index.html"].replace('href="."', 'href="index.html"'), name


@pytest.mark.slow
def test_site_contains_the_generated_references(site_pages):
    assert "sca caption" in site_pages["cli.html"]
    assert "--points-per-side" in site_pages["cli.html"]
    assert "sam-vit-b" in site_pages["cards.html"]
    assert 'id="sca.inference.predictor.Predictor.set_image"' in site_pages["api.html"]
    assert 'id="sca_registry.contracts.Mixer"' in site_pages["contracts.html"]
    assert not [name for name, page in site_pages.items() if "<!-- generated" in page]


@pytest.mark.slow
def test_site_loads_nothing_from_other_hosts(site_pages):
    for name, page in site_pages.items():
        addresses = re.findall(r"<(?:script|link|img|iframe)[^>]*(?:src|href)=[\"']?(https?:[^\"' >]+)", page)
        assert not [address for address in addresses if "canonical" not in address], (name, addresses)


def test_returns_sections_of_the_python_api_contain_no_colon():
    """The docstring parser of the site reads text before a colon as a type."""
    descriptions = [
        section.split("\n\n")[0]
        for name in sca.__all__
        for value in (getattr(sca, name), *vars(getattr(sca, name)).values())
        for section in re.findall(r"Returns:\n(.*)", inspect.getdoc(value) or "", re.DOTALL)
    ]
    assert descriptions
    assert not [each for each in descriptions if re.search(r":\s", each)]
