"""The conformance kit: tries a part against the promises of its contract, on tensors that fit into a thimble.

    for finding in check("mixer", "query", depth=1):
        print(finding)

A promise is one function under `@promise(...)`: its name is the check's, the first paragraph of its docstring says what
is expected, and it returns None if the promise is kept, else what was found instead. The parts upstream are stand-ins
that have what the contract lists and nothing more, so a part that reaches for more is found out.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property, partial
from itertools import islice
from typing import Any, get_args

import torch
from PIL import Image
from sca_registry import registry
from sca_registry.contracts import KINDS, Generated, ImageFormat, Prompts, Region, Regions, Targets
from torch import Tensor, nn
from transformers import PreTrainedModel

from sca.masks import box_of, decode

IMAGES, OWNERS = 3, (0, 0, 0, 2, 2)  # the second image has no region
SIZE, STRIDE, WIDTH, MASKS = 64, 8, 32, 3
GRID, SIDE = SIZE // STRIDE, 4 * SIZE // STRIDE
CLOSE = 1e-3  # differences up to this share of the largest value may come from the order of additions
NEW_TOKENS = 4
SAMPLES = 8  # how much of a dataset is read
TEXTS = ("a small striped red circle left of a blue square", "car", "two words")


@dataclass(frozen=True)
class Finding:
    """How one promise was kept: `written` says where it is made."""

    check: str
    passed: bool
    expected: str
    found: str
    written: str

    def __str__(self) -> str:
        if self.passed:
            return f"ok      {self.check}: {self.found}"
        return f"FAILED  {self.check}: expected: {self.expected} Found: {self.found}. See {self.written}"


@dataclass(frozen=True)
class Promise:
    name: str
    kinds: tuple[str, ...]
    expected: str
    written: str | None  # None: the protocol of the kind
    keeps: Callable[[Any], str | None]


PROMISES: list[Promise] = []


class DoesNotApply(Exception):
    """Raised by a check that has nothing to try on this part; the message says why."""


def check(kind: str, part: str | Callable[..., Any], /, **options: Any) -> list[Finding]:
    """One finding for each promise of the kind ("mixer" or "mixers"), in the order they are written below.

    part: a registered name, or a factory. options: of the factory; the dataset's `split` too (default "val"). A part
    that cannot be built has one finding. Nothing that the part does wrong is raised, except KeyboardInterrupt. Random
    state is put back as it was.

    Raises RegistryError if there is no such kind.
    """
    described = registry(kind).kind
    trial = TRIALS.get(described.plural, Trial)(described.plural, part, options)
    with torch.random.fork_rng(devices=[]):
        findings = []
        for kept in (each for each in PROMISES if described.plural in each.kinds):
            findings.append(_try(kept, trial))
            if kept.keeps is builds and not findings[-1].passed:
                break
    return findings


def promise(*kinds: str, written: str | None = None) -> Callable[[Callable[[Any], str | None]], Any]:
    """Adds the function below it to what parts of these kinds (plural) are tried for."""

    def add(keeps: Callable[[Any], str | None]) -> Callable[[Any], str | None]:
        expected = " ".join(inspect.getdoc(keeps).partition("\n\n")[0].split())
        PROMISES.append(Promise(keeps.__name__.replace("_", "-"), kinds, expected, written, keeps))
        return keeps

    return add


def _try(kept: Promise, trial: Trial) -> Finding:
    written = kept.written or f"sca_registry.contracts.{KINDS[trial.kind].protocol.__name__}"
    torch.manual_seed(0)
    try:
        problem = kept.keeps(trial)
    except DoesNotApply as reason:
        return Finding(kept.name, True, kept.expected, f"does not apply: {reason}", written)
    except Exception as error:
        problem = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return Finding(kept.name, problem is None, kept.expected, problem or "as expected", written)


# --- what each kind is tried with -----------------------------------------------------------------------------------


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

    def __call__(self, features: Tensor, prompts: Prompts, multimask: bool = True) -> Regions:
        return random_regions(prompts.owner, len(features))


def random_regions(owner: Tensor, images: int) -> Regions:
    """Regions with every field that a segmenter can give."""
    count, tokens = len(owner), torch.randn(len(owner), 3 + MASKS, WIDTH)
    corner = torch.rand(count, 2) * SIZE / 2
    return Regions(
        owner=owner,
        image=torch.randn(images, WIDTH, GRID, GRID),
        size=SIZE,
        dense=torch.randn(count, WIDTH, GRID, GRID),
        position=torch.randn(WIDTH, GRID, GRID),
        prompt_tokens=tokens[:, MASKS:],
        tokens=tokens,
        mask_tokens=tokens[:, :MASKS],
        grid=torch.randn(count, WIDTH, GRID, GRID),
        masks=torch.randn(count, MASKS, SIDE, SIDE),
        scores=torch.rand(count, MASKS),
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
    prompts: dict[str, Prompts]


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
            "box": Prompts(owner, boxes=boxes),
            "point": Prompts(owner, points=points[:, :1], labels=inside),
            "two points": Prompts(owner, points=points, labels=mixed),
            "box and points": Prompts(owner, boxes=boxes, points=points, labels=mixed),
            "mask": Prompts(owner, masks=masks),
            "box and mask": Prompts(owner, boxes=boxes, masks=masks),
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
        taken = {kind: replace(each, owner=torch.searchsorted(images, each.owner)) for kind, each in taken.items()}
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
    BY_REGION = tuple(each.name for each in fields(Regions) if each.name not in ("owner", "image", "size", "position"))

    def inputs(self) -> Regions:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            return random_regions(torch.tensor(OWNERS), IMAGES)

    def take(self, inputs: Regions, rows: Sequence[int]) -> Regions:
        images = inputs.owner[rows].unique()
        taken = {name: getattr(inputs, name)[rows] for name in self.BY_REGION}
        owner = torch.searchsorted(images, inputs.owner[rows])
        return replace(inputs, owner=owner, image=inputs.image[images], **taken)

    def cast(self, inputs: Regions, dtype: torch.dtype) -> Regions:
        names = [each.name for each in fields(Regions) if each.name not in ("owner", "size", "boxes")]
        return replace(inputs, **{name: getattr(inputs, name).to(dtype) for name in names})

    def leaves(self, inputs: Regions) -> list[Tensor]:
        return [inputs.image, inputs.tokens, inputs.grid, inputs.prompt_tokens, inputs.mask_tokens, inputs.masks]

    def outputs(self, part: Any, inputs: Regions) -> dict[str, Tensor]:
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


# --- promises of every kind -----------------------------------------------------------------------------------------


@promise(*KINDS)
def builds(trial: Trial) -> str | None:
    """The factory gives a part when it is called with the part upstream and its options."""
    return None if trial.part is not None else "None"


@promise(*KINDS)
def attributes(trial: Trial) -> str | None:
    """The part has what its protocol lists, of the types given there."""
    protocol = KINDS[trial.kind].protocol
    own = [name for name, value in vars(protocol).items() if getattr(value, "__module__", "") == protocol.__module__]
    methods = [name for name in own if inspect.isfunction(getattr(protocol, name))]
    missing = [name for name in (*protocol.__annotations__, *methods) if not hasattr(trial.part, name)]
    if missing:
        return f"a {type(trial.part).__name__} without {', '.join(missing)}"
    for name, written in protocol.__annotations__.items():
        value = getattr(trial.part, name)
        whole = isinstance(value, int) and not isinstance(value, bool) and value > 0
        if (written == "int" and not whole) or (written == "bool" and not isinstance(value, bool)):
            return f"{name} = {value!r}, and the protocol asks for {written}" + (" above 0" * (written == "int"))
    return None


# --- promises of whatever computes ----------------------------------------------------------------------------------


@promise(*TENSORS)
@torch.no_grad()
def eval_is_deterministic(trial: Trial) -> str | None:
    """In eval mode the same inputs give the same outputs to the last bit, whatever the random state."""
    once = trial.outputs(trial.part, trial.inputs())
    torch.manual_seed(99)
    return _different(once, trial.outputs(trial.part, trial.inputs()), share=0.0)


@promise(*TENSORS)
@torch.no_grad()
def eval_changes_nothing(trial: Trial) -> str | None:
    """A pass in eval mode leaves the part's tensors, and the tensors it was given, as they were."""
    inputs, part = trial.inputs(), trial.part
    before = _copies(part.state_dict()) if isinstance(part, nn.Module) else {}
    given = [leaf.clone() for leaf in trial.leaves(inputs)]
    trial.outputs(part, inputs)
    changed = [name for name, value in before.items() if not torch.equal(value, part.state_dict()[name])]
    if changed:
        return f"changed: {_some(changed)}"
    same = all(torch.equal(old, new) for old, new in zip(given, trial.leaves(inputs), strict=True))
    return None if same else "the tensors that were given are changed in place"


