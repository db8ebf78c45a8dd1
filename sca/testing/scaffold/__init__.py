"""Template of a plugin package that installs, registers its component, and passes its own tests."""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path

from sca_registry import get_registry
from sca_registry.cards import check_name
from sca_registry.plugins import is_installed

from sca.io.atomic import write_folder

TEMPLATE_KINDS = ("encoder", "segmenter", "mixer", "language_model", "dataset", "metric", "proposer")


def write_plugin_package(kind: str, name: str, folder: Path | None = None) -> Path:
    """Write a plugin package `sca-NAME` with one component.

    Args:
        kind: Kind of the component, singular or plural, one of `TEMPLATE_KINDS`.
        name: Name of the component.
        folder: New or empty folder. Default: `sca-NAME` in the current directory.

    Returns:
        Path of the folder.

    Raises:
        RegistryError: The kind is unknown or the name is invalid.
        ValueError: The kind has no template, or the component or the package already exists.
        OutputError: The folder is not empty or cannot be written.
    """
    kind_info = get_registry(kind).kind
    check_name(name)
    if kind_info.singular not in TEMPLATE_KINDS:
        raise ValueError(f"no template for a {kind_info.singular}; choose from {', '.join(TEMPLATE_KINDS)}")
    if name in get_registry(kind):
        distribution_name = get_registry(kind).load_entry(name).distribution
        raise ValueError(
            f"the {kind_info.singular} {name!r} already exists in {distribution_name}; choose another name"
        )
    module_name = "sca_" + re.sub(r"\W+", "_", name.lower()).strip("_")
    placeholders = {
        "NAME": name,
        "DISTRIBUTION": "sca-" + re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-"),
        "MODULE": module_name,
        "CLASS": "".join(word.capitalize() for word in re.split(r"[\W_]+", f"{name} {kind_info.singular}") if word),
        "GROUP": kind_info.entry_point_group,
        "KIND": kind_info.singular,
        "PLURAL": kind_info.plural,
    }
    if not placeholders["CLASS"][0].isalpha():
        placeholders["CLASS"] = "Component" + placeholders["CLASS"]
    if is_installed(placeholders["DISTRIBUTION"]):
        raise ValueError(f"a package {placeholders['DISTRIBUTION']} is already installed; choose another name")
    folder = folder or Path(placeholders["DISTRIBUTION"])
    template_folder = files("sca.testing.scaffold") / "templates"
    with write_folder(folder) as draft:
        for template, target in (
            ("pyproject.toml.txt", "pyproject.toml"),
            ("README.md.txt", "README.md"),
            (f"{kind_info.singular}.py.txt", f"{module_name}.py"),
            ("test.py.txt", f"test_{module_name}.py"),
        ):
            text = (template_folder / template).read_text("utf-8")
            (draft / target).write_text(re.sub(r"\{([A-Z]+)\}", lambda match: placeholders[match[1]], text), "utf-8")
    return folder
