"""Measure the speedup over a reproduction of the original SCA implementation: `sca bench speedup [PART...]`.

`sca_bench.published_procedure` reproduces the original SCA implementation (arXiv 2312.00869) with the same weights:
eight regions at a time through the two-way blocks of transformers, each with a copy of its image's grid, eager
attention, and one `generate` call per eight regions. Both implementations are timed alternately in one run, and their
captions are compared. Prints a Markdown table of ratios; `--out FILE` writes the measurements as JSON.

captions     regions/s from an encoded image, SAM ViT-B + query + GPT-2, greedy
training     a step with 16 regions; ours with cached encoder features
mixers       mix stages of `resampler` and `roi-query` next to that of `query`, and the growth of the first with the
             number of regions
tiny         64 regions of sca-tiny in one batch next to one at a time
pam          captions of an image's regions with Perceive Anything (PAM, arXiv 2506.05302), next to the procedure of its
             code: each region alone through the encoder, the perceiver and `generate`
everything   masks and captions of an image from 1,024 points, 100 of which remain: everything mode, next to the
             original SamAutomaticMaskGenerator and transformers' pipeline `mask-generation`, whose masks are captioned
             by the reproduction

On a GPU the original implementation may take a minute where ours takes a second. `published_regions` limits the
regions that it captions; the comparison is then between rates.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from sca_registry.contracts import Prompt, PromptBatch
from sca_registry.errors import make_unknown_name_error
from torch import Tensor

import sca
from sca.checkpoints.pam import MODEL_FIELDS
from sca.inference.engine import REGION_BATCH_SIZE
from sca.language_models.questions import EncodedQuestion
from sca.model import SegmentCaptioner, count_rows_per_call
from sca.precision import describe_precision
from sca_bench.everything_comparison import compare_everything
from sca_bench.mask_generators import check_original_code
from sca_bench.published_procedure import (
    MAX_NEW_TOKENS,
    PUBLISHED_REGIONS_PER_CALL,
    ComparisonSettings,
    RatioRow,
    generate_ids,
    time_alternately,
    use_published_procedure,
)
from sca_bench.timing import make_random_inputs, make_training_batch
from sca_bench.worker import run_measurement

REGIONS_PER_STEP = 16


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


def compare_pam(settings: ComparisonSettings) -> list[RatioRow]:
    """Compare PAM with the procedure of its code, which encodes the image for each region and captions it alone."""
    model = settings.prepare_model(
        sca.compose(
            **settings.pam_model,
            **MODEL_FIELDS,
            device=settings.device,
            weights=False,  # type: ignore[arg-type]  # mypy assigns the unpacked tables to all arguments
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
    """Run comparisons and yield their rows.

    Args:
        parts: Names of comparisons.
        settings: Their settings.

    Yields:
        Each row when it is measured.

    Raises:
        ValueError: The part "everything" lacks a package, or is not in float32.
    """
    if "everything" in parts:
        check_original_code()
        if settings.dtype != "float32":
            raise ValueError(f"the part everything requires float32, not {settings.dtype}; name other parts")
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
