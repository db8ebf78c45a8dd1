"""An interrupted run resumes and ends like an uninterrupted one."""

from dataclasses import replace

import pytest
import torch

from sca.checkpoints.load import load
from sca.training.examples import ExampleMixture
from sca.training.module import TrainingModule
from sca.training.recipe import Recipe, TrainOptions
from sca.training.train import compute_images_per_process, train


class SimulatedKill(BaseException):
    """Stands for a kill of the training process."""


@pytest.fixture
def make_recipe(small_model_table):
    def make(**options):
        table = {
            "model": small_model_table,
            "data": {
                "scenes": {
                    "name": "scenes",
                    "num_images": 9,
                    "image_size": 64,
                    "augment": {"min_crop_fraction": 0.8, "color_jitter": 0.2},
                },
                "more": {"name": "scenes", "num_images": 5, "image_size": 64, "seed": 7, "weight": 0.5},
            },
            "train": {
                "steps": 6,
                "batch_size": 2,
                "warmup_steps": 2,
                "save_steps": 2,
                "class_name_prob": 0.5,
                "box_jitter": 0.05,
                **options,
            },
            "loss": {"attributes": 0.5},
        }
        return Recipe.from_dict("resumed", table)

    return make


def stop_training_after(monkeypatch, num_passes):
    """Stop training in the middle of a step, after N forward passes."""
    forward, batches = TrainingModule.forward, []

    def forward_or_stop(self, batch, shares):
        if len(batches) == num_passes:
            raise SimulatedKill
        batches.append(batch)
        return forward(self, batch, shares)

    monkeypatch.setattr(TrainingModule, "forward", forward_or_stop)


def have_equal_weights(model, other_model):
    state_dict, other_state_dict = model.state_dict(), other_model.state_dict()
    return all(torch.equal(state_dict[name], other_state_dict[name]) for name in state_dict)


def list_run_folders(folder):
    return sorted(path.name for path in folder.iterdir() if path.name.startswith(("checkpoint", ".sca-draft", "model")))


@pytest.mark.parametrize("accumulation_steps", [1, 2])
@pytest.mark.slow
def test_resumed_training_ends_with_bitwise_equal_weights(make_recipe, tmp_path, monkeypatch, accumulation_steps):
    recipe = make_recipe(gradient_accumulation_steps=accumulation_steps)
    uninterrupted = train(recipe, tmp_path / "straight", quiet=True)
    with monkeypatch.context() as patch:
        stop_training_after(patch, 5 * accumulation_steps)
        with pytest.raises(SimulatedKill):
            train(recipe, tmp_path / "stopped", quiet=True)
    assert list_run_folders(tmp_path / "stopped") == ["checkpoint-4"]
    half_written = tmp_path / "stopped" / ".sca-draft" / "checkpoint-999"
    half_written.mkdir(parents=True)
    (half_written / "training_module.pt").write_bytes(b"half")
    passes = []
    with monkeypatch.context() as patch:
        forward = TrainingModule.forward
        patch.setattr(TrainingModule, "forward", lambda self, *args: (passes.append(1), forward(self, *args))[1])
        resumed = train(recipe, tmp_path / "stopped", quiet=True)
    assert len(passes) == 2 * accumulation_steps  # steps 5 and 6
    assert have_equal_weights(uninterrupted, resumed)
    assert have_equal_weights(load(tmp_path / "stopped" / "model"), uninterrupted)
    assert list_run_folders(tmp_path / "stopped") == ["checkpoint-6", "model"]


@pytest.mark.slow
def test_train_without_resume_starts_from_scratch(make_recipe, tmp_path):
    first = train(make_recipe(steps=2), tmp_path, quiet=True)
    restarted = train(make_recipe(steps=2), tmp_path, resume=False, quiet=True)
    assert have_equal_weights(first, restarted)
    assert not have_equal_weights(first, train(make_recipe(steps=2, seed=1), tmp_path, quiet=True, overwrite=True))


