"""What each kind of part is tried with: stand-ins for the parts upstream, and inputs that fit into a thimble."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property, partial
from typing import Any

import torch
from sca_registry import registry
from sca_registry.contracts import ImageFormat, PromptBatch, Region, SegmenterOutput
from sca_registry.options import read_options
from torch import Tensor, nn

from sca.testing.conformance.promises import DoesNotApply
from sca.testing.conformance.settings import settings

IMAGES, OWNERS = 3, (0, 0, 0, 2, 2)  # the second image has no region
SIZE, STRIDE, WIDTH, MASKS = 64, 8, 32, 3
GRID, SIDE = SIZE // STRIDE, 4 * SIZE // STRIDE
SAMPLES = 8  # how much of a dataset is read


class StandInEncoder:
    """As much of an encoder as a segmenter may rely on."""

    image = ImageFormat(size=SIZE)
    channels = WIDTH
    stride = STRIDE
    default_segmenter = "box"
    checkpoint = None

    def __call__(self, pixels: Tensor) -> Tensor:
        return pixels.new_zeros(len(pixels), WIDTH, GRID, GRID)


class StandInSegmenter:
    """As much of a segmenter as a mixer may rely on."""

    channels = WIDTH

    def __call__(self, features: Tensor, prompts: PromptBatch, multimask: bool = True) -> SegmenterOutput:
        return random_regions(prompts.image_index, len(features))


def random_regions(owner: Tensor, images: int) -> SegmenterOutput:
    """Regions with every field that a segmenter can give."""
    count, tokens = len(owner), torch.randn(len(owner), 3 + MASKS, WIDTH)
    corner = torch.rand(count, 2) * SIZE / 2
    return SegmenterOutput(
        image_index=owner,
        image_embeddings=torch.randn(images, WIDTH, GRID, GRID),
        image_size=SIZE,
        dense_embeddings=torch.randn(count, WIDTH, GRID, GRID),
        positional_encoding=torch.randn(WIDTH, GRID, GRID),
        prompt_tokens=tokens[:, MASKS:],
        tokens=tokens,
        mask_tokens=tokens[:, :MASKS],
        grid=torch.randn(count, WIDTH, GRID, GRID),
        masks=torch.randn(count, MASKS, SIDE, SIDE),
        iou_scores=torch.rand(count, MASKS),
        boxes=torch.cat((corner, corner + SIZE / 4), dim=1),
    )


class Trial:
    """A part on trial: how to build it, and what it is tried with.

    `inputs()` are the same at every call; `take(inputs, rows)` are those of some rows alone, and `outputs` are tensors
    by name, each with one row for each row of the inputs.
    """

    upstream: tuple[Any, ...] = ()

    def __init__(self, kind: str, part: str | Callable[..., Any], options: Mapping[str, Any]):
        self.kind = kind
        self.name = part if isinstance(part, str) else None
        self.factory = partial(registry(kind).build, part) if isinstance(part, str) else part
        self.options = dict(options)
        self.before = settings()  # where nothing of the part is imported yet, if this process has not used it

    def build(self, seed: int = 0) -> Any:
        torch.manual_seed(seed)
        part = self.factory(*self.upstream, **self.options)
        return part.eval() if isinstance(part, nn.Module) else part

    @cached_property
    def part(self) -> Any:
        return self.build()

    def module(self, seed: int = 0) -> nn.Module:
        """Built anew, for checks that change it."""
        part = self.build(seed)
        if not isinstance(part, nn.Module):
            raise DoesNotApply(f"a {type(part).__name__} is no torch module")
        return part

    def stated(self, fact: str) -> Any:
        """What the card or the class says of `gives` or `needs`."""
        return registry(self.kind).stated(self.name, fact) if self.name else getattr(self.factory, fact, None)

    def numbers(self) -> dict[str, int]:
        """The options that are whole numbers, as they are on trial."""
        taken = len(self.upstream)
        known = registry(self.kind).describe(self.name).options if self.name else read_options(self.factory, taken)
        whole = {**known, **self.options}
        return {name: value for name, value in whole.items() if isinstance(value, int) and not isinstance(value, bool)}

    def varied(self, options: Mapping[str, Any]) -> Trial:
        """The same part with other options."""
        return type(self)(self.kind, self.name or self.factory, {**self.options, **options})

    # what the checks that several kinds share are made of

    def inputs(self) -> Any:
        raise NotImplementedError

    def rows(self, inputs: Any) -> int:
        return len(inputs)

    def take(self, inputs: Any, rows: Sequence[int]) -> Any:
        return inputs[rows]

    def cast(self, inputs: Any, dtype: torch.dtype) -> Any:
        return inputs.to(dtype)

    def leaves(self, inputs: Any) -> list[Tensor]:
        """The floating tensors that come from the parts upstream."""
        return [inputs]

    def outputs(self, part: Any, inputs: Any) -> dict[str, Tensor]:
        raise NotImplementedError


class EncoderTrial(Trial):
    def inputs(self) -> Tensor:
        size = self.part.image.size
        return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))

    def outputs(self, part: Any, inputs: Tensor) -> dict[str, Tensor]:
        return {"features": part(inputs)}


@dataclass
class Pointing:
    """The inputs of a segmenter: the same regions asked for in every way that it takes."""

    features: Tensor
    prompts: dict[str, PromptBatch]


class SegmenterTrial(Trial):
    upstream = (StandInEncoder(),)
    FIELDS = ("prompt_tokens", "tokens", "mask_tokens", "grid", "masks", "scores", "boxes")

    def every(self) -> Pointing:
        """Ragged regions of a batch, by every kind of prompt."""
        draw = torch.Generator().manual_seed(1)
        owner, count = torch.tensor(OWNERS), len(OWNERS)
        corner = torch.rand(count, 2, generator=draw) * SIZE / 2
        boxes = torch.cat((corner, corner + 8 + torch.rand(count, 2, generator=draw) * SIZE / 4), dim=1)
        points = torch.rand(count, 2, 2, generator=draw) * SIZE
        inside, mixed = torch.ones(count, 1, dtype=torch.long), torch.tensor([[1, 0]]).expand(count, 2)
        masks = torch.randn(count, 1, SIDE, SIDE, generator=draw) * 5
        prompts = {
            "box": PromptBatch(owner, boxes=boxes),
            "point": PromptBatch(owner, points=points[:, :1], labels=inside),
            "two points": PromptBatch(owner, points=points, labels=mixed),
            "box and points": PromptBatch(owner, boxes=boxes, points=points, labels=mixed),
            "mask": PromptBatch(owner, masks=masks),
            "box and mask": PromptBatch(owner, boxes=boxes, masks=masks),
        }
        return Pointing(torch.randn(IMAGES, WIDTH, GRID, GRID, generator=draw), prompts)

    @cached_property
    def taken(self) -> tuple[str, ...]:
        """The kinds of prompt that the segmenter does not refuse with a ValueError; boxes always."""
        every, taken = self.every(), ["box"]
        for kind, prompts in every.prompts.items():
            if kind != "box":
                try:
                    self.part(every.features, prompts)
                    taken.append(kind)
                except ValueError:
                    continue
        return tuple(taken)

    def inputs(self) -> Pointing:
        every = self.every()
        return Pointing(every.features, {kind: every.prompts[kind] for kind in self.taken})

    def rows(self, inputs: Pointing) -> int:
        return len(OWNERS)

    def take(self, inputs: Pointing, rows: Sequence[int]) -> Pointing:
        owner = torch.tensor(OWNERS)[rows]
        images = owner.unique()
        taken = {kind: each[rows] for kind, each in inputs.prompts.items()}
        taken = {kind: replace(each, owner=torch.searchsorted(images, each.image_index)) for kind, each in taken.items()}
        return Pointing(inputs.features[images], taken)

    def cast(self, inputs: Pointing, dtype: torch.dtype) -> Pointing:
        return Pointing(inputs.features.to(dtype), inputs.prompts)  # coordinates stay exact

    def leaves(self, inputs: Pointing) -> list[Tensor]:
        return [inputs.features]

    def outputs(self, part: Any, inputs: Pointing) -> dict[str, Tensor]:
        found = {}
        asked = [(kind, kind, True) for kind in inputs.prompts]
        for name, kind, multimask in [*asked, ("box, one mask", "box", False)]:
            regions = part(inputs.features, inputs.prompts[kind], multimask)
            values = {field: getattr(regions, field) for field in self.FIELDS}
            values["image"] = regions.image[regions.owner]
            dense = regions.dense
            values["dense"] = dense if dense.dim() == 4 else dense.expand(len(regions), *dense.shape)
            found |= {f"{field} by {name}": value for field, value in values.items() if value is not None}
        return found


class MixerTrial(Trial):
    upstream = (StandInSegmenter(),)
    BY_REGION = tuple(each.name for each in fields(SegmenterOutput) if each.name not in ("owner", "image", "size", "position"))

    def inputs(self) -> SegmenterOutput:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            return random_regions(torch.tensor(OWNERS), IMAGES)

    def take(self, inputs: SegmenterOutput, rows: Sequence[int]) -> SegmenterOutput:
        images = inputs.image_index[rows].unique()
        taken = {name: getattr(inputs, name)[rows] for name in self.BY_REGION}
        owner = torch.searchsorted(images, inputs.image_index[rows])
        return replace(inputs, owner=owner, image=inputs.image_embeddings[images], **taken)

    def cast(self, inputs: SegmenterOutput, dtype: torch.dtype) -> SegmenterOutput:
        names = [each.name for each in fields(SegmenterOutput) if each.name not in ("owner", "size", "boxes")]
        return replace(inputs, **{name: getattr(inputs, name).to(dtype) for name in names})

    def leaves(self, inputs: SegmenterOutput) -> list[Tensor]:
        return [inputs.image_embeddings, inputs.tokens, inputs.grid, inputs.prompt_tokens, inputs.mask_tokens, inputs.masks]

    def outputs(self, part: Any, inputs: SegmenterOutput) -> dict[str, Tensor]:
        return {"queries": part(inputs)}

    def needs(self) -> set[str]:
        """What the part says it needs of masks, boxes and grid, with the options it has."""
        needs = set(self.stated("needs") or ())
        if self.name:
            card = registry(self.kind).card(self.name)
            given = {**card.options, **self.options}
            needs.update(thing for option, things in card.needs_with.items() if given.get(option) for thing in things)
        return needs


@dataclass
class Text:
    """The inputs of a language model: ids padded right, and what is seen of them."""

    ids: Tensor  # (N, L)
    mask: Tensor  # (N, L)
    prefix: Tensor  # (N, K, E)


class LanguageModelTrial(Trial):
    LENGTHS = (6, 3, 1)

    def inputs(self) -> Text:
        draw = torch.Generator().manual_seed(1)
        count, longest = len(self.LENGTHS), max(self.LENGTHS)
        tokenizer = self.part.tokenizer
        vocabulary = self.vocabulary
        ids = torch.randint(vocabulary, (count, longest), generator=draw)
        mask = (torch.arange(longest) < torch.tensor(self.LENGTHS)[:, None]).long()
        ids = ids.masked_fill(mask == 0, tokenizer.pad if tokenizer is not None else 0)
        scale = self.part.embed(torch.arange(min(vocabulary, 64))[None]).float().std().item()
        return Text(ids, mask, torch.randn(count, 3, self.part.width, generator=draw) * scale)

    @cached_property
    def vocabulary(self) -> int:
        return self.part.head(torch.zeros(1, self.part.width)).shape[-1]

    def rows(self, inputs: Text) -> int:
        return len(inputs.ids)

    def take(self, inputs: Text, rows: Sequence[int]) -> Text:
        longest = int(inputs.mask[rows].sum(1).max())
        return Text(inputs.ids[rows][:, :longest], inputs.mask[rows][:, :longest], inputs.prefix[rows])

    def cast(self, inputs: Text, dtype: torch.dtype) -> Text:
        return replace(inputs, prefix=inputs.prefix.to(dtype))

    def leaves(self, inputs: Text) -> list[Tensor]:
        return [inputs.prefix]

    def outputs(self, part: Any, inputs: Text) -> dict[str, Tensor]:
        words = part.embed(inputs.ids)
        seen = torch.cat((inputs.mask.new_ones(inputs.prefix.shape[:2]), inputs.mask), dim=1)
        states = part.hidden(torch.cat((inputs.prefix, words.to(inputs.prefix.dtype)), dim=1), seen)
        found = {"embeddings": words * inputs.mask[..., None], "states": states * seen[..., None]}
        found["logits"] = part.head(states) * seen[..., None]
        room = max(self.LENGTHS) - inputs.ids.shape[1]
        return {name: nn.functional.pad(value, (0, 0, 0, room)) for name, value in found.items()}


class DatasetTrial(Trial):
    def __init__(self, kind: str, part: str | Callable[..., Any], options: Mapping[str, Any]):
        super().__init__(kind, part, {name: value for name, value in options.items() if name != "split"})
        self.upstream = (options.get("split", "val"),)

    def samples(self) -> list[Any]:
        return [self.part[index] for index in range(min(SAMPLES, len(self.part)))]

    def regions(self) -> Iterator[tuple[Any, Region]]:
        return ((sample, region) for sample in self.samples() for region in sample.regions)


TRIALS = {
    "encoders": EncoderTrial,
    "segmenters": SegmenterTrial,
    "mixers": MixerTrial,
    "language_models": LanguageModelTrial,
    "datasets": DatasetTrial,
}
TENSORS = ("encoders", "segmenters", "mixers", "language_models")
