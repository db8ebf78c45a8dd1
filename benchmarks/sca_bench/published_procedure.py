"""Reproduction of the original SCA implementation (arXiv 2312.00869), and what its comparisons share."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, cast
from unittest.mock import patch

import torch
from sca_registry.contracts import PromptBatch
from torch import Tensor
from transformers import SamMaskDecoderConfig
from transformers.models.sam.modeling_sam import SamTwoWayTransformer

from sca.model import SegmentCaptioner
from sca.nn.parameters import share_parameters
from sca.nn.two_way_transformer import TwoWayBlock, TwoWayTransformer
from sca.precision import set_precision
from sca_bench.timing import synchronize

PUBLISHED_REGIONS_PER_CALL, MAX_NEW_TOKENS = 8, 20
MEDIUM_PAM_MODEL: Mapping[str, Any] = {  # a small SAM 2.1 and a small Qwen2
    "encoder": {"name": "sam2.1-hiera-tiny", "resample": "bicubic"},
    "mixer": "semantic-perceiver",
    "language_model": {
        "name": "hf",
        "config": {
            "model_type": "qwen2",
            "vocab_size": 8192,
            "hidden_size": 256,
            "intermediate_size": 1024,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 4096,
        },
    },
}
RatioRow = tuple[str, str, float, float, str]  # quantity, unit, ours, reference (published or other), note


@dataclass(frozen=True)
class ComparisonSettings:
    """Settings of the comparison.

    Args:
        encoder: Name of a SAM encoder.
        language_model: Name of a language model.
        batch_size: Images per batch.
        regions_per_image: Regions per image.
        published_regions: Regions captioned with the reproduced original implementation; 0 for all.
        num_repeats: Repeats of each implementation after a warm-up; the fastest counts.
        device: A torch device.
        dtype: Data type of the weights and activations.
        precision: Precision of our implementation in the part "captions", see `sca.load`; None for `dtype`.
        time_budget: Seconds after which no comparison starts.
        points_per_side: Points per side of the grid of everything mode.
        pam_model: Encoder, mixer and language model of the comparison with PAM.
    """

    encoder: str | Mapping[str, Any] = "sam-vit-b"
    language_model: str | Mapping[str, Any] = "gpt2"
    batch_size: int = 1
    regions_per_image: int = 32
    published_regions: int = 0
    num_repeats: int = 3
    device: str = "cpu"
    dtype: str = "float32"
    precision: str | None = None
    time_budget: float = math.inf
    points_per_side: int = 32
    pam_model: Mapping[str, Any] = field(default_factory=lambda: MEDIUM_PAM_MODEL)

    def prepare_model(self, model: SegmentCaptioner) -> SegmentCaptioner:
        """Move a model to the device and data type, in eval mode."""
        return model.to(device=self.device, dtype=getattr(torch, self.dtype)).eval()

    def convert_model(self, model: SegmentCaptioner) -> SegmentCaptioner:
        """Return a copy of a model in the precision of our implementation, or the model itself without one."""
        if self.precision is None:
            return model
        converted = copy.deepcopy(model)
        set_precision(converted, self.precision)
        return converted


@lru_cache(maxsize=8)
def load_library_transformer(transformer: TwoWayTransformer) -> SamTwoWayTransformer:
    """Return transformers' two-way transformer with the parameters of ours, which are not copied."""
    block = cast("TwoWayBlock", transformer.layers[0])
    config = SamMaskDecoderConfig(
        hidden_size=block.mlp.lin1.in_features,
        mlp_dim=block.mlp.lin1.out_features,
        num_hidden_layers=len(transformer.layers),
        num_attention_heads=block.self_attn.num_attention_heads,
        layer_norm_eps=block.layer_norm1.eps,
    )
    config._attn_implementation = "eager"
    with torch.device("meta"):
        library_transformer = SamTwoWayTransformer(config)
    share_parameters(transformer, library_transformer)
    return library_transformer.eval()


@contextmanager
def use_published_procedure(model: SegmentCaptioner) -> Iterator[None]:
    """Make the model compute as the original SCA code inside the context."""

    def forward(
        self: TwoWayTransformer,
        tokens: Tensor,
        grid: Tensor,
        positional_encoding: Tensor,
        image_index: Tensor | None = None,
        return_grids: bool = True,
    ) -> tuple[Tensor, Tensor]:
        grid = grid if image_index is None else grid[image_index]
        fused, keys = load_library_transformer(self)(
            tokens.unsqueeze(1),
            grid,
            positional_encoding.unsqueeze(0),
            None,  # type: ignore[arg-type]  # transformers declares a tensor, but passes None itself
        )
        return fused.squeeze(1), keys.squeeze(1).transpose(1, 2).unflatten(2, grid.shape[-2:])

    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}.values()
    attention_implementations = [
        config._attn_implementation for config in configs if hasattr(config, "_attn_implementation")
    ]
    with ExitStack() as stack:
        stack.enter_context(patch.object(TwoWayTransformer, "forward", forward))
        stack.enter_context(patch("sca.language_models.causal.has_plain_greedy_settings", lambda model: False))
        for config in configs:
            if hasattr(config, "_attn_implementation"):
                config._attn_implementation = "eager"
        try:
            yield
        finally:
            for config, implementation in zip(
                (c for c in configs if hasattr(c, "_attn_implementation")), attention_implementations, strict=True
            ):
                config._attn_implementation = implementation


def time_alternately(settings: ComparisonSettings, *functions: Callable[[], Any], num_warm_ups: int = 1) -> list[float]:
    """Return the minimum seconds of each function. They run alternately; the first rounds are warm-ups."""
    seconds: list[list[float]] = [[] for _ in functions]
    for repeat in range(settings.num_repeats + num_warm_ups):
        for function, function_seconds in zip(functions, seconds, strict=True):
            synchronize(settings.device)
            start = time.perf_counter()
            function()
            synchronize(settings.device)
            if repeat >= num_warm_ups:
                function_seconds.append(time.perf_counter() - start)
    return [min(function_seconds) for function_seconds in seconds]


def generate_ids(
    model: SegmentCaptioner, features: Tensor, prompts: PromptBatch, regions_per_call: int, generate_together: bool
) -> Tensor:
    """Generate token ids (N, T).

    Args:
        model: The model.
        features: Encoder features.
        prompts: N prompts.
        regions_per_call: Regions per call of the segmenter and mixer.
        generate_together: Generate all captions in one call of the language model, instead of one call per chunk.

    Returns:
        (N, T) token ids.
    """
    prefixes = []
    for chunk in prompts.iter_chunks(regions_per_call):
        queries = model.mix(model.segment(features, chunk))
        prefixes.append(model.build_prefix(queries, torch.ones_like(chunk.image_index)))
    if generate_together:
        return model.generate_from_prefix(torch.cat(prefixes), max_new_tokens=MAX_NEW_TOKENS).sequences[:, 0]
    return torch.cat(
        [model.language_model.generate(prefix, max_new_tokens=MAX_NEW_TOKENS).sequences[:, 0] for prefix in prefixes]
    )
