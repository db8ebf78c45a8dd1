"""Portable checkpoints: native ones with copies of the pretrained weights from other folders."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from sca_registry.spec import ComponentSpec

from sca.builder import resolve_components
from sca.checkpoints.layout import ORIGIN_FILE, SPEC_FILE
from sca.checkpoints.native import read_spec, write_checkpoint_files, write_json
from sca.checkpoints.trust import SOURCE_OPTIONS, TRUST_OPTION, Trust, confine_spec
from sca.io.atomic import write_folder
from sca.io.hub import CONFIG_PATTERNS, fetch_model_folder, find_local_file, get_known_sources
from sca.io.json import read_json
from sca.io.weight_files import require_weight_files
from sca.model import SegmentCaptioner

TERMS_PATTERNS = ("LICENSE*", "README.md")  # of a folder of weights, kept with every copy


class SourceFiles(NamedTuple):
    """Files that a component reads from a source.

    Attributes:
        source: File, folder or Hub id.
        revision: Revision of a Hub id.
        prefix: Prefix of the file names.
        includes_weights: Whether the weights are read, or only configurations and tokenizers.
        includes_code: Whether Python files are read.
    """

    source: str
    revision: str | None
    prefix: str
    includes_weights: bool
    includes_code: bool


def write_portable_checkpoint(model: SegmentCaptioner, folder: Path) -> Path:
    """Write a model to a folder in the native layout that loads on any machine without `allow_external`.

    Weights, tokenizers and configurations outside the checkpoint are copied to a subfolder per component. Weights of
    registered components are not copied: the checkpoint refers to them by name.

    Args:
        model: Model to export.
        folder: New or empty folder.

    Returns:
        The folder.

    Raises:
        InputError: Weights that the model was built from no longer exist.
        OutputError: The folder cannot be written.
    """
    with write_folder(folder) as draft:
        write_checkpoint_files(model, draft)
        spec = read_spec(draft)
        copies: dict[SourceFiles, str] = {}
        components: dict[str, Any] = {
            kind: ComponentSpec(
                component.name,
                _copy_sources(kind, component.options, getattr(model, kind), draft, copies),
            )
            for kind, component in resolve_components(spec, model.encoder).items()
        }
        names_by_source = {files.source: name for files, name in copies.items()}
        origin = read_json(draft / ORIGIN_FILE)
        for component_origin in origin["components"].values():
            if source := component_origin.get("weights"):
                component_origin["weights"] = names_by_source.get(source, source)
        write_json(draft / SPEC_FILE, replace(spec, **components).to_dict())
        write_json(draft / ORIGIN_FILE, origin)
        confine_spec(read_spec(draft), draft, Trust(remote_code=True))  # raises for a reference that is still external
    return folder


def _copy_sources(
    kind: str, options: Mapping[str, Any], component: Any, draft: Path, copies: dict[SourceFiles, str]
) -> dict[str, Any]:
    """Copy the external sources of a component to `draft`, and return its options with the names of the copies.

    `copies` contains the name of each copy, and is extended.
    """
    changed = dict(options)
    for option in SOURCE_OPTIONS:
        source = options.get(option)
        if not isinstance(source, str) or source in get_known_sources():
            continue
        files = SourceFiles(
            source,
            options.get("revision"),
            getattr(component, "file_prefix", ""),
            option == "weights",
            bool(options.get(TRUST_OPTION)),
        )
        if files not in copies:
            copies[files] = _copy_files(files, draft, kind if option == "weights" else f"{kind}_{option}")
        changed[option] = copies[files]
        if option == "weights":
            changed.pop("revision", None)
    return changed


def _copy_files(files: SourceFiles, draft: Path, name: str) -> str:
    """Copy files to `draft`, and return the name of the copy: `name`, with the suffix of a single file."""
    file = find_local_file(files.source)
    if file is not None:
        name += file.suffix
        shutil.copy(file, draft / name)
        return name
    folder = fetch_model_folder(files.source, files.revision, files.includes_weights, files.includes_code, files.prefix)
    (draft / name).mkdir()
    for path in _list_model_files(folder, files.prefix, files.includes_weights, files.includes_code):
        shutil.copy(path, draft / name)
    return name


def _list_model_files(folder: Path, prefix: str, includes_weights: bool, includes_code: bool) -> list[Path]:
    """Return the files of a folder of weights that a component reads, and its license and model card."""
    patterns = [*CONFIG_PATTERNS, *TERMS_PATTERNS, *(["*.py"] if includes_code else [])]
    files = {file for pattern in patterns for file in folder.glob(pattern) if file.is_file()}
    return sorted(files | set(require_weight_files(folder, folder, prefix) if includes_weights else ()))
