"""Freezing: trainable parameters are those of the spec; frozen parameters do not change."""

import pytest
import torch
from sca_registry.contracts import Batch, PromptBatch


def make_batch():
    generator = torch.Generator().manual_seed(0)
    return Batch(
        pixel_values=torch.randn(2, 3, 64, 64, generator=generator),
        prompts=PromptBatch(
            torch.tensor([0, 1, 1]), boxes=torch.tensor([[4.0, 4, 30, 30], [8, 8, 60, 50], [0, 0, 9, 9]])
        ),
        task_ids=torch.tensor([0, 1, 1]),
        input_ids=torch.tensor([[5, 6, 7], [8, 0, 0], [9, 3, 0]]),
        attention_mask=torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0]]),
    )


def run_training_step(model):
    trainable_parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable_parameters, lr=0.1, weight_decay=0.1)
    model(make_batch()).loss.backward()
    optimizer.step()


@pytest.mark.parametrize(
    ("trainable", "lora"),
    [
        (("mixer", "projection", "task_tokens"), None),
        (("encoder",), None),
        (("task_tokens",), None),
        (("mixer", "language_model"), None),
        (("lora",), 2),
        (("lora", "language_model"), 2),
    ],
)
def test_training_step_changes_only_trainable_groups(build_small_model, trainable, lora):
    model = build_small_model(trainable=trainable, lora=lora).train()
    group_of = {id(parameter): group for group, members in model.group_parameters().items() for parameter in members}
    is_trainable = {name: group_of[id(parameter)] in trainable for name, parameter in model.named_parameters()}
    state_before = {name: value.clone() for name, value in model.state_dict().items()}
    run_training_step(model)
    state_after = model.state_dict()
    changed_groups = {
        group_of[id(p)]
        for name, p in model.named_parameters()
        if not torch.equal(state_before[name], state_after[name])
    }
    assert changed_groups == set(trainable)
    for name in state_before:
        part = name.split(".")[0]
        if name not in is_trainable:  # buffers, which move only in a part that trains
            assert part in trainable or torch.equal(state_before[name], state_after[name]), name
        elif not is_trainable[name]:
            assert torch.equal(state_before[name], state_after[name]), name


def test_model_train_keeps_frozen_components_in_eval_mode(build_small_model):
    model = build_small_model(trainable=["mixer", "projection"]).train()
    training_flags = {name: [module.training for module in part.modules()] for name, part in model.named_children()}
    assert all(training_flags["mixer"])
    assert all(training_flags["projection"])
    assert not any(training_flags["encoder"] + training_flags["segmenter"] + training_flags["language_model"])
    assert model.training
    assert not model.eval().mixer.training


def test_neck_can_train_while_its_segmenter_is_frozen(build_small_model):
    segmenter = {"name": "sam", "hidden_size": 48, "depth": 1, "num_heads": 2, "mlp_dim": 64}
    model = build_small_model(trainable=["neck", "mixer"], segmenter=segmenter)
    assert {name for name, p in model.segmenter.named_parameters() if p.requires_grad} == {
        f"neck.{name}" for name, _ in model.segmenter.neck.named_parameters()
    }


def test_positional_embedding_frequencies_are_always_frozen(build_small_model, small_model_table):
    model = build_small_model(trainable=small_model_table["trainable"])
    frozen_names = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    assert frozen_names == ["segmenter.prompt_encoder.shared_embedding.positional_embedding"]


def test_summarize_parameters_counts_every_parameter_once(build_small_model):
    model = build_small_model(trainable=["mixer", "lora"], lora=2)
    lines = model.summarize_parameters().splitlines()
    counts = {line.split()[0]: int(line.split()[1].replace(",", "")) for line in lines[:-1]}
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    num_trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert sum(counts.values()) == num_parameters
    assert counts["mixer"] + counts["lora"] == num_trainable
    assert [line.split()[0] for line in lines if line.endswith(" trainable")][:-1] == ["mixer", "lora"]
    assert lines[-1].endswith(f"{num_trainable:,} trainable")