@promise(*TENSORS)
@torch.no_grad()
def alone_as_together(trial: Trial) -> str | None:
    """An image, a region or a text gives alone what it gives in a batch with others, which may be fewer or longer."""
    inputs = trial.inputs()
    together = trial.outputs(trial.part, inputs)
    for row in range(trial.rows(inputs)):
        alone = trial.outputs(trial.part, trial.take(inputs, [row]))
        difference = _different({name: value[row : row + 1] for name, value in together.items()}, alone)
        if difference:
            return f"row {row} alone: {difference}"
    return None


@promise(*TENSORS)
@torch.no_grad()
def order_is_free(trial: Trial) -> str | None:
    """Rows in another order (regions: within their image) give the same outputs in that order."""
    inputs = trial.inputs()
    order = [2, 0, 1, 4, 3][: trial.rows(inputs)] if trial.rows(inputs) != 2 else [1, 0]
    together = trial.outputs(trial.part, inputs)
    expected = {name: value[order] for name, value in together.items()}
    return _different(expected, trial.outputs(trial.part, trial.take(inputs, order)))


@promise(*TENSORS)
@torch.no_grad()
def dtype_is_kept(trial: Trial) -> str | None:
    """Moved to bfloat16 or float64, the part gives finite outputs of that type; float64 agrees with float32."""
    single = trial.outputs(trial.module(), trial.inputs())
    for dtype in (torch.bfloat16, torch.float64):
        outputs = trial.outputs(trial.module().to(dtype), trial.cast(trial.inputs(), dtype))
        for name, value in outputs.items():
            if not name.startswith("boxes") and value.dtype != dtype:  # boxes are coordinates: they stay exact
                return f"{name} is {value.dtype} in a part of {dtype}"
            if not value.isfinite().all():
                return f"{name} is not finite in {dtype}"
    inexact = {name: value for name, value in outputs.items() if not name.startswith("boxes")}
    return _different({name: single[name].double() for name in inexact}, inexact, share=1e-2)


