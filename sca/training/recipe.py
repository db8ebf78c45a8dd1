"""Training recipes: model, data, options and loss weights in one TOML file.

[model]          A `ModelSpec`; or `model = "NAME"`, a checkpoint or a model name to start from.
[data.NAME]      A `DataSource`: name of a dataset, split, weight, augment, phrases, class_name_task, and the
                 dataset's options.
[train]          `TrainOptions`.
[validate]       `ValidationOptions`; without this table, the model is not validated.
[loss]           Weights of the losses. `attributes` and `feature_attributes` train auxiliary heads that predict the
                 attributes of regions from their queries, and from the image features under their ground-truth masks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sca_registry import RegistryError
from sca_registry.errors import make_unknown_name_error
from sca_registry.overrides import apply_overrides, parse_assignment
from sca_registry.spec import ComponentSpec, ModelSpec

from sca.io.toml import parse_toml, read_toml_text
from sca.io.validation import (
    check_choice,
    check_keys,
    check_list,
    check_range,
    check_same_type,
    check_type,
)

if TYPE_CHECKING:
    from sca.training.augmentation import Augmentation

SECTIONS = ("model", "data", "train", "loss", "validate")
DEFAULT_LOSS_WEIGHTS = {"caption": 1.0, "mask": 1.0, "iou": 1.0, "attributes": 0.0, "feature_attributes": 0.0}
PROMPT_KINDS = ("box", "point", "mask", "box-and-point")
PHRASE_MODES = ("dataset", "template")
SIDE_WORD_MODES = ("swap", "drop")
CLASS_NAME_TASKS = ("recognition", "caption", "both")
PRECISIONS = ("float32", "bfloat16", "float16")
POSITIVE_COUNT_OPTIONS = (  # integers of at least 1
    "steps",
    "batch_size",
    "gradient_accumulation_steps",
    "captions_per_region",
    "max_regions",
    "max_tokens",
    "num_processes",
    "save_steps",
)
COUNT_OPTIONS = (  # integers of at least 0
    *("max_regions_per_step", "chunk_size", "warmup_steps", "num_workers", "lora_rank"),
)
NON_NEGATIVE_OPTIONS = ("learning_rate", "adam_beta2", "weight_decay", "max_grad_norm", "box_jitter")
MAX_SEED = 2**32 - 1  # NumPy's maximum
FRACTION_OPTIONS = (  # numbers from 0 to 1
    "class_name_prob",
    "label_smoothing",
    "question_prob",
    "length_prob",
    "class_name_warmup",
    "short_caption_warmup",
    "longest_caption_prob",
)


@dataclass(frozen=True)
class SamplingOptions:
    """Sampling options for regions and their texts.

    Args:
        prompt_weights: Sampling weights of the prompt kinds "box", "point", "mask" and "box-and-point", drawn once per
            step. A region without a mask uses its filled box as the mask.
        class_name_prob: Probability that a sampled text is the region's class name instead of a phrase.
        class_name_warmup: Fraction of training, from the start, in which every text is a class name (the weak
            supervision of SCA, arXiv 2312.00869).
        short_caption_warmup: Fraction of training, after the class names, in which every phrase is the region's first
            and shortest.
        longest_caption_prob: Probability, after both warmups, that a phrase is the region's last and longest instead
            of a random one.
        question_prob: Probability that a sampled text is the answer to a question about the region, if the dataset has
            any for it. Above 0, the trained model supports questions.
        length_prob: Probability that a sampled caption or class name follows a request for its length, see
            `sca.language_models.questions.LENGTH_REQUESTS`. Above 0, captions of a requested length can be generated.
        captions_per_region: Texts sampled per region; distinct ones are all trained on, from one forward pass.
        max_regions: Maximum number of regions per image.
        box_jitter: Standard deviation of the noise on box corners, as a fraction of the box sides.
        max_tokens: Maximum number of tokens per text, including the end token.
    """

    prompt_weights: Mapping[str, float] = field(default_factory=lambda: {"box": 1.0})
    class_name_prob: float = 0.0
    class_name_warmup: float = 0.0
    short_caption_warmup: float = 0.0
    longest_caption_prob: float = 0.0
    question_prob: float = 0.0
    length_prob: float = 0.0
    captions_per_region: int = 1
    max_regions: int = 16
    box_jitter: float = 0.0
    max_tokens: int = 20


@dataclass(frozen=True)
class TrainOptions(SamplingOptions):
    """Options of [train].

    Args:
        steps: Optimizer steps.
        batch_size: Images per step, over all processes and accumulated batches.
        max_regions_per_step: Maximum number of regions per step, over all processes and accumulated batches; images
            with few regions keep all of them and the others share the rest. 0 for no limit.
        learning_rate: Peak learning rate, after `warmup_steps` and before a cosine decay to zero.
        lr_multipliers: Factors of the learning rate by trainable group (`spec.trainable`, and "heads"); 1 by default.
        lora_rank: Rank of LoRA adapters that are added to the language model of a checkpoint, with alpha twice the
            rank; 0 for none. A new model has its LoRA in [model].
        label_smoothing: Label smoothing of the caption loss; 0.1 in SCA, 0 in PAM.
        adam_beta2: Decay rate of AdamW's second moment.
        weight_decay: Weight decay of AdamW; norms and biases have none.
        warmup_steps: Steps of linear warmup, at most `steps` - 1.
        max_grad_norm: Maximum gradient norm.
        gradient_accumulation_steps: Batches per step that are computed one after another.
        chunk_size: Regions per forward pass, with activations recomputed for the gradients to save memory; 0 for all.
        feature_cache_dir: Folder that caches the features of a frozen encoder, see `FeatureCache`; "none"; or "auto"
            for a folder of this package's cache, if `open_feature_cache` expects it to save time.
        precision: "float32", or autocast to "bfloat16" or "float16".
        report_to: "tensorboard", "wandb", "trackio" or another integration of transformers, comma-separated; "none";
            or "auto" for TensorBoard if it is installed.
        fsdp: Shard trainable parameters over the processes (FSDP2), see `sca.training.sharding`.
        num_processes: Processes started on this machine, unless a launcher started them; on GPUs, one per GPU instead.
        num_workers: Processes that load data.
        save_steps: Steps between checkpoints to resume from.
        seed: Random seed.
    """

    steps: int = 1000
    batch_size: int = 16
    max_regions_per_step: int = 0
    learning_rate: float = 1e-3
    lr_multipliers: Mapping[str, float] = field(default_factory=dict)
    lora_rank: int = 0
    label_smoothing: float = 0.1
    adam_beta2: float = 0.999
    weight_decay: float = 1e-4
    warmup_steps: int = 200
    max_grad_norm: float = 1.0
    gradient_accumulation_steps: int = 1
    chunk_size: int = 0
    feature_cache_dir: str = "auto"
    precision: str = "float32"
    report_to: str = "auto"
    fsdp: bool = False
    num_processes: int = 1
    num_workers: int = 0
    save_steps: int = 500
    seed: int = 0


FEATURE_CACHE_MODES = ("auto", "none")  # values of `feature_cache_dir` that are not a folder

RECIPE_KEYS = {  # name without its section, or in transformers -> key of a recipe, for error messages
    "model": "model",
    "data": "data",
    **{each.name: f"train.{each.name}" for each in fields(TrainOptions)},
    **dict.fromkeys(("max_steps", "num_steps", "epochs", "num_epochs", "num_train_epochs"), "train.steps"),
    **dict.fromkeys(("per_device_train_batch_size", "train_batch_size"), "train.batch_size"),
    "lr": "train.learning_rate",
    "label_smoothing_factor": "train.label_smoothing",
    "warmup_ratio": "train.warmup_steps",
    "bf16": "train.precision",
    "fp16": "train.precision",
    "dataloader_num_workers": "train.num_workers",
}
RUN_FOLDER_NAMES = ("out", "output_dir")  # not part of a recipe


@dataclass(frozen=True)
class DataSource:
    """A source of examples.

    Args:
        dataset: Name and options of the dataset.
        split: Split of the dataset.
        weight: Sampling weight relative to the other sources.
        augment: Random augmentation of the samples.
        phrases: "dataset" for the phrases of the dataset, or "template" to add `add_template_phrases` to regions
            without a phrase.
        class_name_task: Task of a class name: "recognition", "caption" as in the released recipe of SCA, or "both" for
            a random one of the two if the region has no phrase and "recognition" otherwise.
    """

    dataset: ComponentSpec
    split: str = "train"
    weight: float = 1.0
    augment: Augmentation | None = None
    phrases: str = "dataset"
    class_name_task: str = "recognition"

    @classmethod
    def from_dict(cls, table: Any, location: str) -> DataSource:
        """Create a data source from a table [data.NAME].

        Args:
            table: Dataset name or table.
            location: Subject of error messages, such as "data.scenes".

        Returns:
            The data source.

        Raises:
            RegistryError: A value is invalid.
        """
        component = ComponentSpec.from_dict(table, f"dataset of {location}")
        options = dict(component.options)
        option_names = ("split", "weight", "augment", "phrases", "class_name_task")
        split, weight, augment_table, phrases, class_name_task = (options.pop(key, None) for key in option_names)
        kwargs: dict[str, Any] = {}
        if split is not None:
            check_type(f"{location}.split", split, str)
            kwargs["split"] = split
        if weight is not None:
            check_type(f"{location}.weight", weight, float)
            if weight <= 0:
                raise RegistryError(
                    f"{location}.weight is {weight}; expected a number greater than 0, or remove the table"
                )
            kwargs["weight"] = float(weight)
        if augment_table is not None:
            kwargs["augment"] = parse_augmentation(augment_table, f"{location}.augment")
        for key, value, choices in (
            ("phrases", phrases, PHRASE_MODES),
            ("class_name_task", class_name_task, CLASS_NAME_TASKS),
        ):
            if value is not None:
                check_choice(f"{location}.{key}", value, choices)
                kwargs[key] = value
        return cls(ComponentSpec(component.name, options), **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """Return the table [data.NAME]."""
        augment = {} if self.augment is None else {"augment": _tuples_to_lists(vars(self.augment))}
        source_options = {
            "split": self.split,
            "weight": self.weight,
            "phrases": self.phrases,
            "class_name_task": self.class_name_task,
        }
        return self.dataset.to_dict() | source_options | augment


@dataclass(frozen=True)
class ValidationOptions:
    """Options of [validate].

    Args:
        eval_steps: Steps between validations; the last step is always validated.
        dataset: Table of the dataset; by default that of the first data source.
        split: Split of the dataset. Test splits are rejected, because a model selected on a split has no unbiased score
            on it.
        max_images: Maximum number of images.
        prompt_type: One of `sca.evaluation.predictions.PROMPT_TYPES`.
        metrics: Names of metrics; by default all that the data supports.
        metric_for_best_model: Names of scores. The model with the highest score is saved in the folder `best`; the
            first score that is finite counts.
    """

    eval_steps: int = 500
    dataset: Mapping[str, Any] = field(default_factory=dict)
    split: str = "val"
    max_images: int = 100
    prompt_type: str = "box"
    metrics: Sequence[str] = ()
    metric_for_best_model: Sequence[str] = ("cider-d", "class/accuracy")

    @classmethod
    def from_dict(cls, table: Mapping[str, Any], data: DataSource) -> ValidationOptions:
        """Create options from a table [validate].

        Args:
            table: Values by field.
            data: Source of the default dataset.

        Returns:
            The options.

        Raises:
            RegistryError: A key or a value is invalid.
        """
        defaults = {each.name: getattr(cls(), each.name) for each in fields(cls)}
        check_keys("[validate] of the recipe", table, defaults)
        for key, value in table.items():
            if key in ("metrics", "metric_for_best_model"):
                check_list(f"validate.{key}", value, str, minimum=int(key == "metric_for_best_model"))
            else:
                check_same_type(f"validate.{key}", value, defaults[key])
        lists = {key: tuple(value) for key, value in table.items() if isinstance(value, list)}
        options = cls(**{"dataset": data.dataset.to_dict(), **table, **lists})
        for key in ("eval_steps", "max_images"):
            check_range(f"validate.{key}", getattr(options, key), int, 1)
        if options.split.startswith("test"):
            raise RegistryError(
                f"validate.split is {options.split!r}; a test split must not select the model, use 'val'"
            )
        ComponentSpec.from_dict(options.dataset, "dataset of validate")
        return options

    def to_dict(self) -> dict[str, Any]:
        """Return the table [validate]."""
        return _tuples_to_lists(asdict(self))


@dataclass(frozen=True)
class Recipe:
    """Complete description of a training run.

    Args:
        name: Name, which is also the default name of the run folder.
        model: Spec of a new model, or a checkpoint or model name to start from.
        data: Data sources by name.
        train: Options of [train].
        loss: Loss weights by name.
        validate: Options of [validate]; None for no validation.
        summary: One-line description.
        source: Paper or repository that the recipe follows.
    """

    name: str
    model: ModelSpec | str
    data: Mapping[str, DataSource]
    train: TrainOptions
    loss: Mapping[str, float]
    validate: ValidationOptions | None = None
    summary: str = ""
    source: str = ""

    @classmethod
    def read(cls, name: str, assignments: Iterable[str] = ()) -> Recipe:
        """Read a recipe.

        Args:
            name: Name of a bundled recipe, or path of a TOML file.
            assignments: `key=value` changes, such as "train.steps=200".

        Returns:
            The recipe, with its assignments applied.

        Raises:
            RegistryError: The name, a key or a value is invalid.
        """
        text = read_recipe_text(name)
        try:
            table = parse_toml(text)
        except ValueError as error:
            raise RegistryError(f"the recipe {name} is not valid TOML: {error}") from error
        return cls.from_dict(Path(name).stem if name.endswith(".toml") else name, table, assignments)

    @classmethod
    def from_dict(cls, name: str, table: Mapping[str, Any], assignments: Iterable[str] = ()) -> Recipe:
        """Create a recipe from its tables.

        Args:
            name: Name of the recipe.
            table: Tables by section, as in TOML.
            assignments: `key=value` changes, such as "train.steps=200".

        Returns:
            The recipe, with its assignments applied.

        Raises:
            RegistryError: A key or a value is invalid.
        """
        assignments = list(assignments)
        _reject_known_names(table, assignments)
        check_keys("the recipe", table, ("summary", "source", *SECTIONS))
        for key in ("summary", "source"):
            check_type(key, table.get(key, ""), str)
        defaults = {each.name: getattr(TrainOptions(), each.name) for each in fields(TrainOptions)}
        table, assignments = _replace_sections(table, assignments)
        _check_tables(name, table)
        merged = {
            "model": table.get("model", {}),
            "data": table.get("data", {}),
            "train": defaults | table.get("train", {}),
            "loss": DEFAULT_LOSS_WEIGHTS | table.get("loss", {}),
            "validate": {},  # read below: its default dataset is that of the data
        }
        validate_assignments = [each for each in assignments if _get_section(each) == "validate"]
        merged = apply_overrides(merged, [each for each in assignments if each not in validate_assignments])
        _check_tables(name, merged)
        for section, expected in (("train", defaults), ("loss", DEFAULT_LOSS_WEIGHTS)):
            check_keys(f"[{section}] of the recipe", merged[section], expected)
            for key, value in merged[section].items():
                check_same_type(f"{section}.{key}", value, expected[key])
        _check_train_options(merged["train"])
        for key, weight in merged["loss"].items():
            check_range(f"loss.{key}", weight, float)
        if not merged["data"]:
            raise RegistryError(
                f"the recipe {name} has no data; set data=PATH, or add a table [data.NAME] with name = '...'"
            )
        data = {
            key: DataSource.from_dict(validate_table, f"data.{key}") for key, validate_table in merged["data"].items()
        }
        source = next(iter(data.values()))
        validation, model = None, merged["model"]
        if "validate" in table or validate_assignments:
            validate_table = ValidationOptions(dataset=source.dataset.to_dict()).to_dict() | table.get("validate", {})
            validation = ValidationOptions.from_dict(
                apply_overrides({"validate": validate_table}, validate_assignments)["validate"], source
            )
        if merged["train"]["lora_rank"] and not isinstance(model, str):
            raise RegistryError("train.lora_rank adds LoRA to a checkpoint; for a new model, set lora=RANK instead")
        return cls(
            name,
            model if isinstance(model, str) else _read_model(model),
            data,
            TrainOptions(**merged["train"]),
            merged["loss"],
            validation,
            table.get("summary", ""),
            table.get("source", ""),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the tables that reproduce the run, for JSON and TOML."""
        train = {each.name: getattr(self.train, each.name) for each in fields(TrainOptions)}
        data = {name: source.to_dict() for name, source in self.data.items()}
        validation = {} if self.validate is None else {"validate": self.validate.to_dict()}
        model = self.model if isinstance(self.model, str) else self.model.to_dict()
        return {"model": model, "data": data, "train": train, "loss": dict(self.loss), **validation}


