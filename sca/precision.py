"""Precision of a loaded model: a floating-point type, or int8 linear layers on a CPU.

On a CPU with VNNI instructions, dynamic int8 linear layers are about twice as fast as float32 ones, if they are wide.
Layers of the segmenter, the projection and the box embedding stay in float32: they are small, and masks and captions
depend on them most. `auto` chooses by the device and, on a CPU, by a short measurement of the model's own layers.
"""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from sca.devices import resolve_precision
from sca.io.text import format_count
from sca.nn.int8_linear import Int8Linear, has_fast_int8, has_int8_operators

FLOAT32_MODULES = ("segmenter", "projection", "geometry")  # top-level modules without int8 layers
MIN_INT8_WIDTH = 384  # inputs and outputs of a layer, below which int8 gains little or nothing
MIN_SPEEDUP = 1.25  # of a layer in the measurement of `auto`
PROBE_ROWS, PROBE_REPEATS, PROBE_SECONDS = 32, 3, 1.0
Shape = tuple[int, int]  # inputs and outputs of a linear layer

logger: logging.Logger = logging.getLogger(__name__)
_speedups: dict[tuple[Shape, str], float] = {}  # over float32 by precision, measured in this process


def set_precision(model: nn.Module, precision: str | torch.dtype | None, min_width: int = MIN_INT8_WIDTH) -> None:
    """Convert a model in place.

    Args:
        model: Model in eval mode, on its device.
        precision: "float32", "bfloat16" or "float16" converts all floating-point tensors. "int8" converts the wide
            linear layers, on a CPU. "auto" chooses: on a GPU bfloat16 if it is supported; on a CPU int8 or bfloat16 for
            the layers that it makes faster. None changes nothing.
        min_width: Minimum number of inputs and of outputs of an int8 layer.

    Raises:
        ValueError: The precision is unknown, or int8 is not supported by the device or the model.
    """
    name = resolve_precision(precision)
    if name == "auto":
        _choose_precision(model, min_width)
    elif name == "int8":
        check_int8_support(_get_device(model))
        model.float()
        layers = dict(_iter_wide_layers(model, min_width))
        if not layers:
            raise ValueError(
                f"the model has no linear layer with at least {min_width} inputs and outputs, so int8 gains nothing; "
                "use precision=float32"
            )
        _convert_layers(model, layers)
    elif name is not None:
        model.to(getattr(torch, name))


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
        raise ValueError("int8 requires a CPU with VNNI instructions and torch with oneDNN; use precision=float32")


def describe_precision(model: nn.Module) -> str:
    """Describe the precision that a model has.

    Args:
        model: Model.

    Returns:
        Dtypes of the parameters, the most frequent first, after the number of int8 layers, such as
        "int8 (124 linear layers), float32".
    """
    num_int8_layers = sum(isinstance(module, Int8Linear) for module in model.modules())
    dtypes: Counter[torch.dtype] = Counter()
    for parameter in model.parameters():
        dtypes[parameter.dtype] += parameter.numel()
    names = [f"int8 ({format_count(num_int8_layers, 'linear layer')})"] if num_int8_layers else []
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


def _get_device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _iter_wide_layers(model: nn.Module, min_width: int) -> Iterator[tuple[str, nn.Module]]:
    """Yield the linear layers that may be converted, with their names. Subclasses of `nn.Linear` can have readers."""
    for name, module in model.named_modules():
        is_linear = type(module) in (nn.Linear, Conv1D)
        if is_linear and name.partition(".")[0] not in FLOAT32_MODULES and min(_get_shape(module)) >= min_width:
            yield name, module


def _get_shape(layer: nn.Module) -> Shape:
    outputs, inputs = _get_weight(layer).shape
    return inputs, outputs


def _get_weight(layer: Any) -> Tensor:
    """Return the weights (O, I) of a linear layer; GPT-2's store the transposed matrix."""
    return layer.weight.T if isinstance(layer, Conv1D) else layer.weight


def _convert_layer(layer: Any) -> Int8Linear:
    return Int8Linear(_get_weight(layer), layer.bias)