@promise(*TENSORS)
def gradients_reach_what_trains(trial: Trial) -> str | None:
    """Every parameter that requires a gradient gets one from some kind of input, finite and not zero everywhere."""
    part = trial.module().train()
    trained = {name: parameter for name, parameter in part.named_parameters() if parameter.requires_grad}
    if not trained:
        raise DoesNotApply("nothing trains")
    _weighted_sum(trial.outputs(part, trial.inputs())).backward()
    without = [name for name, parameter in trained.items() if parameter.grad is None]
    if without:
        return f"no gradient reaches {_some(without)}"
    broken = [name for name, parameter in trained.items() if not parameter.grad.isfinite().all()]
    if broken:
        return f"gradients that are not finite: {_some(broken)}"
    return None if any(parameter.grad.any() for parameter in trained.values()) else "all gradients are zero"


@promise("segmenters", "mixers", "language_models")
def gradients_pass_upstream(trial: Trial) -> str | None:
    """Gradients go back through the part to what it was given, so that the parts upstream can train."""
    inputs = trial.inputs()
    leaves = [leaf.requires_grad_() for leaf in trial.leaves(inputs)]
    _weighted_sum(trial.outputs(trial.part, inputs)).backward()
    return None if any(leaf.grad is not None and leaf.grad.any() for leaf in leaves) else "no gradient comes back"


@promise(*TENSORS)
@torch.no_grad()
def reloads_equal(trial: Trial) -> str | None:
    """Built anew with other random numbers and given the `state_dict`, the part gives equal outputs to the last bit."""
    first, second = trial.module(seed=0), trial.module(seed=1)
    second.load_state_dict(_copies(first.state_dict()), strict=True)
    return _different(trial.outputs(first, trial.inputs()), trial.outputs(second, trial.inputs()), share=0.0)


@promise(*TENSORS, written="sca.composition.compose")
def builds_on_meta(trial: Trial) -> str | None:
    """Under `torch.device("meta")` the same tensors are made and nothing is allocated."""
    real = {name: value.shape for name, value in trial.module().state_dict().items()}
    with torch.device("meta"):
        drawn = trial.module().state_dict()
    allocated = [name for name, value in drawn.items() if not value.is_meta]
    if allocated:
        return f"allocated: {_some(allocated)}"
    shapes = {name: value.shape for name, value in drawn.items()}
    return None if shapes == real else f"other tensors than usual: {_some(sorted(set(shapes) ^ set(real)))}"


# --- encoders -------------------------------------------------------------------------------------------------------


