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

On a GPU the published procedure may take a minute where ours takes a second: `beside` limits the regions that it
captions, and its rate is theirs.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from sca_registry.contracts import Prompt, PromptBatch
from sca_registry.messages import unknown
from torch import Tensor
from transformers.models.sam.modeling_sam import SamTwoWayTransformer

import sca
from sca.inference.engine import REGION_BATCH_SIZE
from sca.model import SegmentCaptioner
from sca.nn.two_way import TwoWayTransformer
from sca_bench.timing import asked, lesson, synchronize
from sca_bench.worker import record

EIGHT, WORDS, TRAINED, POINTS, LEFT = 8, 20, 16, 1024, 100
Row = tuple[str, str, float, float, str]  # what, unit, ours, published or other, a remark


@dataclass(frozen=True)
class Setting:
    """What is measured, and on what.

    Args:
        encoder: A SAM by name.
        language_model: A language model by name.
        images: Images per batch of captions.
        regions: Regions per image.
        beside: Regions that the published procedure captions; 0 for all.
        repeats: Repeats of each way after a warm-up; the fastest counts.
        device: A torch device.
        dtype: Data type of the weights and activations.
        seconds: Time budget; a part is not started after it.
    """

    encoder: str | Mapping[str, Any] = "sam-vit-b"
    language_model: str | Mapping[str, Any] = "gpt2"
    images: int = 1
    regions: int = 32
    beside: int = 0
    repeats: int = 3
    device: str = "cpu"
    dtype: str = "float32"
    seconds: float = math.inf

    def place(self, model: SegmentCaptioner) -> SegmentCaptioner:
        """Move a model to the device and data type, in eval mode."""
        return model.to(device=self.device, dtype=getattr(torch, self.dtype)).eval()


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


def time_in_turn(setting: Setting, *ways: Callable[[], Any]) -> list[float]:
    """Return the least seconds of each way. The ways take turns; the first round is a warm-up and does not count."""
    seconds: list[list[float]] = [[] for _ in ways]
    for repeat in range(setting.repeats + 1):
        for way, taken in zip(ways, seconds, strict=True):
            synchronize(setting.device)
            start = time.perf_counter()
            way()
            synchronize(setting.device)
            if repeat:
                taken.append(time.perf_counter() - start)
    return [min(taken) for taken in seconds]


def ids_of(model: SegmentCaptioner, features: Tensor, prompts: PromptBatch, regions: int, together: bool) -> Tensor:
    """Word ids (N, T), `regions` at a time through segmenter and mixer; `together`: all at once through the rest."""
    prefixes = []
    for chunk in prompts.chunks(regions):
        mixed = model.mix(model.segment(features, chunk))
        prefixes.append(model.build_prefix(mixed, torch.ones_like(chunk.image_index)))
    if together:
        return model.generate_from_prefix(torch.cat(prefixes), max_new_tokens=WORDS).sequences[:, 0]
    return torch.cat([model.language_model.generate(prefix, max_new_tokens=WORDS).sequences[:, 0] for prefix in prefixes])


def captions(model: SegmentCaptioner, setting: Setting) -> list[Row]:
    images, regions = setting.images, setting.regions
    pixels, prompts = asked(model, images, regions)
    beside = prompts[: setting.beside or None]
    count, few = len(prompts), len(beside)
    seen = int(beside.image_index[-1]) + 1  # images of theirs
    said: dict[str, Tensor] = {}
    with torch.inference_mode():
        features = model.encode(pixels)

        def ours() -> None:
            said["ours"] = ids_of(model, features, prompts, REGION_BATCH_SIZE, together=True)

        def theirs() -> None:
            with published(model):
                said["published"] = ids_of(model, features[:seen], beside, EIGHT, together=False)

        mine, other, encoding = time_in_turn(setting, ours, theirs, lambda: model.encode(pixels))
    same = float((said["ours"][:few] == said["published"]).all(dim=1).float().mean())
    what = f"{images} x {regions} regions beside {few}; identical ids: {same:.1%}"
    theirs_whole = other + encoding * seen / images
    return [
        ("captions of encoded images", "regions/s", count / mine, few / other, what),
        ("captions, encoding included", "regions/s", count / (mine + encoding), few / theirs_whole, what),
    ]


def training(model: SegmentCaptioner, setting: Setting) -> list[Row]:
    pixels, prompts = asked(model, 1, TRAINED)
    batch = lesson(model, pixels, prompts, WORDS)
    model.train()
    with torch.no_grad():
        features = model.encode(pixels)
    cached = lesson(model, pixels, prompts, WORDS)
    cached.pixel_values, cached.features = None, features

    def ours() -> None:
        model(cached).loss.backward()

    def same() -> None:
        model(batch).loss.backward()

    def theirs() -> None:
        with published(model):
            model(batch).loss.backward()

    mine, encoding, other = time_in_turn(setting, ours, same, theirs)
    model.zero_grad(set_to_none=True)
    model.eval()
    told = f"{TRAINED} regions, forward and backward"
    return [
        ("a step of training, features kept", "steps/s", 1 / mine, 1 / other, told),
        ("the same with and without features kept", "steps/s", 1 / mine, 1 / encoding, "ours both"),
    ]


