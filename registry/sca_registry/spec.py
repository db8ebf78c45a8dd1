"""Model specs: the names and options of the components of a model, stored with its weights and used to build it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any

from sca_registry.contracts import TASKS
from sca_registry.errors import RegistryError, make_unknown_name_error
from sca_registry.options import check_options
from sca_registry.overrides import MODEL_COMPONENTS, apply_overrides, parse_assignments
from sca_registry.plugins import BUILTIN_DISTRIBUTION
from sca_registry.registry import get_registry

SPEC_FORMAT = 2
ARGUMENT_PATTERN = re.compile(r"""(?:[^\s"']|"[^"]*"|'[^']*')+""")
TRAINABLE_GROUPS = ("mixer", "projection", "task_tokens", "neck", "lora", "encoder", "segmenter", "language_model")
DEFAULT_PROJECTION = {"type": "linear", "norm": "none"}
PROJECTION_CHOICES = {"type": ("linear", "mlp", "none"), "norm": ("none", "pre", "post", "both")}
EXAMPLE_COMPONENTS = {"encoder": "sam-vit-b", "mixer": "query", "language_model": "gpt2"}  # required components
GEOMETRY_CHOICES = ("token", "add")
TASK_NAME_PATTERN = re.compile(r"[a-z][a-z0-9-]{0,39}")
IMAGE_MARK, PROMPT_MARK = "{image}", "{prompt}"  # places of the visual prefix and of the prompt in a template
PEFT_OPTION_NAMES = {"r": "rank", "lora_alpha": "alpha", "lora_dropout": "dropout"}
DEFAULT_LORA = {"rank": 16, "alpha": 32, "dropout": 0.0, "target_modules": None}
CAPTION_FROM_CHOICES = ("box-and-point", "box", "point")
DEFAULT_GENERATION = {"max_new_tokens": 20, "num_beams": 1}
MAX_GENERATION = {"max_new_tokens": 4096, "num_beams": 64, "num_captions": 64}
MIN_ZOOM_CONTEXT = 1.5  # crops with less context cut off regions that are not in their center
MAX_CROP_LAYERS = 4
MAX_GRID_POINTS = 2**20  # points in the grids of an image and all its crops


@dataclass(frozen=True)
class ComponentSpec:
    """Component of a model: a registered name and options.

    Attributes:
        name: Registered name.
        options: Options of the factory.
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return a dict {"name": ..., option: value, ...}; `name` cannot be an option."""
        return {"name": self.name, **self.options}

    @classmethod
    def from_dict(cls, data: Any, subject: str = "component") -> ComponentSpec:
        """Create a component from the dict of `to_dict`, or from a name.

        Args:
            data: Dict or name.
            subject: Subject of the error messages, such as "mixer".

        Returns:
            The component.

        Raises:
            RegistryError: `data` is neither a name nor a dict with a name.
        """
        table = {"name": data} if isinstance(data, str) else data
        if callable(data):
            description = getattr(data, "__qualname__", f"of type {type(data).__name__}")
            raise RegistryError(
                f"the {subject} is {description}; pass its name{_suggest_registered_name(subject, data)}"
            )
        if not isinstance(table, Mapping) or not isinstance(table.get("name"), str):
            raise RegistryError(
                f"the {subject} is {data!r}; expected a name, or a dict or table with a name and options"
            )
        return cls(table["name"], {option: value for option, value in table.items() if option != "name"})

    @classmethod
    def parse(cls, text: str, subject: str = "a component", kind: str = "") -> ComponentSpec:
        """Parse a component with options.

        Args:
            text: "NAME [key=value]...". Quotes enclose values with spaces.
            subject: Subject of the error messages, such as "--proposer".
            kind: Kind of the component, to read the options that are strings without quotes.

        Returns:
            The component.

        Raises:
            RegistryError: The text is invalid.
        """
        arguments = ARGUMENT_PATTERN.findall(text)
        if not arguments or ARGUMENT_PATTERN.sub("", text).strip():  # empty, or an unclosed quote
            raise RegistryError(f"{subject} must have the form 'NAME [key=value]...', but is {text!r}")
        name, *assignments = arguments
        if not kind:
            return cls(name, parse_assignments(assignments))
        component_name = name.rpartition("+")[2]  # the captioner of encoder+captioner
        return cls(name, parse_assignments(assignments, partial(get_registry(kind).is_text_option, component_name)))


@dataclass(frozen=True)
class EverythingOptions:
    """Options of everything mode, as in SAM's automatic mask generator (arXiv 2304.02643).

    Attributes:
        points_per_side: Points per side of the prompt grid.
        pred_iou_thresh: Minimum predicted IoU of a mask.
        stability_score_thresh: Minimum stability score: the IoU between the mask thresholded at
            +`stability_score_offset` and at -`stability_score_offset` logits.
        stability_score_offset: Offset of the logits for the stability score.
        box_nms_thresh: IoU threshold for non-maximum suppression of boxes.
        mask_nms_thresh: IoU threshold for non-maximum suppression of masks, an addition to SAM's generator; 1
            disables it.
        min_area: Minimum area of a mask as a fraction of the image.
        max_area: Maximum area of a mask as a fraction of the image.
        crop_n_layers: Layers of image crops in addition to the full image. Layer i has 2^i x 2^i crops.
        crop_overlap_ratio: Overlap of neighboring crops in the first layer, as a fraction of the shorter image side.
        caption_from: Prompt for the caption of a proposed region: "box-and-point" (bounding box of the mask, and the
            grid point that produced it), "box", or "point" as in SCA (arXiv 2312.00869).
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
class ZoomOptions:
    """Options of zoom, which predicts small regions a second time from a crop of the image.

    Attributes:
        max_cells: Area of the largest region to zoom into: the area of its box in cells of the feature grid. None if it
            was not measured for the model.
        context: Side of a crop divided by the longer side of the box.
        max_upscale: Maximum pixels of the model input per pixel of the image in a crop. 1 crops at least as many pixels
            as the model input has.
        keep_best_caption: Also caption small regions from the image, and keep the caption with the higher score. Masks
            are those of the crops.
    """

    max_cells: float | None = None
    context: float = 3.0
    max_upscale: float = 1.0
    keep_best_caption: bool = False


@dataclass(frozen=True)
class ModelSpec:
    """Architecture and default options of a model, without weights.

    Dict fields can be partial: missing keys take their default values.

    Attributes:
        encoder: Image encoder.
        mixer: Feature mixer.
        language_model: Language model.
        segmenter: Segmenter; None selects the encoder's default.
        projection: Projection from query embeddings to the embedding space of the language model: `type` "linear",
            "mlp", or "none" for a mixer whose queries have the hidden size of the language model; `norm` "none", "pre",
            "post" or "both".
        task_tokens: Number of learned tokens per task.
        tasks: Prompts by task, for a language model that follows instructions: the text after the visual prefix
            replaces the learned tokens, so that `task_tokens` is 0. Contains "recognition" and "caption"; other names
            are further tasks. None for a model with these two tasks and learned tokens.
        prompt_template: Text around the visual prefix and a prompt or question, such as "USER: {image} {prompt}
            ASSISTANT:". None for the chat template of the tokenizer, if it has one.
        geometry: How the language model receives the box of a region in its image: "token" for one more position of
            the prefix, before the queries; "add" to add its embedding to every projected query. None if it receives
            only the queries.
        questions: The model supports questions about regions. Training with `question_prob` sets it.
        lengths: The model generates captions of a requested length. Training with `length_prob` sets it.
        trainable: Parameter groups to train, a subset of `TRAINABLE_GROUPS`; the others are frozen.
        lora: LoRA of the language model: `rank`, `alpha`, `dropout` and `target_modules` (None selects them by
            architecture). An integer r is shorthand for rank r and alpha 2r. None disables LoRA.
        generation: Default options of `generate`.
        everything: Options of everything mode; the keys are fields of `EverythingOptions`.
        zoom: Options of zoom; the keys are fields of `ZoomOptions`. Empty if they were not measured for the model.

    Raises:
        RegistryError: A field, key or value is invalid.
    """

    encoder: ComponentSpec
    mixer: ComponentSpec
    language_model: ComponentSpec
    segmenter: ComponentSpec | None = None
    projection: Mapping[str, str] = field(default_factory=dict)
    task_tokens: int = 6
    tasks: Mapping[str, str] | None = None
    prompt_template: str | None = None
    geometry: str | None = None
    questions: bool = False
    lengths: bool = False
    trainable: tuple[str, ...] = TRAINABLE_GROUPS[:5]
    lora: Mapping[str, Any] | int | None = None
    generation: Mapping[str, Any] = field(default_factory=dict)
    everything: Mapping[str, Any] = field(default_factory=dict)
    zoom: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        def set_field(name: str, value: Any) -> None:
            object.__setattr__(self, name, value)

        set_field("projection", _complete_projection(self.projection))
        set_field("lora", _complete_lora(self.lora))
        set_field("generation", _complete_generation(self.generation))
        set_field("everything", _complete_everything(self.everything))
        set_field("zoom", _check_zoom(self.zoom))
        set_field("trainable", _check_trainable(self.trainable))
        if not isinstance(self.task_tokens, int) or isinstance(self.task_tokens, bool) or self.task_tokens < 0:
            raise RegistryError(f"task_tokens is {self.task_tokens!r}; expected an integer of at least 0")
        set_field("tasks", _check_tasks(self.tasks))
        if self.tasks is not None and self.task_tokens:
            raise RegistryError(
                f"task_tokens is {self.task_tokens}, but tasks with prompts have no learned tokens; set task_tokens=0"
            )
        _check_prompt_template(self.prompt_template)
        for name in ("questions", "lengths"):
            if not isinstance(getattr(self, name), bool):
                raise RegistryError(f"{name} is {getattr(self, name)!r:.80}; expected true or false")
        if self.geometry is not None and self.geometry not in GEOMETRY_CHOICES:
            raise make_unknown_name_error(f"geometry is {self.geometry!r:.80}", str(self.geometry), GEOMETRY_CHOICES)

    @property
    def task_names(self) -> tuple[str, ...]:
        """Names of the tasks; the index of a task is its id."""
        return TASKS if self.tasks is None else tuple(self.tasks)

    @property
    def everything_options(self) -> EverythingOptions:
        """Options of everything mode."""
        return EverythingOptions(**self.everything)

    @property
    def zoom_options(self) -> ZoomOptions:
        """Options of zoom."""
        return ZoomOptions(**self.zoom)

    # --- serialization ------------------------------------------------------------------------------------------------

    @classmethod
    def parse(cls, text: str) -> ModelSpec:
        """Create a spec with default options from three names.

        Args:
            text: "encoder+mixer+language-model".

        Returns:
            The spec.

        Raises:
            RegistryError: The text does not contain three names.
        """
        names = [name.strip() for name in text.split("+")]
        if len(names) != 3 or not all(names):
            hint = "; for encoder+captioner, use sca.load_captioner" if len(names) == 2 else ""
            raise RegistryError(
                f"{text!r} is not a model; write encoder+mixer+language-model, such as tiny-vit+query+tiny-gpt2{hint}"
            )
        encoder, mixer, language_model = map(ComponentSpec, names)
        return cls(encoder, mixer, language_model)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ModelSpec:
        """Create a spec from a dict returned by `to_dict`.

        Args:
            data: Fields by name; dict fields can be partial. A component can be a name without options.

        Returns:
            The spec.

        Raises:
            RegistryError: A component is missing, a key is unknown, or the format is not supported.
        """
        table = dict(data)
        spec_format = table.pop("format", SPEC_FORMAT)
        if spec_format != SPEC_FORMAT:
            raise RegistryError(
                f"spec format {spec_format!r} is not supported, expected {SPEC_FORMAT}; {_suggest_fix(spec_format)}"
            )
        field_names = [each.name for each in fields(cls)]
        for key in table:
            if key not in field_names:
                raise make_unknown_name_error(f"unknown field {key!r} of a model", key, field_names)
        for kind in MODEL_COMPONENTS:
            if kind in EXAMPLE_COMPONENTS and table.get(kind) is None:
                example = f'{kind} = "{EXAMPLE_COMPONENTS[kind]}"'
                raise RegistryError(f"the model has no {kind.replace('_', ' ')}; add `{example}` to [model]")
            if kind in table or kind != "segmenter":
                table[kind] = ComponentSpec.from_dict(table.get(kind), kind.replace("_", " "))
        return cls(**table)

    def to_dict(self) -> dict[str, Any]:
        """Return the spec as a dict for JSON or TOML. None, an empty `zoom` and false flags are omitted."""
        data: dict[str, Any] = {"format": SPEC_FORMAT}
        for each in fields(self):
            value = getattr(self, each.name)
            if (
                each.name in ("zoom", "questions", "lengths") and not value
            ):  # specs of models without them stay the same
                continue
            if isinstance(value, ComponentSpec):
                data[each.name] = value.to_dict()
            elif isinstance(value, Mapping):
                data[each.name] = {key: option for key, option in value.items() if option is not None}
            elif value is not None:
                data[each.name] = list(value) if isinstance(value, tuple) else value
        return data

    def apply_overrides(self, assignments: Iterable[str]) -> ModelSpec:
        """Return a copy of the spec with changes.

        Args:
            assignments: Overrides such as "mixer.depth=3" or "lora=16", with TOML values.

        Returns:
            The changed spec.

        Raises:
            RegistryError: An assignment, or the changed spec, is invalid.
        """
        return self.from_dict(apply_overrides({"model": self.to_dict()}, assignments)["model"])


def _suggest_fix(spec_format: Any) -> str:
    if isinstance(spec_format, int) and spec_format > SPEC_FORMAT:
        return f"pip install -U {BUILTIN_DISTRIBUTION}"
    return "save the model again with this version"


def _suggest_registered_name(subject: str, factory: Any) -> str:
    """Suggest the registered name of a factory, or its registration."""
    kind = subject.replace(" ", "_")
    if kind not in MODEL_COMPONENTS:
        return ""
    path = f"{getattr(factory, '__module__', '')}:{getattr(factory, '__qualname__', '')}"
    names = [name for name in get_registry(kind).list_names() if get_registry(kind).get_card(name).factory == path]
    return f", {names[0]!r}" if names else f"; register it with @sca_registry.{kind}s('NAME')"


def _check_table(subject: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise RegistryError(f"{subject} is {value!r}; expected a dict or table of options")
    return dict(value)


def _complete_generation(value: Any) -> dict[str, Any]:
    options = DEFAULT_GENERATION | _check_table("generation", value)
    check_generation("generation", options)
    return options


def check_generation(
    subject: str, options: Any, generate_method: Callable[..., Any] | None = None, num_positional: int = 1
) -> None:
    """Check generation options.

    Args:
        subject: Subject of the error messages, such as "evaluate.generation".
        options: Values by option. Options that all language models have must be in range.
        generate_method: Method `generate` of the language model, to check for unknown options; None if not available.
        num_positional: Number of leading parameters of `generate_method` that are not options: 1 for the prefix of a
            bound method, 2 for a function of a class.

    Raises:
        RegistryError: An option is unknown, or a value has the wrong type or is out of range.
    """
    checked_options = _check_table(subject, options)
    for name, maximum in MAX_GENERATION.items():
        if name in checked_options:
            _check_number(subject, name, checked_options[name], is_integer=True, minimum=1, maximum=maximum)
    for name, upper_bound in (("temperature", math.inf), ("top_p", 1.0)):
        if name in checked_options:
            _check_number(subject, name, checked_options[name], is_integer=False, minimum=0, maximum=upper_bound)
    if checked_options.get("temperature") == 0:
        raise RegistryError(f"{subject}.temperature is 0; use a number above 0, or omit temperature and do_sample")
    if not isinstance(checked_options.get("do_sample", False), bool):
        raise RegistryError(f"{subject}.do_sample is {checked_options['do_sample']!r:.80}; expected true or false")
    if "seed" in checked_options:
        _check_number(subject, "seed", checked_options["seed"], is_integer=True, minimum=-(2**63), maximum=2**63 - 1)
    if generate_method is not None:
        check_options(subject, generate_method, num_positional, DEFAULT_GENERATION | checked_options)


def make_everything_options(options: Mapping[str, Any]) -> EverythingOptions:
    """Create options of everything mode; missing ones are SAM's defaults.

    Args:
        options: Values by field of `EverythingOptions`.

    Returns:
        The options.

    Raises:
        RegistryError: A field is unknown, or a value has the wrong type or is out of range.
    """
    return EverythingOptions(**_complete_everything(options))


def _complete_everything(value: Any) -> dict[str, Any]:
    options = _check_table("everything", value)
    defaults = vars(EverythingOptions())
    for key, setting in options.items():
        if key not in defaults:
            raise make_unknown_name_error(f"unknown option everything.{key}", key, defaults)
        if key != "caption_from":
            is_integer, minimum = key in ("points_per_side", "crop_n_layers"), 1 if key == "points_per_side" else 0
            maximum = MAX_CROP_LAYERS if key == "crop_n_layers" else math.inf
            _check_number("everything", key, setting, is_integer=is_integer, minimum=minimum, maximum=maximum)
        elif setting not in CAPTION_FROM_CHOICES:
            problem = f"everything.caption_from is {setting!r}"
            raise make_unknown_name_error(problem, str(setting), CAPTION_FROM_CHOICES)
    if not options.get("crop_overlap_ratio", 0) < 1:
        raise RegistryError(
            f"everything.crop_overlap_ratio is {options['crop_overlap_ratio']}; expected a fraction of the image "
            "below 1"
        )
    completed = defaults | options
    num_points = completed["points_per_side"] ** 2 * sum(4**layer for layer in range(completed["crop_n_layers"] + 1))
    if num_points > MAX_GRID_POINTS:
        raise RegistryError(
            "everything.points_per_side and everything.crop_n_layers result in more than "
            f"{MAX_GRID_POINTS:,} points; reduce one of them"
        )
    return completed


def _check_tasks(value: Any) -> dict[str, str] | None:
    """Return the prompts by task, recognition and captions first."""
    if value is None:
        return None
    prompts = _check_table("tasks", value)
    for name, prompt in prompts.items():
        if not isinstance(name, str) or not TASK_NAME_PATTERN.fullmatch(name):
            raise RegistryError(
                f"tasks has the name {name!r:.80}; use lowercase letters, digits and hyphens, such as 'explain'"
            )
        if not isinstance(prompt, str) or not prompt.strip():
            raise RegistryError(f"tasks.{name} is {prompt!r:.80}; expected the text of a prompt")
    missing = [name for name in TASKS if name not in prompts]
    if missing:
        raise RegistryError(f"tasks has no prompt for {' and '.join(missing)}; add tasks.{missing[0]}")
    return {name: prompts[name] for name in dict.fromkeys((*TASKS, *prompts))}


def _check_prompt_template(value: Any) -> None:
    if value is None:
        return
    is_valid = isinstance(value, str) and value.count(IMAGE_MARK) == value.count(PROMPT_MARK) == 1
    if not is_valid or value.index(IMAGE_MARK) > value.index(PROMPT_MARK):
        raise RegistryError(
            f"prompt_template is {value!r:.80}; expected a text with {IMAGE_MARK}, then {PROMPT_MARK}, once each"
        )


def _check_zoom(value: Any) -> dict[str, Any]:
    options = {key: option for key, option in _check_table("zoom", value).items() if option is not None}
    defaults = vars(ZoomOptions())
    for key, option in options.items():
        if key not in defaults:
            raise make_unknown_name_error(f"unknown option zoom.{key}", key, defaults)
        if key != "keep_best_caption":
            minimum = MIN_ZOOM_CONTEXT if key == "context" else 0
            _check_number("zoom", key, option, is_integer=False, minimum=minimum, maximum=math.inf)
        elif not isinstance(option, bool):
            raise RegistryError(f"zoom.{key} is {option!r:.80}; expected true or false")
    return options


def _check_number(subject: str, key: str, value: Any, is_integer: bool, minimum: float, maximum: float) -> None:
    expected = "an integer" if is_integer else "a number"
    is_valid = (
        isinstance(value, int if is_integer else int | float) and not isinstance(value, bool) and value != math.inf
    )
    if not (is_valid and value >= minimum):
        raise RegistryError(f"{subject}.{key} is {value!r}; expected {expected} of at least {minimum:g}")
    if value > maximum:
        raise RegistryError(f"{subject}.{key} is {value!r:.80}; expected {expected} of at most {maximum:g}")


def _complete_projection(value: Any) -> dict[str, str]:
    projection = {"type": value} if isinstance(value, str) else _check_table("projection", value)
    for key, setting in projection.items():
        if key not in PROJECTION_CHOICES:
            raise make_unknown_name_error(f"unknown option projection.{key}", key, PROJECTION_CHOICES)
        if setting not in PROJECTION_CHOICES[key]:
            raise make_unknown_name_error(f"projection.{key} is {setting!r}", str(setting), PROJECTION_CHOICES[key])
    return DEFAULT_PROJECTION | projection


def _complete_lora(value: Any) -> dict[str, Any] | None:
    if not value:  # None, 0, false, or an empty table
        return None
    _reject_peft_options(value)
    if not isinstance(value, int | Mapping):
        raise RegistryError(
            f"lora is {value!r:.80}; expected a rank, such as lora=8, or a dict or table of {', '.join(DEFAULT_LORA)}"
        )
    options = {"rank": value} if isinstance(value, int) else dict(value)
    for key in options:
        if key not in DEFAULT_LORA:
            raise make_unknown_name_error(
                f"unknown option lora.{key}", PEFT_OPTION_NAMES.get(key, str(key)), DEFAULT_LORA
            )
    rank = options.get("rank", DEFAULT_LORA["rank"])
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise RegistryError(f"lora.rank is {rank!r}; expected an integer of at least 1, or lora=0 to disable LoRA")
    completed = DEFAULT_LORA | {"alpha": 2 * rank} | options
    for key, maximum in (("alpha", math.inf), ("dropout", 1)):
        _check_number("lora", key, completed[key], is_integer=False, minimum=0, maximum=maximum)
    target_modules = completed["target_modules"]
    if not (
        target_modules is None
        or (isinstance(target_modules, list | tuple) and all(isinstance(each, str) for each in target_modules))
    ):
        raise RegistryError(f"lora.target_modules is {target_modules!r}; expected a list of layer names")
    return completed


def _reject_peft_options(value: Any) -> None:
    """Raise RegistryError, with the table to write, for a LoraConfig of peft or a table with its names."""
    if isinstance(value, Mapping):
        options = {PEFT_OPTION_NAMES.get(key, key): option for key, option in value.items()}
        is_foreign = options.keys() != value.keys() and options.keys() <= DEFAULT_LORA.keys()
        description = f"lora has the peft names {' and '.join(key for key in value if key in PEFT_OPTION_NAMES)}"
    else:
        is_foreign = all(hasattr(value, name) for name in PEFT_OPTION_NAMES)
        names = {**PEFT_OPTION_NAMES, "target_modules": "target_modules"}
        options = {name: option for key, name in names.items() if (option := getattr(value, key, None))}
        description = f"lora is of type {type(value).__name__}"
    if is_foreign:
        options = {key: sorted(each) if isinstance(each, set) else each for key, each in options.items()}
        values = {key: json.dumps(each, default=str) for key, each in options.items()}
        table = ", ".join(f'"{key}": {each}' for key, each in values.items())
        assignments = " ".join(f"lora.{key}={each}" for key, each in values.items())
        raise RegistryError(f"{description}; give lora={{{table:.200}}}, or on the command line {assignments:.200}")


def _check_trainable(value: Any) -> tuple[str, ...]:
    names = (value,) if isinstance(value, str) else value
    if not isinstance(names, list | tuple):
        raise RegistryError(f"trainable is {value!r}; expected a list of names")
    for name in names:
        if name not in TRAINABLE_GROUPS:
            raise make_unknown_name_error(f"unknown trainable group {name!r}", str(name), TRAINABLE_GROUPS)
    return tuple(names)
