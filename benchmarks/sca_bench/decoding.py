"""Measure what CUDA graphs and torch.compile save in decoding, with identical token ids.

A step of a few hundred rows is short, and a deep language model launches thousands of kernels per step. A graph
launches them at once, and compiled code fuses them. Both need a static cache, which attends over its full length.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from sca_registry import language_models
from torch import Tensor
from transformers import StaticCache

from sca.language_models.causal import CausalLanguageModel
from sca.language_models.tiny_gpt2 import convert_tiny_gpt2
from sca_bench.timing import disable_early_end, summarize_seconds, synchronize
from sca_bench.worker import run_measurement

DECODING_METHODS = ("growing cache", "fixed cache", "cuda graph", "torch.compile")


def run_job(config: Mapping[str, Any], folder: str) -> dict[str, Any]:
    """Measure one decoding method as a launcher job.

    Args:
        config: `language_model` (a name, or a name with options), `method` (one of `DECODING_METHODS`), `batch_size`,
            `prefix_length`, `max_new_tokens`, `num_repeats`, `device` and `dtype`.
        folder: Unused.

    Returns:
        The measurements, JSON-serializable.
    """

    def measure_decoding(row: dict[str, Any]) -> None:
        torch.manual_seed(0)
        component = config["language_model"]
        name, options = (component, {}) if isinstance(component, str) else (component["name"], {**component})
        options.pop("name", None)
        device, dtype = config["device"], getattr(torch, config["dtype"])
        with torch.device(device):
            built = language_models.build(name, **options, **get_untrained_options(name)).to(dtype).eval()
            language_model = cast("CausalLanguageModel", convert_tiny_gpt2(built))
            prefix = torch.randn(config["batch_size"], config["prefix_length"], language_model.hidden_size, dtype=dtype)
        row["decoding"] = measure_method(
            language_model, prefix, config["max_new_tokens"], config["method"], config["num_repeats"]
        )

    return run_measurement(measure_decoding, config["device"])


def get_untrained_options(name: str) -> dict[str, bool]:
    """Return the option that builds a language model with random weights, if it has one."""
    return {"pretrained": False} if "pretrained" in language_models.load_entry(name).options else {}


@torch.inference_mode()
def measure_method(
    language_model: CausalLanguageModel, prefix: Tensor, num_steps: int, method: str, num_repeats: int
) -> dict[str, Any]:
    """Time the decoding of `num_steps` tokens for each row of a prefix.

    Args:
        language_model: The language model.
        prefix: (N, K, E) embeddings.
        num_steps: Tokens per row.
        method: One of `DECODING_METHODS`.
        num_repeats: Repeats after a warm-up.

    Returns:
        Seconds of preparation (capture or compilation), summarized decoding seconds, tokens per second, and the
        fraction of rows with the same ids as the growing cache.
    """
    start = time.perf_counter()
    decode = _prepare_decoding(language_model, prefix, num_steps, method)
    ids = decode()
    synchronize(prefix.device)
    preparation_seconds = time.perf_counter() - start
    seconds = []
    for _ in range(num_repeats):
        start = time.perf_counter()
        decode()
        synchronize(prefix.device)
        seconds.append(time.perf_counter() - start)
    reference = _decode_with_growing_cache(language_model, prefix, num_steps)
    timing = summarize_seconds(seconds)
    return {
        "preparation_seconds": preparation_seconds,
        "seconds": timing,
        "tokens_per_second": ids.numel() / timing["median"],
        "identical_ids": float((ids == reference).all(dim=1).float().mean()),
    }


def _decode_with_growing_cache(language_model: CausalLanguageModel, prefix: Tensor, num_steps: int) -> Tensor:
    """Decode with the model's own cache: (N, K, E) -> ids (N, num_steps). Captions never end early."""
    disable_early_end(language_model)
    return language_model.generate(prefix, max_new_tokens=num_steps).sequences[:, 0]


def _prepare_decoding(
    language_model: CausalLanguageModel, prefix: Tensor, num_steps: int, method: str
) -> Callable[[], Tensor]:
    """Return a function that decodes once, with everything captured or compiled in advance."""
    if method == "growing cache":
        return lambda: _decode_with_growing_cache(language_model, prefix, num_steps)
    model = language_model.model
    cache = StaticCache(config=model.config, max_cache_len=prefix.shape[1] + num_steps)
    token = torch.zeros(len(prefix), 1, dtype=torch.long, device=prefix.device)

    def predict_token(**inputs: Tensor) -> None:
        states = model.base_model(**inputs, past_key_values=cache, use_cache=True).last_hidden_state[:, -1]
        token.copy_(language_model.lm_head(states).float().argmax(dim=1, keepdim=True))

    def decode_step() -> None:
        predict_token(input_ids=token)

    def start_decoding() -> None:
        cache.reset()
        predict_token(inputs_embeds=prefix)

    if method == "torch.compile":
        decode_step = torch.compile(decode_step)
    elif method == "cuda graph":
        start_decoding()
        decode_step = _capture_cuda_graph(decode_step)
    elif method != "fixed cache":
        raise ValueError(f"unknown method {method!r}; choose from {', '.join(DECODING_METHODS)}")

    def decode_all() -> Tensor:
        start_decoding()
        ids = [token.clone()]
        for _ in range(num_steps - 1):
            decode_step()
            ids.append(token.clone())
        return torch.cat(ids, dim=1)

    return decode_all


def _capture_cuda_graph(decode_step: Callable[[], None]) -> Callable[[], None]:
    """Capture a step as a CUDA graph and return its replay function."""
    if not torch.cuda.is_available():
        raise ValueError("a CUDA graph requires a CUDA device; choose another method")
    side_stream = torch.cuda.Stream()
    side_stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side_stream):
        decode_step()  # libraries allocate their workspaces before the capture
    torch.cuda.current_stream().wait_stream(side_stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        decode_step()
    return graph.replay
