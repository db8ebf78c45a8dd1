"""Every encoder with every mixer and every family of language models: a step of training, and back from disk."""

import pytest
import sca_registry
import torch
from sca_registry import RegistryError
from sca_registry.contracts import Batch, PromptBatch
from tiny import FAMILIES

import sca
from sca.testing.tiny import get_tiny_options

OPTIONS = {
    "query": {"num_queries": 2, "depth": 1, "num_heads": 4, "mlp_dim": 48},
    "split": {"num_queries": 2, "depth": 1, "num_heads": 4, "mlp_dim": 48},
    "mask-tokens": {"depth": 1, "num_heads": 4, "mlp_dim": 48},
    "resampler": {"num_queries": 2, "depth": 1, "num_heads": 4, "mlp_dim": 48},
    "roi-pool": {"output_size": 2},
    "masked-pool": {"num_queries": 2, "mlp_dim": 48},
}


ENCODERS = (  # besides SAM's own, which has a folder with weights
    *("tiny-vit", "clip-vit-b-16", "siglip-b-16", "clip-rn50", "dinov2-vit-b-14", "dinov3-vit-b-16", "mae-vit-b-16"),
    *("samvit-b-16", "convnext-b", "swin-b", "hiera-b"),
)


def combination(encoder, mixer, family, lora):
    """All are tried by `make test-all`; every encoder, mixer and family, at least once each way, by `make test`."""
    m, f = list(OPTIONS).index(mixer), list(FAMILIES).index(family) % len(OPTIONS)
    if encoder == "sam":
        some = f == m if not lora else f in (m, (m + 1) % len(OPTIONS))
    else:
        some = (m, list(FAMILIES).index(family)) == (list(ENCODERS).index(encoder) % len(OPTIONS), m)
    name = f"{encoder}-{mixer}-{family}-{'lora' if lora else 'frozen'}"
    return pytest.param(encoder, mixer, family, lora, id=name, marks=() if some else pytest.mark.all)


COMBINATIONS = [
    *(combination("sam", mixer, family, lora) for mixer in OPTIONS for family in FAMILIES for lora in (0, 2)),
    *(
        combination(encoder, mixer, family, 2 * (number % 2))
        for encoder in ENCODERS
        for mixer in OPTIONS
        for number, family in enumerate(FAMILIES)
    ),
]
BOXES = torch.tensor([[4.0, 4, 30, 30], [8, 8, 60, 50], [0, 0, 19, 29]])


def test_every_registered_mixer_is_in_the_matrix():
    assert set(sca_registry.mixers.list_names()) == set(OPTIONS)


def batch_for(size):
    draw = torch.Generator().manual_seed(0)
    return Batch(
        pixel_values=torch.randn(2, 3, size, size, generator=draw),
        prompts=PromptBatch(torch.tensor([0, 1, 1]), boxes=BOXES * size / 64),
        task_ids=torch.tensor([0, 1, 1]),
        input_ids=torch.tensor([[5, 6, 2], [8, 2, 0], [9, 3, 2]]),
        attention_mask=torch.tensor([[1, 1, 1], [1, 1, 0], [1, 1, 1]]),
    )


def parts_of(encoder, mixer, sam_folder):
    if encoder == "sam":
        part, card = {"name": "sam", "weights": str(sam_folder)}, sca_registry.encoders.get_card("sam")
    else:
        card = sca_registry.encoders.get_card(encoder)
        part = {"name": encoder, **get_tiny_options("encoder", encoder)}
    if card.extra and sca_registry.encoders.load_entry(encoder).state != "ok":
        pytest.skip(f"the extra {card.extra} is not installed")
    return part, {"name": mixer, **OPTIONS[mixer]}


@pytest.mark.parametrize(("encoder", "mixer", "family", "lora"), COMBINATIONS)
@pytest.mark.slow
def test_a_combination_learns_and_comes_back_from_disk(
    encoder, mixer, family, lora, sam_folder, lm_folder, tmp_path, monkeypatch
):
    torch.manual_seed(0)
    part, mixed = parts_of(encoder, mixer, sam_folder)
    spoken, options = {"name": "hf", "weights": str(lm_folder(family))}, {"lora": lora, "task_tokens": 2}
    boxed = sca_registry.encoders.get_declared(encoder, "default_segmenter") == "box"
    if boxed and "masks" in (sca_registry.mixers.get_declared(mixer, "requires") or ()):
        with monkeypatch.context() as patch:
            patch.setattr(sca_registry.encoders, "build", None)  # refused before anything is built
            with pytest.raises(RegistryError, match=rf"'{mixer}'.*segmenter=sam"):
                sca.compose(part, mixed, spoken, **options)
        options["segmenter"] = {
            "name": "sam",
            "depth": 1,
            "mlp_dim": 48,
            "num_heads": 4,
            "hidden_size": 32,
        }  # the way out
    model = sca.compose(part, mixed, spoken, **options)
    batch = batch_for(model.encoder.image_format.size)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    groups = ("mixer", "projection", "task_tokens")
    assert all(name.split(".")[0] in groups or "lora_" in name or ".neck." in name for name in trained)
    model.train()
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
    first = model(batch).loss
    first.backward()
    without = [name for name, p in trained.items() if p.grad is None and not (lora and "lora_A" in name)]
    assert not without
    optimizer.step()
    model.eval()
    with torch.no_grad():
        after = model(batch)
        assert after.loss < first
        generated = model.generate(model.encode(batch.pixel_values), batch.prompts, batch.task_ids, max_new_tokens=3)
        assert generated.sequences.shape[:2] == (3, 1)
        sca.save(model, tmp_path / "model")
        again = sca.load(tmp_path / "model", allow_external=True)
        assert torch.equal(again(batch).logits, after.logits)
    stored = (tmp_path / "model" / "weights.safetensors").stat().st_size
    assert (
        encoder != "sam" or stored < 4 * sum(p.numel() for p in trained.values()) + 20_000
    )  # nothing of what lies elsewhere