def resampler(setting: Setting) -> list[Row]:
    options = {"language_model": "tiny-gpt2", "weights": False}
    models = [setting.place(sca.compose(setting.encoder, mixer, **options)) for mixer in ("resampler", "query")]
    ways = []
    with torch.inference_mode():
        for model, counts in zip(models, ((64, 1), (64,)), strict=True):
            features = model.encode(asked(model, 1, 1)[0])
            for count in counts:
                found = model.segment(features, asked(model, 1, count)[1])
                ways.append(lambda model=model, found=found: model.mix(found, model.prepare_mixer(found)))
        many, one, query = time_in_turn(setting, *ways)
    return [
        ("mix stage, resampler beside query", "regions/s", 64 / many, 64 / query, "64 regions"),
        ("mix stage of resampler, 64 regions beside 1", "seconds", many, one, "linear would be 64"),
    ]


def tiny(setting: Setting) -> list[Row]:
    from PIL import Image

    predictor = sca.Predictor(setting.place(sca.load("sca-tiny")))
    predictor.set_image(Image.new("RGB", (512, 512), "grey"))
    boxes = [Prompt(box=(x * 60.0, y * 60.0, x * 60.0 + 70, y * 60.0 + 70)) for x in range(8) for y in range(8)]
    said: dict[str, list[str]] = {}

    def ours() -> None:
        said["ours"] = [each.text for each in predictor.predict(boxes)]

    def loop() -> None:
        said["loop"] = [predictor.predict([box])[0].text for box in boxes]

    mine, other = time_in_turn(setting, ours, loop)
    same = f"64 regions; same captions: {said['ours'] == said['loop']}"
    return [("sca-tiny, all at once beside a loop", "regions/s", 64 / mine, 64 / other, same)]


def everything(model: SegmentCaptioner, setting: Setting) -> list[Row]:
    pixels, boxes = asked(model, 1, 16)
    points = PromptBatch(boxes.image_index, points=boxes.boxes[:, None, :2], labels=boxes.image_index.new_ones(16, 1))
    with torch.inference_mode():
        features = model.encode(pixels)

        def theirs() -> None:
            with published(model):
                ids_of(model, features, points, EIGHT, together=False)

        encode, segment, caption, other = time_in_turn(
            setting,
            lambda: model.encode(pixels),
            lambda: model.segment(features, points),
            lambda: ids_of(model, features, points, REGION_BATCH_SIZE, together=True),
            theirs,
        )
    mine = encode + POINTS * segment / 16 + LEFT * caption / 16
    whole = POINTS / 64 * encode + POINTS * other / 16
    return [("everything in an image (estimated)", "images/s", 1 / mine, 1 / whole, f"{LEFT} of {POINTS} left")]


PARTS = ("captions", "training", "resampler", "tiny", "everything")


def choose_parts(names: Sequence[str]) -> list[str]:
    """Return the named parts in the order of `PARTS`, or all of them.

    Raises:
        RegistryError: A part that does not exist.
    """
    for name in names:
        if name not in PARTS:
            raise unknown(f"no part {name!r}", name, PARTS)
    return [part for part in PARTS if part in names or not names]


def compare(parts: Sequence[str], setting: Setting) -> Iterator[Row]:
    """Measure parts, one row at a time."""
    start = time.monotonic()
    torch.manual_seed(0)
    model = None
    if {"captions", "training", "everything"} & set(parts):
        options = {"device": setting.device, "weights": False}
        model = setting.place(sca.compose(setting.encoder, "query", setting.language_model, **options))
    measure: dict[str, Callable[[], list[Row]]] = {
        "captions": lambda: captions(model, setting),
        "training": lambda: training(model, setting),
        "resampler": lambda: resampler(setting),
        "tiny": lambda: tiny(setting),
        "everything": lambda: everything(model, setting),
    }
    for part in parts:
        if time.monotonic() - start < setting.seconds:
            yield from measure[part]()


def to_table(row: Row) -> dict[str, Any]:
    """Return a row as plain values."""
    return dict(zip(("what", "unit", "ours", "published", "note"), row, strict=True))


def print_table(rows: Iterable[Row]) -> list[Row]:
    """Print a Markdown table of ratios, each row when it is measured, and return the rows."""
    print("| quantity | unit | ours | published | ratio | |\n| --- | --- | ---: | ---: | ---: | --- |")
    measured = []
    for row in rows:
        what, unit, mine, other, told = row
        print(f"| {what} | {unit} | {mine:.4g} | {other:.4g} | {mine / other:.2f} | {told} |", flush=True)
        measured.append(row)
    return measured


def work(config: Mapping[str, Any], folder: str) -> dict[str, Any]:
    """Measure in a process of its own, as a job of a launcher: `parts` and the fields of `Setting`."""
    options = dict(config)
    parts = options.pop("parts", ())

    def measure(row: dict[str, Any]) -> None:
        row["ratios"] = [to_table(each) for each in print_table(compare(choose_parts(parts), Setting(**options)))]

    return record(measure, config["device"])
