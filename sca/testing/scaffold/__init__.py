"""A plugin package to begin with: a folder that installs, is listed, and passes its own tests as it is."""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path

from sca_registry import registry
from sca_registry.cards import check_name
from sca_registry.plugins import is_installed

from sca.io.atomic import new_folder

KINDS = ("encoder", "segmenter", "mixer", "language_model", "dataset", "metric", "proposer")


def scaffold(kind: str, name: str, folder: Path | None = None) -> Path:
    """Writes the package `sca-NAME` with one part of a kind, into a new or empty folder (default: `sca-NAME` here).

    Raises RegistryError for a kind or name that is none, ValueError for a kind without a template, and OutputError for
    a folder that cannot be written.
    """
    described = registry(kind).kind
    check_name(name)
    if described.singular not in KINDS:
        raise ValueError(f"there is no template for a {described.singular}: there are {', '.join(KINDS)}")
    if name in registry(kind):
        taken = registry(kind).describe(name).distribution
        raise ValueError(f"there is a {described.singular} {name!r} already, from {taken}: choose another name")
    module = "sca_" + re.sub(r"\W+", "_", name.lower()).strip("_")
    words = {
        "NAME": name,
        "DISTRIBUTION": "sca-" + re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-"),
        "MODULE": module,
        "CLASS": "".join(word.capitalize() for word in re.split(r"[\W_]+", f"{name} {described.singular}") if word),
        "GROUP": described.group,
        "KIND": described.singular,
        "PLURAL": described.plural,
    }
    if not words["CLASS"][0].isalpha():
        words["CLASS"] = "Part" + words["CLASS"]
    if is_installed(words["DISTRIBUTION"]):
        raise ValueError(f"a package {words['DISTRIBUTION']} is installed already: choose another name")
    folder = folder or Path(words["DISTRIBUTION"])
    templates = files("sca.testing.scaffold") / "templates"
    with new_folder(folder) as draft:
        for template, target in (
            ("pyproject.toml.txt", "pyproject.toml"),
            ("README.md.txt", "README.md"),
            (f"{described.singular}.py.txt", f"{module}.py"),
            ("test.py.txt", f"test_{module}.py"),
        ):
            text = (templates / template).read_text("utf-8")
            (draft / target).write_text(re.sub(r"\{([A-Z]+)\}", lambda found: words[found[1]], text), "utf-8")
    return folder
