"""A model by the names of its parts: what is written down, sent to a worker, stored with the weights and built from."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any

from sca_registry.messages import RegistryError, unknown
from sca_registry.options import check_options
from sca_registry.overrides import PARTS, override, read_assignments
from sca_registry.plugins import BUILTIN
from sca_registry.registry import registry

FORMAT = 1
WORD = re.compile(r"""(?:[^\s"']|"[^"]*"|'[^']*')+""")  # of a part with its options, on one line
TRAINABLE = ("mixer", "projection", "task_tokens", "neck", "lora", "encoder", "segmenter", "language_model")
PROJECTION = {"kind": "linear", "norm": "none"}
PROJECTIONS = {"kind": ("linear", "mlp"), "norm": ("none", "pre", "post", "both")}
PEFT = {"r": "rank", "lora_alpha": "alpha", "lora_dropout": "dropout", "target_modules": "targets"}  # its names
LORA = {"rank": 16, "alpha": 32, "dropout": 0.0, "targets": None}
CAPTION_FROM = ("box-and-point", "box", "point")
GENERATION = {"max_new_tokens": 20, "beams": 1}
MAX_GENERATION = {"max_new_tokens": 4096, "beams": 64, "captions": 64}
MAX_CROPS = 4  # layers
MAX_POINTS = 2**20  # of the grids of an image and all its crops


@dataclass(frozen=True)
class Part:
    """A registered name and the options given to its factory."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """{"name": ..., option: value, ...}: `name` is the one word that cannot be an option."""
        return {"name": self.name, **self.options}

    @classmethod
    def from_dict(cls, written: Any, what: str = "part") -> Part:
        """From such a table, or from a name alone. Raises RegistryError if there is no name in it."""
        table = {"name": written} if isinstance(written, str) else written
        if callable(written):
            given = getattr(written, "__qualname__", f"of type {type(written).__name__}")
            raise RegistryError(f"the {what} is {given}: give its name{_name_factory(what, written)}")
        if not isinstance(table, Mapping) or not isinstance(table.get("name"), str):
            raise RegistryError(f"the {what} is {written!r}: give a name, or a table with a name and options")
        return cls(table["name"], {option: value for option, value in table.items() if option != "name"})

    @classmethod
    def parse(cls, text: str, what: str = "a part", kind: str = "") -> Part:
        """From "NAME [key=value]...", where quotes keep a value with spaces together; with its kind, options that take
        text are read as text. Raises RegistryError.
        """
        words = WORD.findall(text)
        if not words or WORD.sub("", text).strip():  # nothing in it, or a quote that does not end
            raise RegistryError(f"{what} is 'NAME [key=value]...', not {text!r}")
        name, *assignments = words
        if not kind:
            return cls(name, read_assignments(assignments))
        last = name.rpartition("+")[2]  # of encoder+captioner
        return cls(name, read_assignments(assignments, partial(registry(kind).takes_text, last)))


@dataclass(frozen=True)
class EverythingOptions:
    """How "segment everything" looks for regions, by SAM's filters (arXiv 2304.02643).

    points: along each side of the grid. iou: masks predicted below it go. stability: least overlap of the mask cut at
    `+offset` and at `-offset` logits. nms: of two regions whose boxes overlap more, the better stays. mask_nms_thresh:
    the same for masks, which SAM does not compare; 1 for never. area, largest: least and greatest share of the image.
    crops: layers of crops that are searched, too, 2 x 2 in the first and twice as many each way in every further one;
    crop_overlap: of neighbors, as a share of the image's shorter side. caption_from: what a region found is then
    captioned from, "box-and-point" (its own box, and the point that found it), "box", or "point", which is SCA's way
    (arXiv 2312.00869).
    """

    points_per_side: int = 32
    pred_iou_thresh: float = 0.88
    stability_score_thresh: float = 0.95
    stability_score_offset: float = 1.0
    box_nms_thresh: float = 0.7
    mask_nms_thresh: float = 1.0
    min_area: float = 0.0
    max_area: float = 1.0
    crop_n_layers: int = 0
    crop_overlap_ratio: float = 512 / 1500
    caption_from: str = "box-and-point"


@dataclass(frozen=True)
class ModelSpec:
    """Everything that makes one model different from another, before any weights.

    segmenter: None for the encoder's own. projection: `kind` "linear" or "mlp" and `norm` "none", "pre", "post" or
    "both". task_tokens: how many a task has. trainable: names out of `TRAINABLE`; the rest is frozen. lora: None, or
    `rank`, `alpha`, `dropout` and `targets` (None: those that suit the architecture); a number is short for that rank
    with twice as much alpha. generation: defaults for `generate`. everything: those fields of `Everything` that suit
    the weights better than SAM's. Tables may be partial; defaults are filled in.

    Raises RegistryError for a word or a value that is none of these.
    """

    encoder: Part
    mixer: Part
    language_model: Part
    segmenter: Part | None = None
    projection: Mapping[str, str] = field(default_factory=dict)
    task_tokens: int = 6
    trainable: tuple[str, ...] = TRAINABLE[:5]
    lora: Mapping[str, Any] | int | None = None
    generation: Mapping[str, Any] = field(default_factory=dict)
    everything: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        def settle(name: str, value: Any) -> None:
            object.__setattr__(self, name, value)

        settle("projection", _projection(self.projection))
        settle("lora", _lora(self.lora))
        settle("generation", _generation(self.generation))
        settle("everything", _everything(self.everything))
        settle("trainable", _trainable(self.trainable))
        if not isinstance(self.task_tokens, int) or isinstance(self.task_tokens, bool) or self.task_tokens < 0:
            raise RegistryError(f"task_tokens is {self.task_tokens!r}: give a whole number, 0 or more")

    @property
    def search(self) -> EverythingOptions:
        """The model's own search settings for everything mode."""
        return EverythingOptions(**self.everything)

    # --- written forms ------------------------------------------------------------------------------------------------

    @classmethod
    def parse(cls, text: str) -> ModelSpec:
        """From "encoder+mixer+language model". Raises RegistryError unless there are three names."""
        names = [name.strip() for name in text.split("+")]
        if len(names) != 3 or not all(names):
            two = " Two names are encoder+captioner, for sca.captioner." if len(names) == 2 else ""
            raise RegistryError(
                f"{text!r} is not a model: write encoder+mixer+language-model, such as tiny-vit+query+tiny-gpt2.{two}"
            )
        encoder, mixer, language_model = map(Part, names)
        return cls(encoder, mixer, language_model)

    @classmethod
    def from_dict(cls, written: Mapping[str, Any]) -> ModelSpec:
        """From what `to_dict` gives, or less: a part may be its name alone, and what is left out has its default.

        Raises RegistryError for a missing part, an unknown key, or a format that this version does not read.
        """
        table = dict(written)
        form = table.pop("format", FORMAT)
        if form != FORMAT:
            raise RegistryError(
                f"the spec has format {form!r} and this version reads {FORMAT}: pip install -U {BUILTIN}"
            )
        known = [each.name for each in fields(cls)]
        for key in table:
            if key not in known:
                raise unknown(f"a model has no {key!r}", key, known)
        for kind in PARTS:
            if kind in table or kind != "segmenter":
                table[kind] = Part.from_dict(table.get(kind), kind.replace("_", " "))
        return cls(**table)

    def to_dict(self) -> dict[str, Any]:
        """Plain tables, lists, text and numbers, without None: good for JSON and for TOML."""
        written: dict[str, Any] = {"format": FORMAT}
        for each in fields(self):
            value = getattr(self, each.name)
            if isinstance(value, Part):
                written[each.name] = value.to_dict()
            elif isinstance(value, Mapping):
                written[each.name] = {key: inner for key, inner in value.items() if inner is not None}
            elif value is not None:
                written[each.name] = list(value) if isinstance(value, tuple) else value
        return written

    def override(self, assignments: Iterable[str]) -> ModelSpec:
        """Changed by `key=value`, see `overrides`. Raises RegistryError for an assignment or a result that is wrong."""
        return self.from_dict(override({"model": self.to_dict()}, assignments)["model"])


def _name_factory(what: str, factory: Any) -> str:
    """Say which name a factory of a model's part is registered under, or how to register it."""
    kind = what.replace(" ", "_")
    if kind not in PARTS:
        return ""
    path = f"{getattr(factory, '__module__', '')}:{getattr(factory, '__qualname__', '')}"
    names = [name for name in registry(kind).names() if registry(kind).card(name).factory == path]
    return f", {names[0]!r}" if names else f"; register it with @sca_registry.{kind}s('NAME')"


def _table(what: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise RegistryError(f"{what} is {value!r}: give a table of options")
    return dict(value)


def _generation(value: Any) -> dict[str, Any]:
    given = GENERATION | _table("generation", value)
    check_generation("generation", given)
    return given


def check_generation(key: str, options: Any, generate: Callable[..., Any] | None = None, upstream: int = 1) -> None:
    """Check options of generation.

    Args:
        key: What messages call them, such as "evaluate.generation".
        options: The options; those that every language model has must be in range.
        generate: The method of the language model that takes the options; None if it is not known yet.
        upstream: How many of its first parameters are not options: 1 for the prefix, 2 for a method of a class.

    Raises:
        RegistryError: An option that the language model does not take, or a value of another type or out of range.
    """
    given = _table(key, options)
    for name, most in MAX_GENERATION.items():
        if name in given:
            _check_number(key, name, given[name], whole=True, least=1, most=most)
    for name, highest in (("temperature", math.inf), ("top_p", 1.0)):
        if name in given:
            _check_number(key, name, given[name], whole=False, least=0, most=highest)
    if given.get("temperature") == 0:
        raise RegistryError(f"{key}.temperature is 0: give a number above 0, or leave out sample")
    if not isinstance(given.get("sample", False), bool):
        raise RegistryError(f"{key}.sample is {given['sample']!r:.80}: give true or false")
    if "seed" in given:
        _check_number(key, "seed", given["seed"], whole=True, least=-(2**63), most=2**63 - 1)
    if generate is not None:
        check_options(key, generate, upstream, GENERATION | given)


def check_search(fields: Mapping[str, Any]) -> EverythingOptions:
    """Return search settings from fields by name; the others are SAM's.

    Raises:
        RegistryError: An unknown field, or a value of another type or out of range.
    """
    return EverythingOptions(**_everything(fields))


def _everything(value: Any) -> dict[str, Any]:
    given = _table("everything", value)
    defaults = vars(EverythingOptions())
    for key, number in given.items():
        if key not in defaults:
            raise unknown(f"everything has no {key!r}", key, defaults)
        if key == "caption_from":
            if number not in CAPTION_FROM:
                raise unknown(f"everything.caption_from is {number!r}", str(number), CAPTION_FROM)
        else:
            most = MAX_CROPS if key == "crops" else math.inf
            _check_number("everything", key, number, whole=key in ("points", "crops"), least=key == "points", most=most)
    if not given.get("crop_overlap", 0) < 1:
        raise RegistryError(f"everything.crop_overlap is {given['crop_overlap']}: give a share of the image, below 1")
    settled = defaults | given
    total = settled["points"] ** 2 * sum(4**layer for layer in range(settled["crops"] + 1))
    if total > MAX_POINTS:
        raise RegistryError(
            f"everything.points and everything.crops ask for more than {MAX_POINTS:,} points; lower one of them"
        )
    return settled


def _check_number(table: str, key: str, value: Any, whole: bool, least: float, most: float) -> None:
    kind = f"a {'whole ' if whole else ''}number"
    valid = isinstance(value, int if whole else int | float) and not isinstance(value, bool) and value != math.inf
    if not (valid and value >= least):
        raise RegistryError(f"{table}.{key} is {value!r}: give {kind}, {least:g} or more")
    if value > most:
        raise RegistryError(f"{table}.{key} is {value!r:.80}: give {kind}, {most:g} or less")


def _projection(value: Any) -> dict[str, str]:
    given = {"kind": value} if isinstance(value, str) else _table("projection", value)
    for key, chosen in given.items():
        if key not in PROJECTIONS:
            raise unknown(f"a projection has no {key!r}", key, PROJECTIONS)
        if chosen not in PROJECTIONS[key]:
            raise unknown(f"no {key} of a projection is called {chosen!r}", str(chosen), PROJECTIONS[key])
    return PROJECTION | given


def _lora(value: Any) -> dict[str, Any] | None:
    if not value:  # None, 0, false, or an empty table
        return None
    if not isinstance(value, int | Mapping):
        raise RegistryError(f"lora is {value!r:.80}: give a rank, such as lora=8, or a table of {', '.join(LORA)}")
    given = {"rank": value} if isinstance(value, int) else dict(value)
    for key in given:
        if key not in LORA:
            raise unknown(f"lora has no {key!r}", PEFT.get(key, str(key)), LORA)
    rank = given.get("rank", LORA["rank"])
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise RegistryError(f"the rank of lora is {rank!r}: give a whole number, 1 or more, or lora=0 for none")
    full = LORA | {"alpha": 2 * rank} | given
    for key, most in (("alpha", math.inf), ("dropout", 1)):
        _check_number("lora", key, full[key], whole=False, least=0, most=most)
    targets = full["targets"]
    if not (targets is None or (isinstance(targets, list | tuple) and all(isinstance(each, str) for each in targets))):
        raise RegistryError(f"lora.targets is {targets!r}: give a list of names of layers")
    return full


def _trainable(value: Any) -> tuple[str, ...]:
    names = (value,) if isinstance(value, str) else value
    if not isinstance(names, list | tuple):
        raise RegistryError(f"trainable is {value!r}: give a list of names")
    for name in names:
        if name not in TRAINABLE:
            raise unknown(f"{name!r} is nothing that trains", str(name), TRAINABLE)
    return tuple(names)
