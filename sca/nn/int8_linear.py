"""Linear layers with int8 weights for inference on a CPU.

The products are computed by oneDNN through `torch.ops.onednn`, the operators that torch's compiler uses for quantized
models on x86. They take plain integer tensors, unlike `torch.ops.quantized`, whose tensor types are deprecated.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

INT8_MAX = 127
UINT8_ZERO = 128  # oneDNN has fast kernels for unsigned inputs only
SMALLEST_SCALE = 1e-12  # of rows of zeros
ROWS_PER_CHUNK = 256  # rows whose temporary values stay in the CPU cache


class Int8Linear(nn.Module):
    """Linear layer with int8 weights, whose inputs are quantized when it runs (dynamic quantization).

    Quantization is symmetric, with one scale per output of the weights and one per row of the inputs. A row of the
    output therefore does not depend on the other rows of its batch. Accumulation is exact, in int32.

    Args:
        weight: (O, I) weights.
        bias: (O,) bias, or None.

    Attributes:
        in_features: Inputs I.
        out_features: Outputs O.
    """

    weight_scales: Tensor
    packed_weight: Tensor
    zero_points: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        weight = weight.detach().float().contiguous()
        scales = weight.abs().amax(1).clamp_(min=SMALLEST_SCALE).div_(INT8_MAX)
        integers = weight.div(scales[:, None]).round_().to(torch.int8)
        self.register_buffer("weight_scales", scales)
        self.register_buffer("bias", None if bias is None else bias.detach().float())
        self.register_buffer(
            "packed_weight",  # (I, O), in a layout of oneDNN
            integers.T if weight.is_meta else torch.ops.onednn.qlinear_prepack(integers, None),
            persistent=False,
        )
        self.register_buffer("zero_points", torch.zeros_like(scales, dtype=torch.int64), persistent=False)

    @property
    def weight(self) -> Tensor:
        """Dequantized weights (O, I), for modules that read them instead of calling the layer."""
        return self._unpack_weight() * self.weight_scales[:, None]

    def forward(self, inputs: Tensor) -> Tensor:
        """Apply the layer.

        Args:
            inputs: (..., I) float32 inputs.

        Returns:
            Outputs (..., O).

        Raises:
            RuntimeError: A gradient is required, which int8 layers do not have.
        """
        if inputs.requires_grad and torch.is_grad_enabled():
            raise RuntimeError("int8 layers have no gradients; load the model with precision=float32 to train it")
        integers, row_scales = _quantize_rows(inputs.reshape(-1, self.in_features))
        outputs = torch.ops.onednn.qlinear_pointwise(
            integers,
            1.0,
            UINT8_ZERO,
            self.packed_weight,
            self.weight_scales,
            self.zero_points,
            None,
            1.0,
            0,
            torch.float32,
            "none",
            [],
            "",
        )
        outputs.mul_(row_scales)
        if self.bias is not None:
            outputs.add_(self.bias)
        return outputs.view(*inputs.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"

    def _unpack_weight(self) -> Tensor:
        """Return the integer weights (O, I)."""
        return (self.packed_weight.to_dense() if self.packed_weight.is_mkldnn else self.packed_weight).T

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)  # type: ignore[no-untyped-call]
        destination[f"{prefix}weight"] = self._unpack_weight()


def _quantize_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize rows (N, I) to integers (N, I) of value / scale + `UINT8_ZERO`, with scales (N, 1)."""
    integers, scales = torch.empty(rows.shape, dtype=torch.uint8, device=rows.device), rows.new_empty(len(rows), 1)
    chunks = (each.split(ROWS_PER_CHUNK) for each in (rows, integers, scales))
    for chunk, chunk_integers, chunk_scales in zip(*chunks, strict=True):
        torch.amax(chunk.abs(), 1, keepdim=True, out=chunk_scales).clamp_(min=SMALLEST_SCALE).div_(INT8_MAX)
        chunk_integers.copy_(chunk.div(chunk_scales).add_(UINT8_ZERO + 0.5))  # truncation rounds to the nearest
    return integers, scales


def has_int8_operators() -> bool:
    """Return whether this build of torch has the operators of `Int8Linear`."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.onednn, "qlinear_pointwise")


def has_fast_int8() -> bool:
    """Return whether int8 products are fast on this CPU: with AVX-512 VNNI instructions, which also do not saturate."""
    return has_int8_operators() and torch.cpu._is_vnni_supported()
