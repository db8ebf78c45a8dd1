"""Processors of transformers that preprocess images with Pillow, whether or not torchvision is installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sca_registry.plugins import BUILTIN_DISTRIBUTION
from transformers import AutoImageProcessor, AutoProcessor

from sca.io.errors import InputError
from sca.io.hub import silence_transformers
from sca.io.weight_files import translate_load_errors

PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
EXTRA_PACKAGES = ("torchvision", "num2words")  # required by the processors of videos; in the extra `baselines`


def load_processor(folder: Path) -> Any:
    """Load the processor of images and texts from a folder.

    Args:
        folder: Folder with the files of the processor.

    Returns:
        The processor of transformers.

    Raises:
        InputError: The processor cannot be read.
    """
    try:
        image_processor = load_image_processor(folder)
        with translate_load_errors(f"the processor in {folder}"), silence_transformers():
            processor = AutoProcessor.from_pretrained(folder, trust_remote_code=False)
    except InputError as error:
        is_missing_package = any(package in str(error).lower() for package in EXTRA_PACKAGES)
        hint = f". Install the extra: pip install '{BUILTIN_DISTRIBUTION}[baselines]'" if is_missing_package else ""
        raise InputError(f"{error}{hint}") from error
    processor.image_processor = image_processor
    return processor


def load_image_processor(folder: Path) -> Any:
    """Load the image processor from a folder.

    Args:
        folder: Folder with the files of the processor.

    Returns:
        The image processor of transformers.

    Raises:
        InputError: The image processor cannot be read.
    """
    if not any((folder / name).is_file() for name in PROCESSOR_FILES):
        raise InputError(f"{folder} has no {PROCESSOR_FILES[0]}; save the image processor of the model there")
    with translate_load_errors(f"the image processor in {folder}"), silence_transformers():
        return AutoImageProcessor.from_pretrained(folder, backend="pil", trust_remote_code=False)
