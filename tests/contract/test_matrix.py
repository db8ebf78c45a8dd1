"""Every mixer with every family of language models, on SAM's own code path: a step of training, and back from disk."""

import pytest
import sca_registry
import torch
from sca_registry.contracts import Batch, Prompts
from tiny import FAMILIES

import sca

OPTIONS = {
    "query": {"queries": 2, "depth": 1, "heads": 4, "mlp": 48},
    "split": {"queries": 2, "depth": 1, "heads": 4, "mlp": 48},
    "mask-tokens": {"depth": 1, "heads": 4, "mlp": 48},
    "resampler": {"queries": 2, "depth": 1, "heads": 4, "mlp": 48},
    "roi-pool": {"size": 2},
    "masked-pool": {"queries": 2, "mlp": 48},
}


def combination(mixer, family, lora):
    """All are tried by `make test-all`; every mixer and every family, at least once each way, by `make test`."""
    m, f = list(OPTIONS).index(mixer), list(FAMILIES).index(family) % len(OPTIONS)
    some = f == m if not lora else f in (m, (m + 1) % len(OPTIONS))
    name = f"{mixer}-{family}-{'lora' if lora else 'frozen'}"
    return pytest.param(mixer, family, lora, id=name, marks=() if some else pytest.mark.all)


COMBINATIONS = [combination(mixer, family, lora) for mixer in OPTIONS for family in FAMILIES for lora in (0, 2)]
BOXES = torch.tensor([[4.0, 4, 30, 30], [8, 8, 60, 50], [0, 0, 19, 29]])


def test_every_registered_mixer_is_in_the_matrix():
    assert set(sca_registry.mixers.names()) == set(OPTIONS)


@pytest.fixture
def batch():
    draw = torch.Generator().manual_seed(0)
    return Batch(
        pixels=torch.randn(2, 3, 64, 64, generator=draw),
        prompts=Prompts(torch.tensor([0, 1, 1]), boxes=BOXES),
        task=torch.tensor([0, 1, 1]),
        ids=torch.tensor([[5, 6, 2], [8, 2, 0], [9, 3, 2]]),
        mask=torch.tensor([[1, 1, 1], [1, 1, 0], [1, 1, 1]]),
    )


@pytest.mark.parametrize(("mixer", "family", "lora"), COMBINATIONS)
def test_a_combination_learns_and_comes_back_from_disk(mixer, family, lora, sam_folder, lm_folder, batch, tmp_path):
    torch.manual_seed(0)
    model = sca.compose(
        {"name": "sam", "weights": str(sam_folder)},
        {"name": mixer, **OPTIONS[mixer]},
        {"name": "hf", "weights": str(lm_folder(family))},
        lora=lora,
        task_tokens=2,
    )
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all(name.split(".")[0] in ("mixer", "projection", "task_tokens") or "lora_" in name for name in trained)
    model.train()
    optimiser = torch.optim.AdamW(trained.values(), lr=1e-2)
    first = model(batch).loss
    first.backward()
    without = [name for name, p in trained.items() if p.grad is None and not (lora and "lora_A" in name)]
    assert not without
    optimiser.step()
    model.eval()
    with torch.no_grad():
        after = model(batch)
        assert after.loss < first
        generated = model.generate(model.encode(batch.pixels), batch.prompts, batch.task, max_new_tokens=3)
        assert generated.ids.shape[:2] == (3, 1)
        sca.save(model, tmp_path / "model")
        again = sca.load(tmp_path / "model")
        assert torch.equal(again(batch).logits, after.logits)
    stored = (tmp_path / "model" / "weights.safetensors").stat().st_size
    assert stored < 4 * sum(p.numel() for p in trained.values()) + 20_000  # nothing of what lies elsewhere
