"""Losses, compared with plain Python loops."""

import math
from dataclasses import replace

import pytest
import torch
from sca_registry.contracts import Batch, MaskTargets, PromptBatch, SegmenterOutput

from sca.model import compute_caption_loss

LABEL_SMOOTHING = 0.1  # as published


def compute_smoothed_cross_entropy(logits, target, label_smoothing=LABEL_SMOOTHING):
    """Return the cross-entropy of one position with label smoothing."""
    log_normalizer = math.log(sum(math.exp(value) for value in logits))
    log_probs = [value - log_normalizer for value in logits]
    uniform_share = label_smoothing / len(log_probs)
    return -sum(
        ((1 - label_smoothing) * (index == target) + uniform_share) * log for index, log in enumerate(log_probs)
    )


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.0}], ids=str)
def test_caption_loss_is_the_mean_over_all_tokens(build_small_model, options):
    generator = torch.Generator().manual_seed(0)
    language_model = build_small_model().language_model
    states, token_ids = (
        torch.randn(7, language_model.hidden_size, generator=generator),
        torch.randint(20, (7,), generator=generator),
    )
    loss, logits = compute_caption_loss(language_model, states, token_ids, **options)
    token_losses = [
        compute_smoothed_cross_entropy(row, token_id, options.get("label_smoothing", LABEL_SMOOTHING))
        for row, token_id in zip(logits.tolist(), token_ids.tolist(), strict=True)
    ]
    assert float(loss) == pytest.approx(sum(token_losses) / len(token_losses), rel=1e-5)


def test_caption_loss_in_chunks_equals_the_loss_in_one_chunk(build_small_model, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    language_model = build_small_model().language_model
    token_ids = torch.randint(20, (7,), generator=generator)

    def compute_loss_and_gradient(chunk_size):
        monkeypatch.setattr("sca.model.TOKENS_PER_LOSS_CHUNK", chunk_size)
        states = torch.randn(7, language_model.hidden_size, generator=torch.Generator().manual_seed(1)).requires_grad_()
        loss, logits = compute_caption_loss(language_model, states, token_ids)
        assert (logits is None) == (chunk_size < 7)
        loss.backward()
        return loss.detach(), states.grad

    for chunk_size in (1, 3):
        for chunked, unchunked in zip(compute_loss_and_gradient(chunk_size), compute_loss_and_gradient(7), strict=True):
            assert torch.allclose(chunked, unchunked, atol=1e-6)


@pytest.mark.parametrize("chunk_size", [1, 2])
def test_model_losses_and_gradients_are_equal_in_chunks(build_small_model, chunk_size):
    ids, mask = torch.tensor([[11, 12], [14, 0], [3, 4]]), torch.tensor([[1, 1], [1, 0], [1, 1]])

    def compute_losses_and_gradients(chunk_size):
        model = build_small_model().train()
        training_batch = make_batch(ids, mask)
        training_batch.targets = MaskTargets(
            torch.zeros(3, 32, 32), torch.ones(3, 32, 32, dtype=torch.bool), torch.ones(3, dtype=torch.bool)
        )
        output = model(training_batch, chunk_size=chunk_size)
        output.loss.backward()
        return {name: value.detach() for name, value in output.losses.items()} | {
            name: p.grad for name, p in model.named_parameters() if p.grad is not None
        }

    chunked, unchunked = compute_losses_and_gradients(chunk_size), compute_losses_and_gradients(0)
    assert chunked.keys() == unchunked.keys()
    for name, value in unchunked.items():
        assert torch.allclose(chunked[name], value, atol=1e-5), name


def test_caption_loss_ignores_padding(build_small_model):
    model = build_small_model()
    ids, mask = torch.tensor([[11, 12], [14, 3], [3, 4]]), torch.tensor([[1, 1], [1, 0], [1, 1]])
    ids_with_other_padding = torch.where(mask == 1, ids, ids + 1)
    assert torch.equal(model(make_batch(ids, mask)).loss, model(make_batch(ids_with_other_padding, mask)).loss)


def make_batch(ids, mask):
    generator = torch.Generator().manual_seed(5)
    boxes = torch.tensor([[4.0, 4, 30, 30], [8, 8, 60, 50], [0, 0, 19, 29]])
    pixels = torch.randn(2, 3, 64, 64, generator=generator)
    return Batch(
        PromptBatch(torch.tensor([0, 1, 1]), boxes=boxes),
        torch.tensor([0, 1, 1]),
        pixels,
        input_ids=ids,
        attention_mask=mask,
    )


@torch.no_grad()
def test_model_predicts_each_token_from_the_prefix_and_the_previous_tokens(build_small_model):
    """Compute logits one region and one position at a time: prefix, previous tokens, and the head of the last state."""
    model = build_small_model()
    eos = model.language_model.tokenizer.eos_token_id
    ids = torch.tensor([[11, 12, 13, eos], [14, eos, eos, eos], [eos, eos, eos, eos]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]])
    training_batch = make_batch(ids, mask)
    output = model(training_batch)
    losses = []
    prefixes = model.build_prefix(
        model.mix(model.segment(model.encode(training_batch.pixel_values), training_batch.prompts)),
        training_batch.task_ids,
    )
    for row in range(3):
        for position in range(int(mask[row].sum())):
            token_embeddings = model.language_model.embed_tokens(ids[row : row + 1, :position])
            input_embeddings = torch.cat((prefixes[row : row + 1], token_embeddings), dim=1)
            states = model.language_model.hidden_states(
                input_embeddings, torch.ones(input_embeddings.shape[:2], dtype=torch.long)
            )
            logits = model.language_model.lm_head(states)[0, -1]
            assert torch.allclose(output.logits[len(losses)], logits, atol=1e-5)
            losses.append(compute_smoothed_cross_entropy(logits.tolist(), int(ids[row, position])))
    assert len(output.logits) == mask.sum()
    assert float(output.losses["caption"]) == pytest.approx(sum(losses) / len(losses), rel=1e-5)


