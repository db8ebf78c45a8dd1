"""Regions that were looked at in parts, as one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from sca_registry.contracts import Regions
from torch import Tensor

OWN = ("owner", "prompt_tokens", "tokens", "mask_tokens", "grid", "masks", "scores", "boxes")  # rows of each region


def joined(parts: Sequence[Regions]) -> Regions:
    """Regions of the same images, in the order of the parts."""

    def rows(name: str) -> Tensor | None:
        values = [getattr(part, name) for part in parts]
        return None if values[0] is None else torch.cat(values)

    dense = rows("dense") if parts[0].dense.dim() == 4 else parts[0].dense  # (N, D, h, w), or one for all
    return replace(parts[0], dense=dense, **{name: rows(name) for name in OWN})
