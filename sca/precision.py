"""Precision of a loaded model: a floating-point type, or int8 linear layers on a CPU.

On a CPU with AVX-512 VNNI instructions, wide linear layers in dynamic int8 are about twice as fast as in float32.
Layers of the segmenter, the projection and the box embedding stay in float32: they are small, and masks and captions
depend on them most. So do layers whose weights are read by other code, such as those of two-way transformers. `auto`
chooses by the device and, on a CPU, by a short measurement of the model's largest layers.
"""

from __future__ import annotations

import logging
import math
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sca.devices import resolve_precision
from sca.io.text import format_count
from sca.nn.gpt2 import Conv1D
from sca.nn.int8_linear import Int8Linear, has_fast_int8, has_int8_operators
from sca.nn.quantized_layers import has_quantized_weights, iter_quantized_layers, set_compute_dtype
from sca.nn.two_way_transformer import TwoWayForward

FLOAT32_MODULES = ("segmenter", "projection", "geometry")  # top-level modules without int8 layers
MIN_INT8_WIDTH = 384  # inputs and outputs of a layer, below which int8 gains little or nothing
MIN_SPEEDUP = 1.25  # of the largest layers in the measurement of `auto`
PROBE_SHAPES, PROBE_ROWS, PROBE_REPEATS, PROBE_SECONDS = 4, 32, 5, 0.5
Shape = tuple[int, int]  # inputs and outputs of a linear layer

logger: logging.Logger = logging.getLogger(__name__)


def set_precision(model: nn.Module, precision: str | torch.dtype | None, min_width: int = MIN_INT8_WIDTH) -> None:
    """Convert a model in place.

    Args:
        model: Model in eval mode, on its device.
        precision: "float32", "bfloat16" or "float16" converts all floating-point tensors. "int8" converts the wide
            linear layers, on a CPU. "auto" chooses: on a GPU bfloat16 if it is supported; on a CPU int8 if it is
            faster. None changes nothing.
        min_width: Minimum number of inputs and of outputs of an int8 layer.

    Raises:
        ValueError: The precision is unknown, or int8 is not supported by the device or the model.
    """
    name = resolve_precision(precision)
    if name is not None:
        check_has_float_weights(model, "converted")
    if name == "auto":
        _choose_precision(model, min_width)
    elif name == "int8":
        check_int8_support(_get_device(model))
        if has_quantized_weights(model):
            raise ValueError("int8 does not support models with quantized weights; use precision=float32 or bfloat16")
        layers = dict(_iter_wide_layers(model, min_width))
        if not layers:
            raise ValueError(
                f"the model has no linear layer with at least {min_width} inputs and outputs, so int8 gains nothing; "
                "use precision=float32"
            )
        _convert_layers(model.float(), layers)
    elif name is not None:
        _convert_dtype(model, getattr(torch, name))


def check_int8_support(device: torch.device) -> None:
    """Check that int8 layers run on a device.

    Args:
        device: Device; "meta" to build a model without weights.

    Raises:
        ValueError: It is not a CPU, or this CPU or build of torch has no fast int8 products.
    """
    if device.type not in ("cpu", "meta"):
        raise ValueError(f"int8 is supported on a CPU only, and the device is {device}; use precision=bfloat16")
    if not (has_int8_operators() if device.type == "meta" else has_fast_int8()):
        raise ValueError(
            "int8 requires a CPU with AVX-512 VNNI instructions and torch with oneDNN; use precision=float32"
        )


def describe_precision(model: nn.Module) -> str:
    """Describe the precision that a model has.

    Args:
        model: Model.

    Returns:
        Dtypes of the parameters, the most frequent first, after the number of int8 layers and of layers with quantized
        weights, such as "int8 (124 linear layers), float32" or "nf4 weights (154 linear layers), bfloat16".
    """
    num_int8_layers = sum(isinstance(module, Int8Linear) for module in model.modules())
    quantized_layers = dict(iter_quantized_layers(model))
    quantized_weights = {id(layer.weight) for layer in quantized_layers.values()}
    dtypes: Counter[torch.dtype] = Counter()
    for parameter in model.parameters():
        if id(parameter) not in quantized_weights:
            dtypes[parameter.dtype] += parameter.numel()
    names = [f"int8 ({format_count(num_int8_layers, 'linear layer')})"] if num_int8_layers else []
    if quantized_layers:
        quantization = getattr(getattr(model, "language_model", None), "quantization", "quantized")
        names.append(f"{quantization} weights ({format_count(len(quantized_layers), 'linear layer')})")
    return ", ".join([*names, *(str(dtype).removeprefix("torch.") for dtype, _ in dtypes.most_common())])


def check_has_float_weights(model: nn.Module, action: str) -> None:
    """Check that a model has no int8 layers, whose original weights are lost.

    Args:
        model: Model.
        action: What cannot be done with it, such as "saved".

    Raises:
        ValueError: It has int8 layers.
    """
    if any(isinstance(module, Int8Linear) for module in model.modules()):
        raise ValueError(f"a model with int8 layers cannot be {action}; load it with precision=float32")


