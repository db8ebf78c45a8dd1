"""Compare everything mode with other mask generators, whose masks are captioned by the published procedure.

The generators are the original `SamAutomaticMaskGenerator` and the pipeline `mask-generation` of transformers, with the
weights of one model and thresholds that leave 100 masks of 1,024 points. Their masks are captioned from the features of
our encoder, whose time is not counted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from PIL import Image
from sca_registry.contracts import Prompt, PromptBatch
from sca_registry.spec import EverythingOptions
from torch import Tensor

from sca.inference.engine import REGION_BATCH_SIZE, EncodedImages, Engine
from sca.inference.region_search import find_everything
from sca.io.masks import mask_to_box
from sca.model import SegmentCaptioner
from sca_bench.everything_workload import choose_options, make_image, match_masks, rescale_outputs
from sca_bench.mask_generators import (
    GeneratedMask,
    MaskGenerator,
    build_original_generator,
    build_pipeline_generator,
)
from sca_bench.published_procedure import (
    PUBLISHED_REGIONS_PER_CALL,
    ComparisonSettings,
    RatioRow,
    generate_ids,
    time_alternately,
    use_published_procedure,
)
from sca_bench.timing import measure_peak_memory

OURS, ORIGINAL, PIPELINE = "ours", "SamAutomaticMaskGenerator", "pipeline"
WARM_UP_POINTS_PER_SIDE = 8  # one batch of each generator


@dataclass(frozen=True)
class GeneratorResult:
    """Masks of a generator, their captions, and what they took.

    Attributes:
        masks: Masks.
        seconds: Seconds for the masks.
        caption_seconds: Seconds for the captions.
        token_ids: (N, T) token ids of the captions.
        peak_memory: Bytes for the masks of one batch of points; None if they are not measured.
    """

    masks: Sequence[GeneratedMask]
    seconds: float
    caption_seconds: float
    token_ids: Tensor
    peak_memory: int | None


def compare_everything(model: SegmentCaptioner, settings: ComparisonSettings) -> list[RatioRow]:
    """Compare the time and memory of everything mode with those of the other generators.

    Args:
        model: Model with a SAM segmenter and random weights, which are rescaled.
        settings: Settings of the comparison.

    Returns:
        Rows for each of the other generators.
    """
    reference_engine, image = Engine(model), make_image(model.encoder.image_format.size)
    encoded = reference_engine.encode([image])
    rescale_outputs(reference_engine, encoded)
    options = choose_options(reference_engine, encoded, settings.points_per_side)
    engine = Engine(settings.convert_model(model))
    generators = {
        OURS: build_everything_generator(engine),
        ORIGINAL: build_original_generator(model),
        PIPELINE: build_pipeline_generator(model),
    }
    masks: dict[str, list[GeneratedMask]] = {}
    token_ids: dict[str, Tensor] = {}

    def generate_masks(name: str) -> None:
        masks[name] = generators[name](image, options)

    def caption_here() -> None:
        features, prompts = encoded.require_features(), make_caption_prompts(engine, encoded, masks[OURS])
        token_ids[OURS] = generate_ids(engine.model, features, prompts, REGION_BATCH_SIZE, generate_together=True)

    def caption_published() -> None:
        features, prompts = encoded.require_features(), make_caption_prompts(engine, encoded, masks[ORIGINAL])
        with use_published_procedure(model):
            token_ids[ORIGINAL] = generate_ids(
                model, features, prompts, PUBLISHED_REGIONS_PER_CALL, generate_together=False
            )

    with torch.inference_mode():
        first_options = replace(options, points_per_side=min(WARM_UP_POINTS_PER_SIDE, options.points_per_side))
        peak_memory = {
            name: measure_peak_memory(partial(generate, image, first_options), settings.device)
            for name, generate in generators.items()
        }
        *seconds, caption_seconds, published_seconds = time_alternately(
            settings,
            *(partial(generate_masks, name) for name in generators),
            caption_here,
            caption_published,
            num_warm_ups=0,  # the measurement of memory is one
        )
    results = {
        name: GeneratorResult(
            masks[name],
            mask_seconds,
            caption_seconds if name == OURS else published_seconds,
            token_ids[OURS if name == OURS else ORIGINAL],
            peak_memory[name],
        )
        for name, mask_seconds in zip(generators, seconds, strict=True)
    }
    return [
        *_compare_captions(results[OURS], results[ORIGINAL]),
        *_compare_results(results[OURS], results[ORIGINAL], ORIGINAL, options.points_per_side**2),
        *_compare_results(results[OURS], results[PIPELINE], PIPELINE, options.points_per_side**2),
    ]


def build_everything_generator(engine: Engine) -> MaskGenerator:
    """Return everything mode as a function of an image and options that returns masks."""

    def generate_masks(image: Image.Image, options: EverythingOptions) -> list[GeneratedMask]:
        masks, prompts = find_everything(engine, engine.encode([image]), options)
        points = [prompt.points[0][:2] for prompt in prompts]
        return [GeneratedMask(*mask, point) for mask, point in zip(masks, points, strict=True)]

    return generate_masks


def make_caption_prompts(engine: Engine, encoded: EncodedImages, masks: Sequence[GeneratedMask]) -> PromptBatch:
    """Return the prompts that everything mode captions masks from: their boxes and points."""
    prompts = []
    for mask in masks:
        assert mask.point is not None  # of the generators whose masks are captioned
        prompts.append(Prompt(mask_to_box(mask.rle), ((*mask.point, 1),)))
    ((_, batch),) = engine.processor.group_prompts([prompts], encoded.frames)
    return batch.to(engine.device)


def _compare_captions(ours: GeneratorResult, other: GeneratorResult) -> Iterator[RatioRow]:
    matches, _ = match_masks([each.rle for each in ours.masks], [each.rle for each in other.masks])
    share_identical = float((ours.token_ids[matches] == other.token_ids).all(dim=1).float().mean())
    rate, other_rate = (len(each.masks) / each.caption_seconds for each in (ours, other))
    yield "everything mode, captions of the masks", "regions/s", rate, other_rate, f"identical: {share_identical:.1%}"


def _compare_results(ours: GeneratorResult, other: GeneratorResult, name: str, num_points: int) -> Iterator[RatioRow]:
    _, ious = match_masks([each.rle for each in ours.masks], [each.rle for each in other.masks])
    note = (
        f"{len(ours.masks)} and {len(other.masks)} masks of {num_points:,} points; mean IoU {ious.mean():.4f}, "
        f"equal: {(ious == 1).mean():.1%}"
    )
    yield f"everything mode vs. {name}, masks", "images/s", 1 / ours.seconds, 1 / other.seconds, note
    total, other_total = (each.seconds + each.caption_seconds for each in (ours, other))
    yield f"everything mode vs. {name}, masks and captions", "images/s", 1 / total, 1 / other_total, "with encoding"
    if ours.peak_memory is not None and other.peak_memory is not None:
        gigabytes, other_gigabytes = (each / 2**30 for each in (ours.peak_memory, other.peak_memory))
        yield (
            f"everything mode vs. {name}, memory",
            "GiB",
            gigabytes,
            other_gigabytes,
            "growth for one batch of points; lower is better",
        )
