"""The wheel and the sdist, built from a copy of this checkout and used in another folder."""

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
SOURCE_FOLDER_BY_PACKAGE = {"sca": "sca", "sca_registry": "registry/sca_registry", "sca_bench": "benchmarks/sca_bench"}
GENERATED_NAMES = (
    *(".git", ".venv", ".venv-lowest", "out", "runs", "dist", "build"),
    *("__pycache__", ".pytest_cache", ".ruff_cache", ".mypy_cache"),
)
GENERATED_FILES = (
    ".venv/lib/torch.py",
    "out/boxes/captions.jsonl",
    "runs/mine/model/spec.json",
    "sca/__pycache__/model.pyc",
)
BUNDLED_MODELS = [name for name in zoo.list_names() if zoo.get_entry(name).folder]  # the others are on the Hub
MAX_CHECKPOINT_BYTES = 6_000_000  # bytes of a shipped checkpoint


def run_checked(*command: str | Path, **options) -> str:
    """Return the standard output of a command; show its errors if it fails."""
    completed = subprocess.run([*map(str, command)], capture_output=True, text=True, **options)
    assert completed.returncode == 0, f"{command}\n{completed.stdout}\n{completed.stderr}"
    return completed.stdout


@pytest.fixture(scope="module")
def built_distributions(tmp_path_factory) -> dict[str, Path]:
    """The wheel and the sdist, built from a checkout with untracked files."""
    build_folder = tmp_path_factory.mktemp("built")
    checkout = build_folder / "checkout"
    shutil.copytree(ROOT, checkout, ignore=shutil.ignore_patterns(*GENERATED_NAMES, ".hypothesis"))
    for path in GENERATED_FILES:
        (checkout / path).parent.mkdir(parents=True, exist_ok=True)
        (checkout / path).write_text("left over\n")
    run_checked(
        sys.executable, "-m", "build", "--no-isolation", "--sdist", "--wheel", "-o", build_folder / "dist", cwd=checkout
    )
    (wheel,), (sdist,) = (build_folder / "dist").glob("*.whl"), (build_folder / "dist").glob("*.tar.gz")
    return {"wheel": wheel, "sdist": sdist}


@pytest.fixture(scope="module", params=["wheel", pytest.param("sdist", marks=pytest.mark.all)])
def installed_packages(request, built_distributions, tmp_path_factory) -> Path:
    """A folder into which pip has installed only the wheel, or the sdist."""
    target_folder = tmp_path_factory.mktemp(request.param)
    flags = ("--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--no-compile", "--target", target_folder)
    run_checked(sys.executable, "-m", "pip", "install", *flags, built_distributions[request.param])
    return target_folder


