"""Portable checkpoints: native ones with copies of the pretrained weights that they would otherwise refer to."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from sca_registry.spec import ComponentSpec

from sca.builder import resolve_components
from sca.checkpoints.layout import ORIGIN_FILE, SPEC_FILE
from sca.checkpoints.native import read_spec, write_checkpoint_files, write_json
from sca.checkpoints.trust import SOURCE_OPTIONS, TRUST_OPTION
from sca.io.atomic import write_folder
from sca.io.hub import CONFIG_PATTERNS, fetch_model_folder, find_local_file, get_known_sources
from sca.io.json import read_json
from sca.io.weight_files import require_weight_files
from sca.model import SegmentCaptioner

TERMS_PATTERNS = ("LICENSE*", "README.md")  # of a folder of weights, kept with every copy


def write_portable_checkpoint(model: SegmentCaptioner, folder: Path) -> Path:
    """Write a model to a folder in the native layout that loads on any machine without `allow_external`.

    Weights, tokenizers and configurations outside the checkpoint are copied to a subfolder per component. Weights of
    cards remain references, because their name identifies them.

    Args:
        model: Model to export.
        folder: New or empty folder.

    Returns:
        The folder.

    Raises:
        InputError: Weights that the model was built from do not exist any more.
        OutputError: The folder cannot be written.
    """
    with write_folder(folder) as draft:
        write_checkpoint_files(model, draft)
        spec = read_spec(draft)
        names_by_source: dict[str, str] = {}
        components: dict[str, Any] = {
            kind: ComponentSpec(
                component.name,
                _copy_sources(kind, component.options, getattr(model, kind), draft, names_by_source),
            )
            for kind, component in resolve_components(spec, model.encoder).items()
        }
        origin = read_json(draft / ORIGIN_FILE)
        for component_origin in origin["components"].values():
            if source := component_origin.get("weights"):
                component_origin["weights"] = names_by_source.get(source, source)
        write_json(draft / SPEC_FILE, replace(spec, **components).to_dict())
        write_json(draft / ORIGIN_FILE, origin)
    return folder


def _copy_sources(
    kind: str, options: Mapping[str, Any], component: Any, draft: Path, names_by_source: dict[str, str]
) -> dict[str, Any]:
    """Copy the external sources of a component to `draft`, and return its options with the names of the copies.

    `names_by_source` contains the sources that are already copied, and is extended.
    """
    changed = dict(options)
    for option in SOURCE_OPTIONS:
        source = options.get(option)
        if not isinstance(source, str) or source in get_known_sources():
            continue
        name = names_by_source.get(source)
        if name is None:
            name = kind if option == "weights" else f"{kind}_{option}"
            file = find_local_file(source)
            if file is not None:
                name += file.suffix
                shutil.copy(file, draft / name)
            else:
                prefix, includes_code = getattr(component, "file_prefix", ""), bool(options.get(TRUST_OPTION))
                folder = fetch_model_folder(source, options.get("revision"), option == "weights", includes_code, prefix)
                files = _list_model_files(folder, prefix, option == "weights", includes_code)
                (draft / name).mkdir()
                for file in files:
                    shutil.copy(file, draft / name)
            names_by_source[source] = name
        changed[option] = name
        if option == "weights":
            changed.pop("revision", None)
    return changed


def _list_model_files(folder: Path, prefix: str, includes_weights: bool, includes_code: bool) -> list[Path]:
    """Return the files of a folder of weights that a component reads, and its license and model card."""
    patterns = [*CONFIG_PATTERNS, *TERMS_PATTERNS, *(["*.py"] if includes_code else [])]
    files = {file for pattern in patterns for file in folder.glob(pattern) if file.is_file()}
    return sorted(files | set(require_weight_files(folder, folder, prefix) if includes_weights else ()))