def check_has_full_weights(model: nn.Module) -> None:
    """Check that a model can be exported: it has neither int8 layers nor quantized weights.

    Args:
        model: Model.

    Raises:
        ValueError: It has.
    """
    check_has_float_weights(model, "exported")
    if has_quantized_weights(model):
        raise ValueError(
            "a model with quantized weights cannot be exported, except in the layout portable; remove quantization "
            "from its spec.json to export it with the original weights"
        )


def _convert_dtype(model: nn.Module, dtype: torch.dtype) -> None:
    model.to(dtype)
    set_compute_dtype(model, dtype)


def _get_device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _iter_wide_layers(model: nn.Module, min_width: int) -> Iterator[tuple[str, nn.Module]]:
    """Yield the linear layers that may be converted, with their names."""
    float32_modules = {
        *FLOAT32_MODULES,
        *(name for name, module in model.named_modules() if isinstance(module, TwoWayForward)),  # reads weights
    }
    for name, module in model.named_modules():
        is_linear = type(module) is nn.Linear or _is_transposed(module)  # others can have readers
        is_excluded = any(f"{name}.".startswith(f"{prefix}.") for prefix in float32_modules)
        if is_linear and not is_excluded and min(_get_shape(module)) >= min_width:
            yield name, module


def _get_shape(layer: nn.Module) -> Shape:
    outputs, inputs = _get_weight(layer).shape
    return inputs, outputs


def _get_weight(layer: Any) -> Tensor:
    """Return the weights (O, I) of a linear layer; GPT-2's store the transposed matrix."""
    return layer.weight.T if _is_transposed(layer) else layer.weight


def _is_transposed(layer: nn.Module) -> bool:
    """Return whether a layer is the Conv1D of GPT-2, ours or that of transformers, which is imported only if used."""
    library = sys.modules.get("transformers.pytorch_utils")
    return type(layer) is Conv1D or (library is not None and type(layer) is library.Conv1D)


def _convert_layer(layer: Any) -> Int8Linear:
    return Int8Linear(_get_weight(layer), layer.bias)


def _convert_layers(model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    """Replace layers, so that each float32 weight can be freed before the next is converted."""
    for name, layer in layers.items():
        model.set_submodule(name, _convert_layer(layer))
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer) and isinstance(module.linear1, Int8Linear):
            module.activation_relu_or_gelu = (
                0  # the fused forward of torch reads the weights; this one calls the layers
            )


def _choose_precision(model: nn.Module, min_width: int) -> None:
    """Convert a model to the fastest precision of its device, and log the choice."""
    device, reason = _get_device(model), ""
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        _convert_dtype(model, torch.bfloat16)
    elif device.type == "cpu":
        _convert_dtype(model, torch.float32)
        reason = _choose_cpu_precision(model, min_width)
    logger.info("sca: precision auto: %s%s", describe_precision(model), reason)


def _choose_cpu_precision(model: nn.Module, min_width: int) -> str:
    """Convert the wide layers of a float32 model to int8 if that is faster, and return the reason."""
    if has_quantized_weights(model):
        return "; int8 does not support models with quantized weights"
    if not has_fast_int8():
        return "; this CPU has no AVX-512 VNNI instructions"
    layers = dict(_iter_wide_layers(model, min_width))
    if not layers:
        return "; the linear layers are too small to gain"
    speedup = _measure_speedup(_select_largest_layers(layers.values()))
    if speedup >= MIN_SPEEDUP:
        _convert_layers(model, layers)
    return f"; linear layers in int8 are {speedup:.1f} times as fast as in float32"


def _select_largest_layers(layers: Iterable[nn.Module]) -> list[nn.Module]:
    """Return one layer of each of the shapes that contain the most weights."""
    layers_by_shape: dict[Shape, list[nn.Module]] = {}
    for layer in layers:
        layers_by_shape.setdefault(_get_shape(layer), []).append(layer)
    by_size = sorted(layers_by_shape, key=lambda shape: -math.prod(shape) * len(layers_by_shape[shape]))
    return [layers_by_shape[shape][0] for shape in by_size[:PROBE_SHAPES]]


@torch.inference_mode()
def _measure_speedup(layers: Sequence[nn.Module]) -> float:
    """Return the time of float32 layers relative to int8, alternating as often as there is time."""
    pairs = [(layer, _convert_layer(layer), torch.randn(PROBE_ROWS, _get_shape(layer)[0])) for layer in layers]
    seconds = [[math.inf, math.inf] for _ in pairs]
    deadline = time.perf_counter() + PROBE_SECONDS
    for repeat in range(PROBE_REPEATS + 1):
        if repeat > 1 and time.perf_counter() > deadline:
            break
        for (*functions, inputs), best in zip(pairs, seconds, strict=True):
            for index, function in enumerate(functions):
                start = time.perf_counter()
                function(inputs)
                if repeat:  # the first round is a warm-up
                    best[index] = min(best[index], time.perf_counter() - start)
    return sum(float32 for float32, _ in seconds) / sum(int8 for _, int8 in seconds)
