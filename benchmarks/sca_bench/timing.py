"""Time the stages of a model, with warm-up, synchronization and repeats."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from sca_registry.contracts import Batch, MaskTargets, PromptBatch
from torch import Tensor

from sca.allocator import release_memory
from sca.inference.engine import REGION_BATCH_SIZE
from sca.model import SegmentCaptioner

STAGES = ("encode", "segment", "mix", "prefill", "decode")


def summarize_seconds(seconds: list[float]) -> dict[str, Any]:
    """Return the median, minimum and maximum of repeats in seconds."""
    median = statistics.median(seconds)
    return {"median": median, "min": min(seconds), "max": max(seconds), "num_repeats": len(seconds)}


def make_random_inputs(model: SegmentCaptioner, num_images: int, num_regions: int) -> tuple[Tensor, PromptBatch]:
    """Create random pixels and boxes on the model's device, with `num_regions` boxes per image."""
    size, reference_tensor = model.encoder.image_format.size, model.task_tokens
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(num_images * num_regions, 2, generator=generator) * size / 2
    image_index = torch.arange(num_images).repeat_interleave(num_regions)
    prompts = PromptBatch(
        image_index,
        boxes=torch.cat((corners, corners + size / 3), dim=1),
        image_boxes=torch.tensor([[0.0, 0.0, size, size]]).expand(len(image_index), -1),
        aspect_ratios=torch.ones(len(image_index)),
    )
    return torch.randn(num_images, 3, size, size, generator=generator).to(reference_tensor), prompts.to(
        reference_tensor.device
    )


def disable_early_end(language_model: Any) -> None:
    """Make a language model of SCA generate captions that never end early."""
    language_model._resolve_special_tokens = lambda: (0, [])


@torch.inference_mode()
def measure_stages(
    model: SegmentCaptioner, num_images: int, num_regions: int, max_new_tokens: int, num_repeats: int
) -> dict[str, Any]:
    """Time every stage of captioning.

    encode, segment and mix run as in `Predictor`, `REGION_BATCH_SIZE` regions at a time. prefill is the language
    model's work up to the first token, decode that for the other tokens. Captions never end early.

    Args:
        model: The model.
        num_images: Images per batch.
        num_regions: Regions per image.
        max_new_tokens: Tokens per caption.
        num_repeats: Repeats after a warm-up.

    Returns:
        Seconds by stage, in total and up to the first token, and the throughput.
    """
    pixels, prompts = make_random_inputs(model, num_images, num_regions)
    disable_early_end(model.language_model)
    clock, generate = _DeviceClock(pixels.device), model.language_model.generate
    repeat_seconds: list[dict[str, float]] = []
    for repeat in range(num_repeats + 1):
        stage_seconds = dict.fromkeys(STAGES, 0.0)
        features = clock.time_stage(stage_seconds, "encode", lambda: model.encode(pixels))
        prefixes, prepared_features = [], None
        for chunk in prompts.iter_chunks(REGION_BATCH_SIZE):
            segmenter_output = clock.time_stage(stage_seconds, "segment", partial(model.segment, features, chunk))
            start = clock.read_time()
            prepared_features = (
                model.prepare_mixer(segmenter_output) if prepared_features is None else prepared_features
            )
            queries = model.mix(segmenter_output, prepared_features)
            geometry = model.compute_geometry(segmenter_output, chunk)
            prefixes.append(model.build_prefix(queries, torch.ones_like(chunk.image_index), geometry))
            stage_seconds["mix"] += clock.read_time() - start
            del segmenter_output
        prefix = torch.cat(prefixes)
        clock.time_stage(stage_seconds, "prefill", partial(generate, prefix, max_new_tokens=1))
        clock.time_stage(stage_seconds, "decode", partial(generate, prefix, max_new_tokens=max_new_tokens))
        stage_seconds["decode"] = max(0.0, stage_seconds["decode"] - stage_seconds["prefill"])
        if repeat:  # the first is a warm-up
            repeat_seconds.append(stage_seconds)
    total_seconds = [sum(run.values()) for run in repeat_seconds]
    first_token_seconds = [sum(run[stage] for stage in STAGES[:4]) for run in repeat_seconds]
    stage_timings = {stage: summarize_seconds([run[stage] for run in repeat_seconds]) for stage in STAGES}
    num_captions = num_images * num_regions
    return {
        "batch_size": num_images,
        "regions_per_image": num_regions,
        "max_new_tokens": max_new_tokens,
        "stages": stage_timings,
        "total": summarize_seconds(total_seconds),
        "time_to_first_token": summarize_seconds(first_token_seconds),
        "regions_per_second": num_captions / statistics.median(total_seconds),
        "regions_per_second_after_encoding": num_captions
        / statistics.median([w - r["encode"] for w, r in zip(total_seconds, repeat_seconds, strict=True)]),
    }


