"""Mixer `semantic-perceiver`: order of its tokens, mask tokens of any segmenter, and its width without a projection."""

from dataclasses import replace

import pytest
import torch
from sca_registry import RegistryError
from sca_registry.contracts import DecoderMasks, PromptBatch

import sca
from sca.mixers.semantic_perceiver import merge_cells, select_mask_tokens
from sca.nn.masks import compute_stability_scores, select_mask_indices
from sca.nn.region_batch import concat_segmenter_outputs
from sca.testing.conformance.harnesses import make_random_regions

MIXER = {"name": "semantic-perceiver", "num_queries": 3, "depth": 1, "num_heads": 2, "mlp_dim": 32}
LANGUAGE_MODEL = {"name": "tiny-gpt2", "hidden_size": 48, "depth": 1, "num_heads": 2, "max_positions": 96}
PROMPTS = PromptBatch(torch.tensor([0, 0, 1]), boxes=torch.tensor([[4.0, 4, 30, 30], [20, 20, 60, 60], [9, 9, 50, 50]]))


@pytest.fixture
def build_model(build_small_model):
    def build(**fields):
        return build_small_model(mixer=MIXER, language_model=LANGUAGE_MODEL, **{"projection": "none"} | fields)

    return build


@pytest.fixture
def model(build_model):
    return build_model()


def test_merge_cells_goes_down_the_columns_first():
    height, width, channels = 4, 6, 5
    grid = torch.arange(channels * height * width).view(1, channels, height, width)
    tokens = merge_cells(grid)
    assert tokens.shape == (1, height * width // 4, 4 * channels)
    for row in range(height):
        for column in range(width):
            token, first = (column // 2) * (height // 2) + row // 2, ((row % 2) * 2 + column % 2) * channels
            assert torch.equal(tokens[0, token, first : first + channels], grid[0, :, row, column])


def test_select_mask_indices_keeps_a_stable_single_mask():
    masks = torch.full((3, 4, 8, 8), -1.0)
    masks[0, 0, :4] = 1.0  # stable
    masks[1, 0, :4] = 0.0  # between the offsets
    scores = torch.tensor([[0.1, 0.2, 0.9, 0.3]] * 3)
    assert compute_stability_scores(masks[:, 0], 0.05).tolist() == [1.0, 0.0, 1.0]  # an empty mask is stable
    assert select_mask_indices(masks, scores).tolist() == [0, 2, 0]


def test_mask_tokens_are_those_of_the_stable_and_the_single_mask():
    regions = make_random_regions(torch.tensor([0, 0]), 1)
    masks = torch.full_like(regions.decoder_masks.masks, -1.0)
    masks[0, 0, :4], masks[1, 0, :4] = 1.0, 0.0
    scores = torch.tensor([[0.9, 0.1, 0.2, 0.3]] * 2)
    tokens = regions.decoder_masks.tokens
    selected = select_mask_tokens(replace(regions, decoder_masks=DecoderMasks(masks, scores, tokens)))
    assert torch.equal(selected, torch.stack((tokens[0, [0, 0]], tokens[1, [3, 0]])))


def test_mask_tokens_without_decoder_masks_are_those_of_the_best_mask():
    regions = replace(make_random_regions(torch.tensor([0, 0]), 1), decoder_masks=None)
    best = regions.iou_scores.argmax(1)
    selected = select_mask_tokens(regions)
    assert torch.equal(selected[:, 0], regions.mask_tokens[torch.arange(2), best])
    assert torch.equal(selected[:, 0], selected[:, 1])


@torch.no_grad()
def test_segmenter_returns_all_decoder_masks_for_any_multimask_output(model):
    features = model.encode(torch.randn(2, 3, 64, 64))
    outputs = {multimask: model.segment(features, PROMPTS, multimask) for multimask in (True, False)}
    for name in ("masks", "iou_scores", "tokens"):
        first, second = (getattr(output.decoder_masks, name) for output in outputs.values())
        assert torch.equal(first, second)
        selected = "mask_tokens" if name == "tokens" else name
        assert torch.equal(getattr(outputs[True], selected), first[:, 1:])
        assert torch.equal(getattr(outputs[False], selected), first[:, :1])
    assert outputs[True].masks.data_ptr() == outputs[True].decoder_masks.masks[:, 1:].data_ptr()  # not a copy
    assert torch.equal(model.mix(outputs[True]), model.mix(outputs[False]))


@torch.no_grad()
def test_single_mask_option_returns_one_mask(build_model):
    segmenter = {"name": "sam", "depth": 1, "num_heads": 2, "mlp_dim": 32, "single_mask": True}
    model = build_model(segmenter=segmenter)
    output = model.segment(model.encode(torch.randn(2, 3, 64, 64)), PROMPTS)
    assert torch.equal(output.masks, output.decoder_masks.masks[:, :1])
    assert torch.equal(output.iou_scores, output.decoder_masks.iou_scores[:, :1])


@torch.no_grad()
def test_concat_segmenter_outputs_keeps_decoder_masks(model):
    features = model.encode(torch.randn(2, 3, 64, 64))
    whole = model.segment(features, PROMPTS)
    joined = concat_segmenter_outputs([model.segment(features, chunk) for chunk in PROMPTS.iter_chunks(2)])
    for name in ("masks", "iou_scores", "tokens"):
        expected, actual = (getattr(each.decoder_masks, name) for each in (whole, joined))
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_projection_none_builds_the_mixer_with_the_width_of_the_language_model(model):
    assert model.mixer.hidden_size == model.language_model.hidden_size == 48
    grid_size = model.segmenter.grid_size
    assert model.mixer.num_queries == model.prefix_length - model.spec.task_tokens == grid_size**2 // 4 + 3 + 2
    assert "projection" not in model.group_parameters()
    assert "hidden_size" not in model.spec.mixer.options


def test_projection_none_rejects_a_mixer_of_another_width(build_small_model):
    with pytest.raises(RegistryError, match=r"projection=none requires queries of the width 48.*'query' have 32; use"):
        build_small_model(language_model=LANGUAGE_MODEL, projection="none")


def test_other_projections_use_the_width_of_the_segmenter(build_model):
    model = build_model(projection="linear")
    assert model.mixer.hidden_size == model.segmenter.channels == 32


def test_grid_of_odd_size_is_rejected(build_model):
    with pytest.raises(ValueError, match=r"a grid of 5 x 5 cells, but the mixer 'semantic-perceiver' requires"):
        build_model(encoder={"name": "tiny-vit", "image_size": 40, "hidden_size": 32, "depth": 1, "num_heads": 2})


@torch.no_grad()
def test_checkpoint_of_a_mixer_without_projection_round_trips(model, tmp_path):
    sca.save(model, tmp_path / "model")
    reloaded = sca.load(tmp_path / "model")
    regions = model.segment(model.encode(torch.ones(2, 3, 64, 64)), PROMPTS)
    assert torch.equal(reloaded.mix(regions), model.mix(regions))