def _reject_known_names(table: Mapping[str, Any], assignments: Iterable[str]) -> None:
    """Raise RegistryError, with the key to use, for a key of `RECIPE_KEYS` that is in the wrong section or foreign."""
    train_options = {each.name for each in fields(TrainOptions)}
    problems: list[tuple[str, tuple[str, ...]]] = [
        (f"unknown key {key!r} in the recipe", (key,)) for key in table if key not in SECTIONS
    ]
    train_table = table.get("train")
    if isinstance(train_table, Mapping):
        problems += [(f"unknown key {key!r} in [train]", ("train", key)) for key in train_table]
    for assignment in assignments:
        path = tuple(each.strip() for each in assignment.partition("=")[0].replace("-", "_").split("."))
        problems.append((f"{assignment!r}: unknown key {'.'.join(path)!r}", path))
    for problem, path in problems:
        *sections, name = path
        if (sections == ["train"] and name in train_options) or sections not in ([], ["train"]):
            continue
        if name in RUN_FOLDER_NAMES:
            raise RegistryError(f"{problem}; the run folder is an option: --out FOLDER, or folder=... in Python")
        if name in RECIPE_KEYS and name not in SECTIONS:
            raise RegistryError(f"{problem}; use {RECIPE_KEYS[name]}")


def _tuples_to_lists(table: Mapping[str, Any]) -> dict[str, Any]:
    return {key: list(value) if isinstance(value, tuple) else value for key, value in table.items()}


