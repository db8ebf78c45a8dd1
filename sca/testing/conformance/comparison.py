"""Comparison of tensors and formatting of differences, shared by the checks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any, cast

import torch
from torch import Tensor

RELATIVE_TOLERANCE = 1e-3  # of the largest value; allows for another order of additions


def describe_difference(
    expected: Mapping[str, Tensor], actual: Mapping[str, Tensor], tolerance: float = RELATIVE_TOLERANCE
) -> str | None:
    """Describe the first tensor that differs.

    Args:
        expected: Tensors by name.
        actual: Tensors by name.
        tolerance: Maximum deviation relative to the largest absolute value; 0 for bitwise equality.

    Returns:
        Description; None if all tensors are equal within the tolerance.
    """
    if expected.keys() != actual.keys():
        return f"different outputs: {format_names(sorted(expected.keys() ^ actual.keys()))}"
    for name, value in expected.items():
        problem = describe_shape_mismatch(name, actual[name], tuple(value.shape))
        if problem:
            return problem
        if not value.numel() or torch.equal(value, actual[name]):
            continue
        deviation = float((value.double() - actual[name].double()).abs().max())
        if not deviation <= tolerance * float(value.double().abs().max()):  # also true for NaN
            return f"{name} differs by up to {deviation:.2g} (largest value {float(value.abs().max()):.2g})"
    return None


def describe_shape_mismatch(name: str, value: Any, shape: tuple[int | None, ...]) -> str | None:
    """Describe a value that is not a tensor of this shape; None if it is."""
    if not isinstance(value, Tensor):
        return f"{name} is of type {type(value).__name__}, not a tensor of shape {shape}"
    return None if tuple(value.shape) == shape else f"{name} has shape {tuple(value.shape)}, not {shape}"


def compute_weighted_sum(outputs: Mapping[str, Tensor]) -> Tensor:
    """Return a randomly weighted sum, whose gradient does not vanish after a final normalization."""
    generator = torch.Generator().manual_seed(2)
    differentiable = [value for value in outputs.values() if value.requires_grad]
    terms = [(value * torch.randn(value.shape, generator=generator)).sum() for value in differentiable]
    return cast("Tensor", sum(terms))


def clone_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Clone tensors by name."""
    return {name: value.clone() for name, value in tensors.items()}


def format_names(names: Sequence[str]) -> str:
    """Format the first five names and the number of the others."""
    return ", ".join(islice(names, 5)) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
