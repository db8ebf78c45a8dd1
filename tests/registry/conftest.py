"""Plugins as real installed distributions: a package and a dist-info folder on the path."""

from __future__ import annotations

import sys
from pathlib import Path
from textwrap import dedent

import catalogue
import pytest
import sca_registry


class PluginSite:
    """A folder on `sys.path` into which distributions are installed."""

    def __init__(self, folder: Path):
        self.folder = folder

    def install_distribution(
        self, name: str, entry_points: str, files: dict[str, str], version: str = "1.0", metadata: str = ""
    ) -> None:
        """Install a distribution with the given text files; `metadata` are additional lines of METADATA."""
        dist_info = f"{name.replace('-', '_')}-{version}.dist-info"
        self.write(f"{dist_info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{metadata}")
        self.write(f"{dist_info}/entry_points.txt", entry_points)
        self.write(f"{dist_info}/RECORD", f"{dist_info}/METADATA,,\n")
        for file, text in files.items():
            self.write(file, text)
        sca_registry.refresh_plugins()

    def write(self, file: str, text: str) -> None:
        (self.folder / file).parent.mkdir(exist_ok=True)
        (self.folder / file).write_text(dedent(text), encoding="utf-8")


@pytest.fixture
def plugin_site(tmp_path, monkeypatch):
    modules_before = set(sys.modules)
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # a module written twice in a second is read twice
    yield PluginSite(folder)
    for name in set(sys.modules) - modules_before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(folder)):
            del sys.modules[name]
    monkeypatch.undo()
    sca_registry.refresh_plugins()


@pytest.fixture
def isolated_registry(monkeypatch):
    """Remove what a test registers in code after the test."""
    monkeypatch.setattr(catalogue, "REGISTRY", dict(catalogue.REGISTRY))


@pytest.fixture
def get_states():
    """Return name -> (state, reason) of a registry's list."""
    return lambda registry: {entry.name: (entry.state, entry.reason) for entry in registry.list_entries()}
