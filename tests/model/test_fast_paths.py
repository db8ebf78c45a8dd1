"""Fast paths: outputs equal those of the library, ids exactly and floats within 1e-5."""

import pytest
import torch
from sca_registry.contracts import PromptBatch
from tiny import LANGUAGE_MODEL_FAMILIES
from transformers import SamMaskDecoderConfig
from transformers.models.sam.modeling_sam import SamTwoWayTransformer

import sca
from sca.language_models import causal
from sca.language_models.hf import HfLanguageModel
from sca.nn import two_way_transformer
from sca.nn.masks import select_confident_masks
from sca.nn.parameters import share_parameters
from sca.nn.two_way_transformer import TwoWayTransformer, init_weights
from sca.testing.tiny import get_tiny_options

NUM_REGIONS, NUM_TOKENS, HIDDEN_SIZE, GRID_SIZE = 7, 5, 32, 6


@pytest.fixture
def transformer():
    torch.manual_seed(0)
    module = TwoWayTransformer(HIDDEN_SIZE, 3, num_heads=4, mlp_dim=48)
    module.apply(init_weights)
    for parameter in module.parameters():  # biases and norms that matter
        torch.nn.init.normal_(parameter, std=0.3)
    return module.eval()


@pytest.fixture
def transformer_inputs():
    generator = torch.Generator().manual_seed(1)
    grids = torch.randn(3, HIDDEN_SIZE, GRID_SIZE, GRID_SIZE, generator=generator)
    position = torch.randn(HIDDEN_SIZE, GRID_SIZE, GRID_SIZE, generator=generator)
    return (
        torch.randn(NUM_REGIONS, NUM_TOKENS, HIDDEN_SIZE, generator=generator),
        grids,
        position,
        torch.tensor([0, 0, 0, 1, 2, 2, 2]),
    )


def run_library_transformer(transformer, tokens, grid, position):
    config = SamMaskDecoderConfig(hidden_size=HIDDEN_SIZE, num_hidden_layers=3, num_attention_heads=4, mlp_dim=48)
    library_transformer = SamTwoWayTransformer(config)
    share_parameters(transformer, library_transformer)
    fused, keys = library_transformer(tokens.unsqueeze(1), grid, position.unsqueeze(0), None)
    return fused.squeeze(1), keys.squeeze(1).transpose(1, 2).unflatten(2, grid.shape[-2:])


@pytest.mark.parametrize("regions_per_chunk", [1, 2, 3, 100])
@pytest.mark.parametrize("shares_grids", [False, True])
@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("num_tokens", [2, NUM_TOKENS])  # few tokens are projected instead of the grid
def test_two_way_transformer_matches_transformers(
    transformer, transformer_inputs, monkeypatch, regions_per_chunk, shares_grids, requires_grad, num_tokens
):
    tokens, grids, position, image_index = transformer_inputs
    tokens, original_grids = tokens[:, :num_tokens], grids.clone()
    monkeypatch.setattr(
        TwoWayTransformer, "max_elements_per_chunk", regions_per_chunk * HIDDEN_SIZE * GRID_SIZE * GRID_SIZE
    )
    with torch.set_grad_enabled(requires_grad):
        expected = run_library_transformer(transformer, tokens, grids[image_index], position)
        grid_arguments = (grids, position, image_index) if shares_grids else (grids[image_index], position)
        outputs = transformer(tokens, *grid_arguments)
    for output, expected_output in zip(outputs, expected, strict=True):
        assert output.shape == expected_output.shape
        assert (output - expected_output).abs().max() < 1e-5
    assert transformer(tokens, *grid_arguments, return_grids=False)[1] is None
    assert torch.equal(grids, original_grids)


def test_two_way_transformer_projects_the_grid_only_for_many_tokens(transformer, transformer_inputs):
    tokens, grids, position, _ = transformer_inputs
    cells = grids[:1].flatten(2).transpose(1, 2)
    layer = transformer.layers[0]
    projection = two_way_transformer._build_grid_projection(layer, position.flatten(1).T)
    with torch.inference_mode():
        grid_classes = [
            type(
                two_way_transformer._build_grid(layer.cross_attn_token_to_image, tokens[:1, :count], cells, projection)
            )
            for count in (2, NUM_TOKENS)
        ]
    assert grid_classes == [two_way_transformer._UnprojectedGrid, two_way_transformer._ProjectedGrid]


def test_two_way_transformer_accepts_no_regions(transformer, transformer_inputs):
    tokens, grids, position, image_index = transformer_inputs
    with torch.inference_mode():
        fused, keys = transformer(tokens[:0], grids, position, image_index[:0])
    assert fused.shape == (0, NUM_TOKENS, HIDDEN_SIZE)
    assert keys.shape == (0, HIDDEN_SIZE, GRID_SIZE, GRID_SIZE)


