"""Phi checkpoints of transformers 4.36, with fused attention, are read as that version read them."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from sca_registry.contracts import Batch, PromptBatch
from tiny import tiny

import sca
from sca.checkpoints.export import write_published_checkpoint
from sca.io.errors import InputError
from sca.language_models.hf import HfLanguageModel

HEADS, WIDTH = tiny("phi")["num_attention_heads"], tiny("phi")["hidden_size"]


def fuse(tensors):
    """Join query, key and value row by row, in the order of transformers 4.36: head, then which of the three."""
    split = re.compile(r"(.*model\.layers\.\d+\.self_attn\.)[qkv]_proj\.(\w+)")
    fused = {name: tensor for name, tensor in tensors.items() if not split.fullmatch(name)}
    for prefix, kind in dict.fromkeys(match.groups() for match in map(split.fullmatch, tensors) if match):
        rows = []
        for head in range(HEADS):
            for which in ("q", "k", "v"):
                for row in range(WIDTH // HEADS):
                    rows.append(tensors[f"{prefix}{which}_proj.{kind}"][head * WIDTH // HEADS + row])
        fused[f"{prefix}query_key_value.{kind}"] = torch.stack(rows)
    assert len(fused) < len(tensors)
    return fused


def rewrite(folder, change):
    tensors = change(load_file(folder / "model.safetensors"))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def drop_row(tensors):
    name = next(name for name in tensors if name.endswith("query_key_value.weight"))
    return tensors | {name: tensors[name][1:].contiguous()}


@pytest.fixture
def plain(lm_folder, tmp_path):
    """A folder of transformers with biases that are not zero, as those of a trained Phi."""
    folder = shutil.copytree(lm_folder("phi"), tmp_path / "plain")
    draw = torch.Generator().manual_seed(4)
    rewrite(folder, lambda held: {name: torch.randn(each.shape, generator=draw) / 8 for name, each in held.items()})
    return folder


@pytest.fixture
def published(plain, sam_folder, tmp_path):
    mixer = {"name": "query", "num_queries": 2, "depth": 1, "num_heads": 4, "mlp_dim": 48}
    torch.manual_seed(3)
    model = sca.compose({"name": "sam", "weights": str(sam_folder)}, mixer, {"name": "hf", "weights": str(plain)})
    return write_published_checkpoint(model, tmp_path / "published")


@torch.no_grad()
def logits(folder):
    draw = torch.Generator().manual_seed(0)
    batch = Batch(
        pixel_values=torch.randn(1, 3, 64, 64, generator=draw),
        prompts=PromptBatch(torch.tensor([0, 0]), boxes=torch.tensor([[4.0, 4, 30, 30], [8, 8, 60, 50]])),
        task_ids=torch.tensor([0, 1]),
        input_ids=torch.tensor([[5, 6, 2], [8, 9, 2]]),
        attention_mask=torch.ones(2, 3, dtype=torch.long),
    )
    return sca.load(folder)(batch).logits


@pytest.mark.parametrize("old", [False, True], ids=["safetensors", "bin"])
@pytest.mark.slow
def test_published_phi_with_fused_attention_predicts_the_same(published, old):
    expected = logits(published)
    rewrite(published, fuse)
    if old:
        torch.save(load_file(published / "model.safetensors"), published / "pytorch_model.bin")
        (published / "model.safetensors").unlink()
    assert torch.equal(logits(published), expected)


@pytest.mark.parametrize("old", [False, True], ids=["safetensors", "bin"])
@torch.no_grad()
def test_language_model_with_fused_attention_predicts_the_same(plain, tmp_path, old):
    ids, mask = torch.tensor([[5, 6, 7, 8]]), torch.ones(1, 4, dtype=torch.long)
    expected = HfLanguageModel(str(plain))
    fused = shutil.copytree(plain, tmp_path / "fused")
    rewrite(fused, fuse)
    (fused / "generation_config.json").write_text(json.dumps({"eos_token_id": 7, "repetition_penalty": 1.5}))
    if old:
        torch.save(load_file(fused / "model.safetensors"), fused / "pytorch_model.bin")
        (fused / "model.safetensors").unlink()
    found = HfLanguageModel(str(fused), dtype="float32")
    states = [each.hidden_states(each.embed_tokens(ids), mask) for each in (found, expected)]
    assert torch.equal(*states)
    assert torch.equal(found.lm_head(states[0]), expected.lm_head(states[1]))
    assert found.model.generation_config.repetition_penalty is None
    assert found._resolve_special_tokens()[1] == [7]


@torch.no_grad()
def test_attention_layer_computes_what_the_fused_one_did(plain):
    """The steps of transformers 4.36, with the fused projection, beside the layer that was loaded without it."""
    model = HfLanguageModel(str(plain)).model.model
    fused = fuse(load_file(plain / "model.safetensors"))
    states, places = torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(1)), torch.arange(5)[None]
    cos, sin = model.rotary_emb(states, places)
    name = "model.layers.1.self_attn"
    joint = states @ fused[f"{name}.query_key_value.weight"].T + fused[f"{name}.query_key_value.bias"]
    joint = joint.view(2, 5, HEADS, 3, WIDTH // HEADS)
    query, key, value = (joint[..., place, :].transpose(1, 2) for place in range(3))
    query, key = rotated(query, cos, sin), rotated(key, cos, sin)
    weights = query @ key.transpose(2, 3) / (WIDTH // HEADS) ** 0.5
    weights = (weights + torch.full((5, 5), float("-inf")).triu(1)).softmax(-1)
    expected = (weights @ value).transpose(1, 2).reshape(2, 5, WIDTH)
    expected = expected @ fused[f"{name}.dense.weight"].T + fused[f"{name}.dense.bias"]
    found, _ = model.layers[1].self_attn(states, position_embeddings=(cos, sin), attention_mask=None)
    assert torch.allclose(found, expected, atol=1e-5)


def rotated(values, cos, sin):
    """The first part of each head by its position; the rest is unchanged."""
    turned, rest = values[..., : cos.shape[-1]], values[..., cos.shape[-1] :]
    first, second = turned.chunk(2, dim=-1)
    return torch.cat((turned * cos + torch.cat((-second, first), dim=-1) * sin, rest), dim=-1)


def test_fused_tensor_of_another_shape_is_rejected_in_one_line(published, plain):
    told = r"self_attn\.query_key_value\.weight has shape \(95, 32\), but config\.json requires \(96, 32\)"
    for folder, load, error in ((published, sca.load, InputError), (plain, HfLanguageModel, InputError)):
        rewrite(folder, lambda held: drop_row(fuse(held)))
        with pytest.raises(error, match=told) as raised:
            load(str(folder))
        assert "\n" not in str(raised.value)
        assert str(folder) in str(raised.value)


def test_checkpoint_with_fused_and_split_attention_is_rejected(published):
    rewrite(published, lambda held: held | fuse(held))
    with pytest.raises(InputError, match="both"):
        sca.load(published)


def test_fused_attention_of_another_language_model_is_unexpected(published):
    """Only Phi ordered its rows like this."""
    config = json.loads((published / "config.json").read_text())
    config["text_config"]["model_type"] = "llama"
    (published / "config.json").write_text(json.dumps(config))
    rewrite(published, fuse)
    with pytest.raises(InputError, match=r"missing .*self_attn\.k_proj\.weight"):
        sca.load(published)
