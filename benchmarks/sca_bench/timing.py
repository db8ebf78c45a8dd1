"""How long the stages of a model take: with warm-up, synchronisation, and the spread of several repeats."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from sca_registry.contracts import Batch, PromptBatch, Targets
from torch import Tensor

from sca.inference.engine import REGION_BATCH_SIZE
from sca.model import SegmentCaptioner

STAGES = ("encode", "segment", "mix", "prefill", "decode")


def spread(seconds: list[float]) -> dict[str, Any]:
    """Median, least and most of some repeats, seconds."""
    return {"median": statistics.median(seconds), "low": min(seconds), "high": max(seconds), "repeats": len(seconds)}


def asked(model: SegmentCaptioner, images: int, regions: int) -> tuple[Tensor, PromptBatch]:
    """Pixels and boxes without meaning, on the model's device; `regions` of each image."""
    size, like = model.encoder.image_format.size, model.task_tokens
    draw = torch.Generator().manual_seed(0)
    corner = torch.rand(images * regions, 2, generator=draw) * size / 2
    owner = torch.arange(images).repeat_interleave(regions)
    prompts = PromptBatch(owner, boxes=torch.cat((corner, corner + size / 3), dim=1))
    return torch.randn(images, 3, size, size, generator=draw).to(like), prompts.to(like.device)


@torch.inference_mode()
def stages(model: SegmentCaptioner, images: int, regions: int, words: int, repeats: int) -> dict[str, Any]:
    """Seconds by stage for `images` with `regions` each, and what they make together.

    encode, segment and mix are those of `Predictor`, `REGIONS` at a time; prefill is what the language model does up
    to the first word, decode the other words. No caption ends early.
    """
    pixels, prompts = asked(model, images, regions)
    model.language_model._ends = lambda: (0, [])
    clock, generate = _Clock(pixels.device), model.language_model.generate
    runs: list[dict[str, float]] = []
    for repeat in range(repeats + 1):
        taken = dict.fromkeys(STAGES, 0.0)
        features = clock.time(taken, "encode", lambda: model.encode(pixels))
        prefixes, prepared = [], None
        for chunk in prompts.chunks(REGION_BATCH_SIZE):
            found = clock.time(taken, "segment", lambda chunk=chunk, features=features: model.segment(features, chunk))
            start = clock.now()
            prepared = model.prepare_mixer(found) if prepared is None else prepared
            prefixes.append(model.build_prefix(model.mix(found, prepared), torch.ones_like(chunk.image_index)))
            taken["mix"] += clock.now() - start
            del found
        prefix = torch.cat(prefixes)
        clock.time(taken, "prefill", lambda prefix=prefix: generate(prefix, max_new_tokens=1))
        clock.time(taken, "decode", lambda prefix=prefix: generate(prefix, max_new_tokens=words))
        taken["decode"] = max(0.0, taken["decode"] - taken["prefill"])
        if repeat:  # the first is for warming up
            runs.append(taken)
    whole = [sum(run.values()) for run in runs]
    first = [sum(run[stage] for stage in STAGES[:4]) for run in runs]
    told = {stage: spread([run[stage] for run in runs]) for stage in STAGES}
    count = images * regions
    return {
        "images": images,
        "regions": regions,
        "words": words,
        "stages": told,
        "whole": spread(whole),
        "first_caption": spread(first),
        "regions_per_second": count / statistics.median(whole),
        "captions_per_second_encoded": count
        / statistics.median([w - r["encode"] for w, r in zip(whole, runs, strict=True)]),
    }


def training_step(
    model: SegmentCaptioner, images: int, regions: int, words: int, repeats: int, cached: bool = False
) -> dict[str, Any]:
    """Seconds of a step: forward, backward and AdamW over what trains, with one text a region.

    cached: the encoder's features are kept, so that a step does not compute them.
    """
    pixels, prompts = asked(model, images, regions)
    batch = lesson(model, pixels, prompts, words)
    if cached:
        with torch.no_grad():
            batch.features, batch.pixel_values = model.encode(pixels), None
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(trained)
    clock, seconds = _Clock(pixels.device), []
    model.train()
    for repeat in range(repeats + 1):
        start = clock.now()
        optimiser.zero_grad()
        model(batch).loss.backward()
        optimiser.step()
        if repeat:
            seconds.append(clock.now() - start)
    model.eval()
    return {"images": images, "regions": regions, "words": words, **spread(seconds)}


def lesson(model: SegmentCaptioner, pixels: Tensor, prompts: PromptBatch, words: int) -> Batch:
    """One text a region, and masks where the segmenter learns them."""
    rows, device = len(prompts), pixels.device
    ids = torch.ones(rows, words, dtype=torch.long, device=device)
    task = torch.ones(rows, dtype=torch.long, device=device)
    batch = Batch(prompts=prompts, task_ids=task, pixel_values=pixels, input_ids=ids, attention_mask=ids)
    if hasattr(model.segmenter, "loss"):
        side = 4 * pixels.shape[-1] // model.encoder.stride
        truth = torch.rand(rows, side, side, device=device)
        has = torch.ones(rows, dtype=torch.bool, device=device)
        batch.targets = Targets(truth, torch.ones_like(truth, dtype=torch.bool), has)
    return batch


def synchronize(device: torch.device | str) -> None:
    """Wait until a device has done all of its work."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


class _Clock:
    """Wall time after all that was asked of the device is done."""

    def __init__(self, device: torch.device):
        self.device = device

    def now(self) -> float:
        synchronize(self.device)
        return time.perf_counter()

    def time(self, taken: dict[str, float], stage: str, work: Callable[[], Any]) -> Any:
        start = self.now()
        result = work()
        taken[stage] += self.now() - start
        return result
