"""Parity checks: compare a component with the same model in another library.

    for result in check_parity("segmenter", "sam2.1-hiera-tiny", "transformers:Sam2Model"):
        print(result)

The model of the other library is built at a tiny size with random weights and saved in the library's own format. The
component loads these weights, and both run in float64 on the same inputs. If an output differs, both run again with
hooks on all modules, and the result contains the first tensor that differs and the modules that compute it.
"""

from __future__ import annotations

import re
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from sca_registry import get_registry

from sca.io.errors import InputError
from sca.testing.parity.checks import PARITY_CHECKS
from sca.testing.parity.comparison import DifferenceLocation, ParityResult, format_results
from sca.testing.parity.components import Component, get_option_kind

__all__ = ["DifferenceLocation", "ParityResult", "check_parity", "format_results", "get_option_kind"]


@torch.no_grad()
def check_parity(kind: str, component: Component, against: str, /, **options: Any) -> list[ParityResult]:
    """Compare a component with a model of another library that has the same random weights.

    The component must have an option `weights` that accepts a folder in the format of the library. The size of both is
    the option `config`, by default that of the component's `tiny_options`. The random state of torch is restored.

    Args:
        kind: "encoder", "segmenter" or "language-model", singular or plural.
        component: Registered name, or factory. For a segmenter, also an encoder that brings its segmenter.
        against: Model of the other library, "LIBRARY:MODEL": "transformers:CLASS", and for encoders also "timm:NAME"
            and "open_clip:NAME".
        **options: Options of the component, in addition to those that make it tiny.

    Returns:
        One result per comparison.

    Raises:
        RegistryError: The kind or the component is unknown, or the component cannot be built from the weights.
        InputError: The reference is unknown, of another kind or not installed, or the component has no option
            `weights`.
    """
    plural = get_registry(kind).kind.plural
    if plural not in PARITY_CHECKS:
        choices = ", ".join(get_registry(each).kind.singular.replace("_", "-") for each in PARITY_CHECKS)
        raise InputError(f"components of kind {kind!r} cannot be compared with another library; choose from {choices}")
    with torch.random.fork_rng(devices=[]), TemporaryDirectory(prefix="sca-parity-") as temporary_folder:
        torch.manual_seed(0)
        folder = Path(temporary_folder, re.sub(r"\W+", "-", against))  # its name is part of error messages
        folder.mkdir()
        return PARITY_CHECKS[plural](component, against, options, folder)
