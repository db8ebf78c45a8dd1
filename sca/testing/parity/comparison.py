"""Results of parity checks, and differences of tensors in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

TOLERANCE = 1e-12  # relative to the largest value, in float64
MAX_REASON_LENGTH = 150

Outputs = Mapping[str, Tensor]  # output tensors by name, with one row per input row


@dataclass(frozen=True)
class DifferenceLocation:
    """First tensor that differs between a reference and a component.

    Attributes:
        tensor: Description of the tensor, with the name of the module in the reference.
        difference: Largest difference relative to the largest value; infinite for a tensor of another size, with NaN,
            or without a counterpart.
        reference_module: Module of the reference that computes the tensor, with its class.
        module: Module of the component that computes the tensor, with its class.
    """

    tensor: str
    difference: float
    reference_module: str
    module: str

    def __str__(self) -> str:
        size = "not comparable" if math.isinf(self.difference) else f"relative difference {self.difference:.1g}"
        return f"{self.tensor} ({size}), computed by {self.reference_module}; in the component by {self.module}"


@dataclass(frozen=True)
class ParityResult:
    """Result of one comparison of a component with a reference.

    Attributes:
        name: Name of the comparison.
        difference: Largest difference, relative to the largest value unless `unit` is set.
        tolerance: Largest difference that passes.
        unit: Unit of the difference; "" if it is relative.
        details: Description of the difference.
        location: First tensor that differs; None if the comparison passed, or the difference has no single source.
        skipped: Reason why the comparison was skipped; "" if it was not.
    """

    name: str
    difference: float
    tolerance: float = TOLERANCE
    unit: str = ""
    details: str = ""
    location: DifferenceLocation | None = None
    skipped: str = ""

    @classmethod
    def skip(cls, name: str, reason: str) -> ParityResult:
        """Return the result of a comparison that does not apply."""
        return cls(name, 0.0, skipped=" ".join(reason.split())[:MAX_REASON_LENGTH])

    @property
    def passed(self) -> bool:
        """Whether the difference is within the tolerance, or the comparison was skipped; False for NaN."""
        return self.difference <= self.tolerance

    def __str__(self) -> str:
        if self.skipped:
            return f"{'ok':8}{self.name}: skipped: {self.skipped}"
        size = f"{self.difference:.1g} {self.unit}".strip()
        details = f" ({self.details})" if self.details else ""
        return f"{'ok' if self.passed else 'FAILED':8}{self.name}: {size}{details}"


def compare_outputs(
    name: str, expected: Outputs, actual: Outputs, locate_difference: Callable[[int], DifferenceLocation | None]
) -> ParityResult:
    """Compare outputs by name.

    Args:
        name: Name of the comparison.
        expected: Outputs of the reference.
        actual: Outputs of the component.
        locate_difference: Function that returns the first tensor that differs for the row with the largest difference.

    Returns:
        The result, with the largest difference of all outputs.
    """
    differences = {key: compute_row_differences(value, actual[key]) for key, value in expected.items()}
    worst_output = max(differences, key=lambda key: float(differences[key].max()))
    difference = float(differences[worst_output].max())
    if difference <= TOLERANCE:
        return ParityResult(name, difference)
    location = locate_difference(int(differences[worst_output].argmax()))
    details = worst_output if location else f"{worst_output}, but not for a single region, image or text"
    return ParityResult(name, difference, details=details, location=location)


def format_results(results: Sequence[ParityResult]) -> list[str]:
    """Format results as lines.

    Args:
        results: Results of a check.

    Returns:
        One line per comparison, then one per tensor that is the first to differ, with the modules that compute it.
    """
    names_by_tensor: dict[str, list[str]] = {}
    locations: dict[str, DifferenceLocation] = {}
    for result in results:
        if result.location:
            names_by_tensor.setdefault(result.location.tensor, []).append(result.name)
            locations.setdefault(result.location.tensor, result.location)
    lines = [str(result) for result in results]
    for tensor, (name, *others) in names_by_tensor.items():
        more = f" and {len(others)} more" if others else ""
        lines.append(f"first difference of {name}{more}: {locations[tensor]}")
    return lines


def compute_row_differences(expected: Tensor, actual: Tensor) -> Tensor:
    """Return the largest difference of each row, relative to the largest value of all rows; infinite for NaN.

    Args:
        expected: (N, ...).
        actual: (N, ...); another shape has infinite differences.

    Returns:
        (N,) differences.
    """
    if expected.shape != actual.shape:
        return torch.full((max(1, len(expected)),), torch.inf)
    deviations = (actual.double() - expected.double()).abs().flatten(1).amax(dim=1)
    return _divide_by_scale(deviations, expected)


def compute_difference_up_to_order(expected: Tensor, actual: Tensor) -> float:
    """Return the largest relative difference of two tensors with another layout.

    Feature maps of one shape are compared in order. Sequences of tokens, and maps in another layout, are compared up to
    the order of their values, because implementations order tokens and axes differently.

    Args:
        expected: Tensor of one region or image.
        actual: Tensor of the same one; axes of size 1 do not matter.

    Returns:
        The difference; infinite for NaN and for another number of values.
    """
    expected, actual = expected.detach().squeeze().double(), actual.detach().squeeze().double()
    if expected.numel() != actual.numel():
        return math.inf
    if expected.shape != actual.shape or expected.dim() < 3:
        expected, actual = expected.flatten().sort().values, actual.flatten().sort().values
    return float(_divide_by_scale((actual - expected).abs(), expected).max()) if expected.numel() else 0.0


def compute_list_difference(expected: Sequence[Tensor], actual: Sequence[Tensor]) -> float:
    """Return the largest difference of the expected tensors, each from the most similar actual one."""
    return max(
        (min((compute_difference_up_to_order(each, other) for other in actual), default=math.inf) for each in expected),
        default=0.0,
    )


def _divide_by_scale(deviations: Tensor, expected: Tensor) -> Tensor:
    """Divide deviations by the largest value; 0 / 0 is 0."""
    scale = expected.double().abs().max() if expected.numel() else deviations.new_ones(())
    return torch.where(deviations == 0, 0.0, deviations / scale).nan_to_num(nan=torch.inf, posinf=torch.inf)