@promise("encoders", written="sca_registry.contracts.ImageFormat")
def image_format(trial: Trial) -> str | None:
    """`image` is an ImageFormat whose size is a multiple of the stride, with three means and positive deviations."""
    image = trial.part.image
    if not isinstance(image, ImageFormat):
        return f"image is a {type(image).__name__}"
    if image.size <= 0 or image.size % trial.part.stride:
        return f"size {image.size}, stride {trial.part.stride}"
    if len(image.mean) != 3 or len(image.std) != 3 or min(image.std) <= 0:
        return f"mean {image.mean}, std {image.std}"
    for name in ("order", "resample", "fit"):
        words = get_args(inspect.get_annotations(ImageFormat, eval_str=True)[name])
        if getattr(image, name) not in words:
            return f"{name} = {getattr(image, name)!r}; there are {', '.join(words)}"
    return None


@promise("encoders")
@torch.no_grad()
def output_shape(trial: EncoderTrial) -> str | None:
    """(B, 3, S, S) pixels give (B, channels, S/stride, S/stride) features."""
    pixels = trial.inputs()
    side = pixels.shape[-1] // trial.part.stride
    return _misshapen("features", trial.part(pixels), (len(pixels), trial.part.channels, side, side))


@promise("encoders")
@torch.no_grad()
def features_follow_the_image(trial: EncoderTrial) -> str | None:
    """Different images have different features."""
    first, second = trial.part(trial.inputs())
    return "two images with the same features" if torch.allclose(first, second) else None


# --- segmenters -----------------------------------------------------------------------------------------------------


@promise("segmenters", written="sca_registry.contracts.Regions")
@torch.no_grad()
def regions(trial: SegmenterTrial) -> str | None:
    """Every field of the Regions has the shape that its comment says, by every kind of prompt that is taken."""
    inputs, width, count = trial.inputs(), trial.part.channels, len(OWNERS)
    for kind, prompts in inputs.prompts.items():
        found = trial.part(inputs.features, prompts)
        if not torch.equal(found.owner, prompts.owner) or found.size != SIZE:
            return f"by {kind}: owner {found.owner.tolist()}, size {found.size}; asked with {prompts.owner.tolist()}"
        tokens, raw = found.tokens.shape[1], found.prompt_tokens.shape[1]
        candidates = found.masks.shape[1] if found.masks is not None else None
        dense = (width, 1, 1) if found.dense.dim() == 3 else (count, width, GRID, GRID)
        shapes = {
            "image": (IMAGES, width, GRID, GRID),
            "dense": dense,
            "position": (width, GRID, GRID),
            "prompt_tokens": (count, raw, width),
            "tokens": (count, tokens, width),
            "mask_tokens": (count, candidates, width),
            "grid": (count, width, GRID, GRID),
            "masks": (count, candidates, SIDE, SIDE),
            "scores": (count, candidates),
            "boxes": (count, 4),
        }
        optional = ("mask_tokens", "grid", "masks", "scores", "boxes")
        for name, shape in shapes.items():
            value = getattr(found, name)
            problem = None if value is None and name in optional else _misshapen(f"{name} by {kind}", value, shape)
            if problem:
                return problem
        if (found.masks is None) != (found.scores is None):
            return f"by {kind}: masks and scores do not come together"
    return None


@promise("segmenters", written="sca_registry.contracts.Regions")
@torch.no_grad()
def given_boxes_are_kept(trial: SegmenterTrial) -> str | None:
    """`boxes` are the boxes that were given; without any, the tight boxes of the best masks, or None."""
    inputs = trial.inputs()
    for kind, prompts in inputs.prompts.items():
        found = trial.part(inputs.features, prompts)
        if prompts.boxes is not None and (found.boxes is None or not torch.equal(found.boxes, prompts.boxes)):
            return f"by {kind}: other boxes than were given"
        if prompts.boxes is None and found.boxes is not None and found.masks is not None:
            best = found.masks[torch.arange(len(prompts)), found.scores.argmax(1)] > 0
            tight = [box_of(mask.numpy()) or (0, 0, 0, 0) for mask in best]
            if not torch.allclose(found.boxes, torch.tensor(tight, dtype=torch.float32) * SIZE / SIDE):
                return f"by {kind}: boxes that are not tight around the best masks"
    return None


@promise("segmenters", written="sca_registry.cards.Card.gives")
@torch.no_grad()
def gives_what_it_says(trial: SegmenterTrial) -> str | None:
    """What the card or class says it `gives` is there for a box."""
    said = trial.stated("gives")
    if said is None:
        raise DoesNotApply("it does not say what it gives")
    inputs = trial.inputs()
    found = trial.part(inputs.features, inputs.prompts["box"])
    lacking = [name for name in said if getattr(found, name) is None]
    return f"no {' and no '.join(lacking)}" if lacking else None


