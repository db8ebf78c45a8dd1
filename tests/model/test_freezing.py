"""What is frozen stays as it is; what trains is what the spec says."""

import pytest
import torch
from sca_registry.contracts import Batch, PromptBatch


def batch():
    draw = torch.Generator().manual_seed(0)
    return Batch(
        pixel_values=torch.randn(2, 3, 64, 64, generator=draw),
        prompts=PromptBatch(
            torch.tensor([0, 1, 1]), boxes=torch.tensor([[4.0, 4, 30, 30], [8, 8, 60, 50], [0, 0, 9, 9]])
        ),
        task_ids=torch.tensor([0, 1, 1]),
        input_ids=torch.tensor([[5, 6, 7], [8, 0, 0], [9, 3, 0]]),
        attention_mask=torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0]]),
    )


def step(model):
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.1, weight_decay=0.1)
    model(batch()).loss.backward()
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
def test_only_what_the_spec_names_changes_in_a_step(small, trainable, lora):
    model = small(trainable=trainable, lora=lora).train()
    group_of = {id(parameter): group for group, members in model.group_parameters().items() for parameter in members}
    trained = {name: group_of[id(parameter)] in trainable for name, parameter in model.named_parameters()}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    step(model)
    after = model.state_dict()
    changed = {group_of[id(p)] for name, p in model.named_parameters() if not torch.equal(before[name], after[name])}
    assert changed == set(trainable)
    for name in before:
        part = name.split(".")[0]
        if name not in trained:  # buffers, which move only in a part that trains
            assert part in trainable or torch.equal(before[name], after[name]), name
        elif not trained[name]:
            assert torch.equal(before[name], after[name]), name


def test_a_frozen_part_stays_in_eval_mode_under_train(small):
    model = small(trainable=["mixer", "projection"]).train()
    modes = {name: [module.training for module in part.modules()] for name, part in model.named_children()}
    assert all(modes["mixer"])
    assert all(modes["projection"])
    assert not any(modes["encoder"] + modes["segmenter"] + modes["language_model"])
    assert model.training
    assert not model.eval().mixer.training


def test_the_neck_trains_apart_from_its_segmenter(small):
    segmenter = {"name": "sam", "hidden_size": 48, "depth": 1, "num_heads": 2, "mlp_dim": 64}
    model = small(trainable=["neck", "mixer"], segmenter=segmenter)
    assert {name for name, p in model.segmenter.named_parameters() if p.requires_grad} == {
        f"neck.{name}" for name, _ in model.segmenter.neck.named_parameters()
    }


def test_random_frequencies_never_train(small, small_table):
    model = small(trainable=small_table["trainable"])
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    assert frozen == ["segmenter.prompt_encoder.shared_embedding.positional_embedding"]


def test_the_report_counts_every_parameter_once(small):
    model = small(trainable=["mixer", "lora"], lora=2)
    lines = model.summarize_parameters().splitlines()
    counts = {line.split()[0]: int(line.split()[1].replace(",", "")) for line in lines[:-1]}
    total = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert sum(counts.values()) == total
    assert counts["mixer"] + counts["lora"] == trained
    assert [line.split()[0] for line in lines if line.endswith("trains")] == ["mixer", "lora"]
    assert lines[-1].endswith(f"{trained:,} train")
