"""Small operations that checks share: what differs, and how to say it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor

CLOSE = 1e-3  # differences up to this share of the largest value may come from the order of additions


def different(expected: Mapping[str, Tensor], found: Mapping[str, Tensor], share: float = CLOSE) -> str | None:
    """The first tensor that is further off than `share` of its largest value, or None. 0: equal to the last bit."""
    if expected.keys() != found.keys():
        return f"other outputs: {listed(sorted(expected.keys() ^ found.keys()))}"
    for name, value in expected.items():
        problem = misshapen(name, found[name], tuple(value.shape))
        if problem:
            return problem
        if not value.numel() or torch.equal(value, found[name]):
            continue
        off = float((value.double() - found[name].double()).abs().max())
        if not off <= share * float(value.double().abs().max()):  # NaN is off, too
            return f"{name} differs by {off:.2g}, of at most {float(value.abs().max()):.2g}"
    return None


def misshapen(name: str, value: Any, shape: tuple[int | None, ...]) -> str | None:
    if not isinstance(value, Tensor):
        return f"{name} is {type(value).__name__}, not a tensor {shape}"
    return None if tuple(value.shape) == shape else f"{name} is {tuple(value.shape)}, not {shape}"


def weighted_sum(outputs: Mapping[str, Tensor]) -> Tensor:
    """A scalar whose gradient is not made zero by a normalisation at the end."""
    draw = torch.Generator().manual_seed(2)
    learned = [value for value in outputs.values() if value.requires_grad]
    return sum((value * torch.randn(value.shape, generator=draw)).sum() for value in learned)


def copies(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in state.items()}


def listed(names: Sequence[str]) -> str:
    return ", ".join(islice(names, 5)) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
