"""Training: transformers' Trainer over flat batches of regions."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from sca_registry import RegistryError, datasets
from sca_registry.contracts import Batch
from torch import Tensor, nn
from torch.utils.data import Sampler, SequentialSampler
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from sca.checkpoint import load, save
from sca.composition import build
from sca.model import SegmentCaptioner
from sca.processing import Processor
from sca.training.auxiliary import UNKNOWN, AttributeHead, Attributes, features_under_truth
from sca.training.examples import ExampleStream, Mixture, collate
from sca.training.recipe import Recipe, TrainOptions


def train(recipe: Recipe, folder: str | Path, resume: bool = True, quiet: bool = False) -> SegmentCaptioner:
    """Trains a recipe and writes `folder/model`; what an interrupted run left under `folder` is continued.

    Works alone or as one of several processes that a launcher started (torchrun, accelerate launch): each takes its
    share of a step's images, and the first writes.
    """
    folder = Path(folder)
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")  # of 1x1 convolutions: harmless
    torch.manual_seed(recipe.train.seed)
    share = images_each(recipe.train, int(os.environ.get("WORLD_SIZE", 1)))
    model, stream, attributes = prepare(recipe)
    lesson = Lesson(model, recipe.loss, attributes)
    trainer = CaptionTrainer(
        model=lesson,
        args=_arguments(recipe, folder, share, quiet),
        train_dataset=stream,
        data_collator=lambda examples: {"batch": collate(examples, model.language_model.tokenizer.pad)},
        callbacks=[Losses(lesson)],
    )
    last = get_last_checkpoint(str(folder)) if resume and folder.is_dir() else None
    trainer.train(resume_from_checkpoint=last)
    if trainer.is_world_process_zero():
        save(model.eval(), folder / "model")
    return model


def images_each(options: TrainOptions, processes: int) -> int:
    """How many images each process sees at a time. Raises RegistryError if a step's images cannot be shared out."""
    parts = processes * options.accumulate
    if options.images % parts:
        raise RegistryError(
            f"train.images={options.images} is no multiple of {processes} processes x "
            f"train.accumulate={options.accumulate}"
        )
    return options.images // parts


def prepare(recipe: Recipe) -> tuple[SegmentCaptioner, Mixture, Attributes]:
    """The model to train, the examples, and the attributes that the auxiliary losses name.

    Raises what parts, checkpoints and datasets raise for what the recipe asks of them.
    """
    model = load(recipe.train.start) if recipe.train.start else build(recipe.model)
    if model.language_model.tokenizer is None:
        raise RegistryError("the language model has no tokenizer to learn words with: language_model.tokenizer=FOLDER")
    return model, *_stream(recipe, model)


class Lesson(nn.Module):
    """A model together with the weights of its losses and the heads that exist only while training."""

    def __init__(self, model: SegmentCaptioner, weights: Mapping[str, float], attributes: Attributes):
        super().__init__()
        self.model = model
        self.weights = dict(weights)
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

    def forward(self, batch: Batch) -> Tensor:
        output = self.model(batch, self.weights)
        losses = dict(output.losses)
        if "attributes" in self.heads:
            losses["attributes"] = self.heads["attributes"](output.queries, batch.extra)
        if "features" in self.heads:
            features = features_under_truth(output.regions, batch.targets)
            known = {name: labels.masked_fill(~batch.targets.has_mask, UNKNOWN) for name, labels in batch.extra.items()}
            losses["features"] = self.heads["features"](features, known)
        loss = output.loss + sum(self.weights[name] * losses[name] for name in self.heads)
        for name, value in losses.items():
            self.recent.setdefault(name, []).append(value.detach())
        return loss


class CaptionTrainer(Trainer):
    """The Trainer of transformers, told how a flat batch of regions travels, and in which order examples come."""

    def compute_loss(self, model: nn.Module, inputs: dict[str, Batch], *_: Any, **__: Any) -> Tensor:
        return model(inputs["batch"])

    def _get_train_sampler(self, *_: Any) -> Sampler:
        return SequentialSampler(self.train_dataset)  # the stream has its own order, a function of the seed alone

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        os.makedirs(output_dir, exist_ok=True)
        torch.save(self.model.state_dict(), os.path.join(output_dir, "lesson.pt"))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        state = torch.load(os.path.join(resume_from_checkpoint, "lesson.pt"), weights_only=True, map_location="cpu")
        self.model.load_state_dict(state)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Written under another name first, so that a kill never leaves half a checkpoint to resume from."""
        final = Path(self.args.output_dir)
        draft = final / "draft"
        if self.args.should_save:
            shutil.rmtree(draft, ignore_errors=True)  # of a run that was killed while it wrote
        self.accelerator.wait_for_everyone()
        self.args.output_dir = str(draft)
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.output_dir = str(final)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            earlier = set(final.glob("checkpoint-*"))
            for written in draft.glob("checkpoint-*"):
                shutil.rmtree(final / written.name, ignore_errors=True)  # of a run that was not to be resumed
                earlier.discard(written.rename(final / written.name))
            for old in earlier:
                shutil.rmtree(old)
            shutil.rmtree(draft)


class Losses(TrainerCallback):
    """Adds the mean of every loss since the last line to what is logged."""

    def __init__(self, lesson: Lesson):
        self.lesson = lesson

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        if logs is not None and "loss" in logs:
            logs |= {name: round(float(torch.stack(values).mean()), 4) for name, values in self.lesson.recent.items()}
            self.lesson.recent.clear()


def _arguments(recipe: Recipe, folder: Path, share: int, quiet: bool) -> TrainingArguments:
    options = recipe.train
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=options.steps,
        per_device_train_batch_size=share,
        gradient_accumulation_steps=options.accumulate,
        learning_rate=options.learning_rate,
        adam_beta2=options.adam_beta2,
        weight_decay=options.weight_decay,
        warmup_steps=options.warmup,
        max_grad_norm=options.clip,
        lr_scheduler_type="cosine",
        bf16=options.precision == "bfloat16",
        fp16=options.precision == "float16",
        dataloader_num_workers=options.workers,
        save_steps=options.save,
        logging_steps=max(1, min(50, options.steps // 10)),
        disable_tqdm=quiet,
        report_to="none",
        seed=options.seed,
        remove_unused_columns=False,
        ddp_find_unused_parameters=True,
        use_cpu=not torch.cuda.is_available(),
    )


def _stream(recipe: Recipe, model: SegmentCaptioner) -> tuple[Mixture, Attributes]:
    """The examples of all data of a recipe, and the attributes that its auxiliary losses name."""
    options = recipe.train
    sources = recipe.data.values()
    weights = [source.weight for source in sources]
    sets = [datasets.build(source.dataset.name, source.split, **source.dataset.options) for source in sources]
    attributes = Attributes.of(sets)
    length = options.steps * options.images
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
        )
        for dataset, source in zip(sets, sources, strict=True)
    ]
    return Mixture(streams, weights, length, options.seed), attributes