@promise("segmenters")
@torch.no_grad()
def one_mask_when_asked(trial: SegmenterTrial) -> str | None:
    """`multimask=False` gives one mask a region."""
    inputs = trial.inputs()
    found = trial.part(inputs.features, inputs.prompts["box"], multimask=False)
    if found.masks is None:
        raise DoesNotApply("it gives no masks")
    return _misshapen("masks", found.masks, (len(OWNERS), 1, SIDE, SIDE))


@promise("segmenters")
@torch.no_grad()
def prompts_are_heard(trial: SegmenterTrial) -> str | None:
    """Two regions of one image differ, in their tokens or in the image as they see it."""
    inputs = trial.inputs()
    for kind, prompts in inputs.prompts.items():
        found = trial.part(inputs.features, prompts)
        if torch.allclose(found.tokens[0], found.tokens[1]) and torch.allclose(_private(found, 0), _private(found, 1)):
            return f"by {kind}: two regions of one image with the same tokens and grid"
    return None


@promise("segmenters")
def loss_is_scalars_that_train(trial: SegmenterTrial) -> str | None:
    """`loss(regions, targets)`, where there is one, gives finite scalars by name, and a gradient to the part."""
    part = trial.module()
    losses = _losses(part, trial, _targets())
    for name, value in losses.items():
        if not isinstance(value, Tensor) or value.dim() or not value.isfinite():
            return f"{name} = {value!r}"
    sum(losses.values()).backward()
    reached = any(p.grad is not None and p.grad.any() for p in part.parameters() if p.requires_grad)
    return None if reached else "no gradient"


@promise("segmenters", written="sca_registry.contracts.Targets")
@torch.no_grad()
def loss_counts_only_truth(trial: SegmenterTrial) -> str | None:
    """Cells that show padding, and regions without a true mask, do not count in the loss."""
    part, targets = trial.module(), _targets()
    plain = _losses(part, trial, _targets())
    padded, unknown = _targets(), _targets()
    padded.masks[~targets.valid] = 1.0
    unknown.masks[~targets.has_mask] = 1.0
    for what, changed in (("padding", padded), ("regions without a mask", unknown)):
        if _different(plain, _losses(part, trial, changed)):
            return f"the loss depends on {what}"
    return None


# --- mixers ---------------------------------------------------------------------------------------------------------


@promise("mixers")
@torch.no_grad()
def queries_shape(trial: MixerTrial) -> str | None:
    """Regions give queries (N, queries, width)."""
    return _misshapen("queries", trial.part(trial.inputs()), (len(OWNERS), trial.part.queries, trial.part.width))


@promise("mixers")
@torch.no_grad()
def regions_are_told_apart(trial: MixerTrial) -> str | None:
    """Two regions of one image have different queries."""
    first, second = trial.part(trial.inputs())[:2]
    return "two regions of one image with the same queries" if torch.allclose(first, second) else None


@promise("mixers", written="sca_registry.cards.Card.needs")
@torch.no_grad()
def needs_no_more_than_it_says(trial: MixerTrial) -> str | None:
    """Of masks, boxes and grid the part does without those that its card or class does not list in `needs`."""
    needs, inputs = trial.needs(), trial.inputs()
    things = {"masks": ("masks", "scores", "mask_tokens"), "boxes": ("boxes",), "grid": ("grid",)}
    for thing, names in things.items():
        if thing not in needs:
            try:
                trial.part(replace(inputs, **dict.fromkeys(names)))
            except Exception as error:
                return f"without {thing}: {type(error).__name__}: {error}"
    return None


@promise("mixers")
@torch.no_grad()
def uses_grid_is_true(trial: MixerTrial) -> str | None:
    """A mixer that says `uses_grid = False` gives the same queries when there is no grid."""
    if trial.part.uses_grid:
        raise DoesNotApply("it uses the grid")
    inputs = trial.inputs()
    return _different({"queries": trial.part(inputs)}, {"queries": trial.part(replace(inputs, grid=None))}, share=0.0)


# --- language models ------------------------------------------------------------------------------------------------


@promise("language_models")
@torch.no_grad()
def states_and_logits_shape(trial: LanguageModelTrial) -> str | None:
    """`embed` gives (N, L, E), `hidden` the shape of what it is given, and `head` (..., V) for any leading shape."""
    part, text = trial.part, trial.inputs()
    count, length = text.ids.shape
    embedded = part.embed(text.ids)
    problem = _misshapen("embed(ids)", embedded, (count, length, part.width))
    states = part.hidden(embedded, text.mask)
    problem = problem or _misshapen("hidden(embeddings, mask)", states, (count, length, part.width))
    problem = problem or _misshapen("head(states)", part.head(states), (count, length, trial.vocabulary))
    problem = problem or _misshapen("head(states[0, 0])", part.head(states[0, 0]), (trial.vocabulary,))
    return problem or _misshapen("embed of no ids", part.embed(text.ids[:, :0]), (count, 0, part.width))


