"""Export to ONNX, which ONNX Runtime runs without torch, see `examples/onnx_captions.py`."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils import _pytree

from sca.checkpoints.onnx_graphs import CHECKED_REGIONS, TRACED_REGIONS, Graph, StepGraph, build_graphs
from sca.io.atomic import write_folder
from sca.io.errors import InputError
from sca.language_models.causal import CausalLanguageModel, TextTokenizer
from sca.language_models.plain_tokenizer import PlainTokenizer
from sca.language_models.tiny_gpt2 import TinyGpt2, convert_tiny_gpt2
from sca.model import SegmentCaptioner
from sca.precision import check_has_full_weights

MAX_DIMENSION = 2**20  # bound of the dynamic dimensions
TOLERANCE = 1e-4  # between ONNX Runtime and torch, relative to the largest value if that is above 1
FORMAT = 1  # of `preprocessing.json`


def write_onnx_graphs(model: SegmentCaptioner, folder: Path) -> Path:
    """Write a model to a folder of ONNX graphs, with its image format and its tokenizer.

    ONNX Runtime runs each graph on random inputs. A graph whose outputs differ from those of torch is not written.

    Args:
        model: Model to export.
        folder: New or empty folder.

    Returns:
        The folder.

    Raises:
        InputError: A component cannot be exported, or packages are missing.
        ValueError: The model has int8 layers or quantized weights.
        OutputError: The folder cannot be written.
    """
    check_has_full_weights(model)
    problem = _find_unexportable(model)
    if problem:
        raise InputError(f"the layout onnx does not support {problem}")
    _check_packages()
    with write_folder(folder) as draft, torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for graph in build_graphs(model.eval()):
            file = draft / f"{graph.name}.onnx"
            _write_graph(graph, file)
            _check_graph(graph, file)
        settings = json.dumps(_build_settings(model), indent=2)
        (draft / "preprocessing.json").write_text(settings + "\n", "utf-8")
        _get_fast_tokenizer(model).save(str(draft / "tokenizer.json"))
    return folder


def _check_packages() -> None:
    try:
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise InputError(
            f"the layout onnx requires {error.name}; run pip install 'segment-caption-anything[onnx]'"
        ) from error


def _find_unexportable(model: SegmentCaptioner) -> str | None:
    language_model, name = convert_tiny_gpt2(model.language_model), model.spec.language_model.name
    if not isinstance(language_model, CausalLanguageModel) or not language_model.has_greedy_loop:
        return f"the language model {name!r}, whose cache is not made of keys and values; choose another one"
    if _get_fast_tokenizer(model) is None:
        return f"the language model {name!r} without a fast tokenizer; add one with `sca import --tokenizer`"
    if model.spec.tasks is not None:
        return "tasks with a prompt (`tasks` of the spec); supported are learned task tokens"
    other_dtypes = sorted({str(each.dtype) for each in model.parameters()} - {"torch.float32"})
    if other_dtypes:
        return f"parameters of {', '.join(other_dtypes)}; load the model with precision=float32"
    return None


def _get_fast_tokenizer(model: SegmentCaptioner) -> Any:
    """Return the tokenizer of the package tokenizers; None if the language model has another one or none."""
    tokenizer = model.language_model.tokenizer
    if isinstance(tokenizer, PlainTokenizer):
        return tokenizer.tokenizer
    return getattr(tokenizer.tokenizer, "backend_tokenizer", None) if isinstance(tokenizer, TextTokenizer) else None


def _write_graph(graph: Graph, file: Path) -> None:
    """Trace a module and convert it to ONNX."""
    dimensions = {
        name: torch.export.Dim(name, min=1, max=MAX_DIMENSION)
        for axes in graph.dynamic_axes.values()
        for name in axes.values()
    }
    named_shapes = [dict(axes) for axes in graph.dynamic_axes.values()]
    shapes = [{axis: dimensions[name] for axis, name in axes.items()} for axes in named_shapes]
    with warnings.catch_warnings(), _disable_fused_attention():
        warnings.simplefilter("ignore")  # about the internals of torch
        try:
            program = torch.export.export(
                graph.module,
                _group_arguments(graph, graph.sample_inputs(TRACED_REGIONS)),
                dynamic_shapes=_group_arguments(graph, shapes),
                strict=True,
            )
            onnx_program = torch.onnx.export(
                program,
                dynamo=True,
                input_names=[*graph.dynamic_axes],
                output_names=graph.output_names,
                dynamic_shapes=_group_arguments(graph, named_shapes),
                verbose=False,
            )
        except Exception as error:  # of components, torch and onnxscript
            raise InputError(
                f"the layout onnx does not support this model: {graph.name} cannot be traced "
                f"({_describe_cause(error)}); choose other components"
            ) from error
    assert onnx_program is not None
    onnx_program.save(file)


@contextmanager
def _disable_fused_attention() -> Iterator[None]:
    """Disable the fused operator of `nn.TransformerEncoderLayer`, which ONNX does not have."""
    is_enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(is_enabled)


def _describe_cause(error: BaseException) -> str:
    """Return the type and the start of the text of the error that caused all others."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _group_arguments(graph: Graph, values: Sequence[Any]) -> tuple[Any, ...]:
    """Return the arguments of the module of a graph for its inputs, or what belongs to each of them."""
    return (values[0], list(values[1:])) if isinstance(graph.module, StepGraph) else tuple(values)


def _check_graph(graph: Graph, file: Path) -> None:
    """Compare the outputs of ONNX Runtime with those of torch, for another number of regions than the traced one."""
    import onnxruntime

    inputs = graph.sample_inputs(CHECKED_REGIONS)
    expected = graph.module(*_group_arguments(graph, inputs))
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    feeds = {name: value.numpy() for name, value in zip(graph.dynamic_axes, inputs, strict=True)}
    outputs = session.run(graph.output_names, feeds)
    tensors: list[Tensor] = _pytree.tree_leaves(expected)
    for name, output, tensor in zip(graph.output_names, outputs, tensors, strict=True):
        difference = (torch.from_numpy(output) - tensor).abs().max().item()
        if not difference <= TOLERANCE * max(1.0, tensor.abs().max().item()):
            raise InputError(
                f"the output {name!r} of {graph.name} differs by {difference:.2g} between ONNX Runtime and torch; "
                "choose other components, or other versions of torch and onnxruntime"
            )


def _build_settings(model: SegmentCaptioner) -> dict[str, Any]:
    language_model = cast("CausalLanguageModel | TinyGpt2", model.language_model)
    image_format = asdict(model.encoder.image_format)
    del image_format["channel_order"]  # the graph of the encoder accepts RGB
    max_new_tokens = model.spec.generation["max_new_tokens"]
    if language_model.max_positions is not None:
        max_new_tokens = min(max_new_tokens, language_model.max_positions - model.prefix_length)
    return {
        "format": FORMAT,
        "image": image_format,
        "tasks": list(model.spec.task_names),
        "eos_token_ids": language_model.eos_token_ids,
        "max_new_tokens": max_new_tokens,
    }
