"""Where the time goes, beside what the machine could do: `python benchmarks/studies/roofline.py [--out FILE]`

Times the stages of captioning an image by the published procedure (see `sca bench published`) and by ours, and
prints them beside two floors: the operations of a stage at the speed of a large matrix product on this machine, and its
bytes (weights once a pass, features, and the grid of every region once in and once out) at the speed of a copy.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from sca_bench.against_published import EIGHT, published
from sca_bench.timing import STAGES, asked

import sca
from sca.inference.engine import REGION_BATCH_SIZE
from sca.io.atomic import write_file
from sca.model import SegmentCaptioner
from sca.plan import plan_model

WORDS = 20


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--encoder", default="sam-vit-b")
    parser.add_argument("--language-model", default="gpt2")
    parser.add_argument("--regions", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--out", type=Path, help="a JSON file")
    given = parser.parse_args(arguments)
    torch.manual_seed(0)
    model = sca.compose(given.encoder, "query", given.language_model, weights=False).eval()
    model.language_model._ends = lambda: (0, [])  # no caption ends early
    speed, copied = _speed(), _copied()
    with published(model):
        before = _stages(model, given.regions, EIGHT, given.repeats)
    after = _stages(model, given.regions, REGION_BATCH_SIZE, given.repeats)
    flops = plan_model(model.spec, 1, given.regions, WORDS).flops
    moved = _bytes(model, given.regions)
    print(f"a matrix product makes {speed / 1e9:.0f} GFLOP/s here, a copy {copied / 1e9:.1f} GB/s\n")
    print("| stage | published, s | ours, s | arithmetic, s | bytes, s | ours : higher floor |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    rows = []
    for stage in STAGES:
        floors = flops[stage] / speed, moved[stage] / copied
        rows.append({"stage": stage, "published": before[stage], "ours": after[stage], "floors": floors})
        told = f"{before[stage]:.3g} | {after[stage]:.3g} | {floors[0]:.3g} | {floors[1]:.3g}"
        print(f"| {stage} | {told} | {after[stage] / max(floors):.1f} |")
    if given.out:
        from sca_bench.worker import environment

        options = {name: value for name, value in vars(given).items() if name != "out"}
        found = {**options, "flops_per_second": speed, "bytes_per_second": copied, "rows": rows}
        given.out.parent.mkdir(parents=True, exist_ok=True)
        write_file(given.out, f"{json.dumps({**found, 'environment': environment('cpu')}, indent=1)}\n")


@torch.inference_mode()
def _stages(model: SegmentCaptioner, regions: int, together: int, repeats: int) -> dict[str, float]:
    """The least seconds of each stage, `together` regions at a time; the words likewise, and all at once for ours."""
    pixels, prompts = asked(model, 1, regions)
    generate, best = model.language_model.generate, dict.fromkeys(STAGES, float("inf"))
    for repeat in range(repeats + 1):
        taken = dict.fromkeys(STAGES, 0.0)

        def timed(stage: str, work: Callable[[], Any], taken: dict[str, float] = taken) -> Any:
            start = time.perf_counter()
            result = work()
            taken[stage] += time.perf_counter() - start
            return result

        features = timed("encode", lambda: model.encode(pixels))
        prefixes = []
        for chunk in prompts.chunks(together):
            found = timed("segment", lambda chunk=chunk, features=features: model.segment(features, chunk))
            mixed = timed("mix", lambda found=found: model.mix(found, model.prepare_mixer(found)))
            prefixes.append(model.build_prefix(mixed, torch.ones_like(chunk.image_index)))
        for part in prefixes:
            timed("prefill", lambda part=part: generate(part, max_new_tokens=1))
            timed("decode", lambda part=part: generate(part, max_new_tokens=WORDS))
        taken["decode"] -= taken["prefill"]
        if repeat:
            best = {stage: min(best[stage], taken[stage]) for stage in STAGES}
    return best


def _bytes(model: SegmentCaptioner, regions: int) -> dict[str, int]:
    """What each stage has to move at the least."""

    def weights(module: torch.nn.Module) -> int:
        return sum(parameter.nbytes for parameter in module.parameters())

    side = model.encoder.image_format.size // model.encoder.stride
    features = 4 * model.segmenter.channels * side * side
    words = weights(model.language_model)
    return {
        "encode": weights(model.encoder) + 4 * 3 * model.encoder.image_format.size**2 + features,
        "segment": weights(model.segmenter) + (1 + regions) * features,
        "mix": weights(model.mixer) + 2 * regions * features,
        "prefill": words,
        "decode": (WORDS - 1) * words,
    }


def _speed() -> float:
    """Operations a second of a large matrix product."""
    side = 2048
    one = torch.randn(side, side)
    return 2 * side**3 / min(_seconds(lambda: one @ one) for _ in range(5))


def _copied() -> float:
    """Bytes a second of a copy, each counted as it is read and as it is written."""
    one = torch.empty(2**26)
    other = torch.empty_like(one)
    return 2 * one.nbytes / min(_seconds(lambda: other.copy_(one)) for _ in range(5))


def _seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