@torch.no_grad()
def test_model_loss_is_the_weighted_sum_of_its_losses(build_small_model):
    model = build_small_model()
    training_batch = make_batch(torch.tensor([[11, 12], [14, 0], [3, 4]]), torch.tensor([[1, 1], [1, 0], [1, 1]]))
    training_batch.targets = MaskTargets(
        torch.zeros(3, 32, 32), torch.ones(3, 32, 32, dtype=torch.bool), torch.ones(3, dtype=torch.bool)
    )
    output = model(training_batch, {"mask": 0.5, "iou": 0.0})
    assert output.losses.keys() == {"caption", "mask", "iou"}
    assert torch.allclose(output.loss, output.losses["caption"] + 0.5 * output.losses["mask"])
    feature_batch = Batch(
        training_batch.prompts,
        training_batch.task_ids,
        features=model.encode(training_batch.pixel_values),
        input_ids=training_batch.input_ids,
        attention_mask=training_batch.attention_mask,
    )
    assert torch.equal(model(feature_batch).loss, output.losses["caption"])
    assert model(Batch(training_batch.prompts, training_batch.task_ids, training_batch.pixel_values)).loss is None


# --- masks ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_model_segments_a_region_once_for_several_captions_with_equal_logits(build_small_model):
    model = build_small_model()
    ids = torch.tensor([[11, 12], [13, 14], [15, 16], [17, 18]])
    mask, region_index, task_ids = torch.ones_like(ids), torch.tensor([0, 0, 2, 2]), torch.tensor([0, 1, 1, 0])
    training_batch = make_batch(ids, mask)
    output = model(replace(training_batch, task_ids=task_ids, region_index=region_index))
    assert len(output.regions) == 3
    logits = output.logits.unflatten(0, ids.shape)
    for row, region_row in enumerate(region_index.tolist()):
        repeated_batch = replace(
            training_batch, task_ids=task_ids[row].expand(3), input_ids=ids[row].expand(3, -1), attention_mask=mask[:3]
        )
        assert torch.allclose(logits[row], model(repeated_batch).logits.unflatten(0, (3, -1))[region_row], atol=1e-5)


def make_segmenter_output(masks, scores):
    num_regions = len(masks)
    empty = torch.zeros(num_regions, 1, 1)
    return SegmenterOutput(
        torch.zeros(num_regions, dtype=torch.long),
        empty,
        8,
        empty,
        empty,
        empty,
        empty,
        masks=masks,
        iou_scores=scores,
    )


