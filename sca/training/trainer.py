"""Trainer of transformers for flat batches of regions."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from sca_registry import RegistryError
from sca_registry.contracts import Batch
from torch import Tensor, nn
from torch.utils.data import Sampler, SequentialSampler
from transformers import Trainer

from sca.io.atomic import make_write_error, sync_path, sync_tree
from sca.io.errors import DifferentRunError
from sca.training.sharding import (
    ShardedModule,
    gather_tensors,
    load_full_tensors,
    shard_optimizer_state,
    shard_parameters,
)

if TYPE_CHECKING:
    from sca.training.examples import ExampleMixture
    from sca.training.module import TrainingModule

DRAFT_FOLDER = ".sca-draft"
MODULE_FILE = "training_module.pt"  # trainable parameters and buffers in a checkpoint


def count_loss_terms(batch: Batch) -> dict[str, int]:
    """Return the number of terms that each loss of a batch averages over; "regions" is for all other losses."""
    assert batch.targets is not None  # set by `collate_examples`
    predicted = batch.attention_mask if batch.questions is None else batch.questions.answer_mask
    num_masks = int(batch.targets.has_mask.sum())
    return {
        "caption": 0 if predicted is None else int(predicted.sum()),
        "mask": num_masks,
        "iou": num_masks,
        "regions": len(batch.prompts),
    }


class CaptionTrainer(Trainer):
    """Trainer of transformers for flat batches of regions, with examples in the order of the stream.

    Args:
        *args: Arguments of transformers' Trainer.
        lr_multipliers: Factors of the learning rate by trainable group.
        sharded: Shard trainable parameters over the processes, see `sca.training.sharding`.
        **options: Options of transformers' Trainer.
    """

    model: TrainingModule
    train_dataset: ExampleMixture
    optimizer: torch.optim.Optimizer | None

    def __init__(self, *args: Any, lr_multipliers: Mapping[str, float], sharded: bool, **options: Any):
        super().__init__(*args, **options)
        self.lr_multipliers = lr_multipliers
        self.sharded = sharded
        if sharded:
            self.model.to(self.args.device)
            shard_parameters(self.model)
        self.loss_scales: list[dict[str, float]] = []

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, Any]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], None]:
        """Return the accumulated batches of a step on this process, and compute their loss scales.

        A loss scale is the batch's share of the step's tokens, masks or regions, times the total number of batches,
        which cancels the average over accumulated batches and processes.
        """
        micro_batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        term_counts = [count_loss_terms(micro_batch["batch"]) for micro_batch in micro_batches]
        if not term_counts:
            return micro_batches, None
        local_counts = torch.tensor([list(each.values()) for each in term_counts], dtype=torch.float64, device=device)
        total_counts = self.accelerator.reduce(local_counts.sum(0).float()).double().clamp(min=1)
        scales = local_counts * (len(micro_batches) * self.args.world_size) / total_counts
        self.loss_scales = [dict(zip(term_counts[0], row, strict=True)) for row in scales.tolist()]
        return micro_batches, None

    def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor | Any], *_: Any, **__: Any) -> Tensor:
        """Return the loss of the next accumulated batch."""
        return model(inputs["batch"], self.loss_scales.pop(0))

    def log(self, logs: dict[str, float], *args: Any) -> None:
        """Log, with the mean of each loss since the last call."""
        recent_losses = self.model.recent_losses
        if "loss" in logs:
            means = {name: torch.stack(values).float().mean() for name, values in recent_losses.items()}
            means = {name: self.accelerator.reduce(mean, "mean") for name, mean in means.items()}
            logs = {**logs, **{name: round(float(mean), 6) for name, mean in means.items()}}
            recent_losses.clear()
        super().log(logs, *args)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Create AdamW with the learning rate of each group, and without weight decay for norms and biases."""
        if self.optimizer is None:
            module = self.model if model is None else cast("TrainingModule", model)
            decaying_names = set(self.get_decay_parameter_names(module))
            names = {id(parameter): name for name, parameter in module.named_parameters()}
            parameter_groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
            for group, parameters in module.group_trainable_parameters().items():
                rate = self.args.learning_rate * self.lr_multipliers.get(group, 1.0)
                for parameter in parameters:
                    parameter_groups.setdefault((rate, names[id(parameter)] in decaying_names), []).append(parameter)
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(
                self.args,
                module,  # type: ignore[arg-type]  # transformers passes any module
            )
            self.optimizer = optimizer_class(
                [
                    {"params": parameters, "lr": rate, "weight_decay": self.args.weight_decay if decays else 0.0}
                    for (rate, decays), parameters in parameter_groups.items()
                ],
                **options,
            )
        return self.optimizer

    def _get_train_sampler(self, *_: Any) -> Sampler[int]:
        return SequentialSampler(self.train_dataset)  # the stream is already shuffled by the seed

    def _wrap_model(self, model: nn.Module, *args: Any, **options: Any) -> nn.Module:
        return ShardedModule(self.model) if self.sharded else super()._wrap_model(model, *args, **options)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save trainable parameters and buffers; frozen parameters are restored from their source."""
        frozen = {name for name, parameter in self.model.named_parameters() if not parameter.requires_grad}
        state = {name: tensor for name, tensor in self.model.state_dict().items() if name not in frozen}
        state = gather_tensors(state)
        if self.args.should_save:
            assert output_dir is not None  # transformers always passes it
            os.makedirs(output_dir, exist_ok=True)
            torch.save(state, os.path.join(output_dir, MODULE_FILE))

    def load_checkpoint(self, folder: str) -> None:
        """Load the trained tensors of a checkpoint without training."""
        self._load_from_checkpoint(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        path = Path(resume_from_checkpoint, MODULE_FILE)
        if not path.is_file():
            raise DifferentRunError(
                f"{resume_from_checkpoint} has no {MODULE_FILE}; choose another folder, or overwrite the run"
            )
        state = torch.load(path, weights_only=True, map_location="cpu")
        frozen = {name for name, parameter in self.model.named_parameters() if not parameter.requires_grad}
        missing, unexpected = load_full_tensors(self.model, state)
        if set(missing) != frozen & self.model.state_dict().keys() or unexpected:
            raise RegistryError(
                f"{resume_from_checkpoint} belongs to a different model; choose another folder, or overwrite the run"
            )

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.sharded:
            return super()._save_optimizer_and_scheduler(output_dir)
        assert self.optimizer is not None  # created before training
        assert self.lr_scheduler is not None
        state = gather_tensors(self.optimizer.state_dict())
        if self.args.should_save:
            torch.save(state, os.path.join(output_dir, "optimizer.pt"))
            torch.save(self.lr_scheduler.state_dict(), os.path.join(output_dir, "scheduler.pt"))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and self.sharded:
            assert self.optimizer is not None  # created before training
            shard_optimizer_state(self.optimizer)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write to a draft folder and rename it, so that a kill never leaves an incomplete checkpoint."""
        assert self.args.output_dir is not None  # transformers sets a default
        output_folder = Path(self.args.output_dir)
        draft = output_folder / DRAFT_FOLDER
        if self.args.should_save:
            shutil.rmtree(draft, ignore_errors=True)  # left by a run killed during a save
        self.accelerator.wait_for_everyone()
        self.args.output_dir = str(draft)
        try:
            super()._save_checkpoint(model, trial)
        except (OSError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and not _is_write_error(error):
                raise
            shutil.rmtree(draft, ignore_errors=True)
            reason = error if isinstance(error, OSError) else OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            raise make_write_error(draft, reason) from error
        finally:
            self.args.output_dir = str(output_folder)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            sync_tree(draft)
            old_checkpoints = set(_list_checkpoints(output_folder))
            for new_checkpoint in _list_checkpoints(draft):
                # May exist from a run that was not resumed.
                shutil.rmtree(output_folder / new_checkpoint.name, ignore_errors=True)
                old_checkpoints.discard(new_checkpoint.rename(output_folder / new_checkpoint.name))
            sync_path(output_folder)
            for old_checkpoint in old_checkpoints:
                shutil.rmtree(old_checkpoint)
            shutil.rmtree(draft)


def _list_checkpoints(folder: Path) -> list[Path]:
    """List the trainer's checkpoint folders; other names, such as `checkpoint-500-good`, are not included."""
    return [path for path in folder.iterdir() if re.fullmatch("checkpoint-[0-9]+", path.name)]


def _is_write_error(error: RuntimeError) -> bool:
    """Return whether torch.save failed to write, which it reports without the OS error."""
    return "PytorchStreamWriter" in str(error) or "unexpected pos" in str(error)
