"""Names of the files of a checkpoint, and which layout a folder has; imports no torch."""

from __future__ import annotations

from pathlib import Path

from sca.checkpoints.trust import NO_TRUST, Trust, check_source
from sca.io.json import read_json
from sca.io.weight_files import has_tokenizer

WEIGHTS, SPEC, ORIGIN = "weights.safetensors", "spec.json", "origin.json"
CONFIG = "config.json"  # of the published layout and of transformers


def is_published(folder: Path) -> bool:
    """Return whether a folder has the layout of the published system, see `sca.checkpoints.published`.

    Raises:
        InputError: If its `config.json` cannot be read.
    """
    try:
        config = read_json(folder / CONFIG)
    except FileNotFoundError:
        return False
    return isinstance(config, dict) and config.get("model_type") == "sca"


def tokenizer_source(folder: Path, trust: Trust = NO_TRUST) -> str | None:
    """Return the source that a folder in the published layout names for its tokenizer.

    Returns:
        A hub id or folder; None if the folder contains a tokenizer, names no source, or has another layout.

    Raises:
        TrustError: For one that is neither in the folder nor that of a known card, unless the caller agreed.
    """
    if not is_published(folder) or has_tokenizer(folder):
        return None
    text = read_json(folder / CONFIG).get("text_config")
    source = text.get("_name_or_path") if isinstance(text, dict) else None
    return check_source(source, folder, trust) if source and isinstance(source, str) else None
