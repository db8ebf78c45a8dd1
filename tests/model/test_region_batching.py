"""Region batching: outputs of a region do not depend on the other regions or their order."""

import pytest
import torch
from sca_registry.contracts import PromptBatch

import sca

IMAGE_INDEX = torch.tensor([0, 0, 0, 2, 3, 3])  # the second image has no region


@pytest.fixture(params=["box", "point", "box and point"])
def prompts(request):
    generator = torch.Generator().manual_seed(3)
    corners = torch.rand(len(IMAGE_INDEX), 2, generator=generator) * 30
    boxes = torch.cat((corners, corners + 10 + torch.rand(len(IMAGE_INDEX), 2, generator=generator) * 20), dim=1)
    points = (boxes[:, :2] + boxes[:, 2:])[:, None] / 2
    labels = torch.ones(len(IMAGE_INDEX), 1, dtype=torch.long)
    with_boxes, with_points = "box" in request.param, "point" in request.param
    return PromptBatch(
        IMAGE_INDEX, boxes if with_boxes else None, points if with_points else None, labels if with_points else None
    )


@pytest.fixture
def features(build_small_model):
    return build_small_model().encode(torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(1))).detach()


def segment_and_generate(model, features, prompts, task_ids):
    """Return masks, scores and token ids of each row."""
    with torch.no_grad():
        regions = model.segment(features, prompts)
    generated = model.generate(features, prompts, task_ids)
    return regions.masks, regions.iou_scores, generated.sequences[:, 0], generated.scores[:, 0]


def assert_equal_predictions(predictions, expected):
    masks, ious, ids, scores = predictions
    assert torch.allclose(masks, expected[0], atol=1e-3)
    assert torch.allclose(ious, expected[1], atol=1e-4)
    assert torch.equal(ids, expected[2])
    assert torch.allclose(scores, expected[3], atol=1e-4)


def test_model_output_of_a_region_is_independent_of_other_regions(build_small_model, features, prompts):
    model, task_ids = build_small_model(), torch.tensor([1, 0, 1, 1, 0, 1])
    all_predictions = segment_and_generate(model, features, prompts, task_ids)
    for row, image_index in enumerate(IMAGE_INDEX.tolist()):
        single_prompt = prompts[row : row + 1]
        single_prompt.image_index = torch.zeros(1, dtype=torch.long)
        single_prediction = segment_and_generate(
            model, features[image_index : image_index + 1], single_prompt, task_ids[row : row + 1]
        )
        assert_equal_predictions(single_prediction, [each[row : row + 1] for each in all_predictions])


def test_model_output_is_independent_of_region_order(build_small_model, features, prompts):
    model, order = build_small_model(), torch.tensor([2, 0, 1, 3, 5, 4])
    task_ids = torch.tensor([1, 0, 1, 1, 0, 1])
    predictions = segment_and_generate(model, features, prompts, task_ids)
    assert_equal_predictions(
        segment_and_generate(model, features, prompts[order], task_ids[order]), [each[order] for each in predictions]
    )


def test_model_output_is_independent_of_image_order(build_small_model, features, prompts):
    model, order = build_small_model(), torch.tensor([3, 2, 1, 0])
    rows = torch.tensor([4, 5, 3, 0, 1, 2])
    reordered_prompts = prompts[rows]
    reordered_prompts.image_index = torch.tensor([0, 0, 1, 3, 3, 3])
    task_ids = torch.ones(len(IMAGE_INDEX), dtype=torch.long)
    predictions = segment_and_generate(model, features, prompts, task_ids)
    assert_equal_predictions(
        segment_and_generate(model, features[order], reordered_prompts, task_ids), [each[rows] for each in predictions]
    )