def test_two_way_transformer_grid_of_one_region_has_channels_last(transformer, transformer_inputs):
    tokens, grids, position, _ = transformer_inputs
    with torch.inference_mode():
        _, grid = transformer(tokens[:1], grids[:1], position)
    assert grid.stride() == grid.clone(memory_format=torch.channels_last).stride()


@pytest.mark.parametrize("regions_per_chunk", [1, 2, 100])
def test_predict_confident_masks_upscales_only_the_grids_of_confident_regions(monkeypatch, regions_per_chunk):
    torch.manual_seed(0)
    model = sca.compose({"name": "sam", **get_tiny_options("encoder", "sam")}, "query", "tiny-gpt2", weights=False)
    grid_size = model.segmenter.grid_size
    max_elements = regions_per_chunk * model.segmenter.channels * grid_size**2
    monkeypatch.setattr(TwoWayTransformer, "max_elements_per_chunk", max_elements)
    upscaled_rows, upscale_grid = [], model.segmenter.upscale_grid
    monkeypatch.setattr(
        model.segmenter,
        "upscale_grid",
        lambda grid, *args: (upscaled_rows.append(len(grid)), upscale_grid(grid, *args))[1],
    )
    features = torch.randn(2, model.encoder.channels, grid_size, grid_size, generator=torch.Generator().manual_seed(1))
    points = torch.rand(9, 1, 2, generator=torch.Generator().manual_seed(2)) * model.encoder.image_format.size
    image_index = torch.tensor([0] * 4 + [1] * 5)
    prompts = PromptBatch(image_index, points=points, labels=torch.ones(9, 1, dtype=torch.long))
    with torch.inference_mode():
        regions = model.segment(features, prompts)
        min_iou = float(regions.iou_scores.amax(1).sort().values[4:6].mean())  # between two scores
        expected = select_confident_masks(regions.masks, regions.iou_scores, min_iou)
        upscaled_rows.clear()
        confident = model.predict_confident_masks(features, prompts, min_iou)
    assert sum(upscaled_rows) == len(expected.region_index.unique()) == 4
    assert torch.equal(confident.region_index, expected.region_index)
    assert torch.allclose(confident.iou_scores, expected.iou_scores, atol=1e-6)
    assert torch.allclose(confident.masks, expected.masks, atol=1e-5)


def test_two_way_transformer_gradients_match_transformers(transformer, transformer_inputs):
    tokens, grids, position, image_index = transformer_inputs
    gradients = []
    for forward in (run_library_transformer, lambda model, *args: model(*args)):
        transformer.zero_grad()
        fused, keys = forward(transformer, tokens, grids[image_index], position)
        (fused.square().sum() + keys.square().mean()).backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in transformer.named_parameters()})
    largest_gradient = max(expected.abs().max() for expected in gradients[0].values())
    for name, expected in gradients[0].items():
        assert torch.allclose(gradients[1][name], expected, rtol=1e-3, atol=1e-6 * largest_gradient), name


@pytest.mark.parametrize("family", LANGUAGE_MODEL_FAMILIES)
@pytest.mark.parametrize("num_eos_tokens", [0, 4, 40])
@pytest.mark.slow
def test_greedy_search_matches_transformers_generate(save_language_model, monkeypatch, family, num_eos_tokens):
    """Some of the 97 tokens end a caption, so that few, some or most captions leave the batch early."""
    model = HfLanguageModel(weights=str(save_language_model(family)))
    generator = torch.Generator().manual_seed(3)
    for parameter in model.model.parameters():  # words that differ from region to region
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    monkeypatch.setattr(model, "_resolve_special_tokens", lambda: (0, list(range(1, 1 + num_eos_tokens))))
    prefix = torch.randn(9, 4, model.hidden_size, generator=generator)
    assert causal.has_plain_greedy_settings(model.model)
    fast_output = model.generate(prefix, 12)
    monkeypatch.setattr(causal, "has_plain_greedy_settings", lambda _: False)
    expected = model.generate(prefix, 12)
    assert fast_output.sequences.tolist() == expected.sequences.tolist()
    assert torch.allclose(fast_output.scores, expected.scores, atol=1e-5)


def test_has_plain_greedy_settings_is_false_with_a_repetition_penalty(save_language_model):
    model = HfLanguageModel(weights=str(save_language_model("gpt2"))).model
    assert causal.has_plain_greedy_settings(model)
    model.generation_config.repetition_penalty = 1.3
    assert not causal.has_plain_greedy_settings(model)