@promise("language_models")
@torch.no_grad()
def later_words_are_unseen(trial: LanguageModelTrial) -> str | None:
    """A state depends on what stands before it and on nothing after."""
    part, text = trial.part, trial.take(trial.inputs(), [0])
    states = part.hidden(part.embed(text.ids), text.mask)
    changed = text.ids.clone()
    changed[:, -1] = (changed[:, -1] + 1) % trial.vocabulary
    again = part.hidden(part.embed(changed), text.mask)
    if torch.equal(states[:, -1], again[:, -1]):
        return "the last state does not depend on its own word"
    return _different({"states before a changed word": states[:, :-1]}, {"states before a changed word": again[:, :-1]})


@promise("language_models")
@torch.no_grad()
def agrees_with_transformers(trial: LanguageModelTrial) -> str | None:
    """`head(hidden(embed(ids)))` are the logits of the transformers model inside."""
    models = [each for each in trial.module().children() if isinstance(each, PreTrainedModel)]
    if not models:
        raise DoesNotApply("there is no transformers model directly inside")
    part, text = trial.part, trial.take(trial.inputs(), [0])
    model = next(each for each in part.children() if isinstance(each, PreTrainedModel))
    expected = model(input_ids=text.ids, attention_mask=text.mask).logits
    return _different({"logits": expected}, {"logits": part.head(part.hidden(part.embed(text.ids), text.mask))})


@promise("language_models")
@torch.no_grad()
def generates_new_words_only(trial: LanguageModelTrial) -> str | None:
    """`generate` gives ids (N, R, T) without the prefix, T at most `max_new_tokens`, and scores (N, R) up to 0."""
    text = trial.inputs()
    for most in (1, NEW_TOKENS):
        found = trial.part.generate(text.prefix, max_new_tokens=most)
        if not isinstance(found, Generated):
            return f"a {type(found).__name__} and not a Generated"
        count, captions, length = found.ids.shape if found.ids.dim() == 3 else (0, 0, 0)
        if count != len(text.prefix) or not captions or not 1 <= length <= most:
            return f"ids {tuple(found.ids.shape)} for {len(text.prefix)} prefixes and {most} new tokens"
        if found.scores.shape != (count, captions) or not (found.scores <= 0).all():
            return f"scores {found.scores.tolist()}"
        if not ((found.ids >= 0) & (found.ids < trial.vocabulary)).all():
            return f"ids outside 0..{trial.vocabulary - 1}"
    return None


@promise("language_models")
@torch.no_grad()
def generates_the_likeliest_word(trial: LanguageModelTrial) -> str | None:
    """By default each word is the likeliest after the prefix and the words before; the score is their mean log-share.

    The end counts as a word, and what stands after it does not.
    """
    part, text = trial.part, trial.inputs()
    end = part.tokenizer.eos if part.tokenizer is not None else None
    found = part.generate(text.prefix, max_new_tokens=NEW_TOKENS)
    for row, prefix in enumerate(text.prefix):
        seen, words, logs = prefix[None], [], []
        while len(words) < NEW_TOKENS and (not words or words[-1] != end):
            logits = part.head(part.hidden(seen, torch.ones(seen.shape[:2], dtype=torch.long)))[0, -1]
            words.append(int(logits.argmax()))
            logs.append(float(logits.float().log_softmax(0)[words[-1]]))
            seen = torch.cat((seen, part.embed(torch.tensor([words[-1:]]))), dim=1)
        given, score = found.ids[row, 0].tolist()[: len(words)], float(found.scores[row, 0])
        if given != words:
            return f"ids {given} where {words} are the likeliest"
        if not math.isclose(score, sum(logs) / len(logs), rel_tol=1e-3, abs_tol=1e-3):
            return f"a score of {score:.4f} where the mean log-probability is {sum(logs) / len(logs):.4f}"
    return None


