"""Quantization of the base weights of language models, by the backends of transformers.

`quantization` is how the weights of the linear layers are stored. `precision` (`sca.precision`) is how a loaded model
computes; with quantized weights, it is the dtype of the activations. Embeddings and the output projection are not
quantized. int8 and int4 are the weight-only formats of torchao: int8 has one scale per output, and int4 one per output
and group of inputs. nf4 is the format of QLoRA (arXiv 2305.14314) in bitsandbytes, with double quantization.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from sca_registry import RegistryError, language_models
from sca_registry.errors import make_unknown_name_error
from torch import nn

from sca.io.errors import InputError
from sca.io.hub import fetch_config_fields
from sca.nn.quantized_layers import Int4WeightLinear, Int8WeightLinear, QuantizedLinearEstimate, iter_quantized_layers

if TYPE_CHECKING:
    from sca_registry.spec import ModelSpec
    from transformers import PreTrainedModel

INT4_GROUP_SIZE = 64  # inputs that share a scale; divides the widths of all language models with a card
NF4_BLOCK_SIZE, NF4_BLOCKS_PER_SCALE = 64, 256  # of bitsandbytes: weights per 8-bit scale, and these per float32 scale
NF4_TABLE_BYTES = 4 * (16 + 256 + 1)  # per layer: values of both formats, and the mean of the scales


class Quantization(NamedTuple):
    """Properties of a format of stored weights.

    Attributes:
        library: Library that implements it.
        has_gradients: Whether gradients pass through the layers, so that adapters, mixers and projections are trained.
        supports_conv1d: Whether it stores the Conv1D layers of GPT-2.
        input_multiple: Number that divides the inputs of each layer.
        is_cpu_only: Whether it runs on a CPU only.
        dequantizes: Whether a layer dequantizes all its weights each time it runs.
    """

    library: str
    has_gradients: bool = True
    supports_conv1d: bool = False
    input_multiple: int = 1
    is_cpu_only: bool = False
    dequantizes: bool = True


QUANTIZATIONS: Mapping[str, Quantization] = {
    "int4": Quantization(
        "torchao", has_gradients=False, input_multiple=INT4_GROUP_SIZE, is_cpu_only=True, dequantizes=False
    ),
    "nf4": Quantization("bitsandbytes", supports_conv1d=True),
    "int8": Quantization("torchao"),
}


def get_quantization(spec: ModelSpec) -> str | None:
    """Return the quantization of the language model of a spec; None for none."""
    component = spec.language_model
    return {**language_models.get_card(component.name).options, **component.options}.get("quantization")


def check_quantization(
    spec: ModelSpec, device_type: str = "cpu", precision: str | None = None, training: bool = False
) -> None:
    """Check that the quantization of a spec supports what the model is used for, before anything is loaded.

    Args:
        spec: Model.
        device_type: Type of its device.
        precision: Name of its precision, or None.
        training: Whether it is trained.

    Raises:
        RegistryError: The quantization is unknown, or does not support the use.
    """
    name = get_quantization(spec)
    if name is None:
        return
    quantization = _resolve_quantization(name)
    if "language_model" in spec.trainable:
        raise RegistryError(
            f"the weights of a language model in {name} cannot be trained; remove language_model from trainable and "
            "add LoRA with lora=RANK, or omit language_model.quantization"
        )
    if training and not quantization.has_gradients:
        raise RegistryError(
            f"{name} weights have no gradients, so no part of the model can be trained; set "
            "language_model.quantization to nf4 or int8"
        )
    if quantization.is_cpu_only and device_type not in ("cpu", "meta"):
        raise RegistryError(
            f"{name} weights run on a CPU only, and the device is {device_type}; set language_model.quantization to nf4"
        )
    if precision == "int8":
        raise RegistryError(
            f"precision int8 does not support a language model with {name} weights; use precision float32 or bfloat16"
        )


def check_weights_are_full(weights: str, revision: str | None) -> None:
    """Check that pretrained weights are not quantized already.

    Args:
        weights: Hub id or folder.
        revision: Revision of the Hub id.

    Raises:
        InputError: They are quantized.
    """
    method = (fetch_config_fields(weights, revision).get("quantization_config") or {}).get("quant_method")
    if method is not None:
        raise InputError(f"{weights} is quantized already ({method}); omit quantization, or use the original weights")


def make_load_options(name: str, dtype: torch.dtype) -> dict[str, Any]:
    """Return the options of transformers' `from_pretrained` that load quantized weights, on the CPU.

    Args:
        name: One of `QUANTIZATIONS`.
        dtype: Dtype of the other weights and of the activations.

    Returns:
        Options.

    Raises:
        RegistryError: The quantization is unknown.
        InputError: Its library is not installed.
    """
    library = _resolve_quantization(name).library
    try:
        importlib.import_module(library)
    except ImportError as error:
        raise InputError(
            f"quantization={name} requires {library}; run pip install 'segment-caption-anything[quantization]'"
        ) from error
    return {"quantization_config": _make_config(name, dtype), "device_map": {"": "cpu"}}


def _make_config(name: str, dtype: torch.dtype) -> Any:
    from transformers import BitsAndBytesConfig, TorchAoConfig

    if name == "nf4":
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    if name == "int8":
        from torchao.quantization import Int8WeightOnlyConfig

        return TorchAoConfig(Int8WeightOnlyConfig(set_inductor_config=False))
    from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig

    return TorchAoConfig(PrototypeInt4WeightOnlyConfig(INT4_GROUP_SIZE, set_inductor_config=False))


def check_layers(model: PreTrainedModel, name: str) -> None:
    """Check that a quantization supports all linear layers of a model, so that none stays in full size unnoticed.

    Args:
        model: Quantized model, or a model on the meta device, which is not quantized.
        name: One of `QUANTIZATIONS`.

    Raises:
        RegistryError: The quantization is unknown.
        ValueError: It does not support a layer.
    """
    from transformers.pytorch_utils import Conv1D

    quantization = _resolve_quantization(name)
    quantized_names = {layer_name for layer_name, _ in iter_quantized_layers(model)}
    is_loaded = model.device.type != "meta"
    for layer_name, layer in _iter_linear_layers(model):
        if isinstance(layer, Conv1D) and not quantization.supports_conv1d:
            problem = "is a Conv1D layer, as in GPT-2"
        elif _get_shape(layer)[1] % quantization.input_multiple:
            problem = f"has {_get_shape(layer)[1]} inputs, not a multiple of {quantization.input_multiple}"
        elif is_loaded and layer_name not in quantized_names:
            problem = f"was not quantized by {quantization.library}"
        else:
            continue
        raise ValueError(f"quantization={name} does not support the layer {layer_name}, which {problem}; use nf4")


def prepare_layers(model: PreTrainedModel, name: str) -> None:
    """Prepare the quantized layers of a model for their use here.

    Layers in int4 compute in bfloat16. Layers in int8 keep no dequantized weights for the backward pass. The scales of
    nf4 are left out of state dicts, because they belong to frozen weights, which are not stored.

    Args:
        model: Quantized model.
        name: One of `QUANTIZATIONS`.
    """
    for _, layer in iter_quantized_layers(model):
        if name == "int4":
            layer.__class__ = Int4WeightLinear
            layer.weight.scale_and_zero = layer.weight.scale_and_zero.bfloat16()
        elif name == "int8":
            layer.__class__ = Int8WeightLinear
        else:
            layer.register_state_dict_post_hook(_remove_quantization_state)


def _remove_quantization_state(layer: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    for name in [name for name in state if name.startswith(f"{prefix}weight.")]:
        del state[name]


def replace_by_estimates(model: PreTrainedModel, name: str) -> int:
    """Replace the linear layers of a model on the meta device by stand-ins for quantized layers.

    Args:
        model: Model without weights, with or without LoRA.
        name: One of `QUANTIZATIONS`.

    Returns:
        Bytes of the quantized weights and their scales.
    """
    quantization, total = QUANTIZATIONS[name], 0
    for layer_name, layer in [*_iter_linear_layers(model)]:
        outputs, inputs = _get_shape(layer)
        num_bytes = count_bytes(name, outputs, inputs)
        total += num_bytes
        model.set_submodule(
            layer_name,
            QuantizedLinearEstimate(outputs, inputs, layer.bias, num_bytes, quantization.dequantizes),
        )
    return total


def count_bytes(name: str, outputs: int, inputs: int) -> int:
    """Count the bytes of the quantized weights of a layer and their scales.

    Args:
        name: One of `QUANTIZATIONS`.
        outputs: Outputs of the layer.
        inputs: Inputs of the layer.

    Returns:
        Bytes.
    """
    size = outputs * inputs
    if name == "int8":
        return size + outputs * (torch.float32.itemsize + torch.int8.itemsize)  # scales and zero points
    if name == "int4":
        return size // 2 + size // INT4_GROUP_SIZE * 2 * torch.bfloat16.itemsize  # scales and zero points
    num_blocks = -(-size // NF4_BLOCK_SIZE)
    return -(-size // 2) + num_blocks + -(-num_blocks // NF4_BLOCKS_PER_SCALE) * 4 + NF4_TABLE_BYTES


def _iter_linear_layers(model: PreTrainedModel) -> Iterator[tuple[str, Any]]:
    """Yield the linear layers that transformers quantizes: all except the output projection, and those of LoRA."""
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.base import get_keys_to_not_convert
    from transformers.quantizers.quantizers_utils import should_convert_module

    excluded_names = get_keys_to_not_convert(model)
    for name, module in model.named_modules():
        is_base_layer = isinstance(module, nn.Linear | Conv1D) and "lora_" not in name
        if is_base_layer and should_convert_module(name, excluded_names):
            yield name, module


def _get_shape(layer: Any) -> tuple[int, int]:
    """Return the outputs and inputs of a layer; Conv1D stores the transposed matrix."""
    if isinstance(layer, nn.Linear):
        return layer.out_features, layer.in_features
    inputs, outputs = layer.weight.shape
    return outputs, inputs


def _resolve_quantization(name: str) -> Quantization:
    if not isinstance(name, str) or name not in QUANTIZATIONS:
        raise make_unknown_name_error(f"unknown quantization {name!r}", str(name), QUANTIZATIONS)
    return QUANTIZATIONS[name]
