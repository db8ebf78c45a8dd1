"""Model zoo: checkpoints by name, with their training data and terms of use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from sca_registry.errors import make_unknown_name_error

BYTES_PER_PARAMETER = 4  # of float32
PHOTOGRAPH_DOMAIN = "photographs"  # domain of the general models


@dataclass(frozen=True)
class ZooEntry:
    """Metadata of a model in the zoo.

    Attributes:
        name: Name of the model.
        summary: One sentence that describes the model.
        parameters: Number of parameters.
        license: License of the weights.
        source: Paper or repository.
        checkpoint: "package:folder" for weights inside an installed package, else a Hub id.
        trained_on: Training data.
        domain: Kind of images that the model is trained for: `PHOTOGRAPH_DOMAIN` or a narrower one.
        terms: Terms of use.
        revision: Default revision of a Hub id.
        is_noncommercial: Whether the license forbids commercial use; the terms are then printed before a download.
        subfolder: Folder of the checkpoint in the repository of a Hub id; empty for its root.
        download_bytes: Download size in bytes; by default 4 per parameter, and 0 for a checkpoint inside a package.
        config: Configuration of the language model of a PAM checkpoint, to plan it without a download.
    """

    name: str
    summary: str
    parameters: int
    license: str
    source: str
    checkpoint: str
    trained_on: str
    domain: str
    terms: str
    revision: str | None = None
    is_noncommercial: bool = False
    subfolder: str = ""
    download_bytes: int = 0
    config: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        if not self.download_bytes and not self.folder:
            object.__setattr__(self, "download_bytes", BYTES_PER_PARAMETER * self.parameters)

    @property
    def folder(self) -> Path | None:
        """Folder of a checkpoint inside a package, which may not exist; None for a checkpoint on the Hub."""
        package, colon, subfolder = self.checkpoint.partition(":")
        return Path(str(files(package).joinpath(subfolder))) if colon else None


def list_names() -> list[str]:
    """Return the names of all models, sorted."""
    return sorted(_read_entry_files())


def get_entry(name: str) -> ZooEntry:
    """Return the metadata of a model.

    Args:
        name: Name of the model.

    Returns:
        The metadata.

    Raises:
        RegistryError: The name is unknown.
    """
    import tomllib

    contents = _read_entry_files()
    if name not in contents:
        raise make_unknown_name_error(f"no zoo model named {name!r}", name, sorted(contents))
    return ZooEntry(name=name, **tomllib.loads(contents[name]))


def find_hub_entry(checkpoint: str) -> ZooEntry | None:
    """Return the metadata of the model with a Hub id; None if no model of the zoo has it."""
    return next((entry for entry in map(get_entry, list_names()) if entry.checkpoint == checkpoint), None)


def describe_domain(source: object) -> str:
    """Describe the domain of a zoo model that is not trained for photographs.

    Args:
        source: Source of a captioner, as for `sca.load_captioner`.

    Returns:
        One line with the domain and the models for photographs; "" for those models and for sources outside the zoo.
    """
    name = str(source).partition(" ")[0]  # options follow the name
    if name not in list_names() or get_entry(name).domain == PHOTOGRAPH_DOMAIN:
        return ""
    return f"{name} is trained on {get_entry(name).domain} only; {describe_photograph_models()}"


def describe_photograph_models() -> str:
    """Return one line with the models for photographs, smallest first, their sizes and the commands to use one."""
    entries = [entry for entry in map(get_entry, list_names()) if entry.domain == PHOTOGRAPH_DOMAIN]
    entries.sort(key=lambda entry: (entry.download_bytes, entry.name))
    sizes = ", ".join(f"{entry.name} ({entry.download_bytes / 1e9:.1f} GB)" for entry in entries)
    smallest = entries[0].name
    return f"for photographs: {sizes}; run `sca pull {smallest}`, then `sca caption IMAGE --model {smallest}`"


def _read_entry_files() -> dict[str, str]:
    """Return the TOML text of each model by file name without suffix."""
    folder = files("sca_registry") / "zoo"
    return {
        file.name.removesuffix(".toml"): file.read_text("utf-8")
        for file in folder.iterdir()
        if file.name.endswith(".toml")
    }