@promise("language_models")
def adapts_gently(trial: LanguageModelTrial) -> str | None:
    """`adapt` adds parameters named lora_ that train, changes no output at first, and freezes nothing."""
    part = trial.module()
    inputs = trial.inputs()
    with torch.no_grad():
        before = trial.outputs(part, inputs)
    trained = {id(parameter): name for name, parameter in part.named_parameters() if parameter.requires_grad}
    old = {id(parameter) for parameter in part.parameters()}
    try:
        part.adapt(rank=2, alpha=4, dropout=0.0, targets=None)
    except ValueError as error:
        raise DoesNotApply(f"it says: {error}") from error
    added = [(name, parameter) for name, parameter in part.named_parameters() if id(parameter) not in old]
    if not added or not all("lora_" in name and parameter.requires_grad for name, parameter in added):
        return f"added: {_some([name for name, _ in added])}"
    frozen = [trained[id(p)] for p in part.parameters() if id(p) in trained and not p.requires_grad]
    if frozen:
        return f"no longer trains: {_some(frozen)}"
    with torch.no_grad():
        return _different(before, trial.outputs(part.eval(), inputs))


@promise("language_models", written="sca_registry.contracts.Tokenizer")
def words_end_and_do_not_begin(trial: LanguageModelTrial) -> str | None:
    """`encode` ends with `eos`, once, and adds no beginning; with a limit the end is kept and counted."""
    tokenizer = _tokenizer(trial)
    if tokenizer.encode("") != [tokenizer.eos]:
        return f"no text is {tokenizer.encode('')}, and the end is {tokenizer.eos}"
    for text in TEXTS:
        ids = tokenizer.encode(text)
        if ids[-1] != tokenizer.eos or ids.count(tokenizer.eos) != 1:
            return f"{text!r} is {ids}, and the end is {tokenizer.eos}"
        if not all(isinstance(word, int) and 0 <= word < trial.vocabulary for word in ids):
            return f"{text!r} is {ids}, in a vocabulary of {trial.vocabulary}"
        short = tokenizer.encode(text, 2)
        if len(short) > 2 or short[-1] != tokenizer.eos or short[:-1] != ids[: len(short) - 1]:
            return f"{text!r} with a limit of 2 is {short}"
    return None


@promise("language_models", written="sca_registry.contracts.Tokenizer")
def words_come_back(trial: LanguageModelTrial) -> str | None:
    """`decode` gives the text that was encoded, and ends at the first `eos` whatever follows."""
    tokenizer = _tokenizer(trial)
    for text in TEXTS:
        ids = tokenizer.encode(text)
        for given in (ids, [*ids, tokenizer.pad], [*ids, ids[0], tokenizer.pad]):
            if tokenizer.decode(given) != text:
                return f"{text!r} comes back as {tokenizer.decode(given)!r}"
    return None


# --- datasets -------------------------------------------------------------------------------------------------------


@promise("datasets", written="sca_registry.contracts.Sample")
def samples(trial: DatasetTrial) -> str | None:
    """Samples are RGB pictures with a whole number as id, each its own, and a tuple of regions."""
    found = trial.samples()
    if not found:
        return "no samples at all"
    for sample in found:
        image = sample.image
        if not isinstance(image, Image.Image) or image.mode != "RGB":
            return f"image {sample.image_id} is {getattr(image, 'mode', type(image).__name__)}"
        if not isinstance(sample.image_id, int) or not isinstance(sample.regions, tuple):
            return f"image id {sample.image_id!r}, regions in a {type(sample.regions).__name__}"
    ids = [sample.image_id for sample in found]
    return None if len(set(ids)) == len(ids) else f"image ids {ids}"


@promise("datasets")
def samples_are_fixed(trial: DatasetTrial) -> str | None:
    """The same index gives the same sample, from a dataset built anew too."""
    again = trial.build(seed=1)
    for index, sample in enumerate(trial.samples()):
        for other in (trial.part[index], again[index]):
            if other.image.tobytes() != sample.image.tobytes() or other[1:] != sample[1:]:
                return f"sample {index} is another the second time"
    return None


@promise("datasets")
def the_end_is_an_index_error(trial: DatasetTrial) -> str | None:
    """An index past the end raises IndexError, so that iteration ends."""
    try:
        trial.part[len(trial.part)]
    except IndexError:
        return None
    return f"a sample at index {len(trial.part)} of {len(trial.part)}"


@promise("datasets", written="sca_registry.contracts.Region")
def boxes_lie_in_the_image(trial: DatasetTrial) -> str | None:
    """A region's box is x1 y1 x2 y2 with x1 < x2 and y1 < y2, inside the image."""
    for sample, region in trial.regions():
        x1, y1, x2, y2 = region.box
        if not (0 <= x1 < x2 <= sample.image.width and 0 <= y1 < y2 <= sample.image.height):
            return f"box {region.box} of region {region.id} in an image of {sample.image.size}"
    return None


