"""Train a recipe: open its data, build its model, and run the trainer in a run folder."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from sca_registry import RegistryError, language_models
from sca_registry.contracts import Dataset
from sca_registry.errors import make_unknown_name_error
from transformers import PrinterCallback, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from sca.builder import build
from sca.checkpoints.load import load, load_without_weights
from sca.checkpoints.native import check_writable, save
from sca.checkpoints.tensors import hash_weights
from sca.data.summary import count_skipped, summarize_dataset
from sca.hints import check_argument_names
from sca.inference.processor import Processor
from sca.io.run_folder import RunFolder, iter_existing_paths
from sca.io.validation import check_range
from sca.language_models.quantization import check_quantization
from sca.model import SegmentCaptioner
from sca.training.auxiliary_losses import AttributeValues
from sca.training.datasets import open_training_datasets, open_validation_dataset, report_datasets
from sca.training.examples import ExampleMixture, ExampleStream, collate_examples
from sca.training.feature_cache import check_cacheable, use_feature_cache
from sca.training.log import TrainingLog
from sca.training.module import TrainingModule, check_lr_multipliers
from sca.training.recipe import DEFAULT_LOSS_WEIGHTS, RECIPE_KEYS, Recipe, TrainOptions
from sca.training.sharding import gather_tensors
from sca.training.trainer import CaptionTrainer
from sca.training.validation import ValidationCallback

MODEL_FILES = ("spec.json", "weights.safetensors", "origin.json", "uncertainty.json", "tokenizer/*")
RESUME_FILES = ("best.json", "checkpoint-#/*", "validation/step-#/*")  # files of an unfinished run
OUTPUT_FILES = (*RESUME_FILES, *(f"{folder}/{name}" for folder in ("model", "best") for name in MODEL_FILES))
NO_TOKENIZER_MESSAGE = "the language model has no tokenizer; set language_model.tokenizer=FOLDER"
CHANGE_HINTS = {  # argument that `train` does not have -> the change to the recipe
    name: f'Change the recipe: changes=["{key}=VALUE"].' for name, key in RECIPE_KEYS.items()
}
ONE_PROCESS_HINT = ", or train in one process: train.num_processes=1, on GPUs with CUDA_VISIBLE_DEVICES=0"
RESULT_NEUTRAL_OPTIONS = tuple(  # options that do not change the result of a step
    f"train.{name}"
    for name in (
        "chunk_size",
        "feature_cache_dir",
        "fsdp",
        "gradient_accumulation_steps",
        "num_processes",
        "num_workers",
        "report_to",
        "save_steps",
    )
)


@check_argument_names(hints=CHANGE_HINTS)
def train(
    recipe: Recipe | str | Path,
    folder: str | Path | None = None,
    resume: bool = True,
    quiet: bool = False,
    *,
    changes: Sequence[str] = (),
    overwrite: bool = False,
    rename_existing: bool | None = None,
    report: Callable[[str], None] = lambda line: None,
    stop_step: int | None = None,
    trust_remote_code: bool = False,
    allow_external: bool = False,
) -> SegmentCaptioner:
    """Train a model from a recipe.

    Writes the final model to `folder/model` and, if the recipe has validation, the best model to `folder/best`.

    Runs as a single process, or under torchrun or accelerate launch. Each process takes its share of each batch, and
    rank 0 writes the files. The gradients of a step do not depend on the
    number of processes.

    Args:
        recipe: Recipe, name of a bundled recipe, or path of a TOML file.
        folder: Run folder; "runs/NAME" by default. If it contains an interrupted run with the same recipe and data,
            that run is resumed.
        resume: Resume an interrupted run; False starts it over.
        quiet: Suppress the progress bar and the training log.
        changes: Overrides of the recipe, such as "train.steps=200".
        overwrite: If the folder contains a run with a different recipe or different data, delete the outputs of that
            run.
        rename_existing: If the folder contains a run with a different recipe or different data, rename the folder
            instead of failing. Defaults to True if neither `folder` nor `overwrite` is set.
        report: Called with each message for the user: summaries of the datasets and their skipped items, a warning if
            a score cannot be used to select the best model, and the new path of a renamed run folder.
        stop_step: Stop after this step, with the learning rate schedule of the recipe. A later call with the same
            folder and a later stop, or none, continues as if there had been no stop.
        trust_remote_code: Allow the checkpoint that training starts from to run its own code; see `sca.load`.
        allow_external: Allow that checkpoint to refer to files outside its folder, to other repositories and to URLs.

    Returns:
        The trained model in eval mode.

    Raises:
        TypeError: Unknown keyword argument; the message suggests the closest one.
        ValueError: The recipe, or a file or component that it refers to, cannot be read; `stop_step` is not a positive
            integer; or the run to resume is after `stop_step`.
        OutputError: The folder contains a different run, files that `sca train` did not write, or an input of this run,
            such as its dataset.
        LockedError: Another process is training in the folder.
    """
    if not isinstance(recipe, Recipe):
        recipe = Recipe.read(str(recipe), changes)
    elif changes:
        recipe = Recipe.from_dict(recipe.name, recipe.to_dict(), changes)
    if stop_step is not None:
        check_range("stop_step", stop_step, int, 1)
    if rename_existing is None:
        rename_existing = folder is None and not overwrite
    folder = Path("runs") / recipe.name if folder is None else folder
    with ExitStack() as stack:
        is_first = os.environ.get("RANK", "0") == "0"
        run_folder = stack.enter_context(RunFolder(folder, "train", OUTPUT_FILES)) if is_first else None
        conflict_options = {"overwrite": overwrite, "rename_earlier": rename_existing}
        trust_options = {"trust_remote_code": trust_remote_code, "allow_external": allow_external}
        model = _train_process(
            recipe, Path(folder), run_folder, resume, quiet, conflict_options, trust_options, report, stop_step
        )
        if run_folder is not None:
            run_folder.finish()
            if run_folder.earlier_run_path is not None:
                report(f"{folder} contained a different run, which is now in {run_folder.earlier_run_path}")
    return model


def _train_process(
    recipe: Recipe,
    folder: Path,
    run_folder: RunFolder | None,
    resume: bool,
    quiet: bool,
    conflict_options: Mapping[str, bool],
    trust_options: Mapping[str, bool],
    report: Callable[[str], None],
    stop_step: int | None,
) -> SegmentCaptioner:
    """Train as one process; only the first has a run folder."""
    for name in ("model", "best"):
        check_writable(folder / name)
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")  # harmless: 1x1 convolutions
    warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated")  # accelerate has no replacement yet
    torch.manual_seed(recipe.train.seed)
    num_processes = int(os.environ.get("WORLD_SIZE", 1))
    images_per_process = compute_images_per_process(recipe.train, num_processes)
    sharded = _should_shard(recipe) and num_processes > 1
    if sharded:
        check_shardable(recipe)
    model, mixture, attributes, validation_dataset = prepare_training(recipe, **trust_options)
    datasets_by_name = _collect_datasets_by_name(recipe, mixture, validation_dataset)
    training_module = TrainingModule(
        model, recipe.loss, attributes, recipe.train.chunk_size, recipe.train.label_smoothing
    )
    check_lr_multipliers(recipe.train, training_module)
    max_regions = compute_regions_per_process(recipe.train, num_processes)
    tokenizer = model.language_model.tokenizer
    assert tokenizer is not None  # checked by `prepare_training`
    trainer = CaptionTrainer(
        model=training_module,
        args=_build_training_arguments(recipe, folder, images_per_process),
        train_dataset=mixture,
        data_collator=lambda examples: {
            "batch": collate_examples(examples, tokenizer.pad_token_id, max_regions, model.positions_per_region)
        },
        lr_multipliers=recipe.train.lr_multipliers,
        sharded=sharded,
    )
    trainer.remove_callback(PrinterCallback)  # `TrainingLog` prints instead
    if not quiet:
        trainer.add_callback(
            TrainingLog(DEFAULT_LOSS_WEIGHTS, recipe.validate.metric_for_best_model if recipe.validate else ())
        )
    if stop_step is not None:
        trainer.add_callback(StopCallback(stop_step))
    if recipe.validate is not None and validation_dataset is not None and len(validation_dataset):
        trainer.add_callback(ValidationCallback(trainer, recipe.validate, validation_dataset, folder, report))
    use_feature_cache(recipe, model.to(trainer.args.device), mixture, trainer, report, quiet)
    if run_folder is not None:
        input_paths = iter_existing_paths(recipe.to_dict())
        run_folder.begin_run(
            _collect_run_settings(recipe, model, mixture),
            OUTPUT_FILES,
            input_paths,
            ignored_settings=RESULT_NEUTRAL_OPTIONS,
            **conflict_options,
        )
        if not resume or get_last_checkpoint(str(folder)) is None:
            run_folder.delete_outputs(RESUME_FILES)
        report_datasets(datasets_by_name, report, quiet)
        if recipe.validate is not None and validation_dataset is not None and not len(validation_dataset):
            report(
                f"validate ({recipe.validate.split}): no validation, because the dataset is empty; "
                f"{summarize_dataset(validation_dataset)}"
            )
    trainer.accelerator.wait_for_everyone()
    last_checkpoint = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    last_step = read_checkpoint_step(folder)
    if stop_step is not None and last_step > stop_step:
        raise RegistryError(
            f"{folder} contains a run at step {last_step}, after stop_step={stop_step}; choose a different folder, or "
            "set resume=False"
        )
    skipped_before = {name: count_skipped(dataset) for name, dataset in datasets_by_name.items()}
    if last_checkpoint is not None and last_step == stop_step:
        trainer.load_checkpoint(last_checkpoint)
    else:
        trainer.train(resume_from_checkpoint=last_checkpoint)
    if run_folder is not None:  # images found to be damaged during training
        report_datasets(
            {name: each for name, each in datasets_by_name.items() if count_skipped(each) != skipped_before[name]},
            report,
        )
    tensors = gather_tensors(model.eval().state_dict())
    if trainer.is_world_process_zero():
        save(model, folder / "model", tensors=tensors)
    return model


def read_checkpoint_step(folder: Path) -> int:
    """Return the step of the last checkpoint in a run folder; 0 for none."""
    checkpoint = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    return int(checkpoint.rpartition("-")[2]) if checkpoint else 0


class StopCallback(TrainerCallback):
    """Save a checkpoint and stop after a step, without changing the learning rate schedule.

    Args:
        step: The last step.
    """

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step >= self.step:
            control.should_save = control.should_training_stop = True


def _collect_run_settings(recipe: Recipe, model: SegmentCaptioner, mixture: ExampleMixture) -> dict[str, Any]:
    """Collect what identifies a run: the recipe, the hashes of its data, and of the weights it starts from."""
    table = recipe.to_dict()
    options = {f"train.{name}": value for name, value in table.pop("train").items()}
    dataset_hashes = [getattr(each.dataset, "content_hash", None) for each in mixture.streams]
    weights_hash = hash_weights(model) if isinstance(recipe.model, str) else None
    return {**table, **options, "dataset_hashes": dataset_hashes, "initial_weights_hash": weights_hash}


def _should_shard(recipe: Recipe) -> bool:
    """Return whether the recipe or `accelerate launch --use_fsdp` requests sharding; its other settings are ignored."""
    is_requested = os.environ.pop("ACCELERATE_USE_FSDP", "false").lower() == "true"
    return is_requested or recipe.train.fsdp


def compute_images_per_process(options: TrainOptions, num_processes: int) -> int:
    """Return the number of images per process and accumulated batch.

    Args:
        options: Options of [train].
        num_processes: Number of processes.

    Returns:
        The number of images.

    Raises:
        RegistryError: `batch_size` is not a multiple of processes x accumulated batches.
    """
    num_parts = num_processes * options.gradient_accumulation_steps
    if options.batch_size % num_parts:
        raise RegistryError(
            f"train.batch_size={options.batch_size} is not a multiple of {num_processes} processes x "
            f"train.gradient_accumulation_steps={options.gradient_accumulation_steps}; change one of them"
            f"{ONE_PROCESS_HINT if num_processes > 1 else ''}"
        )
    return options.batch_size // num_parts


def compute_regions_per_process(options: TrainOptions, num_processes: int) -> int:
    """Return the maximum number of regions per process and accumulated batch; 0 for no limit.

    Args:
        options: Options of [train].
        num_processes: Number of processes.

    Returns:
        The number of regions, or 0.

    Raises:
        RegistryError: `max_regions_per_step` is less than processes x accumulated batches.
    """
    num_parts = num_processes * options.gradient_accumulation_steps
    if 0 < options.max_regions_per_step < num_parts:
        raise RegistryError(
            f"train.max_regions_per_step={options.max_regions_per_step} is too small; set at least {num_parts}: one "
            f"region for each process ({num_processes}) and accumulated batch ({options.gradient_accumulation_steps})"
        )
    return options.max_regions_per_step // num_parts


def prepare_training(
    recipe: Recipe, trust_remote_code: bool = False, allow_external: bool = False
) -> tuple[SegmentCaptioner, ExampleMixture, AttributeValues, Dataset | None]:
    """Open and build everything that a recipe names.

    Args:
        recipe: Recipe.
        trust_remote_code: Allow the checkpoint that training starts from to run its own code; see `sca.load`.
        allow_external: Allow that checkpoint to refer to files outside its folder, to other repositories and to URLs.

    Returns:
        The model to train, the examples, the attributes that the auxiliary losses predict, and the dataset of
        [validate]; None without that table.

    Raises:
        ValueError: A component, checkpoint or dataset rejects its options.
    """
    validation_dataset, sources = _open_datasets(recipe)
    if isinstance(recipe.model, str):
        model = load(recipe.model, trust_remote_code=trust_remote_code, allow_external=allow_external)
        if recipe.train.lora_rank:
            _add_lora(model, recipe)
    else:
        model = build(recipe.model)
    check_quantization(model.spec, training=True)
    _convert_lora_to_float32(model)
    if recipe.train.fsdp:
        check_shardable(recipe)
    if model.language_model.tokenizer is None:
        raise RegistryError(NO_TOKENIZER_MESSAGE)
    check_cacheable(recipe, model)
    if recipe.train.question_prob:
        _check_question_lengths(recipe, model, sources)
        model.spec = replace(model.spec, questions=True)
    if recipe.train.length_prob:
        model.spec = replace(model.spec, lengths=True)
    return model, *_build_mixture(recipe, model, list(sources.values())), validation_dataset


def check_recipe(recipe: Recipe, trust_remote_code: bool = False, allow_external: bool = False) -> None:
    """Check everything in a recipe that needs no weights, before several processes load them.

    Args:
        recipe: Recipe.
        trust_remote_code: As for `prepare_training`.
        allow_external: As for `prepare_training`.

    Raises:
        ValueError: A component, checkpoint or dataset rejects its options.
    """
    _, sources = _open_datasets(recipe)
    if isinstance(recipe.model, str):
        trust_options = {"trust_remote_code": trust_remote_code, "allow_external": allow_external}
        model = load_without_weights(recipe.model, **trust_options)
    else:
        model = build(recipe.model, "meta")
        component = recipe.model.language_model
        options = {**language_models.get_card(component.name).options, **component.options}
        if model.language_model.tokenizer is None and not (options.get("weights") or options.get("tokenizer")):
            raise RegistryError(NO_TOKENIZER_MESSAGE)
    check_quantization(model.spec, training=True)
    if recipe.train.fsdp:
        check_shardable(recipe)
    check_cacheable(recipe, model)
    attributes = AttributeValues.from_datasets(list(sources.values()))
    check_lr_multipliers(recipe.train, TrainingModule(model, recipe.loss, attributes))
    _resolve_reporters(recipe.train.report_to)


def _open_datasets(recipe: Recipe) -> tuple[Dataset | None, dict[str, Dataset]]:
    """Open the dataset of [validate], if the recipe has one, and the training datasets."""
    validation_dataset = open_validation_dataset(recipe.validate) if recipe.validate is not None else None
    sources = open_training_datasets(recipe)
    for name, dataset in sources.items():
        _check_readable(name, dataset)
    _check_has_texts(recipe, sources)
    return validation_dataset, sources


def _check_has_texts(recipe: Recipe, sources: Mapping[str, Dataset]) -> None:
    """Raise RegistryError if a dataset has only questions and none are used, or if none has any and some are used."""
    has_questions = False
    for name, dataset in sources.items():
        metadata = getattr(dataset, "metadata", {})
        num_without_text = metadata.get("images_with_questions_only", 0)
        has_only_questions = num_without_text and num_without_text == metadata["images"]
        if has_only_questions and not metadata["questions"]:
            raise RegistryError(f"{name} has no captions, names or questions with answers; use other training data")
        if has_only_questions and not recipe.train.question_prob:
            raise RegistryError(f"{name} has questions, but no captions and no names; set train.question_prob above 0")
        has_questions = has_questions or bool(metadata.get("questions") or getattr(dataset, "has_questions", False))
        has_questions = has_questions or bool(dataset[0].questions)
    if recipe.train.question_prob and not has_questions:
        raise RegistryError(
            f"train.question_prob is {recipe.train.question_prob}, but no dataset has questions; set it to 0, or add "
            "questions: scenes have them with data.scenes.questions=true"
        )


def _add_lora(model: SegmentCaptioner, recipe: Recipe) -> None:
    """Add trainable LoRA adapters to the language model of a checkpoint; raise RegistryError if it has adapters."""
    if model.spec.lora is not None:
        raise RegistryError(f"the checkpoint {recipe.model} has LoRA already; set train.lora_rank=0 to train it")
    trainable = tuple(dict.fromkeys((*model.spec.trainable, "lora")))
    model.spec = replace(model.spec, lora=recipe.train.lora_rank, trainable=trainable)
    assert isinstance(model.spec.lora, Mapping)  # completed by the spec
    model.language_model.add_lora(**model.spec.lora)
    model.freeze_parameters()


def _convert_lora_to_float32(model: SegmentCaptioner) -> None:
    """Convert LoRA adapters to float32, as peft does: updates are too small for the precision of bfloat16."""
    for name, parameter in model.named_parameters():
        if "lora_" in name and parameter.dtype in (torch.bfloat16, torch.float16):
            parameter.data = parameter.data.float()


def _check_question_lengths(recipe: Recipe, model: SegmentCaptioner, datasets: Mapping[str, Dataset]) -> None:
    """Raise RegistryError for a question that leaves the language model no positions for its answer."""
    max_positions = getattr(model.language_model, "max_positions", None)
    if not recipe.train.question_prob or max_positions is None:
        return
    max_question = max_positions - recipe.train.max_tokens
    for name, dataset in datasets.items():
        questions = dataset.iter_questions() if hasattr(dataset, "iter_questions") else [dataset[0].questions]
        for text in dict.fromkeys(question.text for image_questions in questions for question in image_questions):
            length = model.count_question_positions(model.encode_question(text))
            if length > max_question:
                raise RegistryError(
                    f"{name}: the question {text!r:.60} and its regions have {length:,} tokens, and an answer up to "
                    f"{recipe.train.max_tokens}, but the language model reads {max_positions:,}; shorten the "
                    "question, or reduce train.max_tokens"
                )


def _check_readable(name: str, dataset: Dataset) -> None:
    """Read one sample, so that a dataset with only damaged images is rejected before the first step."""
    try:
        dataset[0]
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _collect_datasets_by_name(
    recipe: Recipe, mixture: ExampleMixture, validation_dataset: Dataset | None
) -> dict[str, Dataset]:
    """Collect the datasets of a run that have images, by their names in messages."""
    names = [f"data.{name} ({source.split})" for name, source in recipe.data.items()]
    datasets_by_name = dict(zip(names, (each.dataset for each in mixture.streams), strict=True))
    if recipe.validate is not None and validation_dataset is not None and len(validation_dataset):
        datasets_by_name[f"validate ({recipe.validate.split})"] = validation_dataset
    return datasets_by_name


def check_shardable(recipe: Recipe) -> None:
    """Check that a recipe can train with sharded parameters.

    Args:
        recipe: Recipe of the training run.

    Raises:
        RegistryError: The recipe has a table [validate], which needs the full model in every process.
    """
    if recipe.validate is not None:
        raise RegistryError(
            "a sharded model cannot be validated during training; remove [validate], or train without FSDP"
        )


def _build_training_arguments(recipe: Recipe, folder: Path, images_per_process: int) -> TrainingArguments:
    options = recipe.train
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=options.steps,
        per_device_train_batch_size=images_per_process,
        gradient_accumulation_steps=options.gradient_accumulation_steps,
        learning_rate=options.learning_rate,
        adam_beta2=options.adam_beta2,
        weight_decay=options.weight_decay,
        warmup_steps=min(options.warmup_steps, options.steps - 1),  # short runs must reach the peak rate
        max_grad_norm=options.max_grad_norm,
        lr_scheduler_type="cosine",
        bf16=options.precision == "bfloat16",
        fp16=options.precision == "float16",
        dataloader_num_workers=options.num_workers,
        save_steps=options.save_steps,
        logging_steps=max(1, min(50, options.steps // 10)),
        disable_tqdm=True,  # `TrainingLog` shows the bar
        report_to=_resolve_reporters(options.report_to),
        ddp_broadcast_buffers=False,
        seed=options.seed,
        remove_unused_columns=False,
        ddp_find_unused_parameters=True,
        use_cpu=not torch.cuda.is_available(),
    )


def _build_mixture(
    recipe: Recipe, model: SegmentCaptioner, datasets: Sequence[Dataset]
) -> tuple[ExampleMixture, AttributeValues]:
    """Build the examples of a recipe, and the attributes that its auxiliary losses predict."""
    options = recipe.train
    tokenizer = model.language_model.tokenizer
    assert tokenizer is not None  # checked by `prepare_training`
    sources = recipe.data.values()
    weights = [source.weight for source in sources]
    attributes = AttributeValues.from_datasets(datasets)
    length = options.steps * options.batch_size
    prompts = (model.encode_task_prompt(task) for task in model.spec.task_names)
    task_prompts = [prompt for prompt in prompts if prompt is not None]  # of all tasks, or of none
    streams = [
        ExampleStream(
            dataset,
            Processor.from_encoder(model.encoder),
            tokenizer,
            options,
            round(length * source.weight / sum(weights)),
            seed=options.seed,
            attributes=attributes.region_attributes | attributes.relation_attributes,
            augment=source.augment,
            phrase_mode=source.phrases,
            class_name_task=source.class_name_task,
            prompt_template=model.spec.prompt_template,
            task_prompts=task_prompts,
            has_geometry=model.spec.geometry is not None,
        )
        for dataset, source in zip(datasets, sources, strict=True)
    ]
    return ExampleMixture(
        streams, weights, length, options.seed, options.prompt_weights, options.batch_size
    ), attributes


def _resolve_reporters(names: str) -> list[str]:
    """Return the integrations of transformers to report to; RegistryError for unknown or missing ones."""
    from transformers.integrations import get_available_reporting_integrations
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    if names == "none":
        return []
    installed = get_available_reporting_integrations()
    if names == "auto":
        return [name for name in ("tensorboard",) if name in installed]
    requested = [name.strip() for name in names.split(",")]
    for name in requested:
        if name not in INTEGRATION_TO_CALLBACK:
            raise make_unknown_name_error(
                f"train.report_to={names!r}: unknown integration {name!r}", name, INTEGRATION_TO_CALLBACK
            )
        if name not in installed:
            raise RegistryError(f"train.report_to={names!r}: {name} is not installed: pip install {name}")
    return requested
