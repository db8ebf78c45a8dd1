"""Phi checkpoints of transformers 4.36, which have one fused projection for query, key and value.

The rows of a fused projection are ordered by head: query, key and value of the first head, then those of the second
head, and so on (`PhiAttention._split_heads` of transformers 4.36). Version 4.37 introduced three projections and kept
the names of all other tensors. transformers does not convert the old checkpoints.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PhiConfig, PhiForCausalLM

from sca.io.json import read_json
from sca.io.weight_files import find_weight_files, read_tensor_names, read_tensors

FUSED_PATTERN = re.compile(r"(.*\bself_attn\.)query_key_value\.(weight|bias)")
PROJECTIONS = ("q_proj", "k_proj", "v_proj")


class FusedPhiForCausalLM(PhiForCausalLM):
    """Phi model loaded from a folder with fused attention."""

    @classmethod
    def from_pretrained(cls, folder: Path, **options: Any) -> Any:  # type: ignore[override]  # called for folders only
        """Load a checkpoint with fused attention.

        Args:
            folder: Folder in the format of transformers 4.36.
            **options: Options of transformers' `from_pretrained`.

        Returns:
            A `PhiForCausalLM`.
        """
        config = PhiConfig.from_pretrained(folder)
        tensors = {
            name: tensor for file in find_weight_files(folder) or () for name, tensor in read_tensors(file).items()
        }
        tensors = split_fused_attention(tensors, config)
        return PhiForCausalLM.from_pretrained(None, config=config, state_dict=tensors, **options)


def has_fused_attention(folder: Path) -> bool:
    """Return whether a folder in transformers' format contains a Phi checkpoint with fused attention."""
    try:
        if read_json(folder / "config.json")["model_type"] != "phi":
            return False
    except (OSError, ValueError, KeyError, TypeError):  # no valid configuration; loading raises the error
        return False
    return any(
        FUSED_PATTERN.fullmatch(name) for file in find_weight_files(folder) or () for name in read_tensor_names(file)
    )


def split_fused_attention(tensors: Mapping[str, Tensor], config: PhiConfig) -> dict[str, Tensor]:
    """Split fused projections into those for query, key and value.

    Args:
        tensors: Tensors by name, with any prefix.
        config: Configuration of the language model.

    Returns:
        Tensors by name; tensors that are not fused projections are unchanged.

    Raises:
        ValueError: The shape of a fused tensor does not match `config`, or split tensors exist, too.
    """
    num_heads, hidden_size = config.num_attention_heads, config.hidden_size
    split_tensors: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        match = FUSED_PATTERN.fullmatch(name)
        if match is None:
            split_tensors[name] = tensor
            continue
        prefix, suffix = match.groups()
        expected = (3 * hidden_size, hidden_size) if suffix == "weight" else (3 * hidden_size,)
        if tensor.shape != expected:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, but config.json requires {expected}")
        targets = [f"{prefix}{projection}.{suffix}" for projection in PROJECTIONS]
        if any(target in tensors for target in targets):
            raise ValueError(f"the weights contain both {name} and {targets[0]}; remove one of them")
        by_head = tensor.unflatten(0, (num_heads, 3, hidden_size // num_heads))
        for index, target in enumerate(targets):
            split_tensors[target] = by_head[:, index].flatten(0, 1).contiguous()
    return split_tensors
