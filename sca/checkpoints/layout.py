"""File names and layouts of checkpoints; does not import torch."""

from __future__ import annotations

from pathlib import Path

from sca.checkpoints.trust import NO_TRUST, Trust, resolve_source
from sca.io.json import read_json
from sca.io.weight_files import has_tokenizer

WEIGHTS_FILE, SPEC_FILE, ORIGIN_FILE = "weights.safetensors", "spec.json", "origin.json"
UNCERTAINTY_FILE = "uncertainty.json"
CONFIG_FILE = "config.json"  # original SCA layout and transformers


def is_published_checkpoint(folder: Path) -> bool:
    """Return whether a folder has the original SCA layout, see `sca.checkpoints.published`.

    Args:
        folder: Any folder.

    Returns:
        True for the original SCA layout.

    Raises:
        InputError: Its `config.json` cannot be read.
    """
    try:
        config = read_json(folder / CONFIG_FILE)
    except FileNotFoundError:
        return False
    return isinstance(config, dict) and config.get("model_type") == "sca"


def find_tokenizer_source(folder: Path, trust: Trust = NO_TRUST) -> str | None:
    """Return the tokenizer source that a folder in the original SCA layout names.

    Args:
        folder: Checkpoint folder.
        trust: What the caller allows.

    Returns:
        A Hub id or folder; None if the folder contains a tokenizer, names no source, or has another layout.

    Raises:
        TrustError: The source is neither in the folder nor that of a registered card, and the caller does not allow it.
    """
    if not is_published_checkpoint(folder) or has_tokenizer(folder):
        return None
    text_config = read_json(folder / CONFIG_FILE).get("text_config")
    source = text_config.get("_name_or_path") if isinstance(text_config, dict) else None
    return resolve_source(source, folder, trust) if source and isinstance(source, str) else None
