"""A run that was interrupted goes on as if it had not been."""

from dataclasses import replace

import pytest
import torch

from sca.checkpoints.load import load
from sca.training.examples import ExampleMixture
from sca.training.module import TrainingModule
from sca.training.recipe import Recipe
from sca.training.train import train


class Stopped(BaseException):
    """What a kill looks like to a test."""


@pytest.fixture
def plan(small_table):
    def make(**options):
        table = {
            "model": small_table,
            "data": {
                "scenes": {"name": "scenes", "num_images": 9, "image_size": 64, "augment": {"crop": 0.8, "color": 0.2}},
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


def stop_after(monkeypatch, passes):
    """The training is stopped in the middle of a step, after so many passes through the model."""
    forward, done = TrainingModule.forward, []

    def counted(self, batch, shares):
        if len(done) == passes:
            raise Stopped
        done.append(batch)
        return forward(self, batch, shares)

    monkeypatch.setattr(TrainingModule, "forward", counted)


def same(one, other):
    first, second = one.state_dict(), other.state_dict()
    return all(torch.equal(first[name], second[name]) for name in first)


def folders(folder):
    return sorted(path.name for path in folder.iterdir() if path.name.startswith(("checkpoint", ".sca-draft", "model")))


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.slow
def test_a_resumed_run_ends_with_the_same_weights_to_the_last_bit(plan, tmp_path, monkeypatch, accumulate):
    recipe = plan(gradient_accumulation_steps=accumulate)
    straight = train(recipe, tmp_path / "straight", quiet=True)
    with monkeypatch.context() as patch:
        stop_after(patch, 5 * accumulate)
        with pytest.raises(Stopped):
            train(recipe, tmp_path / "stopped", quiet=True)
    assert folders(tmp_path / "stopped") == ["checkpoint-4"]
    half_written = tmp_path / "stopped" / ".sca-draft" / "checkpoint-999"
    half_written.mkdir(parents=True)
    (half_written / "training_module.pt").write_bytes(b"half")
    passes = []
    with monkeypatch.context() as patch:
        forward = TrainingModule.forward
        patch.setattr(TrainingModule, "forward", lambda self, *given: (passes.append(1), forward(self, *given))[1])
        resumed = train(recipe, tmp_path / "stopped", quiet=True)
    assert len(passes) == 2 * accumulate  # steps 5 and 6
    assert same(straight, resumed)
    assert same(load(tmp_path / "stopped" / "model"), straight)
    assert folders(tmp_path / "stopped") == ["checkpoint-6", "model"]


@pytest.mark.slow
def test_without_resume_a_run_starts_from_nothing(plan, tmp_path):
    first = train(plan(steps=2), tmp_path, quiet=True)
    again = train(plan(steps=2), tmp_path, resume=False, quiet=True)
    assert same(first, again)
    assert not same(first, train(plan(steps=2, seed=1), tmp_path, quiet=True, overwrite=True))


@pytest.mark.slow
def test_a_run_can_start_from_a_checkpoint(plan, small, small_table, tmp_path):
    from sca.checkpoints.native import save

    start = save(small(seed=5, trainable=small_table["trainable"]), tmp_path / "start")
    recipe = replace(plan(steps=1, learning_rate=0.0), model=str(start))
    trained = train(recipe, tmp_path / "run", quiet=True)
    moved = {
        name for name, value in load(start).named_parameters() if not torch.equal(value, trained.get_parameter(name))
    }
    assert moved == set()


def test_images_that_cannot_be_shared_out_are_refused(plan, tmp_path):
    with pytest.raises(
        ValueError, match=r"train\.batch_size=3 is not a multiple of 1 processes x train\.gradient_accumulation_steps=2"
    ):
        train(plan(batch_size=3, gradient_accumulation_steps=2), tmp_path, quiet=True)


def test_a_budget_that_cannot_be_shared_out_is_refused(plan, tmp_path):
    with pytest.raises(
        ValueError, match=r"train\.max_regions_per_step=1 is less than one region for each of 1 processes x .*=2"
    ):
        train(plan(max_regions_per_step=1, gradient_accumulation_steps=2), tmp_path, quiet=True)


@pytest.mark.slow
def test_examples_come_in_the_order_of_the_stream(plan, tmp_path, monkeypatch):
    places, take = [], ExampleMixture.__getitem__
    monkeypatch.setattr(ExampleMixture, "__getitem__", lambda self, place: (places.append(place), take(self, place))[1])
    train(plan(steps=3), tmp_path, quiet=True)
    assert places == list(range(6))
