"""Named models: a checkpoint each, what it was trained on, and on what terms it may be used."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from sca_registry.messages import unknown


@dataclass(frozen=True)
class ZooEntry:
    """What is known of a named model before its weights are read."""

    name: str
    summary: str
    parameters: int
    licence: str
    source: str
    checkpoint: str  # "package:folder/inside", or a hub id
    trained_on: str
    terms: str
    revision: str | None = None  # of a hub id: the commit that is fetched unless another is asked for

    @property
    def folder(self) -> Path | None:
        """Where a checkpoint that comes with a package is installed; whether it is there is for the caller to find out.
        None for one on the hub.
        """
        package, colon, inside = self.checkpoint.partition(":")
        return Path(str(files(package).joinpath(inside))) if colon else None


def names() -> list[str]:
    """Every named model, sorted. Nothing is imported and nothing is fetched."""
    return sorted(_texts())


def get(name: str) -> ZooEntry:
    """The entry of a name. Raises RegistryError, with the closest name, if there is none."""
    import tomllib

    texts = _texts()
    if name not in texts:
        raise unknown(f"no model in the zoo is named {name!r}", name, sorted(texts))
    return ZooEntry(name=name, **tomllib.loads(texts[name]))


def _texts() -> dict[str, str]:
    """The TOML of each model by its name, which is the name of the file."""
    folder = files("sca_registry") / "zoo"
    return {
        file.name.removesuffix(".toml"): file.read_text("utf-8")
        for file in folder.iterdir()
        if file.name.endswith(".toml")
    }