def measure_training_step(
    model: SegmentCaptioner,
    num_images: int,
    num_regions: int,
    num_tokens: int,
    num_repeats: int,
    use_cached_features: bool = False,
) -> dict[str, Any]:
    """Time a training step: forward, backward and AdamW over the trainable parameters, with one caption per region.

    Args:
        model: The model.
        num_images: Images per batch.
        num_regions: Regions per image.
        num_tokens: Tokens per caption.
        num_repeats: Repeats after a warm-up.
        use_cached_features: Compute the encoder features once, before the steps.

    Returns:
        The sizes, and summary statistics of the seconds.
    """
    pixels, prompts = make_random_inputs(model, num_images, num_regions)
    batch = make_training_batch(model, pixels, prompts, num_tokens)
    if use_cached_features:
        with torch.no_grad():
            batch.features, batch.pixel_values = model.encode(pixels), None
    trainable_parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable_parameters)
    clock, seconds = _DeviceClock(pixels.device), []
    model.train()
    for repeat in range(num_repeats + 1):
        start = clock.read_time()
        optimizer.zero_grad()
        model(batch).loss.backward()
        optimizer.step()
        if repeat:
            seconds.append(clock.read_time() - start)
    model.eval()
    return {
        "batch_size": num_images,
        "regions_per_image": num_regions,
        "max_new_tokens": num_tokens,
        **summarize_seconds(seconds),
    }


def make_training_batch(model: SegmentCaptioner, pixels: Tensor, prompts: PromptBatch, num_tokens: int) -> Batch:
    """Create a batch with one caption per region, and masks if the segmenter is trainable."""
    num_regions, device = len(prompts), pixels.device
    input_ids = torch.ones(num_regions, num_tokens, dtype=torch.long, device=device)
    task_ids = torch.ones(num_regions, dtype=torch.long, device=device)
    batch = Batch(
        prompts=prompts, task_ids=task_ids, pixel_values=pixels, input_ids=input_ids, attention_mask=input_ids
    )
    if hasattr(model.segmenter, "compute_losses"):
        side = 4 * pixels.shape[-1] // model.encoder.stride
        masks = torch.rand(num_regions, side, side, device=device)
        has_mask = torch.ones(num_regions, dtype=torch.bool, device=device)
        batch.targets = MaskTargets(masks, torch.ones_like(masks, dtype=torch.bool), has_mask)
    return batch


def synchronize(device: torch.device | str) -> None:
    """Wait for all pending work of a device."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def measure_peak_memory(function: Callable[[], Any], device: torch.device | str) -> int | None:
    """Measure by how much the memory of the device grows while a function runs.

    Args:
        function: Function.
        device: CUDA device, or "cpu" for the memory of this process.

    Returns:
        Bytes; None if the operating system does not measure them.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        return torch.cuda.max_memory_allocated(device) - before
    release_memory()
    try:
        Path("/proc/self/clear_refs").write_text("5", "ascii")  # resets VmHWM
    except OSError:  # not Linux, or not allowed in this container
        function()
        return None
    before = _read_process_memory("VmRSS")
    function()
    return _read_process_memory("VmHWM") - before


def _read_process_memory(name: str) -> int:
    """Read a value of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text("ascii").splitlines()
    (value,) = (line.split()[1] for line in lines if line.startswith(f"{name}:"))
    return int(value) * 1024


class _DeviceClock:
    """Wall clock that waits for pending work of the device."""

    def __init__(self, device: torch.device):
        self.device = device

    def read_time(self) -> float:
        synchronize(self.device)
        return time.perf_counter()

    def time_stage(self, stage_seconds: dict[str, float], stage: str, function: Callable[[], Any]) -> Any:
        start = self.read_time()
        result = function()
        stage_seconds[stage] += self.read_time() - start
        return result
