"""What is distributed: the wheel and the sdist, built from a copy of this checkout and used somewhere else."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from sca_registry import zoo

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {"sca": "sca", "sca_registry": "registry/sca_registry", "sca_bench": "benchmarks/sca_bench"}
MADE = (
    *(".git", ".venv", ".venv-lowest", "out", "runs", "dist", "build"),
    *("__pycache__", ".pytest_cache", ".ruff_cache", ".mypy_cache"),
)
LITTER = (".venv/lib/torch.py", "out/boxes/captions.jsonl", "runs/mine/model/spec.json", "sca/__pycache__/model.pyc")
SHIPPED = [name for name in zoo.list_names() if zoo.get_entry(name).folder]  # the others are on the hub
LARGEST = 6_000_000  # bytes of a shipped checkpoint


def run(*command: str | Path, **options) -> str:
    """The standard output of a command; its errors are shown if it fails."""
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, **options)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> dict[str, Path]:
    """The wheel and the sdist, built from a checkout in which people have worked."""
    folder = tmp_path_factory.mktemp("built")
    checkout = folder / "checkout"
    shutil.copytree(ROOT, checkout, ignore=shutil.ignore_patterns(*MADE, ".hypothesis"))
    for path in LITTER:
        (checkout / path).parent.mkdir(parents=True, exist_ok=True)
        (checkout / path).write_text("left over\n")
    run(sys.executable, "-m", "build", "--no-isolation", "--sdist", "--wheel", "-o", folder / "dist", cwd=checkout)
    (wheel,), (sdist,) = (folder / "dist").glob("*.whl"), (folder / "dist").glob("*.tar.gz")
    return {"wheel": wheel, "sdist": sdist}


@pytest.fixture(scope="module", params=["wheel", pytest.param("sdist", marks=pytest.mark.all)])
def installed(request, built, tmp_path_factory) -> Path:
    """A folder with nothing but what pip makes of the wheel, or of the sdist."""
    site = tmp_path_factory.mktemp(request.param)
    flags = ("--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--no-compile", "--target", site)
    run(sys.executable, "-m", "pip", "install", *flags, built[request.param])
    return site


def source_files() -> set[str]:
    """The files of the packages as they are imported: sca/model.py, sca_registry/cards/mixers.toml, ..."""
    return {
        f"{name}/{path.relative_to(ROOT / folder).as_posix()}"
        for name, folder in PACKAGES.items()
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def sdist_files(sdist: Path) -> set[str]:
    with tarfile.open(sdist) as archive:
        return {name.partition("/")[2] for name in archive.getnames()}


def test_the_wheel_holds_the_packages_and_nothing_else(built):
    with zipfile.ZipFile(built["wheel"]) as archive:
        files = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert files == source_files()


def test_the_data_that_the_code_reads_is_among_the_files(built):
    with zipfile.ZipFile(built["wheel"]) as archive:
        files = set(archive.namelist())
    wanted = {"sca/py.typed", "sca_registry/py.typed", "sca/language_models/tiny_tokenizer.json"}
    wanted |= {f"sca_registry/cards/{kind}.toml" for kind in ("encoders", "segmenters", "mixers", "language_models")}
    wanted |= {f"sca_registry/zoo/{name}.toml" for name in zoo.list_names()} | {"sca/training/recipes/sca-tiny.toml"}
    wanted |= {f"sca/output/templates/{name}" for name in ("page.html", "viewer.html", "viewer.css", "viewer.js")}
    wanted |= {"sca/evaluation/templates/report.html", "sca_bench/templates/sweep.html"}
    for name in SHIPPED:
        package, _, folder = zoo.get_entry(name).checkpoint.partition(":")
        wanted |= {f"{package}/{folder}/{file}" for file in ("spec.json", "weights.safetensors", "origin.json")}
    assert wanted - files == set()


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_checkpoint_is_small(name):
    package, _, folder = zoo.get_entry(name).checkpoint.partition(":")
    sizes = [path.stat().st_size for path in (ROOT / PACKAGES[package] / folder).rglob("*") if path.is_file()]
    assert 0 < sum(sizes) <= LARGEST


def test_the_sdist_holds_what_a_checkout_needs_and_nothing_that_was_made(built):
    files = sdist_files(built["sdist"])
    wanted = {"pyproject.toml", "constraints.txt", "Makefile", "README.md", "LICENSE", "tools/environment.py"}
    wanted |= {"examples/scene.png", "tests/test_package.py"}
    wanted |= {f"{PACKAGES[package]}/{rest}" for package, _, rest in (path.partition("/") for path in source_files())}
    assert wanted - files == set()
    assert [path for path in files if set(MADE) & set(path.split("/"))] == []
    assert files & set(LITTER) == set()


@pytest.mark.all
def test_twine_accepts_the_metadata(built):
    run(sys.executable, "-m", "twine", "check", "--strict", built["wheel"], built["sdist"])


def test_pip_makes_the_same_of_both(installed):
    files = {path.relative_to(installed).as_posix() for path in installed.rglob("*") if path.is_file()}
    assert {path for path in files if path.partition("/")[0] in PACKAGES} == source_files()
    assert {path.partition("/")[0] for path in files} == {*PACKAGES, "bin", "segment_caption_anything-0.1.0.dist-info"}


@pytest.mark.parametrize("model", ["sca-tiny", pytest.param("sca-street", marks=pytest.mark.all)])
def test_what_is_installed_captions_with_the_shipped_checkpoint(installed, model, tmp_path):
    alone = {**os.environ, "PYTHONPATH": str(installed)}  # before this checkout, which the tests' environment knows
    where = "import sca, sca_registry; print(sca.__file__, sca_registry.__file__)"
    for file in run(sys.executable, "-c", where, env=alone, cwd=tmp_path).split():
        assert Path(file).is_relative_to(installed)
    command = ("-m", "sca", "caption", ROOT / "examples" / "scene.png", "--box", "370,434,448,512", "--out", "-")
    (line,) = run(sys.executable, *command, "--model", model, "--quiet", env=alone, cwd=tmp_path).splitlines()
    record = json.loads(line)
    assert record["model"] == model
    assert record["box"] == [370, 434, 448, 512]
    assert record["mask"]["size"] == [512, 512]
    assert record["caption"]


def test_what_is_installed_writes_pages(installed, tmp_path):
    program = "from pathlib import Path; from sca.output.html import HtmlWriter; HtmlWriter(Path('page.html')).close()"
    run(sys.executable, "-c", program, env={**os.environ, "PYTHONPATH": str(installed)}, cwd=tmp_path)
    assert (tmp_path / "page.html").read_text().startswith("<!DOCTYPE html>")


def test_constraints_pin_everything_that_the_extras_which_listen_stand_on():
    """fastapi, gradio and whatever they require on this Python, at the version that is installed here."""
    import tomllib
    from importlib.metadata import distribution

    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    pinned = dict(line.split("==") for line in lines if not line.startswith("#"))
    pinned = {canonicalize_name(name): version for name, version in pinned.items()}
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    left, found = [Requirement(each) for each in (*extras["serve"], *extras["demo"])], {}
    while left:
        requirement = left.pop()
        key = canonicalize_name(requirement.name), frozenset(requirement.extras)
        if key not in found:
            found[key] = distribution(requirement.name)
            for each in map(Requirement, found[key].requires or ()):
                wanted = each.marker is None or any(
                    each.marker.evaluate({"extra": extra}) for extra in requirement.extras or {""}
                )
                left += [each] if wanted else []
    installed = {name: distribution.version for (name, _), distribution in found.items()}
    assert len(installed) > 30
    assert {name: pinned.get(name) for name in installed} == installed
