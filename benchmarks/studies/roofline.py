"""Compare stage times with hardware limits: `python benchmarks/studies/roofline.py [--out FILE]`

Times the stages of captioning an image with our reproduction of the original SCA implementation (see `sca bench
speedup`) and with ours. Prints them next to two lower bounds: the operations of a stage at the speed of a large matrix
product on this machine, and its bytes (weights once per pass, features, and the grid of every region read once and
written once) at the speed of a copy.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from sca_bench.published_procedure import PUBLISHED_REGIONS_PER_CALL, use_published_procedure
from sca_bench.timing import STAGES, make_random_inputs

import sca
from sca.inference.engine import REGION_BATCH_SIZE
from sca.io.atomic import write_file
from sca.model import SegmentCaptioner
from sca.plan import plan_model

MAX_NEW_TOKENS = 20


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--encoder", default="sam-vit-b", help="Encoder name.")
    parser.add_argument("--language-model", default="gpt2", help="Language model name.")
    parser.add_argument("--regions-per-image", type=int, default=32, help="Regions of the image.")
    parser.add_argument("--num-repeats", type=int, default=2, help="Repeats; the fastest counts.")
    parser.add_argument("--out", type=Path, help="JSON file for the measurements.")
    args = parser.parse_args(arguments)
    torch.manual_seed(0)
    model = sca.compose(args.encoder, "query", args.language_model, weights=False).eval()
    model.language_model._resolve_special_tokens = lambda: (0, [])  # captions never end early
    flops_per_second, bytes_per_second = _measure_flops_per_second(), _measure_copy_bandwidth()
    with use_published_procedure(model):
        published_seconds = _measure_stages(model, args.regions_per_image, PUBLISHED_REGIONS_PER_CALL, args.num_repeats)
    our_seconds = _measure_stages(model, args.regions_per_image, REGION_BATCH_SIZE, args.num_repeats)
    flops = plan_model(model.spec, 1, args.regions_per_image, MAX_NEW_TOKENS).flops
    num_bytes = _count_stage_bytes(model, args.regions_per_image)
    print(f"matrix product: {flops_per_second / 1e9:.0f} GFLOP/s; copy: {bytes_per_second / 1e9:.1f} GB/s\n")
    print("| stage | original (s) | ours (s) | compute bound (s) | memory bound (s) | overhead (x) |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    rows = []
    for stage in STAGES:
        lower_bounds = flops[stage] / flops_per_second, num_bytes[stage] / bytes_per_second
        rows.append(
            {
                "stage": stage,
                "published": published_seconds[stage],
                "ours": our_seconds[stage],
                "lower_bounds": lower_bounds,
            }
        )
        cells = (
            f"{published_seconds[stage]:.3g} | {our_seconds[stage]:.3g} | {lower_bounds[0]:.3g} | {lower_bounds[1]:.3g}"
        )
        print(f"| {stage} | {cells} | {our_seconds[stage] / max(lower_bounds):.1f} |")
    if args.out:
        from sca_bench.worker import collect_environment

        options = {name: value for name, value in vars(args).items() if name != "out"}
        measurements = {
            **options,
            "flops_per_second": flops_per_second,
            "bytes_per_second": bytes_per_second,
            "rows": rows,
        }
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_file(args.out, f"{json.dumps({**measurements, 'environment': collect_environment('cpu')}, indent=1)}\n")


@torch.inference_mode()
def _measure_stages(model: SegmentCaptioner, num_regions: int, regions_per_call: int, repeats: int) -> dict[str, float]:
    """Return the minimum seconds of each stage, `regions_per_call` at a time; generation uses the same chunks."""
    pixels, prompts = make_random_inputs(model, 1, num_regions)
    generate, min_seconds = model.language_model.generate, dict.fromkeys(STAGES, float("inf"))
    for repeat in range(repeats + 1):
        stage_seconds = dict.fromkeys(STAGES, 0.0)

        def time_stage(stage: str, function: Callable[[], Any], stage_seconds: dict[str, float] = stage_seconds) -> Any:
            start = time.perf_counter()
            result = function()
            stage_seconds[stage] += time.perf_counter() - start
            return result

        features = time_stage("encode", lambda: model.encode(pixels))
        prefixes = []
        for chunk in prompts.iter_chunks(regions_per_call):
            segmenter_output = time_stage(
                "segment", lambda chunk=chunk, features=features: model.segment(features, chunk)
            )
            queries = time_stage(
                "mix",
                lambda segmenter_output=segmenter_output: model.mix(
                    segmenter_output, model.prepare_mixer(segmenter_output)
                ),
            )
            prefixes.append(model.build_prefix(queries, torch.ones_like(chunk.image_index)))
        for prefix in prefixes:
            time_stage("prefill", lambda prefix=prefix: generate(prefix, max_new_tokens=1))
            time_stage("decode", lambda prefix=prefix: generate(prefix, max_new_tokens=MAX_NEW_TOKENS))
        stage_seconds["decode"] -= stage_seconds["prefill"]
        if repeat:
            min_seconds = {stage: min(min_seconds[stage], stage_seconds[stage]) for stage in STAGES}
    return min_seconds


def _count_stage_bytes(model: SegmentCaptioner, num_regions: int) -> dict[str, int]:
    """Return the minimum bytes that each stage moves."""

    def count_weight_bytes(module: torch.nn.Module) -> int:
        return sum(parameter.nbytes for parameter in module.parameters())

    side = model.encoder.image_format.size // model.encoder.stride
    feature_bytes = 4 * model.segmenter.channels * side * side
    language_model_bytes = count_weight_bytes(model.language_model)
    return {
        "encode": count_weight_bytes(model.encoder) + 4 * 3 * model.encoder.image_format.size**2 + feature_bytes,
        "segment": count_weight_bytes(model.segmenter) + (1 + num_regions) * feature_bytes,
        "mix": count_weight_bytes(model.mixer) + 2 * num_regions * feature_bytes,
        "prefill": language_model_bytes,
        "decode": (MAX_NEW_TOKENS - 1) * language_model_bytes,
    }


def _measure_flops_per_second() -> float:
    """Measure operations per second of a large matrix product."""
    side = 2048
    matrix = torch.randn(side, side)
    return 2 * side**3 / min(_time_call(lambda: matrix @ matrix) for _ in range(5))


def _measure_copy_bandwidth() -> float:
    """Measure bytes per second of a copy, counting reads and writes."""
    source = torch.empty(2**26)
    target = torch.empty_like(source)
    return 2 * source.nbytes / min(_time_call(lambda: target.copy_(source)) for _ in range(5))


def _time_call(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
