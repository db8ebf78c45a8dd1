"""How much faster than the published procedure: `sca bench published [PART...] [--out FILE]`

The published implementation of SCA (arXiv 2312.00869) is repeated here with the same weights: eight regions at a time
through transformers' own two-way blocks, each with a copy of its image's grid, attention written out, and `generate`
for each eight. Both are timed in turn in one run, and what they say is compared. Prints a Markdown table of ratios.

captions     regions/s from an encoded image, SAM ViT-B + query + GPT-2, greedy
training     a step with 16 regions; ours with the encoder's features kept
resampler    the mix stage of `resampler` beside that of `query`, and how it grows with regions
tiny         64 regions of sca-tiny at once beside one after the other
everything   the captions of an image, from the times of its parts: published for all 1,024 points, with the encoder run
             again for each 64; ours for 100 that are left of them
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from sca_registry.contracts import Prompt, Prompts
from sca_registry.messages import unknown
from torch import Tensor
from transformers.models.sam.modeling_sam import SamTwoWayTransformer

import sca
from sca.mask_predictor import REGIONS
from sca.model import SegmentCaptioner
from sca.nn.two_way import TwoWayTransformer
from sca_bench.timing import asked, lesson

EIGHT, WORDS, TRAINED, POINTS, LEFT = 8, 20, 16, 1024, 100
Row = tuple[str, str, float, float, str]  # what, unit, ours, published or other, a remark


@contextmanager
def published(model: SegmentCaptioner) -> Iterator[None]:
    """Within it the model computes as the published one does."""

    def forward(
        self: TwoWayTransformer,
        tokens: Tensor,
        grid: Tensor,
        position: Tensor,
        owner: Tensor | None = None,
        grids: bool = True,
    ) -> tuple[Tensor, Tensor]:
        grid = grid if owner is None else grid[owner]
        fused, keys = SamTwoWayTransformer.forward(self, tokens.unsqueeze(1), grid, position.unsqueeze(0), None)
        return fused.squeeze(1), keys.squeeze(1).transpose(1, 2).unflatten(2, grid.shape[-2:])

    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}.values()
    before = [config._attn_implementation for config in configs if hasattr(config, "_attn_implementation")]
    with ExitStack() as stack:
        stack.enter_context(patch.object(TwoWayTransformer, "forward", forward))
        stack.enter_context(patch("sca.language_models.causal.plain", lambda model: False))
        for config in configs:
            if hasattr(config, "_attn_implementation"):
                config._attn_implementation = "eager"
        try:
            yield
        finally:
            for config, kind in zip((c for c in configs if hasattr(c, "_attn_implementation")), before, strict=True):
                config._attn_implementation = kind


def timed(repeats: int, *ways: Callable[[], Any]) -> list[float]:
    """The least seconds of each way, which take turns; one round is for warming up."""
    seconds: list[list[float]] = [[] for _ in ways]
    for repeat in range(repeats + 1):
        for way, taken in zip(ways, seconds, strict=True):
            start = time.perf_counter()
            way()
            if repeat:
                taken.append(time.perf_counter() - start)
    return [min(taken) for taken in seconds]


def ids_of(model: SegmentCaptioner, features: Tensor, prompts: Prompts, regions: int, together: bool) -> Tensor:
    """Word ids (N, T), `regions` at a time through segmenter and mixer; `together`: all at once through the rest."""
    prefixes = []
    for chunk in prompts.chunks(regions):
        mixed = model.mix(model.segment(features, chunk))
        prefixes.append(model.prefix(mixed, torch.ones_like(chunk.owner)))
    parts = [torch.cat(prefixes)] if together else prefixes
    found = [model.language_model.generate(part, max_new_tokens=WORDS).ids[:, 0] for part in parts]
    return torch.cat(found)


def captions(model: SegmentCaptioner, regions: int, repeats: int) -> list[Row]:
    pixels, prompts = asked(model, 1, regions)
    said: dict[str, Tensor] = {}
    with torch.inference_mode():
        features = model.encode(pixels)

        def ours() -> None:
            said["ours"] = ids_of(model, features, prompts, REGIONS, together=True)

        def theirs() -> None:
            with published(model):
                said["published"] = ids_of(model, features, prompts, EIGHT, together=False)

        mine, other = timed(repeats, ours, theirs)
    same = f"{regions} regions; identical ids: {torch.equal(said['ours'], said['published'])}"
    return [("captions of an encoded image", "regions/s", regions / mine, regions / other, same)]


def training(model: SegmentCaptioner, repeats: int) -> list[Row]:
    pixels, prompts = asked(model, 1, TRAINED)
    batch = lesson(model, pixels, prompts, WORDS)
    model.train()
    with torch.no_grad():
        features = model.encode(pixels)
    cached = lesson(model, pixels, prompts, WORDS)
    cached.pixels, cached.features = None, features

    def ours() -> None:
        model(cached).loss.backward()

    def same() -> None:
        model(batch).loss.backward()

    def theirs() -> None:
        with published(model):
            model(batch).loss.backward()

    mine, encoding, other = timed(repeats, ours, same, theirs)
    model.zero_grad(set_to_none=True)
    model.eval()
    told = f"{TRAINED} regions, forward and backward"
    return [
        ("a step of training, features kept", "steps/s", 1 / mine, 1 / other, told),
        ("the same with and without features kept", "steps/s", 1 / mine, 1 / encoding, "ours both"),
    ]


def resampler(repeats: int) -> list[Row]:
    options = {"language_model": "tiny-gpt2", "weights": False}
    models = [sca.compose("sam-vit-b", mixer, **options).eval() for mixer in ("resampler", "query")]
    ways = []
    with torch.inference_mode():
        for model, counts in zip(models, ((64, 1), (64,)), strict=True):
            features = torch.randn(1, model.segmenter.channels, 64, 64)
            for count in counts:
                found = model.segment(features, asked(model, 1, count)[1])
                ways.append(lambda model=model, found=found: model.mix(found, model.prepare(found)))
        many, one, query = timed(repeats, *ways)
    return [
        ("mix stage, resampler beside query", "regions/s", 64 / many, 64 / query, "64 regions"),
        ("mix stage of resampler, 64 regions beside 1", "seconds", many, one, "linear would be 64"),
    ]


def tiny(repeats: int) -> list[Row]:
    from PIL import Image

    predictor = sca.Predictor(sca.load("sca-tiny"))
    predictor.set_image(Image.new("RGB", (512, 512), "grey"))
    boxes = [Prompt(box=(x * 60.0, y * 60.0, x * 60.0 + 70, y * 60.0 + 70)) for x in range(8) for y in range(8)]
    said: dict[str, list[str]] = {}

    def ours() -> None:
        said["ours"] = [each.text for each in predictor.predict(boxes)]

    def loop() -> None:
        said["loop"] = [predictor.predict([box])[0].text for box in boxes]

    mine, other = timed(repeats, ours, loop)
    same = f"64 regions; same captions: {said['ours'] == said['loop']}"
    return [("sca-tiny, all at once beside a loop", "regions/s", 64 / mine, 64 / other, same)]


def everything(model: SegmentCaptioner, repeats: int) -> list[Row]:
    pixels, boxes = asked(model, 1, 16)
    points = Prompts(boxes.owner, points=boxes.boxes[:, None, :2], labels=torch.ones(16, 1, dtype=torch.long))
    with torch.inference_mode():
        features = model.encode(pixels)

        def theirs() -> None:
            with published(model):
                ids_of(model, features, points, EIGHT, together=False)

        encode, segment, caption, other = timed(
            repeats,
            lambda: model.encode(pixels),
            lambda: model.segment(features, points),
            lambda: ids_of(model, features, points, REGIONS, together=True),
            theirs,
        )
    mine = encode + POINTS * segment / 16 + LEFT * caption / 16
    whole = POINTS / 64 * encode + POINTS * other / 16
    return [("everything in an image (estimated)", "images/s", 1 / mine, 1 / whole, f"{LEFT} of {POINTS} left")]


PARTS = ("captions", "training", "resampler", "tiny", "everything")


def compare(
    parts: Sequence[str], encoder: str, language_model: str, regions: int, repeats: int, out: Path | None
) -> None:
    """Measures some of `PARTS`, or all, and prints a Markdown table. ValueError for another part."""
    for part in parts:
        if part not in PARTS:
            raise unknown(f"no part {part!r}", part, PARTS)
    parts = parts or PARTS
    torch.manual_seed(0)
    model = None
    if {"captions", "training", "everything"} & set(parts):
        model = sca.compose(encoder, "query", language_model, weights=False).eval()
    makers: dict[str, Callable[[], list[Row]]] = {
        "captions": lambda: captions(model, regions, repeats),
        "training": lambda: training(model, repeats),
        "resampler": lambda: resampler(repeats),
        "tiny": lambda: tiny(repeats),
        "everything": lambda: everything(model, repeats),
    }
    print("| what | unit | ours | beside | ratio | |\n| --- | --- | ---: | ---: | ---: | --- |")
    rows = []
    for part in PARTS:
        if part in parts:
            for row in makers[part]():
                what, unit, mine, other, told = row
                print(f"| {what} | {unit} | {mine:.4g} | {other:.4g} | {mine / other:.2f} | {told} |", flush=True)
                rows.append({"what": what, "unit": unit, "ours": mine, "beside": other, "told": told})
    if out:
        from sca_bench.worker import environment

        options = {"encoder": encoder, "language_model": language_model, "regions": regions, "repeats": repeats}
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(
            f"{json.dumps({**options, 'rows': rows, 'environment': environment('cpu')}, indent=1)}\n", "utf-8"
        )
