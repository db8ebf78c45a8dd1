"""What is quicker than the library's own way says the same: to the id, and to 1e-5."""

import pytest
import torch
from tiny import FAMILIES
from transformers.models.sam.modeling_sam import SamTwoWayTransformer

from sca.language_models import causal
from sca.language_models.hf import HfLanguageModel
from sca.nn.two_way_transformer import TwoWayTransformer, init_weights

REGIONS, TOKENS, WIDTH, SIDE = 7, 5, 32, 6


@pytest.fixture
def transformer():
    torch.manual_seed(0)
    made = TwoWayTransformer(WIDTH, 3, num_heads=4, mlp_dim=48)
    made.apply(init_weights)
    for parameter in made.parameters():  # biases and norms that matter
        torch.nn.init.normal_(parameter, std=0.3)
    return made.eval()


@pytest.fixture
def asked():
    draw = torch.Generator().manual_seed(1)
    grids = torch.randn(3, WIDTH, SIDE, SIDE, generator=draw)
    position = torch.randn(WIDTH, SIDE, SIDE, generator=draw)
    return torch.randn(REGIONS, TOKENS, WIDTH, generator=draw), grids, position, torch.tensor([0, 0, 0, 1, 2, 2, 2])


def library(transformer, tokens, grid, position):
    fused, keys = SamTwoWayTransformer.forward(transformer, tokens.unsqueeze(1), grid, position.unsqueeze(0), None)
    return fused.squeeze(1), keys.squeeze(1).transpose(1, 2).unflatten(2, grid.shape[-2:])


@pytest.mark.parametrize("regions", [1, 2, 3, 100])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("learning", [False, True])
def test_the_two_way_transformer_is_the_library_s(transformer, asked, monkeypatch, regions, shared, learning):
    tokens, grids, position, owner = asked
    monkeypatch.setattr(TwoWayTransformer, "max_elements_per_chunk", regions * WIDTH * SIDE * SIDE)
    with torch.set_grad_enabled(learning):
        expected = library(transformer, tokens, grids[owner], position)
        given = (grids, position, owner) if shared else (grids[owner], position)
        found = transformer(tokens, *given)
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        assert (one - other).abs().max() < 1e-5
    assert transformer(tokens, *given, return_grids=False)[1] is None


def test_no_region_is_no_trouble(transformer, asked):
    tokens, grids, position, owner = asked
    with torch.inference_mode():
        fused, keys = transformer(tokens[:0], grids, position, owner[:0])
    assert fused.shape == (0, TOKENS, WIDTH)
    assert keys.shape == (0, WIDTH, SIDE, SIDE)


def test_gradients_are_the_library_s(transformer, asked):
    tokens, grids, position, owner = asked
    gradients = []
    for way in (library, lambda model, *given: model(*given)):
        transformer.zero_grad()
        fused, keys = way(transformer, tokens, grids[owner], position)
        (fused.square().sum() + keys.square().mean()).backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in transformer.named_parameters()})
    largest = max(expected.abs().max() for expected in gradients[0].values())
    for name, expected in gradients[0].items():
        assert torch.allclose(gradients[1][name], expected, rtol=1e-3, atol=1e-6 * largest), name


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("ends", [0, 4, 40])
@pytest.mark.slow
def test_greedy_words_are_those_of_generate(lm_folder, monkeypatch, family, ends):
    """Of 97 words so many end a caption, so that few, some or most leave the batch early."""
    model = HfLanguageModel(weights=str(lm_folder(family)))
    draw = torch.Generator().manual_seed(3)
    for parameter in model.model.parameters():  # words that differ from region to region
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=draw)
    monkeypatch.setattr(model, "_resolve_special_tokens", lambda: (0, list(range(1, 1 + ends))))
    prefix = torch.randn(9, 4, model.hidden_size, generator=draw)
    assert causal.has_plain_greedy_settings(model.model)
    fast = model.generate(prefix, 12)
    monkeypatch.setattr(causal, "has_plain_greedy_settings", lambda _: False)
    plain = model.generate(prefix, 12)
    assert fast.sequences.tolist() == plain.sequences.tolist()
    assert torch.allclose(fast.scores, plain.scores, atol=1e-5)


def test_settings_that_greedy_search_does_not_know_are_left_to_the_library(lm_folder):
    model = HfLanguageModel(weights=str(lm_folder("gpt2"))).model
    assert causal.has_plain_greedy_settings(model)
    model.generation_config.repetition_penalty = 1.3
    assert not causal.has_plain_greedy_settings(model)
