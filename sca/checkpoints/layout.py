"""File names and layouts of checkpoints; does not import torch."""

from __future__ import annotations

from pathlib import Path

from sca.checkpoints.trust import NO_TRUST, Trust, resolve_real_root, resolve_source
from sca.io.errors import InputError
from sca.io.json import read_json
from sca.io.weight_files import has_tokenizer

WEIGHTS_FILE, SPEC_FILE, ORIGIN_FILE = "weights.safetensors", "spec.json", "origin.json"
UNCERTAINTY_FILE = "uncertainty.json"
CONFIG_FILE = "config.json"  # layouts of other programs and transformers
SIZES_FILE = "sizes.json"  # sizes of a PAM checkpoint that differs from the published ones
PUBLISHED_LAYOUT, PAM_LAYOUT = "published", "pam"
LAYOUT_BY_MODEL_TYPE = {"sca": PUBLISHED_LAYOUT, "llava_qwen": PAM_LAYOUT}


def read_layout(folder: Path) -> str | None:
    """Read the layout of another program that a checkpoint folder has.

    Args:
        folder: Any folder.

    Returns:
        "published" for the original SCA layout, see `sca.checkpoints.published`; "pam" for that of Perceive Anything,
        see `sca.checkpoints.pam`; None for any other folder.

    Raises:
        InputError: Its `config.json` cannot be read.
    """
    try:
        config = read_json(folder / CONFIG_FILE)
    except FileNotFoundError:
        return None
    model_type = config.get("model_type") if isinstance(config, dict) else None
    return LAYOUT_BY_MODEL_TYPE.get(model_type) if isinstance(model_type, str) else None


def find_subfolder(folder: Path, trust: Trust = NO_TRUST) -> Path:
    """Return the only sub-folder with a PAM checkpoint of a folder without a checkpoint, else the folder itself.

    The published repositories contain the checkpoint in a folder of their own name. Links to outside the folder are
    not read unless the caller allows it.

    Args:
        folder: Any folder.
        trust: What the caller allows.

    Returns:
        The folder of the checkpoint.
    """
    if any((folder / name).exists() for name in (SPEC_FILE, CONFIG_FILE)):
        return folder
    links = () if trust.external else find_external_links(folder)
    candidates = [path for path in _list_subfolders(folder) if path not in links and _is_pam_folder(path)]
    return candidates[0] if len(candidates) == 1 else folder


def find_external_links(folder: Path) -> list[Path]:
    """Return the sub-folders with a `config.json` of which either is a link to outside the folder."""
    root = resolve_real_root(folder)
    return [
        path
        for path in _list_subfolders(folder)
        if not all(each.resolve().is_relative_to(root) for each in (path, path / CONFIG_FILE))
    ]


def _list_subfolders(folder: Path) -> list[Path]:
    return sorted(path.parent for path in folder.glob(f"*/{CONFIG_FILE}"))


def _is_pam_folder(folder: Path) -> bool:
    try:
        return read_layout(folder) == PAM_LAYOUT
    except InputError:  # it is not the checkpoint
        return False


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
    if read_layout(folder) != PUBLISHED_LAYOUT or has_tokenizer(folder):
        return None
    text_config = read_json(folder / CONFIG_FILE).get("text_config")
    source = text_config.get("_name_or_path") if isinstance(text_config, dict) else None
    return resolve_source(source, folder, trust) if source and isinstance(source, str) else None
