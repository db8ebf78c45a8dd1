"""Compare implementations of dynamic int8 linear layers on one CPU core, at the sizes of SAM ViT-B and GPT-2.

    pip install onnx onnxruntime openvino torchao
    python benchmarks/studies/int8_backends.py --out benchmarks/results/precision/backends.json

All run in turn in one process. The CPU time of each is the minimum over the repeats. A backend that is not installed is
left out. The error is relative to the float32 layer.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sca_bench.worker import collect_environment
from torch import Tensor, nn

from sca.nn.int8_linear import Int8Linear
from study_results import write_results

SHAPES = ((32, 768, 2304), (32, 768, 50257), (4096, 768, 768), (4096, 768, 3072), (4096, 3072, 768))  # rows, in, out
OPTIONAL_PACKAGES = ("onnxruntime", "openvino", "torchao")
Layer = Callable[[Tensor], Any]


def build_quantized_tensor_layer(layer: nn.Linear) -> Layer:
    """Build the layer of `torch.ao.nn.quantized.dynamic`, with one scale for all inputs."""
    scales = (layer.weight.abs().amax(1) / 127).double()
    zeros = torch.zeros(layer.out_features, dtype=torch.long)
    quantized = torch.quantize_per_channel(layer.weight, scales, zeros, 0, torch.qint8)
    packed = torch.ops.quantized.linear_prepack(quantized, layer.bias)
    return lambda inputs: torch.ops.quantized.linear_dynamic(inputs, packed)


def build_torchao_layer(layer: nn.Linear) -> Layer:
    """Build the layer of torchao without a compiler, with one scale per row of the inputs."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    model = nn.Sequential(nn.Linear(layer.in_features, layer.out_features)).requires_grad_(False)
    model[0].load_state_dict(layer.state_dict())
    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    return model


def build_onnxruntime_layer(layer: nn.Linear) -> Layer:
    """Build the operators that ONNX Runtime's `quantize_dynamic` writes, with one scale for all inputs."""
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    scales = layer.weight.abs().amax(1) / 127
    integers = (layer.weight / scales[:, None]).round().to(torch.int8)
    constants = {"weight": integers.T.numpy(), "scales": scales.numpy(), "bias": layer.bias.numpy()}
    constants["zero"] = np.array(0, np.int8)
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["inputs"], ["integers", "scale", "zero_point"]),
        helper.make_node("MatMulInteger", ["integers", "weight", "zero_point", "zero"], ["products"]),
        helper.make_node("Cast", ["products"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["scale", "scales"], ["all_scales"]),
        helper.make_node("Mul", ["floats", "all_scales"], ["scaled"]),
        helper.make_node("Add", ["scaled", "bias"], ["outputs"]),
    ]
    graph = helper.make_graph(
        nodes,
        "linear",
        [helper.make_tensor_value_info("inputs", TensorProto.FLOAT, [None, layer.in_features])],
        [helper.make_tensor_value_info("outputs", TensorProto.FLOAT, [None, layer.out_features])],
        [numpy_helper.from_array(np.ascontiguousarray(value), name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
    return lambda inputs: torch.from_numpy(session.run(None, {"inputs": inputs.numpy()})[0])


def build_openvino_layer(layer: nn.Linear) -> Layer:
    """Build a layer with int8 weights, whose inputs OpenVINO quantizes in groups when it runs."""
    import openvino
    from openvino import opset13 as ops

    scales = layer.weight.abs().amax(1, keepdim=True) / 127
    integers = (layer.weight / scales).round().to(torch.int8)
    inputs = ops.parameter([-1, layer.in_features], np.float32)
    weight = ops.multiply(ops.convert(ops.constant(integers.numpy()), "f32"), ops.constant(scales.numpy()))
    outputs = ops.add(ops.matmul(inputs, weight, False, True), ops.constant(layer.bias.numpy()))
    config = {"INFERENCE_NUM_THREADS": 1, "DYNAMIC_QUANTIZATION_GROUP_SIZE": 32}
    compiled = openvino.Core().compile_model(openvino.Model([outputs], [inputs]), "CPU", config)
    return lambda values: torch.from_numpy(compiled(values.numpy())[0])


def iter_layers(layer: nn.Linear) -> Iterator[tuple[str, Layer]]:
    """Yield each implementation of a layer with its name."""
    half = nn.Linear(layer.in_features, layer.out_features, dtype=torch.bfloat16).requires_grad_(False)
    half.load_state_dict(layer.state_dict())
    yield "float32", layer
    yield "bfloat16", lambda inputs: half(inputs.bfloat16()).float()
    yield "sca.nn.int8_linear", Int8Linear(layer.weight, layer.bias)
    yield "torch.ops.quantized.linear_dynamic", build_quantized_tensor_layer(layer)
    builders = {
        "torchao": build_torchao_layer,
        "onnxruntime": build_onnxruntime_layer,
        "openvino": build_openvino_layer,
    }
    for name, build_layer in builders.items():
        if find_spec(name):
            yield name, build_layer(layer)


@torch.inference_mode()
def compare_layers(shape: tuple[int, int, int], num_repeats: int) -> Iterator[Mapping[str, Any]]:
    """Measure all implementations of a layer of one shape in turn, and yield a row for each."""
    rows, in_features, out_features = shape
    layer = nn.Linear(in_features, out_features)
    inputs = torch.randn(rows, in_features)
    expected = layer(inputs)
    layers = dict(iter_layers(layer))
    seconds: dict[str, list[float]] = {name: [] for name in layers}
    for repeat in range(num_repeats + 1):
        for name, run in layers.items():
            start = time.process_time()
            run(inputs)
            if repeat:  # the first is a warm-up
                seconds[name].append(time.process_time() - start)
    for name, run in layers.items():
        error = float((run(inputs) - expected).norm() / expected.norm())
        speedup = min(seconds["float32"]) / min(seconds[name])
        yield {"shape": shape, "layer": name, "seconds": min(seconds[name]), "speedup": speedup, "error": error}


def main() -> None:
    """Measure and print all rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-repeats", type=int, default=3, help="Repeats of each layer; the fastest counts.")
    parser.add_argument("--out", type=Path, help="JSON file for the measurements.")
    args = parser.parse_args()
    warnings.simplefilter("ignore")  # deprecation of quantized tensors
    torch.set_num_threads(1)
    torch.manual_seed(0)
    results = []
    for shape in SHAPES:
        for row in compare_layers(shape, args.num_repeats):
            print(f"{row['shape']} {row['layer']}: {row['speedup']:.2f}x, error {row['error']:.4f}", flush=True)
            results.append(row)
    versions = {name: version(name) for name in OPTIONAL_PACKAGES if find_spec(name)}
    content = {"rows": results, "backend_versions": versions, "environment": collect_environment("cpu")}
    write_results(content, args.out)


if __name__ == "__main__":
    main()