@pytest.mark.slow
def test_train_can_start_from_checkpoint(make_recipe, build_small_model, small_model_table, tmp_path):
    from sca.checkpoints.native import save

    checkpoint = save(build_small_model(seed=5, trainable=small_model_table["trainable"]), tmp_path / "start")
    recipe = replace(make_recipe(steps=1, learning_rate=0.0), model=str(checkpoint))
    trained = train(recipe, tmp_path / "run", quiet=True)
    changed_parameters = {
        name
        for name, value in load(checkpoint).named_parameters()
        if not torch.equal(value, trained.get_parameter(name))
    }
    assert changed_parameters == set()


def test_train_rejects_batch_size_not_divisible_by_accumulation_steps(make_recipe, tmp_path):
    with pytest.raises(
        ValueError, match=r"train\.batch_size=3 is not a multiple of 1 processes x train\.gradient_accumulation_steps=2"
    ):
        train(make_recipe(batch_size=3, gradient_accumulation_steps=2), tmp_path, quiet=True)


def test_train_suggests_one_process_for_a_batch_size_not_divisible_by_processes():
    with pytest.raises(ValueError, match=r"batch_size=1 is not a multiple of 2 processes .*: train\.num_processes=1"):
        compute_images_per_process(TrainOptions(batch_size=1), 2)
    with pytest.raises(ValueError, match=r"change one of them$"):
        compute_images_per_process(TrainOptions(batch_size=1, gradient_accumulation_steps=2), 1)


def test_train_rejects_region_budget_below_accumulation_steps(make_recipe, tmp_path):
    with pytest.raises(
        ValueError, match=r"train\.max_regions_per_step=1 is too small; set at least 2: one region for each process"
    ):
        train(make_recipe(max_regions_per_step=1, gradient_accumulation_steps=2), tmp_path, quiet=True)


@pytest.mark.slow
def test_train_reads_examples_in_stream_order(make_recipe, tmp_path, monkeypatch):
    indices, get_item = [], ExampleMixture.__getitem__
    monkeypatch.setattr(
        ExampleMixture, "__getitem__", lambda self, index: (indices.append(index), get_item(self, index))[1]
    )
    train(make_recipe(steps=3), tmp_path, quiet=True)
    assert indices == list(range(6))


@pytest.mark.slow
def test_training_that_stops_ends_with_bitwise_equal_weights(make_recipe, tmp_path):
    recipe = make_recipe()
    uninterrupted = train(recipe, tmp_path / "straight", quiet=True)
    stopped = train(recipe, tmp_path / "stopped", quiet=True, stop_step=3)
    assert list_run_folders(tmp_path / "stopped") == ["checkpoint-3", "model"]
    assert not have_equal_weights(stopped, uninterrupted)
    again = train(recipe, tmp_path / "stopped", quiet=True, resume=True, stop_step=3)
    assert have_equal_weights(again, stopped)
    assert have_equal_weights(train(recipe, tmp_path / "stopped", quiet=True, resume=True), uninterrupted)
    with pytest.raises(ValueError, match="contains a run at step 6, after stop_step=3; choose a different folder, or"):
        train(recipe, tmp_path / "stopped", quiet=True, resume=True, stop_step=3)
    restarted = train(recipe, tmp_path / "stopped", quiet=True, resume=False, stop_step=3)
    assert have_equal_weights(restarted, stopped)


@pytest.mark.parametrize("option", ["overwrite", "rename_existing"])
@pytest.mark.slow
def test_training_that_stops_replaces_a_different_run(make_recipe, tmp_path, option):
    train(make_recipe(steps=2), tmp_path / "run", quiet=True)
    train(make_recipe(steps=2, seed=1), tmp_path / "run", quiet=True, stop_step=1, **{option: True})
    assert list_run_folders(tmp_path / "run") == ["checkpoint-1", "model"]
    assert (tmp_path / "run-1").exists() == (option == "rename_existing")


@pytest.mark.parametrize("stop_step", [0, -5, 1.5, True])
def test_train_rejects_invalid_stop_step(make_recipe, tmp_path, stop_step):
    with pytest.raises(ValueError, match=f"stop_step is {stop_step}; expected an integer"):
        train(make_recipe(), tmp_path / "run", quiet=True, stop_step=stop_step)
    assert not (tmp_path / "run").exists()
