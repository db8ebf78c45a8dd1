"""Normalization of images that is stored with pretrained weights in transformers' format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from sca_registry.contracts import ImageFormat

from sca.io.errors import InputError
from sca.io.hub import fetch_model_folder
from sca.io.json import read_json
from sca.io.processors import PROCESSOR_FILES
from sca.io.validation import check_object, is_finite_number


def apply_stored_normalization(image_format: ImageFormat, weights: str | None, revision: str | None) -> ImageFormat:
    """Replace the means and standard deviations of an image format by those of the image processor, if it is stored.

    Args:
        image_format: Input format of an encoder.
        weights: Hub id or folder of pretrained weights; None for random weights.
        revision: Revision of the Hub id.

    Returns:
        The format.

    Raises:
        InputError: The stored values are not three numbers, or a standard deviation is not positive.
    """
    if weights is None:
        return image_format
    folder = fetch_model_folder(weights, revision, include_weights=False)
    for path in (folder / name for name in PROCESSOR_FILES):
        if path.is_file():
            content = check_object(read_json(path), str(path))
            table = check_object(content.get("image_processor") or content, f"image_processor in {path}")
            return replace(
                image_format,
                mean=_parse_values(table, "image_mean", path) or image_format.mean,
                std=_parse_values(table, "image_std", path) or image_format.std,
            )
    return image_format


def _parse_values(table: Mapping[str, Any], field: str, path: Path) -> tuple[float, float, float] | None:
    """Return the value of each channel; None if the field is missing."""
    values = table.get(field)
    if values is None:
        return None
    is_valid = isinstance(values, list) and len(values) == 3 and all(map(is_finite_number, values))
    if not is_valid or (field == "image_std" and min(values) <= 0):
        expected = "three positive numbers" if field == "image_std" else "three numbers"
        raise InputError(f"{field} in {path} is {values!r:.80}; expected {expected}")
    red, green, blue = map(float, values)
    return red, green, blue