def test_build_prefix_changes_only_the_task_tokens_with_the_task(build_small_model, features, prompts):
    model = build_small_model()
    with torch.no_grad():
        queries = model.mix(model.segment(features, prompts))
        recognition_prefix = model.build_prefix(queries, torch.zeros(len(IMAGE_INDEX), dtype=torch.long))
        caption_prefix = model.build_prefix(queries, torch.ones(len(IMAGE_INDEX), dtype=torch.long))
    num_task_tokens = model.spec.task_tokens
    assert recognition_prefix.shape == (
        len(IMAGE_INDEX),
        num_task_tokens + model.mixer.num_queries,
        model.language_model.hidden_size,
    )
    assert torch.equal(recognition_prefix[:, num_task_tokens:], caption_prefix[:, num_task_tokens:])
    assert not torch.equal(recognition_prefix[:, :num_task_tokens], caption_prefix[:, :num_task_tokens])


def test_generation_stops_at_eos_and_includes_it_in_the_score(build_small_model):
    """The most likely first token of one row becomes the end token, which alone determines the score."""
    model = build_small_model()
    prefix = torch.randn(3, 4, 32, generator=torch.Generator().manual_seed(0))
    first_token = model.language_model.generate(prefix, max_new_tokens=1)
    tokenizer = model.language_model.tokenizer
    tokenizer.eos_token_id, tokenizer.pad_token_id = int(first_token.sequences[0, 0, 0]), 3
    generated = model.language_model.generate(prefix, max_new_tokens=5)
    assert generated.sequences[0, 0, 0] == tokenizer.eos_token_id
    assert set(generated.sequences[0, 0, 1:].tolist()) <= {3}
    assert torch.allclose(generated.scores[0], first_token.scores[0], atol=1e-5)


def test_beam_search_scores_at_least_as_high_as_greedy_and_sorts_best_first(build_small_model):
    model = build_small_model()
    prefix = torch.randn(4, 4, 32, generator=torch.Generator().manual_seed(0))
    greedy_output = model.language_model.generate(prefix, max_new_tokens=5)
    beam_output = model.language_model.generate(prefix, max_new_tokens=5, num_beams=4, num_captions=3)
    assert beam_output.sequences.shape[:2] == beam_output.scores.shape == (4, 3)
    assert (beam_output.scores.diff(dim=1) <= 1e-6).all()
    assert (beam_output.scores[:, 0] >= greedy_output.scores[:, 0] - 1e-4).all()
    with pytest.raises(ValueError, match="requires num_beams >= 2"):
        model.language_model.generate(prefix, max_new_tokens=5, num_captions=2)


MIXER_OPTIONS = {
    "query": {"num_queries": 2, "depth": 1, "num_heads": 4, "mlp_dim": 48},
    "resampler": {"num_queries": 2, "depth": 1, "num_heads": 4, "mlp_dim": 48},
    "roi-pool": {"output_size": 2},
}


@pytest.mark.parametrize("num_images", [1, 4])
@pytest.mark.parametrize("num_regions", [1, 3, 64])
@pytest.mark.parametrize("mixer", MIXER_OPTIONS)
@pytest.mark.slow
def test_sam_model_output_of_many_regions_matches_one_region_at_a_time(
    sam_folder, save_language_model, mixer, num_regions, num_images
):
    torch.manual_seed(0)
    encoder, language_model = (
        {"name": "sam", "weights": str(sam_folder)},
        {"name": "hf", "weights": str(save_language_model("gpt2"))},
    )
    model = sca.compose(
        encoder, {"name": mixer, **MIXER_OPTIONS[mixer]}, language_model, generation={"max_new_tokens": 4}
    )
    generator = torch.Generator().manual_seed(num_regions)
    features = model.encode(torch.randn(num_images, 3, 64, 64, generator=generator)).detach()
    image_index = torch.randint(num_images, (num_regions,), generator=generator).sort().values
    corners = torch.rand(num_regions, 2, generator=generator) * 30
    prompts = PromptBatch(image_index, boxes=torch.cat((corners, corners + 20), dim=1))
    task_ids = torch.randint(2, (num_regions,), generator=generator)
    all_predictions = segment_and_generate(model, features, prompts, task_ids)
    for row in range(0, num_regions, 7):
        single_prompt = prompts[row : row + 1]
        single_prompt.image_index = torch.zeros(1, dtype=torch.long)
        single_prediction = segment_and_generate(
            model, features[image_index[row]][None], single_prompt, task_ids[row : row + 1]
        )
        assert_equal_predictions(single_prediction, [each[row : row + 1] for each in all_predictions])
