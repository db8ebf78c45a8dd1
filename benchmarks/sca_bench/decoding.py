"""What CUDA graphs and torch.compile save when captions are decoded: the same ids, one step at a time.

A step of a few hundred rows is short, and a language model of many layers launches thousands of kernels for it. A graph
launches them at once, and compiled code fuses them; both need a cache of fixed size, which attends to its full length.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from sca_registry import language_models
from torch import Tensor, nn
from transformers import StaticCache

from sca_bench.timing import spread, synchronize
from sca_bench.worker import record

WAYS = ("growing cache", "fixed cache", "cuda graph", "torch.compile")


def work(config: Mapping[str, Any], folder: str) -> dict[str, Any]:
    """Measure one way as a job of a launcher.

    Args:
        config: `language_model` (a name, or a name with options), `way` of `WAYS`, `rows`, `prefix` (positions),
            `steps`, `repeats`, `device` and `dtype`.
        folder: Not used.
    """

    def measure(row: dict[str, Any]) -> None:
        torch.manual_seed(0)
        part = config["language_model"]
        name, options = (part, {}) if isinstance(part, str) else (part["name"], {**part})
        options.pop("name", None)
        device, dtype = config["device"], getattr(torch, config["dtype"])
        with torch.device(device):
            language_model = language_models.build(name, **options, **untrained(name)).to(dtype).eval()
            prefix = torch.randn(config["rows"], config["prefix"], language_model.width, dtype=dtype)
        row["decoding"] = measure_way(language_model, prefix, config["steps"], config["way"], config["repeats"])

    return record(measure, config["device"])


def untrained(name: str) -> dict[str, bool]:
    """Return the option that builds a language model with random weights, if it has one."""
    return {"pretrained": False} if "pretrained" in language_models.describe(name).options else {}


@torch.inference_mode()
def measure_way(language_model: nn.Module, prefix: Tensor, steps: int, way: str, repeats: int) -> dict[str, Any]:
    """Time the decoding of `steps` tokens for each row of a prefix.

    Returns:
        Seconds of preparation (capture or compilation), the spread of the decoding in seconds, tokens per second, and
        as `ids` the share of rows with the ids of the growing cache.
    """
    start = time.perf_counter()
    decode = _prepare(language_model, prefix, steps, way)
    ids = decode()
    synchronize(prefix.device)
    prepared = time.perf_counter() - start
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        decode()
        synchronize(prefix.device)
        seconds.append(time.perf_counter() - start)
    reference = _decode_growing(language_model, prefix, steps)
    timing = spread(seconds)
    return {
        "prepared": prepared,
        "seconds": timing,
        "tokens_per_second": ids.numel() / timing["median"],
        "ids": float((ids == reference).all(dim=1).float().mean()),
    }


def _decode_growing(language_model: nn.Module, prefix: Tensor, steps: int) -> Tensor:
    """Decode as captions are: (N, K, E) -> ids (N, steps). No caption ends early."""
    language_model._ends = lambda: (0, [])
    return language_model.generate(prefix, max_new_tokens=steps).ids[:, 0]


def _prepare(language_model: nn.Module, prefix: Tensor, steps: int, way: str) -> Callable[[], Tensor]:
    """Return what decodes once, with everything captured or compiled that can be reused."""
    if way == "growing cache":
        return lambda: _decode_growing(language_model, prefix, steps)
    model = language_model.model
    cache = StaticCache(config=model.config, max_cache_len=prefix.shape[1] + steps)
    token = torch.zeros(len(prefix), 1, dtype=torch.long, device=prefix.device)

    def advance(**inputs: Tensor) -> None:
        states = model.base_model(**inputs, past_key_values=cache, use_cache=True).last_hidden_state[:, -1]
        token.copy_(language_model.head(states).float().argmax(dim=1, keepdim=True))

    def step() -> None:
        advance(input_ids=token)

    def begin() -> None:
        cache.reset()
        advance(inputs_embeds=prefix)

    if way == "torch.compile":
        step = torch.compile(step)
    elif way == "cuda graph":
        begin()
        step = _capture(step)
    elif way != "fixed cache":
        raise ValueError(f"unknown way {way!r}; choose from {', '.join(WAYS)}")

    def decode() -> Tensor:
        begin()
        ids = [token.clone()]
        for _ in range(steps - 1):
            step()
            ids.append(token.clone())
        return torch.cat(ids, dim=1)

    return decode


def _capture(step: Callable[[], None]) -> Callable[[], None]:
    """Capture a step as a CUDA graph and return its replay."""
    if not torch.cuda.is_available():
        raise ValueError("a CUDA graph needs a CUDA device; choose another way")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()  # libraries set up their workspaces before anything is captured
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay
