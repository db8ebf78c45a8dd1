"""Train a recipe: open its data, build its model, and run the trainer in a run folder."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from sca_registry import RegistryError, language_models
from sca_registry.contracts import Dataset
from sca_registry.messages import unknown
from tqdm.auto import tqdm
from transformers import PrinterCallback, Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from sca.checkpoints.load import load, load_without_weights
from sca.checkpoints.native import check_writable, save
from sca.checkpoints.state import weights_hash
from sca.composition import build
from sca.data.summary import count_left_out, summarize_dataset
from sca.inference.processor import Processor
from sca.io.run_folder import RunFolder, existing_paths
from sca.model import SegmentCaptioner
from sca.training.auxiliary import Attributes
from sca.training.examples import ExampleStream, Mixture, collate
from sca.training.features import FeatureCache
from sca.training.log import TrainingLog
from sca.training.module import TrainingModule, check_rates
from sca.training.recipe import LOSSES, Recipe, TrainOptions
from sca.training.sharding import gathered
from sca.training.sources import open_sources, open_validation, report_sources
from sca.training.trainer import CaptionTrainer
from sca.training.validation import ValidationCallback

MODEL_FILES = ("spec.json", "weights.safetensors", "origin.json", "tokenizer/*")
STATE = ("best.json", "checkpoint-#/*", "validation/step-#/*")  # of a run that is not finished
OUTPUTS = (*STATE, *(f"{folder}/{name}" for folder in ("model", "best") for name in MODEL_FILES))
NO_TOKENIZER = "the language model has no tokenizer to learn words with: language_model.tokenizer=FOLDER"
LOOSE = tuple(  # what changes no step
    f"train.{name}"
    for name in ("accumulate", "cache_features", "chunk", "processes", "report_to", "save", "sharded", "workers")
)


def train(
    recipe: Recipe | str | Path,
    folder: str | Path | None = None,
    resume: bool = True,
    quiet: bool = False,
    *,
    changes: Sequence[str] = (),
    overwrite: bool = False,
    set_aside: bool | None = None,
    report: Callable[[str], None] = lambda line: None,
    trust_remote_code: bool = False,
    allow_external: bool = False,
) -> SegmentCaptioner:
    """Train a recipe and write `folder/model`, and `folder/best` if it is validated.

    Works alone or as one of several processes that a launcher started (torchrun, accelerate launch): each takes its
    share of a step's images, and the first writes. However many there are, every step learns the same.

    Args:
        recipe: A recipe, the name of a shipped one, or a TOML file.
        folder: The run folder (default: runs/NAME); what an interrupted run of the same recipe and data left there is
            continued.
        resume: False starts the same recipe over.
        quiet: Show no progress bar and no training log.
        changes: Changes to the recipe, such as "train.steps=200".
        overwrite: Delete what a run of another recipe or other data wrote into the folder.
        set_aside: Rename the folder of such a run instead (default: if no folder is given).
        report: Called with each line that a person should read: what the data contains and what was left out of it,
            what cannot choose the best model, and whether another run was set aside.
        trust_remote_code: What the checkpoint that training begins with may do, see `sca.load`.
        allow_external: As `trust_remote_code`.

    Returns:
        The trained model.

    Raises:
        ValueError: The recipe, or something that it names, cannot be read.
        OutputError: The folder contains another run, files that `sca train` did not write, or an input.
        LockedError: Another process trains there.
    """
    if not isinstance(recipe, Recipe):
        recipe = Recipe.read(str(recipe), changes)
    elif changes:
        recipe = Recipe.from_dict(recipe.name, recipe.to_dict(), changes)
    if set_aside is None:
        set_aside = folder is None and not overwrite
    folder = Path("runs") / recipe.name if folder is None else folder
    with ExitStack() as stack:
        first = os.environ.get("RANK", "0") == "0"
        run_folder = stack.enter_context(RunFolder(folder, "train", OUTPUTS)) if first else None
        conflict = {"overwrite": overwrite, "set_aside": set_aside}
        agreed = {"trust_remote_code": trust_remote_code, "allow_external": allow_external}
        model = _train(recipe, Path(folder), run_folder, resume, quiet, conflict, agreed, report)
        if run_folder is not None:
            run_folder.finish()
            if run_folder.moved_to is not None:
                report(f"{folder} contained another run, which is now in {run_folder.moved_to}")
    return model


def _train(
    recipe: Recipe,
    folder: Path,
    run_folder: RunFolder | None,
    resume: bool,
    quiet: bool,
    conflict: Mapping[str, bool],
    agreed: Mapping[str, bool],
    report: Callable[[str], None],
) -> SegmentCaptioner:
    """Train as one process; the first has a run folder."""
    for name in ("model", "best"):
        check_writable(folder / name)
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")  # of 1x1 convolutions: harmless
    warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated")  # accelerate knows no other name for it
    torch.manual_seed(recipe.train.seed)
    processes = int(os.environ.get("WORLD_SIZE", 1))
    share = images_each(recipe.train, processes)
    sharded = _asked_to_shard(recipe) and processes > 1
    if sharded:
        check_shardable(recipe)
    model, stream, attributes, unseen = prepare(recipe, **agreed)
    opened = _name_data(recipe, stream, unseen)
    training_module = TrainingModule(model, recipe.loss, attributes, recipe.train.chunk_size)
    check_rates(recipe.train, training_module)
    budget = budget_each(recipe.train, processes)
    trainer = CaptionTrainer(
        model=training_module,
        args=_arguments(recipe, folder, share),
        train_dataset=stream,
        data_collator=lambda examples: {"batch": collate(examples, model.language_model.tokenizer.pad_token_id, budget)},
        rates=recipe.train.lr_multipliers,
        sharded=sharded,
    )
    trainer.remove_callback(PrinterCallback)  # prints dictionaries
    if not quiet:
        trainer.add_callback(TrainingLog(LOSSES, recipe.validate.best if recipe.validate else ()))
    if recipe.validate is not None and len(unseen):
        trainer.add_callback(ValidationCallback(trainer, recipe.validate, unseen, folder, report))
    if recipe.train.cache_features:
        fill_cache(model.to(trainer.args.device), stream, trainer, quiet)
    if run_folder is not None:
        inputs = existing_paths(recipe.to_dict())
        run_folder.begin(_settings(recipe, model, stream), OUTPUTS, inputs, loose=LOOSE, **conflict)
        if not resume or get_last_checkpoint(str(folder)) is None:
            run_folder.delete_outputs(STATE)
        report_sources(opened, report, quiet)
        if unseen is not None and not len(unseen):
            report(f"validate ({recipe.validate.split}): nothing is validated; {summarize_dataset(unseen)}")
    trainer.accelerator.wait_for_everyone()
    last = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    before = {name: count_left_out(dataset) for name, dataset in opened.items()}
    trainer.train(resume_from_checkpoint=last)
    if run_folder is not None:  # images that were found to be damaged when they were opened
        report_sources({name: each for name, each in opened.items() if count_left_out(each) != before[name]}, report)
    tensors = gathered(model.eval().state_dict())
    if trainer.is_world_process_zero():
        save(model, folder / "model", tensors=tensors)
    return model


def _settings(recipe: Recipe, model: SegmentCaptioner, stream: Mixture) -> dict[str, Any]:
    """What a run is of: the recipe, the content of its data, and the weights that it starts from."""
    table = recipe.to_dict()
    options = {f"train.{name}": value for name, value in table.pop("train").items()}
    contents = [getattr(each.dataset, "hash", None) for each in stream.streams]
    weights = weights_hash(model) if isinstance(recipe.model, str) else None
    return {**table, **options, "contents": contents, "weights": weights}


def _asked_to_shard(recipe: Recipe) -> bool:
    """Whether the recipe or `accelerate launch --use_fsdp` asks for it; the latter's other settings do not count."""
    asked = os.environ.pop("ACCELERATE_USE_FSDP", "false").lower() == "true"
    return asked or recipe.train.sharded


def images_each(options: TrainOptions, processes: int) -> int:
    """How many images each process sees at a time. Raises RegistryError if a step's images cannot be shared out."""
    parts = processes * options.gradient_accumulation_steps
    if options.batch_size % parts:
        raise RegistryError(
            f"train.images={options.batch_size} is no multiple of {processes} processes x "
            f"train.accumulate={options.gradient_accumulation_steps}"
        )
    return options.batch_size // parts


def budget_each(options: TrainOptions, processes: int) -> int:
    """How many regions each process sees at a time, 0 for any number. RegistryError if there is not one for each."""
    parts = processes * options.gradient_accumulation_steps
    if 0 < options.max_regions_per_step < parts:
        raise RegistryError(
            f"train.budget={options.max_regions_per_step} is less than a region for each of {processes} processes x "
            f"train.accumulate={options.gradient_accumulation_steps}"
        )
    return options.max_regions_per_step // parts


def prepare(
    recipe: Recipe, trust_remote_code: bool = False, allow_external: bool = False
) -> tuple[SegmentCaptioner, Mixture, Attributes, Dataset | None]:
    """Open and build everything that a recipe names, before anything is trained.

    Returns:
        The model to train, the examples, the attributes that the auxiliary losses name, and the dataset of [validate]
        if the recipe has one.

    Raises:
        ValueError: What parts, checkpoints and datasets raise for what the recipe asks of them.
    """
    unseen, sources = _open_data(recipe)
    if isinstance(recipe.model, str):
        model = load(recipe.model, trust_remote_code=trust_remote_code, allow_external=allow_external)
    else:
        model = build(recipe.model)
    if recipe.train.sharded:
        check_shardable(recipe)
    if model.language_model.tokenizer is None:
        raise RegistryError(NO_TOKENIZER)
    if recipe.train.cache_features:
        check_cacheable(recipe, model)
    return model, *_stream(recipe, model, list(sources.values())), unseen


def check_recipe(recipe: Recipe, trust_remote_code: bool = False, allow_external: bool = False) -> None:
    """Check everything in a recipe that needs no weights, before several processes load them.

    Args:
        recipe: As for `prepare`, like the others.

    Raises:
        ValueError: What components, checkpoints and datasets raise for what the recipe asks of them.
    """
    _, sources = _open_data(recipe)
    if isinstance(recipe.model, str):
        agreed = {"trust_remote_code": trust_remote_code, "allow_external": allow_external}
        model = load_without_weights(recipe.model, **agreed)
    else:
        model = build(recipe.model, "meta")
        part = recipe.model.language_model
        options = {**language_models.card(part.name).options, **part.options}
        if model.language_model.tokenizer is None and not (options.get("weights") or options.get("tokenizer")):
            raise RegistryError(NO_TOKENIZER)
    if recipe.train.sharded:
        check_shardable(recipe)
    if recipe.train.cache_features:
        check_cacheable(recipe, model)
    attributes = Attributes.of(list(sources.values()))
    check_rates(recipe.train, TrainingModule(model, recipe.loss, attributes))
    _reporters(recipe.train.report_to)


def _open_data(recipe: Recipe) -> tuple[Dataset | None, dict[str, Dataset]]:
    """Open the dataset of [validate], if the recipe has one, and those to train on."""
    unseen = open_validation(recipe.validate) if recipe.validate is not None else None
    sources = open_sources(recipe)
    for name, dataset in sources.items():
        _check_readable(name, dataset)
    return unseen, sources


def _check_readable(name: str, dataset: Dataset) -> None:
    """Open one image, so that a dataset all of whose images are damaged is refused before the first step."""
    try:
        dataset[0]
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _name_data(recipe: Recipe, stream: Mixture, unseen: Dataset | None) -> dict[str, Dataset]:
    """The datasets of a run that have images, by what messages call them."""
    names = [f"data.{name} ({source.split})" for name, source in recipe.data.items()]
    opened = dict(zip(names, (each.dataset for each in stream.streams), strict=True))
    if unseen is not None and len(unseen):
        opened[f"validate ({recipe.validate.split})"] = unseen
    return opened