def compute_expected_mask_loss_and_iou(logits, truth, valid):
    """Return 20 focal + dice of one mask and its IoU, computed per cell."""
    focal = soft_total = soft_overlap = overlap = union = cells = 0.0
    for logit, target, is_valid in zip(logits, truth, valid, strict=True):
        if not is_valid:
            continue
        probability = 1 / (1 + math.exp(-logit))
        cross_entropy = -target * math.log(probability) - (1 - target) * math.log(1 - probability)
        correct_probability = probability * target + (1 - probability) * (1 - target)
        focal += (0.25 * target + 0.75 * (1 - target)) * (1 - correct_probability) ** 2 * cross_entropy
        soft_total, soft_overlap, cells = (
            soft_total + probability + target,
            soft_overlap + probability * target,
            cells + 1,
        )
        overlap += logit > 0 and target > 0.5
        union += logit > 0 or target > 0.5
    return 20 * focal / cells + 1 - (2 * soft_overlap + 1) / (soft_total + 1), overlap / max(union, 1)


@pytest.fixture
def mask_loss_inputs():
    """Two regions with two masks of 2 x 2 cells, one cell of the second in the padding, and soft labels."""
    masks = torch.tensor([[[[2.0, -1], [0.5, -3]], [[-1, -1], [3, 0.2]]], [[[1, 1], [1, 1]], [[-2, -2], [2, 9]]]])
    scores = torch.tensor([[0.9, 0.2], [0.4, 0.6]])
    truth = torch.tensor([[[1.0, 0], [0.75, 0]], [[0, 0], [1, 0]]])
    valid = torch.tensor([[[True, True], [True, True]], [[True, True], [True, False]]])
    return masks, scores, truth, valid


def test_mask_loss_uses_the_best_mask_and_iou_loss_uses_all_masks(build_small_model, mask_loss_inputs):
    masks, scores, truth, valid = mask_loss_inputs
    expected = [
        [
            compute_expected_mask_loss_and_iou(mask.flatten().tolist(), t.flatten().tolist(), v.flatten().tolist())
            for mask in candidates
        ]
        for candidates, t, v in zip(masks, truth, valid, strict=True)
    ]
    losses = build_small_model().segmenter.compute_losses(
        make_segmenter_output(masks, scores), MaskTargets(truth, valid, torch.tensor([True, True]))
    )
    best_losses = [min(loss for loss, _ in candidates) for candidates in expected]
    assert float(losses["mask"]) == pytest.approx(sum(best_losses) / 2, rel=1e-5)
    errors = [(float(scores[n, m]) - expected[n][m][1]) ** 2 for n in range(2) for m in range(2)]
    assert float(losses["iou"]) == pytest.approx(sum(errors) / 4, rel=1e-5)


def test_mask_loss_has_gradients_only_for_the_best_mask(build_small_model, mask_loss_inputs):
    masks, scores, truth, valid = mask_loss_inputs
    masks.requires_grad_()
    build_small_model().segmenter.compute_losses(
        make_segmenter_output(masks, scores), MaskTargets(truth, valid, torch.tensor([True, True]))
    )["mask"].backward()
    has_gradient = masks.grad.flatten(2).any(2)
    assert has_gradient.sum(1).tolist() == [1, 1]
    assert not masks.grad[1, :, 1, 1].any()  # padding


def test_segmenter_loss_ignores_regions_without_a_ground_truth_mask(build_small_model, mask_loss_inputs):
    masks, scores, truth, valid = mask_loss_inputs
    segmenter = build_small_model().segmenter
    losses_of_one_region = segmenter.compute_losses(
        make_segmenter_output(masks[:1], scores[:1]), MaskTargets(truth[:1], valid[:1], torch.tensor([True]))
    )
    losses_of_both_regions = segmenter.compute_losses(
        make_segmenter_output(masks, scores), MaskTargets(truth, valid, torch.tensor([True, False]))
    )
    assert {name: float(value) for name, value in losses_of_both_regions.items()} == pytest.approx(
        {name: float(value) for name, value in losses_of_one_region.items()}
    )
    masks.requires_grad_()
    losses_without_masks = segmenter.compute_losses(
        make_segmenter_output(masks, scores), MaskTargets(truth, valid, torch.tensor([False, False]))
    )
    assert losses_without_masks["mask"] == losses_without_masks["iou"] == 0
    losses_without_masks["mask"].backward()  # every process of a group goes backwards, even one without masks