def _replace_sections(table: Mapping[str, Any], assignments: Iterable[str]) -> tuple[dict[str, Any], list[str]]:
    """Apply assignments of `model`, `data` and entire tables; return the table and the remaining assignments."""
    replaced, remaining = dict(table), []
    for assignment in assignments:
        path, value = parse_assignment(assignment, lambda path: True)  # `apply_overrides` reads the others
        if path == ("model",) or (len(path) == 1 and path[0] in SECTIONS and isinstance(value, Mapping)):
            replaced[path[0]] = value
        elif path == ("data",) and isinstance(value, str):
            from sca.data.custom import detect_data_source

            replaced["data"] = {"own": detect_data_source(value)}
        else:
            remaining.append(assignment)
    return replaced, remaining


def _get_section(assignment: str) -> str:
    return assignment.partition("=")[0].partition(".")[0].strip()


def list_recipes() -> list[str]:
    """Return the names of the bundled recipes."""
    recipe_files = files("sca.training.recipes").iterdir()
    return sorted(file.name.removesuffix(".toml") for file in recipe_files if file.name.endswith(".toml"))


def read_recipe_text(name: str) -> str:
    """Read the TOML text of a bundled recipe or of a file.

    Args:
        name: Name of a bundled recipe, or path of a TOML file.

    Returns:
        The text.

    Raises:
        RegistryError: Neither exists; the message suggests the closest name.
    """
    if name in list_recipes():
        return (files("sca.training.recipes") / f"{name}.toml").read_text("utf-8")
    if name.endswith(".toml") and Path(name).is_file():
        return read_toml_text(Path(name))
    if "=" in name:
        raise RegistryError(
            f"the recipe is missing before {name!r}; write: sca train own-data model=NAME data=FOLDER train.steps=100"
        )
    raise make_unknown_name_error(f"unknown recipe {name!r}, and no such TOML file", name, list_recipes())


