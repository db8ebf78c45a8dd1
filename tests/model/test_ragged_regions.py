"""A region is segmented and captioned as if it were alone, however many others there are and in whatever order."""

import pytest
import torch
from sca_registry.contracts import PromptBatch

import sca

OWNER = torch.tensor([0, 0, 0, 2, 3, 3])  # the second image has no region


@pytest.fixture(params=["box", "point", "box and point"])
def prompts(request):
    draw = torch.Generator().manual_seed(3)
    corner = torch.rand(len(OWNER), 2, generator=draw) * 30
    boxes = torch.cat((corner, corner + 10 + torch.rand(len(OWNER), 2, generator=draw) * 20), dim=1)
    points = (boxes[:, :2] + boxes[:, 2:])[:, None] / 2
    labels = torch.ones(len(OWNER), 1, dtype=torch.long)
    by_box, by_point = "box" in request.param, "point" in request.param
    return PromptBatch(OWNER, boxes if by_box else None, points if by_point else None, labels if by_point else None)


@pytest.fixture
def features(small):
    return small().encode(torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(1))).detach()


def answers(model, features, prompts, task):
    """Masks, scores and word ids of each row."""
    with torch.no_grad():
        regions = model.segment(features, prompts)
    generated = model.generate(features, prompts, task)
    return regions.masks, regions.iou_scores, generated.sequences[:, 0], generated.scores[:, 0]


def same(found, expected):
    masks, ious, ids, scores = found
    assert torch.allclose(masks, expected[0], atol=1e-3)
    assert torch.allclose(ious, expected[1], atol=1e-4)
    assert torch.equal(ids, expected[2])
    assert torch.allclose(scores, expected[3], atol=1e-4)


def test_a_region_does_not_depend_on_its_neighbors(small, features, prompts):
    model, task = small(), torch.tensor([1, 0, 1, 1, 0, 1])
    together = answers(model, features, prompts, task)
    for row, owner in enumerate(OWNER.tolist()):
        alone = prompts[row : row + 1]
        alone.image_index = torch.zeros(1, dtype=torch.long)
        found = answers(model, features[owner : owner + 1], alone, task[row : row + 1])
        same(found, [each[row : row + 1] for each in together])


def test_the_order_of_regions_does_not_matter(small, features, prompts):
    model, order = small(), torch.tensor([2, 0, 1, 3, 5, 4])
    task = torch.tensor([1, 0, 1, 1, 0, 1])
    together = answers(model, features, prompts, task)
    same(answers(model, features, prompts[order], task[order]), [each[order] for each in together])


def test_images_may_come_in_another_order(small, features, prompts):
    model, order = small(), torch.tensor([3, 2, 1, 0])
    rows = torch.tensor([4, 5, 3, 0, 1, 2])
    moved = prompts[rows]
    moved.image_index = torch.tensor([0, 0, 1, 3, 3, 3])
    task = torch.ones(len(OWNER), dtype=torch.long)
    together = answers(model, features, prompts, task)
    same(answers(model, features[order], moved, task), [each[rows] for each in together])


def test_the_task_changes_the_prefix_and_nothing_else(small, features, prompts):
    model = small()
    with torch.no_grad():
        queries = model.mix(model.segment(features, prompts))
        named = model.build_prefix(queries, torch.zeros(len(OWNER), dtype=torch.long))
        told = model.build_prefix(queries, torch.ones(len(OWNER), dtype=torch.long))
    tokens = model.spec.task_tokens
    assert named.shape == (len(OWNER), tokens + model.mixer.num_queries, model.language_model.hidden_size)
    assert torch.equal(named[:, tokens:], told[:, tokens:])
    assert not torch.equal(named[:, :tokens], told[:, :tokens])


def test_generation_stops_at_the_end_and_the_end_counts(small):
    """The likeliest first word of one row is declared the end: padding follows, and it alone makes the score."""
    model = small()
    prefix = torch.randn(3, 4, 32, generator=torch.Generator().manual_seed(0))
    first = model.language_model.generate(prefix, max_new_tokens=1)
    tokenizer = model.language_model.tokenizer
    tokenizer.eos_token_id, tokenizer.pad_token_id = int(first.sequences[0, 0, 0]), 3
    ended = model.language_model.generate(prefix, max_new_tokens=5)
    assert ended.sequences[0, 0, 0] == tokenizer.eos_token_id
    assert set(ended.sequences[0, 0, 1:].tolist()) <= {3}
    assert torch.allclose(ended.scores[0], first.scores[0], atol=1e-5)


def test_beams_find_captions_at_least_as_likely_best_first(small):
    model = small()
    prefix = torch.randn(4, 4, 32, generator=torch.Generator().manual_seed(0))
    greedy = model.language_model.generate(prefix, max_new_tokens=5)
    beams = model.language_model.generate(prefix, max_new_tokens=5, num_beams=4, num_captions=3)
    assert beams.sequences.shape[:2] == beams.scores.shape == (4, 3)
    assert (beams.scores.diff(dim=1) <= 1e-6).all()
    assert (beams.scores[:, 0] >= greedy.scores[:, 0] - 1e-4).all()
    with pytest.raises(ValueError, match="requires num_beams of at least 2"):
        model.language_model.generate(prefix, max_new_tokens=5, num_captions=2)


MIXERS = {
    "query": {"num_queries": 2, "depth": 1, "num_heads": 4, "mlp_dim": 48},
    "resampler": {"num_queries": 2, "depth": 1, "num_heads": 4, "mlp_dim": 48},
    "roi-pool": {"output_size": 2},
}


@pytest.mark.parametrize("images", [1, 4])
@pytest.mark.parametrize("count", [1, 3, 64])
@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.slow
def test_many_regions_of_a_sam_are_as_one_at_a_time(sam_folder, lm_folder, mixer, count, images):
    torch.manual_seed(0)
    encoder, words = {"name": "sam", "weights": str(sam_folder)}, {"name": "hf", "weights": str(lm_folder("gpt2"))}
    model = sca.compose(encoder, {"name": mixer, **MIXERS[mixer]}, words, generation={"max_new_tokens": 4})
    draw = torch.Generator().manual_seed(count)
    features = model.encode(torch.randn(images, 3, 64, 64, generator=draw)).detach()
    owner = torch.randint(images, (count,), generator=draw).sort().values
    corner = torch.rand(count, 2, generator=draw) * 30
    prompts = PromptBatch(owner, boxes=torch.cat((corner, corner + 20), dim=1))
    task = torch.randint(2, (count,), generator=draw)
    together = answers(model, features, prompts, task)
    for row in range(0, count, 7):
        alone = prompts[row : row + 1]
        alone.image_index = torch.zeros(1, dtype=torch.long)
        found = answers(model, features[owner[row]][None], alone, task[row : row + 1])
        same(found, [each[row : row + 1] for each in together])