def list_source_files() -> set[str]:
    """The files of the packages as they are imported: sca/model.py, sca_registry/cards/mixers.toml, ..."""
    return {
        f"{name}/{path.relative_to(ROOT / folder).as_posix()}"
        for name, folder in SOURCE_FOLDER_BY_PACKAGE.items()
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def list_sdist_files(sdist: Path) -> set[str]:
    with tarfile.open(sdist) as archive:
        return {name.partition("/")[2] for name in archive.getnames()}


def test_wheel_contains_exactly_the_source_files(built_distributions):
    with zipfile.ZipFile(built_distributions["wheel"]) as archive:
        files = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert files == list_source_files()


def test_wheel_contains_data_files_read_at_runtime(built_distributions):
    with zipfile.ZipFile(built_distributions["wheel"]) as archive:
        files = set(archive.namelist())
    expected_files = {"sca/py.typed", "sca_registry/py.typed", "sca/language_models/tiny_tokenizer.json"}
    expected_files |= {
        f"sca_registry/cards/{kind}.toml" for kind in ("encoders", "segmenters", "mixers", "language_models")
    }
    expected_files |= {f"sca_registry/zoo/{name}.toml" for name in zoo.list_names()} | {
        "sca/training/recipes/sca-tiny.toml"
    }
    expected_files |= {
        f"sca/output/templates/{name}" for name in ("page.html", "viewer.html", "viewer.css", "viewer.js")
    }
    expected_files |= {"sca/evaluation/templates/report.html", "sca_bench/templates/sweep.html"}
    for name in BUNDLED_MODELS:
        package, _, folder = zoo.get_entry(name).checkpoint.partition(":")
        expected_files |= {f"{package}/{folder}/{file}" for file in ("spec.json", "weights.safetensors", "origin.json")}
        expected_files.add(f"{package}/{folder}/uncertainty.json")
    assert expected_files - files == set()


@pytest.mark.parametrize("name", BUNDLED_MODELS)
def test_bundled_checkpoint_is_below_size_limit(name):
    package, _, folder = zoo.get_entry(name).checkpoint.partition(":")
    sizes = [
        path.stat().st_size for path in (ROOT / SOURCE_FOLDER_BY_PACKAGE[package] / folder).rglob("*") if path.is_file()
    ]
    assert 0 < sum(sizes) <= MAX_CHECKPOINT_BYTES


def test_sdist_contains_development_files_and_no_generated_files(built_distributions):
    files = list_sdist_files(built_distributions["sdist"])
    expected_files = {"pyproject.toml", "constraints.txt", "Makefile", "README.md", "LICENSE", "tools/environment.py"}
    expected_files |= {"examples/scene.png", "tests/test_package.py"}
    expected_files |= {
        f"{SOURCE_FOLDER_BY_PACKAGE[package]}/{relative_path}"
        for package, _, relative_path in (path.partition("/") for path in list_source_files())
    }
    assert expected_files - files == set()
    assert [path for path in files if set(GENERATED_NAMES) & set(path.split("/"))] == []
    assert files & set(GENERATED_FILES) == set()
    assert [path for path in files if path.startswith("benchmarks/pretrained")] == []  # weights for experiments


@pytest.mark.all
def test_twine_accepts_the_metadata(built_distributions):
    run_checked(
        sys.executable, "-m", "twine", "check", "--strict", built_distributions["wheel"], built_distributions["sdist"]
    )


def test_pip_install_of_wheel_or_sdist_yields_exactly_the_source_files(installed_packages):
    files = {
        path.relative_to(installed_packages).as_posix() for path in installed_packages.rglob("*") if path.is_file()
    }
    assert {path for path in files if path.partition("/")[0] in SOURCE_FOLDER_BY_PACKAGE} == list_source_files()
    assert {path.partition("/")[0] for path in files} == {
        *SOURCE_FOLDER_BY_PACKAGE,
        "bin",
        "segment_caption_anything-0.1.0.dist-info",
    }


@pytest.mark.parametrize("model", ["sca-tiny", pytest.param("sca-street", marks=pytest.mark.all)])
def test_installed_package_captions_with_bundled_checkpoint(installed_packages, model, tmp_path):
    environment = {
        **os.environ,
        "PYTHONPATH": str(installed_packages),
    }  # before this checkout, which is installed in the environment of the tests
    print_module_paths = "import sca, sca_registry; print(sca.__file__, sca_registry.__file__)"
    for file in run_checked(sys.executable, "-c", print_module_paths, env=environment, cwd=tmp_path).split():
        assert Path(file).is_relative_to(installed_packages)
    command = ("-m", "sca", "caption", ROOT / "examples" / "scene.png", "--box", "370,434,448,512", "--out", "-")
    (line,) = run_checked(
        sys.executable, *command, "--model", model, "--quiet", env=environment, cwd=tmp_path
    ).splitlines()
    record = json.loads(line)
    assert record["model"] == model
    assert record["box"] == [370, 434, 448, 512]
    assert record["mask"]["size"] == [512, 512]
    assert record["caption"]


def test_installed_package_writes_html_page(installed_packages, tmp_path):
    write_page_program = (
        "from pathlib import Path; from sca.output.html import HtmlWriter; HtmlWriter(Path('page.html')).close()"
    )
    run_checked(
        sys.executable,
        "-c",
        write_page_program,
        env={**os.environ, "PYTHONPATH": str(installed_packages)},
        cwd=tmp_path,
    )
    assert (tmp_path / "page.html").read_text().startswith("<!DOCTYPE html>")


def read_constraints():
    """Return the pinned versions of constraints.txt by canonical name."""
    from packaging.utils import canonicalize_name

    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    pinned = dict(line.split("==") for line in lines if not line.startswith("#"))
    return {canonicalize_name(name): version for name, version in pinned.items()}


def test_constraints_pin_all_direct_requirements_of_the_tests():
    import tomllib

    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    tables = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    untested_extras = ("gguf", "sentencepiece")
    groups = [
        tables["project"]["dependencies"],
        *(group for extra, group in tables["project"]["optional-dependencies"].items() if extra not in untested_extras),
        *tables["dependency-groups"].values(),
    ]
    requirements = {Requirement(line).name for group in groups for line in group if isinstance(line, str)}
    names = {canonicalize_name(name) for name in requirements if not name.startswith("segment-caption")}
    assert len(names) > 30
    assert names <= read_constraints().keys()


def test_constraints_pin_all_dependencies_of_serve_and_demo_extras():
    """fastapi, gradio and whatever they require on this Python, at the version that is installed here."""
    import tomllib
    from importlib.metadata import distribution

    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    pinned = read_constraints()
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    pending, distribution_by_requirement = (
        [Requirement(dependency) for dependency in (*extras["serve"], *extras["demo"])],
        {},
    )
    while pending:
        requirement = pending.pop()
        key = canonicalize_name(requirement.name), frozenset(requirement.extras)
        if key not in distribution_by_requirement:
            distribution_by_requirement[key] = distribution(requirement.name)
            for dependency in map(Requirement, distribution_by_requirement[key].requires or ()):
                is_required = dependency.marker is None or any(
                    dependency.marker.evaluate({"extra": extra}) for extra in requirement.extras or {""}
                )
                pending += [dependency] if is_required else []
    installed_versions = {name: distribution.version for (name, _), distribution in distribution_by_requirement.items()}
    assert len(installed_versions) > 30
    assert {name: pinned.get(name) for name in installed_versions} == installed_versions
