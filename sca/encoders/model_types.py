"""Encoders of promptable segmenters in transformers' format, by the model type in their configuration."""

from __future__ import annotations

from pathlib import Path

from sca.io.errors import InputError
from sca.io.json import read_json

CONFIG_FILE = "config.json"
ENCODER_BY_MODEL_TYPE = {  # published checkpoints of SAM 2's family are those of the video models
    "sam": "sam",
    "sam_hq": "sam-hq",
    **dict.fromkeys(("sam2", "sam2_video", "edgetam", "edgetam_video"), "sam2"),
    **dict.fromkeys(("sam3_tracker", "sam3_tracker_video", "sam3_video"), "sam2"),
}


def find_encoder_of_segmenter(folder: Path) -> str | None:
    """Return the name of the encoder for a promptable segmenter in transformers' format.

    Args:
        folder: Any folder.

    Returns:
        The registered name, to be built with `weights=folder`; None if the folder contains no such segmenter.
    """
    return ENCODER_BY_MODEL_TYPE.get(read_model_type(folder) or "")


def read_model_type(folder: Path) -> str | None:
    """Return the model type in a folder in transformers' format; None for any other folder."""
    try:
        config = read_json(folder / CONFIG_FILE)
    except (InputError, OSError):
        return None
    model_type = config.get("model_type") if isinstance(config, dict) else None
    return None if model_type is None else str(model_type)