def _check_tables(name: str, table: Mapping[str, Any]) -> None:
    """Raise RegistryError for a section that is not a table; the model may be a name."""
    for key in SECTIONS:
        if key == "model" and isinstance(table.get(key), str):
            continue
        if not isinstance(table.get(key, {}), Mapping):
            raise RegistryError(f"the recipe {name}: {key} is {table[key]!r:.80}; expected a table [{key}]")


def _read_model(table: Mapping[str, Any]) -> ModelSpec:
    """Return the spec of a new model; RegistryError for invalid values, and for LoRA that is not trainable."""
    spec = ModelSpec.from_dict(table)
    if spec.lora and "lora" not in spec.trainable:
        names = ", ".join(f'"{name}"' for name in (*spec.trainable, "lora") if name != "language_model")
        rank = spec.lora["rank"] if isinstance(spec.lora, Mapping) else spec.lora
        raise RegistryError(
            f"lora={rank} is not trainable, because `trainable` does not contain 'lora'; set trainable=[{names}]"
        )
    return spec


def _check_train_options(train: Mapping[str, Any]) -> None:
    """Raise RegistryError for a value of [train] that is out of range; types are already checked."""
    for key in POSITIVE_COUNT_OPTIONS:
        check_range(f"train.{key}", train[key], int, 1)
    for key in COUNT_OPTIONS:
        check_range(f"train.{key}", train[key], int)
    check_range("train.seed", train["seed"], int, 0, MAX_SEED)
    for key in NON_NEGATIVE_OPTIONS:
        check_range(f"train.{key}", train[key], float)
    if train["adam_beta2"] >= 1:
        raise RegistryError(f"train.adam_beta2 is {train['adam_beta2']}; expected a number less than 1")
    for group, multiplier in train["lr_multipliers"].items():
        check_range(f"train.lr_multipliers.{group}", multiplier, float)
    for key in FRACTION_OPTIONS:
        check_range(f"train.{key}", train[key], float, 0, 1)
    _check_prompt_weights(train["prompt_weights"])
    check_choice("train.precision", train["precision"], PRECISIONS)
    if not train["feature_cache_dir"]:
        raise RegistryError('train.feature_cache_dir is empty; use a folder, "auto" or "none"')


