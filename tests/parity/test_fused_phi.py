"""Phi checkpoints of transformers 4.36 with fused attention: outputs equal those of that version."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from sca_registry.contracts import Batch, PromptBatch
from tiny import make_tiny_config

import sca
from sca.checkpoints.export import write_published_checkpoint
from sca.io.errors import InputError
from sca.language_models.hf import HfLanguageModel

NUM_HEADS, HIDDEN_SIZE = make_tiny_config("phi")["num_attention_heads"], make_tiny_config("phi")["hidden_size"]


def fuse_attention(tensors):
    """Fuse query, key and value; rows are ordered by head, then by projection, as in transformers 4.36."""
    projection_pattern = re.compile(r"(.*model\.layers\.\d+\.self_attn\.)[qkv]_proj\.(\w+)")
    fused = {name: tensor for name, tensor in tensors.items() if not projection_pattern.fullmatch(name)}
    for prefix, kind in dict.fromkeys(match.groups() for match in map(projection_pattern.fullmatch, tensors) if match):
        rows = []
        for head in range(NUM_HEADS):
            for projection in ("q", "k", "v"):
                for row in range(HIDDEN_SIZE // NUM_HEADS):
                    rows.append(tensors[f"{prefix}{projection}_proj.{kind}"][head * HIDDEN_SIZE // NUM_HEADS + row])
        fused[f"{prefix}query_key_value.{kind}"] = torch.stack(rows)
    assert len(fused) < len(tensors)
    return fused


def rewrite_weights(folder, change_tensors):
    tensors = change_tensors(load_file(folder / "model.safetensors"))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def drop_fused_row(tensors):
    name = next(name for name in tensors if name.endswith("query_key_value.weight"))
    return tensors | {name: tensors[name][1:].contiguous()}


@pytest.fixture
def phi_folder(save_language_model, tmp_path):
    """Save a model with nonzero biases in the layout of transformers."""
    folder = shutil.copytree(save_language_model("phi"), tmp_path / "plain")
    generator = torch.Generator().manual_seed(4)
    rewrite_weights(
        folder, lambda held: {name: torch.randn(each.shape, generator=generator) / 8 for name, each in held.items()}
    )
    return folder


@pytest.fixture
def published_folder(phi_folder, sam_folder, tmp_path):
    mixer = {"name": "query", "num_queries": 2, "depth": 1, "num_heads": 4, "mlp_dim": 48}
    torch.manual_seed(3)
    model = sca.compose({"name": "sam", "weights": str(sam_folder)}, mixer, {"name": "hf", "weights": str(phi_folder)})
    return write_published_checkpoint(model, tmp_path / "published")


@torch.no_grad()
def compute_logits(folder):
    generator = torch.Generator().manual_seed(0)
    batch = Batch(
        pixel_values=torch.randn(1, 3, 64, 64, generator=generator),
        prompts=PromptBatch(torch.tensor([0, 0]), boxes=torch.tensor([[4.0, 4, 30, 30], [8, 8, 60, 50]])),
        task_ids=torch.tensor([0, 1]),
        input_ids=torch.tensor([[5, 6, 2], [8, 9, 2]]),
        attention_mask=torch.ones(2, 3, dtype=torch.long),
    )
    return sca.load(folder)(batch).logits


@pytest.mark.parametrize("as_bin", [False, True], ids=["safetensors", "bin"])
@pytest.mark.slow
def test_published_phi_with_fused_attention_has_equal_logits(published_folder, as_bin):
    expected = compute_logits(published_folder)
    rewrite_weights(published_folder, fuse_attention)
    if as_bin:
        torch.save(load_file(published_folder / "model.safetensors"), published_folder / "pytorch_model.bin")
        (published_folder / "model.safetensors").unlink()
    assert torch.equal(compute_logits(published_folder), expected)


@pytest.mark.parametrize("as_bin", [False, True], ids=["safetensors", "bin"])
@torch.no_grad()
def test_language_model_with_fused_attention_has_equal_logits(phi_folder, tmp_path, as_bin):
    ids, mask = torch.tensor([[5, 6, 7, 8]]), torch.ones(1, 4, dtype=torch.long)
    expected_model = HfLanguageModel(str(phi_folder))
    fused_folder = shutil.copytree(phi_folder, tmp_path / "fused")
    rewrite_weights(fused_folder, fuse_attention)
    (fused_folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 7, "repetition_penalty": 1.5}))
    if as_bin:
        torch.save(load_file(fused_folder / "model.safetensors"), fused_folder / "pytorch_model.bin")
        (fused_folder / "model.safetensors").unlink()
    fused_model = HfLanguageModel(str(fused_folder), dtype="float32")
    states = [each.hidden_states(each.embed_tokens(ids), mask) for each in (fused_model, expected_model)]
    assert torch.equal(*states)
    assert torch.equal(fused_model.lm_head(states[0]), expected_model.lm_head(states[1]))
    assert fused_model.model.generation_config.repetition_penalty is None
    assert fused_model._resolve_special_tokens()[1] == [7]


@torch.no_grad()
def test_phi_attention_layer_matches_fused_attention(phi_folder):
    """Compute attention as transformers 4.36 does, with the fused projection, and compare with the loaded layer."""
    model = HfLanguageModel(str(phi_folder)).model.model
    fused_tensors = fuse_attention(load_file(phi_folder / "model.safetensors"))
    states, positions = (
        torch.randn(2, 5, HIDDEN_SIZE, generator=torch.Generator().manual_seed(1)),
        torch.arange(5)[None],
    )
    cos, sin = model.rotary_emb(states, positions)
    name = "model.layers.1.self_attn"
    fused_projection = (
        states @ fused_tensors[f"{name}.query_key_value.weight"].T + fused_tensors[f"{name}.query_key_value.bias"]
    )
    fused_projection = fused_projection.view(2, 5, NUM_HEADS, 3, HIDDEN_SIZE // NUM_HEADS)
    query, key, value = (fused_projection[..., index, :].transpose(1, 2) for index in range(3))
    query, key = apply_rotary_embedding(query, cos, sin), apply_rotary_embedding(key, cos, sin)
    attention_weights = query @ key.transpose(2, 3) / (HIDDEN_SIZE // NUM_HEADS) ** 0.5
    attention_weights = (attention_weights + torch.full((5, 5), float("-inf")).triu(1)).softmax(-1)
    expected = (attention_weights @ value).transpose(1, 2).reshape(2, 5, HIDDEN_SIZE)
    expected = expected @ fused_tensors[f"{name}.dense.weight"].T + fused_tensors[f"{name}.dense.bias"]
    output, _ = model.layers[1].self_attn(states, position_embeddings=(cos, sin), attention_mask=None)
    assert torch.allclose(output, expected, atol=1e-5)


def apply_rotary_embedding(values, cos, sin):
    """Rotate the first dimensions of each head; the others are unchanged."""
    rotary_part, rest = values[..., : cos.shape[-1]], values[..., cos.shape[-1] :]
    first_half, second_half = rotary_part.chunk(2, dim=-1)
    return torch.cat((rotary_part * cos + torch.cat((-second_half, first_half), dim=-1) * sin, rest), dim=-1)


def test_load_rejects_a_fused_tensor_with_a_wrong_shape_in_one_line(published_folder, phi_folder):
    message = r"self_attn\.query_key_value\.weight has shape \(95, 32\), but config\.json requires \(96, 32\)"
    for folder, load, error in ((published_folder, sca.load, InputError), (phi_folder, HfLanguageModel, InputError)):
        rewrite_weights(folder, lambda held: drop_fused_row(fuse_attention(held)))
        with pytest.raises(error, match=message) as raised:
            load(str(folder))
        assert "\n" not in str(raised.value)
        assert str(folder) in str(raised.value)


def test_load_rejects_a_checkpoint_with_fused_and_split_attention(published_folder):
    rewrite_weights(published_folder, lambda held: held | fuse_attention(held))
    with pytest.raises(InputError, match="both"):
        sca.load(published_folder)


def test_load_rejects_fused_attention_of_other_language_models(published_folder):
    """Only Phi uses this row order."""
    config = json.loads((published_folder / "config.json").read_text())
    config["text_config"]["model_type"] = "llama"
    (published_folder / "config.json").write_text(json.dumps(config))
    rewrite_weights(published_folder, fuse_attention)
    with pytest.raises(InputError, match=r"missing .*self_attn\.k_proj\.weight"):
        sca.load(published_folder)
