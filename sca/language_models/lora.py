"""LoRA (arXiv 2106.09685) for language models, with peft."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import cast

from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import Linear as LoraLinear
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as DEFAULT_TARGET_MODULES
from torch import nn
from transformers.pytorch_utils import Conv1D

from sca.nn import gpt2

TRANSPOSED_LAYERS = (Conv1D, gpt2.Conv1D)  # linear layers whose weight is (in, out)


def add_lora(
    model: nn.Module,
    model_type: str,
    rank: int,
    alpha: float,
    dropout: float = 0.0,
    target_modules: Sequence[str] | None = None,
) -> None:
    """Add LoRA adapters to a language model. Trainable parameters stay trainable.

    Args:
        model: Language model.
        model_type: Architecture, in transformers' notation.
        rank: Rank of the adapters.
        alpha: Scale of the adapters: their output is multiplied by `alpha / rank`.
        dropout: Dropout probability of the adapters' inputs.
        target_modules: Names of the linear layers in each block; None for peft's defaults of the architecture.

    Raises:
        ValueError: A name matches no layer or is missing in some blocks, or the architecture has no defaults.
    """
    layers = _find_linear_layers(model)
    requested = list(target_modules or DEFAULT_TARGET_MODULES.get(model_type, ()))
    problem = "" if requested else f"no defaults for {model_type!r}, so they must be named"
    for name in requested:
        if name not in layers:
            problem = f"no layer named {name!r}"
        elif len(layers[name]) < max(map(len, layers.values())):
            problem = f"only {len(layers[name])} of {max(map(len, layers.values()))} blocks have a layer {name!r}"
    if problem:
        layer_counts = ", ".join(f"{name} ({len(blocks)})" for name, blocks in sorted(layers.items()))
        raise ValueError(
            f"lora.target_modules: {problem}; choose from the linear layers (number of blocks): {layer_counts}"
        )
    config = LoraConfig(
        r=rank,
        lora_alpha=cast("int", alpha),  # peft only divides it by the rank
        lora_dropout=dropout,
        target_modules=requested,
        fan_in_fan_out=any(
            isinstance(module, TRANSPOSED_LAYERS)
            for name, module in model.named_modules()
            if name.split(".")[-1] in requested
        ),
    )
    config._register_custom_module({gpt2.Conv1D: LoraLinear})
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    inject_adapter_in_model(config, model)  # freezes all but the adapters
    for parameter in trained:
        parameter.requires_grad_(True)


def _find_linear_layers(model: nn.Module) -> dict[str, set[str]]:
    """Return the last name of every linear layer in a block, with the indices of the blocks that contain it."""
    layers: dict[str, set[str]] = {}
    for name, module in model.named_modules():
        block = re.search(r"\.(\d+)\.", name)
        if block and isinstance(module, (nn.Linear, *TRANSPOSED_LAYERS)):
            layers.setdefault(name.split(".")[-1], set()).add(block[1])
    return layers