def _check_prompt_weights(prompt_weights: Mapping[str, Any]) -> None:
    check_keys("train.prompt_weights", prompt_weights, PROMPT_KINDS)
    for kind, weight in prompt_weights.items():
        check_range(f"train.prompt_weights.{kind}", weight, float)
    if not any(prompt_weights.values()):
        raise RegistryError("train.prompt_weights are all 0; set the weight of one prompt type above 0")


def parse_augmentation(table: Any, location: str) -> Augmentation:
    """Create an augmentation from a table of options.

    Args:
        table: Values by field of `Augmentation`.
        location: Subject of error messages, such as "data.scenes.augment".

    Returns:
        The augmentation.

    Raises:
        RegistryError: A key or a value is invalid.
    """
    from sca.training.augmentation import Augmentation  # deferred: listing recipes must not import NumPy

    defaults = {each.name: getattr(Augmentation(), each.name) for each in fields(Augmentation)}
    check_keys(location, table, defaults)
    for key, value in table.items():
        check_same_type(f"{location}.{key}", value, list(defaults[key]) if key == "scale_range" else defaults[key])
        if key == "side_words":
            check_choice(f"{location}.side_words", value, SIDE_WORD_MODES)
        elif key == "scale_range":
            check_list(f"{location}.scale_range", value, float)
            if value and not (len(value) == 2 and 0 < value[0] <= value[1]):
                raise RegistryError(
                    f"{location}.scale_range is {value!r}; expected the minimum and maximum factor, [0.1, 2.0]"
                )
        else:
            check_range(f"{location}.{key}", value, float, 0, 1)
    options: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in table.items()}
    return Augmentation(**options)