def _convert_layers(model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    """Replace layers, so that each float32 weight can be freed before the next is converted."""
    for name, layer in layers.items():
        model.set_submodule(name, _convert_layer(layer))


def _choose_precision(model: nn.Module, min_width: int) -> None:
    """Convert a model to the fastest precision of its device, and log the choice."""
    device, reason = _get_device(model), ""
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        model.to(torch.bfloat16)
    elif device.type == "cpu":
        reason = _choose_cpu_precision(model.float(), min_width)
    logger.info("sca: precision auto: %s%s", describe_precision(model), reason)


def _choose_cpu_precision(model: nn.Module, min_width: int) -> str:
    """Convert a float32 model, or the layers that gain, and return the reason."""
    candidates = _list_cpu_candidates()
    layers_by_shape: dict[Shape, dict[str, nn.Module]] = {}
    for name, layer in _iter_wide_layers(model, min_width):
        layers_by_shape.setdefault(_get_shape(layer), {})[name] = layer
    if not candidates:
        return "; this CPU has no instructions for int8 or bfloat16"
    if not layers_by_shape:
        return "; the linear layers are too small to gain"
    sizes = {shape: math.prod(shape) * len(layers) for shape, layers in layers_by_shape.items()}
    by_size = sorted(layers_by_shape, key=lambda shape: -sizes[shape])
    _measure_speedups({shape: next(iter(layers_by_shape[shape].values())) for shape in by_size}, candidates)

    def estimate_time(candidate: str) -> float:
        return sum(size / max(_speedups.get((shape, candidate), 1.0), 1.0) for shape, size in sizes.items())

    best = min(candidates, key=estimate_time)
    faster_shapes = [shape for shape in by_size if _speedups.get((shape, best), 1.0) >= MIN_SPEEDUP]
    if best == "int8":
        for shape in faster_shapes:
            _convert_layers(model, layers_by_shape[shape])
    elif faster_shapes:
        model.to(getattr(torch, best))
    speedups = (
        f"{shape[0]}x{shape[1]} {_speedups[shape, best]:.1f}x" for shape in by_size if (shape, best) in _speedups
    )
    return f"; speedups of linear layers in {best}: {', '.join(speedups)}"


def _list_cpu_candidates() -> list[str]:
    """Return the precisions below float32 that this CPU has instructions for."""
    has_bfloat16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return [*(["int8"] if has_fast_int8() else []), *(["bfloat16"] if has_bfloat16 else [])]


@torch.inference_mode()
def _measure_speedups(layers: Mapping[Shape, nn.Module], candidates: Sequence[str]) -> None:
    """Measure layers that were not measured in this process, in order, as long as there is time."""
    deadline = time.perf_counter() + PROBE_SECONDS
    for shape, layer in layers.items():
        missing = [candidate for candidate in candidates if (shape, candidate) not in _speedups]
        if not missing or time.perf_counter() > deadline:
            continue
        inputs = torch.randn(PROBE_ROWS, shape[0])
        functions: list[Callable[[], Tensor]] = [partial(layer, inputs)]
        for candidate in missing:
            if candidate == "int8":
                functions.append(partial(_convert_layer(layer), inputs))
            else:
                dtype = getattr(torch, candidate)
                functions.append(partial(F.linear, inputs.to(dtype), _get_weight(layer).to(dtype)))
        float32_seconds, *seconds = _time_alternately(functions)
        for candidate, each in zip(missing, seconds, strict=True):
            _speedups[shape, candidate] = float32_seconds / each


def _time_alternately(functions: Sequence[Callable[[], Any]]) -> list[float]:
    """Return the minimum seconds of each function; the first round is a warm-up."""
    seconds: list[list[float]] = [[] for _ in functions]
    for repeat in range(PROBE_REPEATS + 1):
        for function, function_seconds in zip(functions, seconds, strict=True):
            start = time.perf_counter()
            function()
            if repeat:
                function_seconds.append(time.perf_counter() - start)
    return [min(function_seconds) for function_seconds in seconds]