def check_shardable(recipe: Recipe) -> None:
    """Raises RegistryError for what needs a whole model in every process."""
    if recipe.validate is not None:
        raise RegistryError("a sharded model is not validated while it trains: leave [validate] out")


def check_cacheable(recipe: Recipe, model: SegmentCaptioner) -> None:
    """Raise RegistryError if features change during training, by the encoder or by augmentation."""
    if any(parameter.requires_grad for parameter in model.encoder.parameters()):
        raise RegistryError("train.cache_features keeps what a frozen encoder makes, and this one trains: leave it out")
    for name, source in recipe.data.items():
        if source.augment is not None:
            raise RegistryError(
                f"train.cache_features needs pictures as they are, and data.{name}.augment changes them"
            )


def fill_cache(model: SegmentCaptioner, stream: Mixture, trainer: Trainer, quiet: bool) -> None:
    """Encodes the pictures that the stream will draw and whose features are not there, each process its share."""
    drawn = stream.samples()
    mine = drawn[trainer.args.process_index :: trainer.args.world_size]
    bar = tqdm(total=len(mine), desc="features", disable=quiet or not trainer.is_world_process_zero() or None)
    cache = stream.streams[0].cache
    cache.fill(model, (dataset[index].image for dataset, index in mine), bar.update)
    bar.close()
    trainer.accelerator.wait_for_everyone()


def _arguments(recipe: Recipe, folder: Path, share: int) -> TrainingArguments:
    options = recipe.train
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=options.steps,
        per_device_train_batch_size=share,
        gradient_accumulation_steps=options.gradient_accumulation_steps,
        learning_rate=options.learning_rate,
        adam_beta2=options.adam_beta2,
        weight_decay=options.weight_decay,
        warmup_steps=min(options.warmup_steps, options.steps - 1),  # else a short run never gets to its learning rate
        max_grad_norm=options.max_grad_norm,
        lr_scheduler_type="cosine",
        bf16=options.precision == "bfloat16",
        fp16=options.precision == "float16",
        dataloader_num_workers=options.num_workers,
        save_steps=options.save_steps,
        logging_steps=max(1, min(50, options.steps // 10)),
        disable_tqdm=True,  # `TrainingLog` has the bar
        report_to=_reporters(options.report_to),
        ddp_broadcast_buffers=False,
        seed=options.seed,
        remove_unused_columns=False,
        ddp_find_unused_parameters=True,
        use_cpu=not torch.cuda.is_available(),
    )


def _stream(recipe: Recipe, model: SegmentCaptioner, sets: Sequence[Dataset]) -> tuple[Mixture, Attributes]:
    """The examples of all data of a recipe, and the attributes that its auxiliary losses name."""
    options = recipe.train
    sources = recipe.data.values()
    weights = [source.weight for source in sources]
    attributes = Attributes.of(sets)
    length = options.steps * options.batch_size
    cache = FeatureCache(options.cache_features, model) if options.cache_features else None
    streams = [
        ExampleStream(
            dataset,
            Processor.of(model.encoder),
            model.language_model.tokenizer,
            options,
            round(length * source.weight / sum(weights)),
            seed=options.seed,
            attributes=attributes.own | attributes.between,
            augment=source.augment,
            phrases=source.phrases,
            names=source.names,
            cache=cache,
        )
        for dataset, source in zip(sets, sources, strict=True)
    ]
    return Mixture(streams, weights, length, options.seed, options.prompts, options.batch_size), attributes


def _reporters(names: str) -> list[str]:
    """What transformers is to report to. Raises RegistryError for what is unknown or not installed."""
    from transformers.integrations import get_available_reporting_integrations
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    if names == "none":
        return []
    installed = get_available_reporting_integrations()
    if names == "auto":
        return [name for name in ("tensorboard",) if name in installed]
    wanted = [name.strip() for name in names.split(",")]
    for name in wanted:
        if name not in INTEGRATION_TO_CALLBACK:
            raise unknown(f"train.report_to={names!r}: nothing is called {name!r}", name, INTEGRATION_TO_CALLBACK)
        if name not in installed:
            raise RegistryError(f"train.report_to={names!r}: {name} is not installed: pip install {name}")
    return wanted
