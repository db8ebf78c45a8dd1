"""Named models: a checkpoint each, what it was trained on, and on what terms it may be used."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from sca_registry.errors import make_unknown_name_error

PHOTOGRAPH_DOMAIN = "photographs"  # the domain of the models that describe photographs of anything


@dataclass(frozen=True)
class ZooEntry:
    """What is known of a named model before its weights are read."""

    name: str
    summary: str
    parameters: int
    license: str
    source: str
    checkpoint: str  # "package:folder/inside", or a hub id
    trained_on: str
    domain: str  # what kind of images it is for: PHOTOGRAPHS, or something narrower
    terms: str
    revision: str | None = None  # of a hub id: the commit that is fetched unless another is asked for

    @property
    def download_bytes(self) -> int:
        """Size of the weights on the hub, which are stored in float32; 0 for a checkpoint that comes with a package."""
        return 0 if self.folder else 4 * self.parameters

    @property
    def folder(self) -> Path | None:
        """Where a checkpoint that comes with a package is installed; whether it is there is for the caller to find out.
        None for one on the hub.
        """
        package, colon, subfolder = self.checkpoint.partition(":")
        return Path(str(files(package).joinpath(subfolder))) if colon else None


def list_names() -> list[str]:
    """Every named model, sorted. Nothing is imported and nothing is fetched."""
    return sorted(_read_entry_files())


def get_entry(name: str) -> ZooEntry:
    """The entry of a name. Raises RegistryError, with the closest name, if there is none."""
    import tomllib

    contents = _read_entry_files()
    if name not in contents:
        raise make_unknown_name_error(f"no model in the zoo is named {name!r}", name, sorted(contents))
    return ZooEntry(name=name, **tomllib.loads(contents[name]))


def describe_domain(source: object) -> str:
    """Return one line on a model with a narrow domain, which names the models for photographs and how to get one.

    Args:
        source: What `sca.captioner` takes.

    Returns:
        The line; "" for a model for photographs, and for everything that is not a model of the zoo.
    """
    name = str(source).partition(" ")[0]  # options follow the name
    if name not in list_names() or get_entry(name).domain == PHOTOGRAPH_DOMAIN:
        return ""
    return f"{name} is trained on {get_entry(name).domain} only; {describe_photograph_models()}"


def describe_photograph_models() -> str:
    """Return the models for photographs, smallest first, with their download sizes and the commands that use one."""
    entries = [entry for entry in map(get_entry, list_names()) if entry.domain == PHOTOGRAPH_DOMAIN]
    entries.sort(key=lambda entry: (entry.download_bytes, entry.name))
    sizes = ", ".join(f"{entry.name} ({entry.download_bytes / 1e9:.1f} GB)" for entry in entries)
    smallest = entries[0].name
    return f"for photographs: {sizes}; run `sca pull {smallest}`, then `sca caption IMAGE --model {smallest}`"


def _read_entry_files() -> dict[str, str]:
    """The TOML of each model by its name, which is the name of the file."""
    folder = files("sca_registry") / "zoo"
    return {
        file.name.removesuffix(".toml"): file.read_text("utf-8")
        for file in folder.iterdir()
        if file.name.endswith(".toml")
    }
