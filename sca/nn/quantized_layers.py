"""Linear layers whose stored weights torchao or bitsandbytes has quantized.

This module imports neither library. `QuantizedLinearEstimate` takes the place of such a layer in cost estimates.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

LIBRARIES = ("torchao", "bitsandbytes")


def iter_quantized_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the layers with quantized weights of a model, with their names."""
    for name, module in model.named_modules():
        weight_class = type(module._parameters.get("weight"))
        if weight_class.__module__.partition(".")[0] in LIBRARIES:
            yield name, module


def has_quantized_weights(model: nn.Module) -> bool:
    """Return whether a model has layers with quantized weights."""
    return next(iter_quantized_layers(model), None) is not None


def count_parameters(parameters: Iterable[Tensor]) -> int:
    """Count the elements of parameters; bitsandbytes packs two weights in one element, which count as two."""
    states = ((parameter, getattr(parameter, "quant_state", None)) for parameter in parameters)
    return sum(parameter.numel() if state is None else state.shape.numel() for parameter, state in states)


def list_inner_tensors(tensor: Tensor) -> list[Tensor]:
    """Return the tensors that a quantized tensor of torchao consists of; for any other tensor, the tensor itself."""
    if not is_traceable_wrapper_subclass(tensor):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    return [getattr(tensor, name) for name in names]


def set_compute_dtype(model: nn.Module, dtype: torch.dtype) -> None:
    """Set the dtype that layers with quantized weights compute in, which `Module.to` does not change.

    Args:
        model: Model.
        dtype: Dtype of the activations.
    """
    for _, layer in iter_quantized_layers(model):
        if hasattr(layer, "compute_dtype"):  # of bitsandbytes
            layer.compute_dtype = dtype


class Int4WeightLinear(nn.Linear):
    """Linear layer with int4 weights of torchao that computes in bfloat16, for which torch has a fast CPU kernel."""

    def forward(self, inputs: Tensor) -> Tensor:
        """Apply the layer: (..., I) -> (..., O)."""
        outputs = F.linear(inputs.bfloat16(), self.weight).to(inputs.dtype)
        return outputs if self.bias is None else outputs + self.bias


class Int8WeightLinear(nn.Linear):
    """Linear layer with int8 weights of torchao, which dequantizes them again in the backward pass.

    torchao's own operator keeps the dequantized weights for the backward pass, so that training would take more memory
    than without quantization.
    """

    def forward(self, inputs: Tensor) -> Tensor:
        """Apply the layer: (..., I) -> (..., O)."""
        return _Int8WeightProduct.apply(inputs, self.weight, self.bias)  # type: ignore[no-untyped-call,no-any-return]


class _Int8WeightProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        device = inputs.device.type
        ctx.weight = weight
        ctx.dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else inputs.dtype
        return F.linear(inputs, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = gradients
        return (gradient.to(ctx.dtype) @ ctx.weight.dequantize(ctx.dtype)).to(gradient.dtype), None, None


class QuantizedLinearEstimate(nn.Module):
    """Stand-in for a layer with quantized weights: it has the size and the cost of one, and returns arbitrary values.

    Args:
        out_features: Outputs O.
        in_features: Inputs I.
        bias: (O,) bias, or None.
        num_bytes: Bytes of the quantized weights and their scales.
        dequantizes: The layer dequantizes all its weights each time it runs.
    """

    def __init__(
        self, out_features: int, in_features: int, bias: nn.Parameter | None, num_bytes: int, dequantizes: bool
    ):
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.dequantizes = dequantizes
        self.weight: nn.Parameter = nn.Parameter(
            torch.empty(num_bytes, dtype=torch.uint8, device="meta"), requires_grad=False
        )
        self.bias = bias

    def forward(self, inputs: Tensor) -> Tensor:
        """Apply a layer of this size: (..., I) -> (..., O)."""
        shape = self.out_features, self.in_features
        dequantized = inputs.new_empty(shape if self.dequantizes else 1)
        outputs = F.linear(inputs, inputs.new_empty(1).expand(shape), self.bias)  # keeps no dequantized weights
        del dequantized
        return outputs
