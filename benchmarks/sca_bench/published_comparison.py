"""Measure the speedup over a reproduction of the original SCA implementation: `sca bench speedup [PART...]`.

This module reproduces the original SCA implementation (arXiv 2312.00869) with the same weights: eight regions at a time
through the two-way blocks of transformers, each with a copy of its image's grid, eager attention, and one `generate`
call per eight regions. Both implementations are timed alternately in one run, and their captions are compared. Prints a
Markdown table of ratios; `--out FILE` writes the measurements as JSON.

captions     regions/s from an encoded image, SAM ViT-B + query + GPT-2, greedy
training     a step with 16 regions; ours with cached encoder features
mixers       mix stages of `resampler` and `roi-query` next to that of `query`, and the growth of the first with the
             number of regions
tiny         64 regions of sca-tiny in one batch next to one at a time
pam          captions of an image's regions with Perceive Anything (PAM, arXiv 2506.05302), next to the procedure of its
             code: each region alone through the encoder, the perceiver and `generate`
everything   captions of an image, estimated from stage times: the original for all 1,024 points, with one encoder pass
             per 64 points; ours for the 100 regions that remain

On a GPU the original implementation may take a minute where ours takes a second. `published_regions` limits the
regions that it captions; the comparison is then between rates.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any, cast
from unittest.mock import patch

import torch
from sca_registry.contracts import Prompt, PromptBatch
from sca_registry.errors import make_unknown_name_error
from torch import Tensor
from transformers import SamMaskDecoderConfig
from transformers.models.sam.modeling_sam import SamTwoWayTransformer

import sca
from sca.checkpoints.pam import MODEL_FIELDS
from sca.inference.engine import REGION_BATCH_SIZE
from sca.language_models.questions import EncodedQuestion
from sca.model import SegmentCaptioner, count_rows_per_call
from sca.nn.parameters import share_parameters
from sca.nn.two_way_transformer import TwoWayBlock, TwoWayTransformer
from sca.precision import describe_precision, set_precision
from sca_bench.timing import make_random_inputs, make_training_batch, synchronize
from sca_bench.worker import run_measurement

PUBLISHED_REGIONS_PER_CALL, MAX_NEW_TOKENS, REGIONS_PER_STEP, NUM_GRID_POINTS, NUM_KEPT_REGIONS = 8, 20, 16, 1024, 100
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


def time_alternately(settings: ComparisonSettings, *functions: Callable[[], Any]) -> list[float]:
    """Return the minimum seconds of each function. They run alternately; the first round is a warm-up."""
    seconds: list[list[float]] = [[] for _ in functions]
    for repeat in range(settings.num_repeats + 1):
        for function, function_seconds in zip(functions, seconds, strict=True):
            synchronize(settings.device)
            start = time.perf_counter()
            function()
            synchronize(settings.device)
            if repeat:
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


def compare_captioning(model: SegmentCaptioner, settings: ComparisonSettings) -> list[RatioRow]:
    """Compare captioning throughput, with and without encoding."""
    num_images, num_regions = settings.batch_size, settings.regions_per_image
    pixels, prompts = make_random_inputs(model, num_images, num_regions)
    published_prompts = prompts[: settings.published_regions or None]
    num_captions, num_published_captions = len(prompts), len(published_prompts)
    num_published_images = int(published_prompts.image_index[-1]) + 1
    token_ids: dict[str, Tensor] = {}
    converted = settings.convert_model(model)
    with torch.inference_mode():
        features = model.encode(pixels)

        def caption_here() -> None:
            token_ids["ours"] = generate_ids(converted, features, prompts, REGION_BATCH_SIZE, generate_together=True)

        def caption_published() -> None:
            with use_published_procedure(model):
                token_ids["published"] = generate_ids(
                    model,
                    features[:num_published_images],
                    published_prompts,
                    PUBLISHED_REGIONS_PER_CALL,
                    generate_together=False,
                )

        encoders = [converted] if converted is model else [converted, model]
        seconds, published_seconds, *all_encoding_seconds = time_alternately(
            settings, caption_here, caption_published, *(partial(each.encode, pixels) for each in encoders)
        )
    encoding_seconds, published_encoding_seconds = all_encoding_seconds[0], all_encoding_seconds[-1]
    share_identical = float(
        (token_ids["ours"][:num_published_captions] == token_ids["published"]).all(dim=1).float().mean()
    )
    note = f"{num_images} x {num_regions} regions, {num_published_captions} original; identical: {share_identical:.1%}"
    if settings.precision:
        note += f"; {settings.precision}: {describe_precision(converted)}"
    published_total_seconds = published_seconds + published_encoding_seconds * num_published_images / num_images
    return [
        (
            "captions of encoded images",
            "regions/s",
            num_captions / seconds,
            num_published_captions / published_seconds,
            note,
        ),
        (
            "captions, including encoding",
            "regions/s",
            num_captions / (seconds + encoding_seconds),
            num_published_captions / published_total_seconds,
            note,
        ),
        *(
            [
                (
                    "encoding",
                    "images/s",
                    num_images / encoding_seconds,
                    num_images / published_encoding_seconds,
                    "both ours",
                )
            ]
            if settings.precision
            else []
        ),
    ]


def compare_training(model: SegmentCaptioner, settings: ComparisonSettings) -> list[RatioRow]:
    """Compare training steps, with and without cached features."""
    pixels, prompts = make_random_inputs(model, 1, REGIONS_PER_STEP)
    batch = make_training_batch(model, pixels, prompts, MAX_NEW_TOKENS)
    model.train()
    with torch.no_grad():
        features = model.encode(pixels)
    cached_batch = make_training_batch(model, pixels, prompts, MAX_NEW_TOKENS)
    cached_batch.pixel_values, cached_batch.features = None, features

    def train_cached() -> None:
        model(cached_batch).loss.backward()

    def train_uncached() -> None:
        model(batch).loss.backward()

    def train_published() -> None:
        with use_published_procedure(model):
            model(batch).loss.backward()

    cached_seconds, uncached_seconds, published_seconds = time_alternately(
        settings, train_cached, train_uncached, train_published
    )
    model.zero_grad(set_to_none=True)
    model.eval()
    note = f"{REGIONS_PER_STEP} regions, forward and backward"
    return [
        ("training step, cached features", "steps/s", 1 / cached_seconds, 1 / published_seconds, note),
        (
            "training step, with vs. without cached features",
            "steps/s",
            1 / cached_seconds,
            1 / uncached_seconds,
            "both ours",
        ),
    ]


def compare_mixers(settings: ComparisonSettings) -> list[RatioRow]:
    """Compare the mix stages of `resampler`, `roi-query` and `query`."""
    models = [
        settings.prepare_model(sca.compose(settings.encoder, mixer, "tiny-gpt2", weights=False))
        for mixer in ("resampler", "roi-query", "query")
    ]
    mix_functions = []
    with torch.inference_mode():
        for model, region_counts in zip(models, ((64, 1), (64,), (64,)), strict=True):
            features = model.encode(make_random_inputs(model, 1, 1)[0])
            for num_regions in region_counts:
                segmenter_output = model.segment(features, make_random_inputs(model, 1, num_regions)[1])
                mix_functions.append(
                    lambda model=model, segmenter_output=segmenter_output: model.mix(
                        segmenter_output, model.prepare_mixer(segmenter_output)
                    )
                )
        seconds_64, seconds_1, roi_query_seconds, query_seconds = time_alternately(settings, *mix_functions)
    return [
        ("mix stage, resampler vs. query", "regions/s", 64 / seconds_64, 64 / query_seconds, "64 regions"),
        ("mix stage, roi-query vs. query", "regions/s", 64 / roi_query_seconds, 64 / query_seconds, "64 regions"),
        ("mix stage of resampler, 64 regions vs. 1", "seconds", seconds_64, seconds_1, "64 if linear"),
    ]


def compare_batching(settings: ComparisonSettings) -> list[RatioRow]:
    """Compare captioning 64 regions in one batch with one at a time."""
    from PIL import Image

    predictor = sca.Predictor(settings.prepare_model(sca.load("sca-tiny")))
    predictor.set_image(Image.new("RGB", (512, 512), "gray"))
    boxes = [Prompt(box=(x * 60.0, y * 60.0, x * 60.0 + 70, y * 60.0 + 70)) for x in range(8) for y in range(8)]
    texts: dict[str, list[str]] = {}

    def caption_together() -> None:
        texts["ours"] = [each.text for each in predictor.predict(boxes)]

    def caption_one_by_one() -> None:
        texts["loop"] = [predictor.predict([box])[0].text for box in boxes]

    together_seconds, loop_seconds = time_alternately(settings, caption_together, caption_one_by_one)
    note = f"64 regions; same captions: {texts['ours'] == texts['loop']}"
    return [("sca-tiny, one batch vs. a loop", "regions/s", 64 / together_seconds, 64 / loop_seconds, note)]


def compare_everything(model: SegmentCaptioner, settings: ComparisonSettings) -> list[RatioRow]:
    """Estimate captioning everything in an image from stage times."""
    pixels, box_prompts = make_random_inputs(model, 1, 16)
    assert box_prompts.boxes is not None  # see `make_random_inputs`
    point_prompts = PromptBatch(
        box_prompts.image_index, points=box_prompts.boxes[:, None, :2], labels=box_prompts.image_index.new_ones(16, 1)
    )
    with torch.inference_mode():
        features = model.encode(pixels)

        def caption_published() -> None:
            with use_published_procedure(model):
                generate_ids(model, features, point_prompts, PUBLISHED_REGIONS_PER_CALL, generate_together=False)

        encode_seconds, segment_seconds, caption_seconds, published_seconds = time_alternately(
            settings,
            lambda: model.encode(pixels),
            lambda: model.segment(features, point_prompts),
            lambda: generate_ids(model, features, point_prompts, REGION_BATCH_SIZE, generate_together=True),
            caption_published,
        )
    total_seconds = encode_seconds + NUM_GRID_POINTS * segment_seconds / 16 + NUM_KEPT_REGIONS * caption_seconds / 16
    published_total_seconds = NUM_GRID_POINTS / 64 * encode_seconds + NUM_GRID_POINTS * published_seconds / 16
    return [
        (
            "everything mode (estimated)",
            "images/s",
            1 / total_seconds,
            1 / published_total_seconds,
            f"{NUM_KEPT_REGIONS} of {NUM_GRID_POINTS} regions kept",
        )
    ]


def compare_pam(settings: ComparisonSettings) -> list[RatioRow]:
    """Compare PAM with the procedure of its code, which encodes the image for each region and captions it alone."""
    model = settings.prepare_model(
        sca.compose(
            **settings.pam_model,
            **MODEL_FIELDS,
            device=settings.device,
            weights=False,  # type: ignore[arg-type]
        )
    )
    pixels, prompts = make_random_inputs(model, 1, settings.regions_per_image)
    num_positions = model.count_prefix_positions() - model.prefix_length
    question = EncodedQuestion([], [1] * num_positions)
    token_ids: dict[str, Tensor] = {}

    def generate_ids_of_chunk(features: Tensor, chunk: PromptBatch) -> Tensor:
        prefix = model.build_prefix(model.mix(model.segment(features, chunk)), torch.ones_like(chunk.image_index))
        prefix = model.append_question(prefix, question)
        return model.generate_from_prefix(prefix, max_new_tokens=MAX_NEW_TOKENS).sequences[:, 0]

    def caption_here() -> None:
        features = model.encode(pixels)
        rows = count_rows_per_call(model.count_prefix_positions())
        token_ids["ours"] = torch.cat([generate_ids_of_chunk(features, chunk) for chunk in prompts.iter_chunks(rows)])

    def caption_published() -> None:
        with patch("sca.language_models.causal.has_plain_greedy_settings", lambda model: False):
            token_ids["published"] = torch.cat(
                [generate_ids_of_chunk(model.encode(pixels), chunk) for chunk in prompts.iter_chunks(1)]
            )

    with torch.inference_mode():
        seconds, published_seconds = time_alternately(settings, caption_here, caption_published)
    share_identical = float((token_ids["ours"] == token_ids["published"]).all(dim=1).float().mean())
    note = f"1 x {settings.regions_per_image} regions; identical: {share_identical:.1%}"
    rate, published_rate = (settings.regions_per_image / each for each in (seconds, published_seconds))
    return [("PAM, captions, including encoding", "regions/s", rate, published_rate, note)]


COMPARISON_PARTS = ("captions", "training", "mixers", "tiny", "pam", "everything")


def choose_parts(names: Sequence[str]) -> list[str]:
    """Return the named comparisons in the order of `COMPARISON_PARTS`; all of them without names.

    Args:
        names: Names of comparisons.

    Returns:
        The names, in order.

    Raises:
        RegistryError: An unknown name.
    """
    for name in names:
        if name not in COMPARISON_PARTS:
            raise make_unknown_name_error(f"unknown part {name!r}", name, COMPARISON_PARTS)
    return [part for part in COMPARISON_PARTS if part in names or not names]


def run_comparisons(parts: Sequence[str], settings: ComparisonSettings) -> Iterator[RatioRow]:
    """Run comparisons and yield their rows."""
    start = time.monotonic()
    torch.manual_seed(0)
    comparisons: dict[str, Callable[[], list[RatioRow]]] = {
        "mixers": lambda: compare_mixers(settings),
        "tiny": lambda: compare_batching(settings),
        "pam": lambda: compare_pam(settings),
    }
    if {"captions", "training", "everything"} & set(parts):
        model = settings.prepare_model(
            sca.compose(settings.encoder, "query", settings.language_model, device=settings.device, weights=False)
        )
        comparisons |= {
            "captions": lambda: compare_captioning(model, settings),
            "training": lambda: compare_training(model, settings),
            "everything": lambda: compare_everything(model, settings),
        }
    for part in parts:
        if time.monotonic() - start < settings.time_budget:
            yield from comparisons[part]()


def convert_row_to_dict(row: RatioRow) -> dict[str, Any]:
    """Return a row as plain values."""
    return dict(zip(("quantity", "unit", "ours", "reference", "note"), row, strict=True))


def print_table(rows: Iterable[RatioRow]) -> list[RatioRow]:
    """Print a Markdown table row by row as it is measured, and return the rows."""
    print("| quantity | unit | ours | reference | ratio (x) | |\n| --- | --- | ---: | ---: | ---: | --- |")
    measured_rows = []
    for row in rows:
        quantity, unit, ours, reference, note = row
        print(
            f"| {quantity} | {unit} | {ours:.4g} | {reference:.4g} | {ours / reference:.2f} | {note} |",
            flush=True,
        )
        measured_rows.append(row)
    return measured_rows


def run_job(config: Mapping[str, Any], folder: str) -> dict[str, Any]:
    """Run comparisons as a launcher job; `config` contains `parts` and the fields of `ComparisonSettings`."""
    options = dict(config)
    parts = options.pop("parts", ())

    def measure_ratios(row: dict[str, Any]) -> None:
        row["ratios"] = [
            convert_row_to_dict(each)
            for each in print_table(run_comparisons(choose_parts(parts), ComparisonSettings(**options)))
        ]

    return run_measurement(measure_ratios, config["device"])