@promise("datasets", written="sca_registry.contracts.Region")
def boxes_contain_masks(trial: DatasetTrial) -> str | None:
    """A region's mask is an RLE of the image's size, is not empty, and lies inside the box, give or take a pixel."""
    seen = 0
    for sample, region in trial.regions():
        if region.mask is not None:
            seen += 1
            height, width = decode(region.mask).shape
            if (width, height) != sample.image.size:
                return f"a mask of {(width, height)} for an image of {sample.image.size}"
            tight = box_of(region.mask)
            if tight is None:
                return f"region {region.id} has an empty mask"
            over = max(region.box[0] - tight[0], region.box[1] - tight[1], tight[2] - region.box[2])
            if max(over, tight[3] - region.box[3]) > 1:
                return f"the mask of region {region.id} fills {tight} and its box is {region.box}"
    if not seen:
        raise DoesNotApply("no region has a mask")
    return None


@promise("datasets", written="sca_registry.contracts.Region")
def regions_have_words(trial: DatasetTrial) -> str | None:
    """A region has a name or phrases, none of them blank, and an id of its own."""
    ids = []
    for _, region in trial.regions():
        ids.append(region.id)
        words = [*region.phrases, *([] if region.name is None else [region.name])]
        if not isinstance(region.phrases, tuple) or not all(isinstance(text, str) and text.strip() for text in words):
            return f"region {region.id}: name {region.name!r}, phrases {region.phrases!r}"
        if not words:
            return f"region {region.id} has neither a name nor a phrase"
    return None if len(set(ids)) == len(ids) else "two regions with one id"


# --- small operations -----------------------------------------------------------------------------------------------


def _different(expected: Mapping[str, Tensor], found: Mapping[str, Tensor], share: float = CLOSE) -> str | None:
    """The first tensor that is further off than `share` of its largest value, or None. 0: equal to the last bit."""
    if expected.keys() != found.keys():
        return f"other outputs: {_some(sorted(expected.keys() ^ found.keys()))}"
    for name, value in expected.items():
        problem = _misshapen(name, found[name], tuple(value.shape))
        if problem:
            return problem
        if not value.numel() or torch.equal(value, found[name]):
            continue
        off = float((value.double() - found[name].double()).abs().max())
        if not off <= share * float(value.double().abs().max()):  # NaN is off, too
            return f"{name} differs by {off:.2g}, of at most {float(value.abs().max()):.2g}"
    return None


def _misshapen(name: str, value: Any, shape: tuple[int | None, ...]) -> str | None:
    if not isinstance(value, Tensor):
        return f"{name} is {type(value).__name__}, not a tensor {shape}"
    return None if tuple(value.shape) == shape else f"{name} is {tuple(value.shape)}, not {shape}"


def _weighted_sum(outputs: Mapping[str, Tensor]) -> Tensor:
    """A scalar whose gradient is not made zero by a normalisation at the end."""
    draw = torch.Generator().manual_seed(2)
    learned = [value for value in outputs.values() if value.requires_grad]
    return sum((value * torch.randn(value.shape, generator=draw)).sum() for value in learned)


def _copies(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in state.items()}


def _some(names: Sequence[str]) -> str:
    return ", ".join(islice(names, 5)) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _private(found: Regions, row: int) -> Tensor:
    """The image as one region sees it, or its dense prompt where there is no grid."""
    return found.grid[row] if found.grid is not None else found.dense[row if found.dense.dim() == 4 else slice(None)]


def _targets() -> Targets:
    """True masks: a block in each frame whose right quarter is padding; the last region has none."""
    masks = torch.zeros(len(OWNERS), SIDE, SIDE)
    masks[:, 4:20, 4:20] = 1.0
    valid = torch.ones(len(OWNERS), SIDE, SIDE, dtype=torch.bool)
    valid[:, :, SIDE * 3 // 4 :] = False
    has_mask = torch.ones(len(OWNERS), dtype=torch.bool)
    has_mask[-1] = False
    masks[-1] = 0.0
    return Targets(masks, valid, has_mask)


def _losses(part: Any, trial: SegmenterTrial, targets: Targets) -> dict[str, Tensor]:
    if not hasattr(part, "loss"):
        raise DoesNotApply("it has no loss")
    inputs = trial.inputs()
    return part.loss(part(inputs.features, inputs.prompts["box"]), targets)


def _tokenizer(trial: LanguageModelTrial) -> Any:
    if trial.part.tokenizer is None:
        raise DoesNotApply("it has no tokenizer")
    return trial.part.tokenizer
