"""Training: transformers' Trainer over flat batches of regions."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from sca_registry import RegistryError
from sca_registry.contracts import Batch, Dataset
from sca_registry.messages import unknown
from torch import Tensor, nn
from torch.utils.data import Sampler, SequentialSampler
from tqdm.auto import tqdm
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from sca.checkpoints.load import load
from sca.checkpoints.native import check_writable, save
from sca.checkpoints.state import weights_hash
from sca.composition import build
from sca.data.summary import count_left_out, summarize_dataset
from sca.evaluation.evaluate import evaluate
from sca.evaluation.predictions import Questions
from sca.inference.processor import Processor
from sca.io.atomic import sync, sync_tree, unwritable, write_file
from sca.io.json import read_json
from sca.io.run_folder import RunFolder, existing_paths
from sca.model import SegmentCaptioner
from sca.training.auxiliary import UNKNOWN, AttributeHead, Attributes, features_under_truth
from sca.training.examples import ExampleStream, Mixture, collate
from sca.training.features import FeatureCache
from sca.training.log import VALIDATION, TrainingLog
from sca.training.recipe import LOSSES, Recipe, TrainOptions, Validation
from sca.training.sharding import Sharded, gathered, load_gathered, shard, spread_state
from sca.training.sources import open_sources, open_validation, report_sources

MODEL_FILES = ("spec.json", "weights.safetensors", "origin.json", "tokenizer/*")
STATE = ("best.json", "checkpoint-#/*", "validation/step-#/*")  # of a run that is not finished
OUTPUTS = (*STATE, *(f"{folder}/{name}" for folder in ("model", "best") for name in MODEL_FILES))
LOOSE = tuple(  # what changes no step
    f"train.{name}"
    for name in ("accumulate", "cache_features", "chunk", "processes", "report_to", "save", "sharded", "workers")
)
DRAFT = ".sca-draft"


def train(
    recipe: Recipe,
    folder: str | Path,
    resume: bool = True,
    quiet: bool = False,
    *,
    overwrite: bool = False,
    set_aside: bool = False,
    report: Callable[[str], None] = lambda line: None,
    trust_remote_code: bool = False,
    allow_external: bool = False,
) -> SegmentCaptioner:
    """Train a recipe and write `folder/model`, and `folder/best` if it is validated.

    Works alone or as one of several processes that a launcher started (torchrun, accelerate launch): each takes its
    share of a step's images, and the first writes. However many there are, every step learns the same.

    Args:
        recipe: What is trained.
        folder: The run folder; what an interrupted run of the same recipe and data left there is continued.
        resume: False starts the same recipe over.
        quiet: Show no progress bar and no training log.
        overwrite: Delete what a run of another recipe or other data wrote into the folder.
        set_aside: Rename the folder of such a run instead.
        report: Called with each line that a person should read: what the data contains and what was left out of it,
            what cannot choose the best model, and whether another run was set aside.
        trust_remote_code: What the checkpoint that training begins with may do, see `sca.load`.
        allow_external: As `trust_remote_code`.

    Raises:
        RunFolderError: The folder contains another run, files that `sca train` did not write, or an input.
        LockedError: Another process trains there.
    """
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
    lesson = Lesson(model, recipe.loss, attributes, recipe.train.chunk)
    check_rates(recipe.train, lesson)
    budget = budget_each(recipe.train, processes)
    trainer = CaptionTrainer(
        model=lesson,
        args=_arguments(recipe, folder, share),
        train_dataset=stream,
        data_collator=lambda examples: {"batch": collate(examples, model.language_model.tokenizer.pad, budget)},
        rates=recipe.train.rates,
        sharded=sharded,
    )
    trainer.remove_callback(PrinterCallback)  # prints dictionaries
    if not quiet:
        trainer.add_callback(TrainingLog(LOSSES, recipe.validate.best if recipe.validate else ()))
    if recipe.validate is not None and len(unseen):
        trainer.add_callback(Validating(trainer, recipe.validate, unseen, folder, report))
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
    parts = processes * options.accumulate
    if options.images % parts:
        raise RegistryError(
            f"train.images={options.images} is no multiple of {processes} processes x "
            f"train.accumulate={options.accumulate}"
        )
    return options.images // parts


def budget_each(options: TrainOptions, processes: int) -> int:
    """How many regions each process sees at a time, 0 for any number. RegistryError if there is not one for each."""
    parts = processes * options.accumulate
    if 0 < options.budget < parts:
        raise RegistryError(
            f"train.budget={options.budget} is less than a region for each of {processes} processes x "
            f"train.accumulate={options.accumulate}"
        )
    return options.budget // parts


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
    unseen = open_validation(recipe.validate) if recipe.validate is not None else None
    sources = open_sources(recipe)
    for name, dataset in sources.items():
        _check_readable(name, dataset)
    if isinstance(recipe.model, str):
        model = load(recipe.model, trust_remote_code=trust_remote_code, allow_external=allow_external)
    else:
        model = build(recipe.model)
    if recipe.train.sharded:
        check_shardable(recipe)
    if model.language_model.tokenizer is None:
        raise RegistryError("the language model has no tokenizer to learn words with: language_model.tokenizer=FOLDER")
    if recipe.train.cache_features:
        check_cacheable(recipe, model)
    return model, *_stream(recipe, model, list(sources.values())), unseen


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
    """Raises RegistryError if features change while training, by the encoder or by the pictures."""
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


class Lesson(nn.Module):
    """A model together with the weights of its losses and the heads that exist only while training."""

    def __init__(self, model: SegmentCaptioner, weights: Mapping[str, float], attributes: Attributes, chunk: int = 0):
        super().__init__()
        self.model = model
        self.weights = dict(weights)
        self.chunk = chunk
        for loss in ("attributes", "features"):
            if weights.get(loss) and not (attributes.own or (loss == "attributes" and attributes.between)):
                raise RegistryError(f"loss.{loss} names attributes, and the data has none: set loss.{loss}=0")
        self.heads = nn.ModuleDict()
        if weights.get("attributes"):
            named = attributes.own | attributes.between
            self.heads["attributes"] = AttributeHead(model.mixer.width, model.mixer.queries, named)
        if weights.get("features"):
            self.heads["features"] = AttributeHead(model.segmenter.channels, 1, attributes.own)
        self.recent: dict[str, list[float]] = {}

    def forward(self, batch: Batch, shares: Mapping[str, float] | None = None) -> Tensor:
        """The sum of all losses, each the mean of what it counts in this batch times its share (1: the batch is all
        there is), so that a step cut into pieces learns what it would as a whole.
        """
        output = self.model(batch, self.weights, self.chunk)
        losses = dict(output.losses)
        if "attributes" in self.heads:
            losses["attributes"] = self.heads["attributes"](output.queries, batch.extra)
        if "features" in self.heads:
            features = features_under_truth(output.regions, batch.targets)
            known = {name: labels.masked_fill(~batch.targets.has_mask, UNKNOWN) for name, labels in batch.extra.items()}
            losses["features"] = self.heads["features"](features, known)
        if shares is not None:
            losses = {name: value * shares.get(name, shares["regions"]) for name, value in losses.items()}
        for name, value in losses.items():
            self.recent.setdefault(name, []).append(value.detach())
        return sum(self.weights.get(name, 1.0) * value for name, value in losses.items())

    def groups(self) -> dict[str, list[nn.Parameter]]:
        """What trains, by the names that `spec.trainable` uses, and the heads."""
        groups = {**self.model.groups(), "heads": list(self.heads.parameters())}
        trained = {name: [p for p in parameters if p.requires_grad] for name, parameters in groups.items()}
        return {name: parameters for name, parameters in trained.items() if parameters}


def check_rates(options: TrainOptions, lesson: Lesson) -> None:
    """Raises RegistryError for a rate of something that does not train."""
    for name in options.rates:
        if name not in (known := lesson.groups()):
            raise unknown(f"train.rates.{name} is for nothing that trains", name, known)


def counts(batch: Batch) -> dict[str, int]:
    """How many things each loss of a batch is the mean of; "regions" for those that are not named."""
    masks = int(batch.targets.has_mask.sum())
    return {"caption": int(batch.mask.sum()), "mask": masks, "iou": masks, "regions": len(batch.prompts)}


class CaptionTrainer(Trainer):
    """The Trainer of transformers, told how a flat batch of regions travels, and in which order examples come.

    rates: factors of the learning rate, by group of what trains. sharded: over processes, see `sca.training.sharding`.
    """

    def __init__(self, *args: Any, rates: Mapping[str, float], sharded: bool, **options: Any):
        super().__init__(*args, **options)
        self.rates = rates
        self.sharded = sharded
        if sharded:
            self.model.to(self.args.device)
            shard(self.model)
        self.shares: list[dict[str, float]] = []

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple[list, None]:
        """The pieces of a step on this process; notes which share of the whole step's words, masks and regions each
        has, times the number of pieces, by which gradients are divided again.
        """
        pieces, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        told = [counts(piece["batch"]) for piece in pieces]
        if not told:
            return pieces, None
        table = torch.tensor([list(each.values()) for each in told], dtype=torch.float64, device=device)
        whole = self.accelerator.reduce(table.sum(0).float()).double().clamp(min=1)
        scaled = table * (len(pieces) * self.args.world_size) / whole
        self.shares = [dict(zip(told[0], row, strict=True)) for row in scaled.tolist()]
        return pieces, None

    def compute_loss(self, model: nn.Module, inputs: dict[str, Batch], *_: Any, **__: Any) -> Tensor:
        return model(inputs["batch"], self.shares.pop(0))

    def log(self, logs: dict[str, float], *more: Any) -> None:
        """Adds the mean of every loss since the last line."""
        recent = self.model.recent
        if "loss" in logs:
            means = {name: torch.stack(values).float().mean() for name, values in recent.items()}
            means = {name: self.accelerator.reduce(mean, "mean") for name, mean in means.items()}
            logs = {**logs, **{name: round(float(mean), 6) for name, mean in means.items()}}
            recent.clear()
        super().log(logs, *more)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW over each group at its own rate; norms and biases do not decay."""
        if self.optimizer is None:
            lesson = self.model if model is None else model
            decaying = set(self.get_decay_parameter_names(lesson))
            names = {id(parameter): name for name, parameter in lesson.named_parameters()}
            tables: dict[tuple[float, bool], list[nn.Parameter]] = {}
            for group, parameters in lesson.groups().items():
                rate = self.args.learning_rate * self.rates.get(group, 1.0)
                for parameter in parameters:
                    tables.setdefault((rate, names[id(parameter)] in decaying), []).append(parameter)
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, lesson)
            self.optimizer = kind(
                [
                    {"params": parameters, "lr": rate, "weight_decay": self.args.weight_decay if decays else 0.0}
                    for (rate, decays), parameters in tables.items()
                ],
                **options,
            )
        return self.optimizer

    def _get_train_sampler(self, *_: Any) -> Sampler:
        return SequentialSampler(self.train_dataset)  # the stream has its own order, a function of the seed alone

    def _wrap_model(self, model: nn.Module, *more: Any, **options: Any) -> nn.Module:
        return Sharded(self.model) if self.sharded else super()._wrap_model(model, *more, **options)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Writes what trains, and buffers: frozen parameters are where they came from."""
        frozen = {name for name, parameter in self.model.named_parameters() if not parameter.requires_grad}
        state = {name: tensor for name, tensor in self.model.state_dict().items() if name not in frozen}
        state = gathered(state)
        if self.args.should_save:
            os.makedirs(output_dir, exist_ok=True)
            torch.save(state, os.path.join(output_dir, "lesson.pt"))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        state = torch.load(os.path.join(resume_from_checkpoint, "lesson.pt"), weights_only=True, map_location="cpu")
        frozen = {name for name, parameter in self.model.named_parameters() if not parameter.requires_grad}
        missing, unexpected = load_gathered(self.model, state)
        if set(missing) != frozen & self.model.state_dict().keys() or unexpected:
            raise RegistryError(f"{resume_from_checkpoint} is of another model: give another --out, or --overwrite")

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.sharded:
            return super()._save_optimizer_and_scheduler(output_dir)
        state = gathered(self.optimizer.state_dict())
        if self.args.should_save:
            torch.save(state, os.path.join(output_dir, "optimizer.pt"))
            torch.save(self.lr_scheduler.state_dict(), os.path.join(output_dir, "scheduler.pt"))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and self.sharded:
            spread_state(self.optimizer)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Written under another name first, so that a kill never leaves half a checkpoint to resume from."""
        final = Path(self.args.output_dir)
        draft = final / DRAFT
        if self.args.should_save:
            shutil.rmtree(draft, ignore_errors=True)  # of a run that was killed while it wrote
        self.accelerator.wait_for_everyone()
        self.args.output_dir = str(draft)
        try:
            super()._save_checkpoint(model, trial)
        except (OSError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and not _is_write_error(error):
                raise
            shutil.rmtree(draft, ignore_errors=True)
            reason = error if isinstance(error, OSError) else OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            raise unwritable(draft, reason) from error
        finally:
            self.args.output_dir = str(final)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            sync_tree(draft)
            earlier = set(_checkpoints(final))
            for written in _checkpoints(draft):
                shutil.rmtree(final / written.name, ignore_errors=True)  # of a run that was not to be resumed
                earlier.discard(written.rename(final / written.name))
            sync(final)
            for old in earlier:
                shutil.rmtree(old)
            shutil.rmtree(draft)


def _checkpoints(folder: Path) -> list[Path]:
    """The checkpoint folders of the trainer; any other name, such as `checkpoint-500-good`, is not one."""
    return [path for path in folder.iterdir() if re.fullmatch("checkpoint-[0-9]+", path.name)]


class Validating(TrainerCallback):
    """Evaluates while training, logs the scores, and keeps the best model."""

    def __init__(
        self,
        trainer: CaptionTrainer,
        options: Validation,
        unseen: Dataset,
        folder: Path,
        report: Callable[[str], None] = lambda line: None,
    ):
        self.trainer, self.options, self.unseen, self.folder, self.report = trainer, options, unseen, folder, report
        self.questions = Questions(prompt=options.prompt)
        self.values: dict[str, list[float]] = {}  # of the scores that chose
        self.unusable: set[str] = set()  # scores of `best` that were not a number

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step % self.options.every == 0 or state.global_step == state.max_steps:
            logs = control.should_log
            self._validate(state.global_step)
            control.should_log = logs  # what one process logged here, all are still to log together

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        for metric, values in self.values.items():
            if len(values) > 1 and len(set(values)) == 1:
                self.report(
                    f"validate.best: {metric} was {values[0]:g} at all {len(values)} validations, so `best` is the "
                    "first of them; name another score, or validate on more images"
                )

    def _validate(self, step: int) -> None:
        model, options = self.trainer.model.model, self.options
        if self.trainer.args.world_size > 1:  # statistics of batches differ, and all are to ask the same model
            for buffer in model.buffers():
                torch.distributed.broadcast(buffer, 0)
        training = model.training
        folder = self.folder / "validation" / f"step-{step}"
        folder.mkdir(parents=True, exist_ok=True)
        scored = evaluate(
            model.eval(),
            self.unseen,
            options.split,
            questions=self.questions,
            metrics=options.metrics or None,
            limit=options.limit,
            folder=folder,
            overwrite=True,  # of a run that was ended between this step and its last checkpoint
        )
        model.train(training)
        if scored is not None:
            self._note(step, scored.scores)
        self.trainer.accelerator.wait_for_everyone()

    def _note(self, step: int, scores: Mapping[str, float]) -> None:
        scored = [name for name in self.options.best if name in scores]
        if not scored:
            raise unknown(f"validate.best is {list(self.options.best)}, and none was scored", "", scores)
        metric = next((name for name in scored if math.isfinite(scores[name])), None)
        self._report_unusable(scored, metric)
        note = self.folder / "best.json"
        if metric is not None:
            self.values.setdefault(metric, []).append(scores[metric])
            if self._is_best(metric, scores[metric], read_json(note) if note.exists() else None):
                save(self.trainer.model.model, self.folder / "best")
                write_file(note, json.dumps({"step": step, "metric": metric, "score": scores[metric]}))
        self.trainer.log({f"{VALIDATION}{name}": value for name, value in scores.items()})

    def _report_unusable(self, scored: Sequence[str], metric: str | None) -> None:
        """Report, once each, the scores of `best` that should have chosen and are not a number."""
        for name in scored if metric is None else scored[: scored.index(metric)]:
            if name not in self.unusable:
                self.unusable.add(name)
                instead = f"{metric} chooses `best`" if metric else "no model is kept as `best`"
                self.report(f"validate.best: {name} is not a number on this data; {instead}")

    def _is_best(self, metric: str, score: float, before: Mapping[str, Any] | None) -> bool:
        """Whether a model is better than the one that is kept; a score that is named earlier in `best` decides."""
        if before is None or before["metric"] == metric:
            return before is None or score > before["score"]
        order = list(self.options.best)
        return before["metric"] not in order or order.index(metric) < order.index(before["metric"])


def _is_write_error(error: RuntimeError) -> bool:
    """Whether torch.save could not write, which it reports without the system's reason."""
    return "PytorchStreamWriter" in str(error) or "unexpected pos" in str(error)


def _arguments(recipe: Recipe, folder: Path, share: int) -> TrainingArguments:
    options = recipe.train
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=options.steps,
        per_device_train_batch_size=share,
        gradient_accumulation_steps=options.accumulate,
        learning_rate=options.learning_rate,
        adam_beta2=options.adam_beta2,
        weight_decay=options.weight_decay,
        warmup_steps=min(options.warmup, options.steps - 1),  # else a short run never gets to its learning rate
        max_grad_norm=options.clip,
        lr_scheduler_type="cosine",
        bf16=options.precision == "bfloat16",
        fp16=options.precision == "float16",
        dataloader_num_workers=options.workers,
        save_steps=options.save,
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
    length = options.steps * options.images
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
    return Mixture(streams, weights, length, options.seed, options.prompts, options.images), attributes


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
