"""Compare `sca plan` with measurements: `python -m sca_bench.plan_accuracy [--device cuda] [--out FILE] [MODEL...]`.

Each model is built with random weights, captions a few regions and takes a training step. Operations are counted by
torch; memory is the peak of its allocator. Prints a Markdown table of estimated-to-measured ratios, and writes the rows
with device and versions as JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from sca_registry.contracts import PromptBatch
from sca_registry.spec import ModelSpec
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from sca.builder import build
from sca.checkpoints.load import resolve_spec
from sca.inference.engine import REGION_BATCH_SIZE
from sca.io.atomic import write_file
from sca.model import SegmentCaptioner
from sca.plan import plan_model
from sca.stage_costs import make_flop_counter
from sca_bench.timing import disable_early_end, make_random_inputs, make_training_batch
from sca_bench.worker import collect_environment, run_measurement

FULL_SIZE_MODELS = (
    "sam-vit-b+query+gpt2",
    "sam-vit-h+query+gpt2-large",
    "sam-vit-l+resampler+qwen3-0.6b",
    "clip-vit-l-14-336+query+gpt2",
    "dinov2-vit-b-14+query+smollm2-360m",
    "sam-vit-h+query+mistral-7b",
)


@torch.no_grad()
def run_captioning(model: SegmentCaptioner, pixels: Tensor, prompts: PromptBatch, max_new_tokens: int) -> None:
    """Caption regions in the same steps as `Predictor`, always generating `max_new_tokens` tokens."""
    features = model.encode(pixels)
    prefixes, prepared_features = [], None
    for chunk in prompts.iter_chunks(REGION_BATCH_SIZE):
        segmenter_output = model.segment(features, chunk)
        prepared_features = model.prepare_mixer(segmenter_output) if prepared_features is None else prepared_features
        queries = model.mix(segmenter_output, prepared_features)
        geometry = model.compute_geometry(segmenter_output, chunk)
        prefixes.append(model.build_prefix(queries, torch.zeros_like(chunk.image_index), geometry))
        del segmenter_output, queries
    disable_early_end(model.language_model)
    model.generate_from_prefix(torch.cat(prefixes), max_new_tokens=max_new_tokens)


def run_training_step(model: SegmentCaptioner, pixels: Tensor, prompts: PromptBatch, num_tokens: int) -> None:
    """Run a forward and a backward pass with one caption per region."""
    model.train()
    model(make_training_batch(model, pixels, prompts, num_tokens)).loss.backward()


def measure_peak_allocation(function: Callable[[], None], device: torch.device) -> int:
    """Return the peak bytes that torch's allocator adds while a function runs."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    current = peak = 0
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        current += event.nbytes()
        peak = max(peak, current)
    return peak


def compare_plan(
    spec: ModelSpec,
    batch_size: int,
    regions_per_image: int,
    max_new_tokens: int,
    training: bool = False,
    device: str = "cpu",
    dtype: str = "float32",
) -> dict[str, Any]:
    """Compare the estimated and measured parameters, operations and memory of a model.

    Args:
        spec: Model specification.
        batch_size: Images per batch.
        regions_per_image: Regions per image.
        max_new_tokens: Tokens per caption.
        training: Measure a training step instead of captioning.
        device: A torch device.
        dtype: Data type of the weights; training always uses float32.

    Returns:
        The settings, and a pair [estimated, measured] for `parameters`, `flops` and `memory` (bytes).
    """
    precision = "float32" if training else dtype
    plan = plan_model(
        spec,
        batch_size,
        regions_per_image,
        max_new_tokens,
        training,
        precision,
        on_gpu=device.startswith("cuda"),
    )
    model = build(spec, device, weights=False).to(dtype=getattr(torch, precision))
    static_bytes = sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))
    static_bytes += 8 * plan.trainable_parameters if training else 0  # optimizer state of AdamW
    pixels, prompts = make_random_inputs(model, batch_size, regions_per_image)
    run_step = run_training_step if training else run_captioning
    allocated_bytes = measure_peak_allocation(
        lambda: run_step(model, pixels, prompts, max_new_tokens), torch.device(device)
    )
    model.zero_grad()
    with make_flop_counter() as counter:
        run_step(model, pixels, prompts, max_new_tokens)
    return {
        "model": plan.model,
        "batch_size": batch_size,
        "regions_per_image": regions_per_image,
        "max_new_tokens": max_new_tokens,
        "training": training,
        "dtype": plan.precision,
        "parameters": [sum(plan.parameters.values()), sum(p.numel() for p in model.parameters())],
        "flops": [sum(plan.flops.values()), counter.get_total_flops()],
        "memory": [plan.peak_memory, static_bytes + pixels.nbytes + allocated_bytes],
    }


def run_job(config: Mapping[str, Any], folder: str) -> dict[str, Any]:
    """Compare one model as a launcher job; `config` contains `model` and the options of `compare_plan`."""
    options = {key: value for key, value in config.items() if key != "model"}
    spec = ModelSpec.parse(config["model"])
    return run_measurement(lambda row: row.update(plan=compare_plan(spec, **options)), config["device"])


def main() -> None:
    """Compare plans with measurements on the command line."""
    parser = argparse.ArgumentParser(description="Compare the estimates of sca plan with measurements.")
    parser.add_argument(
        "models",
        nargs="*",
        default=FULL_SIZE_MODELS,
        help="Models: a name or encoder+mixer+language-model. Defaults to six full-size models.",
    )
    parser.add_argument("--device", default="cpu", help="Device: cpu or cuda.")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"), help="Data type.")
    parser.add_argument("--regions-per-image", type=int, default=16, help="Regions per image.")
    parser.add_argument("--max-new-tokens", type=int, default=8, help="Tokens per caption.")
    parser.add_argument("--train", action="store_true", help="Also measure a training step.")
    parser.add_argument("--time-budget", type=float, default=math.inf, help="Seconds after which no model starts.")
    parser.add_argument("--out", type=Path, help="JSON file for the rows.")
    args = parser.parse_args()
    rows, start = [], time.monotonic()
    print(
        "| model | workload | memory, estimated / measured | FLOPs, estimated / measured |\n| --- | --- | ---: | ---: |"
    )
    for model_name in args.models:
        for training in (False, True) if args.train else (False,):
            if time.monotonic() - start >= args.time_budget:
                break
            spec, dtype = resolve_spec(model_name), args.dtype
            row = compare_plan(spec, 1, args.regions_per_image, args.max_new_tokens, training, args.device, dtype)
            rows.append(row)
            workload = "training" if training else "captioning"
            ratios = [f"{row[quantity][0] / row[quantity][1]:.3f}" for quantity in ("memory", "flops")]
            print(f"| {row['model']} | {workload} | {' | '.join(ratios)} |", flush=True)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        content = {**collect_environment(args.device), "rows": rows}
        write_file(args.out, json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
