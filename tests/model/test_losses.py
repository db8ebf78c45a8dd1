"""The losses, against plain loops over numbers."""

import math
from dataclasses import replace

import pytest
import torch
from sca_registry.contracts import Batch, MaskTargets, PromptBatch, SegmenterOutput

from sca.model import compute_caption_loss

SMOOTHING = 0.1  # as published


def smoothed(logits, target):
    """Cross-entropy of one position with label smoothing, number by number."""
    total = math.log(sum(math.exp(value) for value in logits))
    logs = [value - total for value in logits]
    share = SMOOTHING / len(logs)
    return -sum(((1 - SMOOTHING) * (place == target) + share) * log for place, log in enumerate(logs))


def test_the_caption_loss_is_the_mean_over_all_words_and_ends(small):
    draw = torch.Generator().manual_seed(0)
    language_model = small().language_model
    states, words = torch.randn(7, language_model.hidden_size, generator=draw), torch.randint(20, (7,), generator=draw)
    loss, logits = compute_caption_loss(language_model, states, words)
    each = [smoothed(row, word) for row, word in zip(logits.tolist(), words.tolist(), strict=True)]
    assert float(loss) == pytest.approx(sum(each) / len(each), rel=1e-5)


def test_the_loss_of_many_words_is_made_in_pieces_and_is_the_same(small, monkeypatch):
    draw = torch.Generator().manual_seed(0)
    language_model = small().language_model
    words = torch.randint(20, (7,), generator=draw)

    def learned(pieces):
        monkeypatch.setattr("sca.model.TOKENS_PER_LOSS_CHUNK", pieces)
        states = torch.randn(7, language_model.hidden_size, generator=torch.Generator().manual_seed(1)).requires_grad_()
        loss, logits = compute_caption_loss(language_model, states, words)
        assert (logits is None) == (pieces < 7)
        loss.backward()
        return loss.detach(), states.grad

    for pieces in (1, 3):
        for ours, whole in zip(learned(pieces), learned(7), strict=True):
            assert torch.allclose(ours, whole, atol=1e-6)


@pytest.mark.parametrize("chunk", [1, 2])
def test_a_step_in_chunks_learns_the_same(small, chunk):
    ids, mask = torch.tensor([[11, 12], [14, 0], [3, 4]]), torch.tensor([[1, 1], [1, 0], [1, 1]])

    def learned(chunk):
        model = small().train()
        given = batch(ids, mask)
        given.targets = MaskTargets(
            torch.zeros(3, 32, 32), torch.ones(3, 32, 32, dtype=torch.bool), torch.ones(3, dtype=torch.bool)
        )
        output = model(given, chunk_size=chunk)
        output.loss.backward()
        return {name: value.detach() for name, value in output.losses.items()} | {
            name: p.grad for name, p in model.named_parameters() if p.grad is not None
        }

    ours, whole = learned(chunk), learned(0)
    assert ours.keys() == whole.keys()
    for name, value in whole.items():
        assert torch.allclose(ours[name], value, atol=1e-5), name


def test_padding_is_ignored_by_the_caption_loss(small):
    model = small()
    ids, mask = torch.tensor([[11, 12], [14, 3], [3, 4]]), torch.tensor([[1, 1], [1, 0], [1, 1]])
    other = torch.where(mask == 1, ids, ids + 1)
    assert torch.equal(model(batch(ids, mask)).loss, model(batch(other, mask)).loss)


def batch(ids, mask):
    draw = torch.Generator().manual_seed(5)
    boxes = torch.tensor([[4.0, 4, 30, 30], [8, 8, 60, 50], [0, 0, 19, 29]])
    pixels = torch.randn(2, 3, 64, 64, generator=draw)
    return Batch(
        PromptBatch(torch.tensor([0, 1, 1]), boxes=boxes),
        torch.tensor([0, 1, 1]),
        pixels,
        input_ids=ids,
        attention_mask=mask,
    )


@torch.no_grad()
def test_the_last_position_of_the_prefix_predicts_the_first_word_and_the_last_word_predicts_the_end(small):
    """Each logit is computed anew, one region at a time: prefix, then the words so far, and the last state's head."""
    model = small()
    eos = model.language_model.tokenizer.eos_token_id
    ids = torch.tensor([[11, 12, 13, eos], [14, eos, eos, eos], [eos, eos, eos, eos]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]])
    given = batch(ids, mask)
    output = model(given)
    losses = []
    prefixes = model.build_prefix(
        model.mix(model.segment(model.encode(given.pixel_values), given.prompts)), given.task_ids
    )
    for row in range(3):
        for place in range(int(mask[row].sum())):
            embedded = model.language_model.embed_tokens(ids[row : row + 1, :place])
            seen = torch.cat((prefixes[row : row + 1], embedded), dim=1)
            states = model.language_model.hidden_states(seen, torch.ones(seen.shape[:2], dtype=torch.long))
            logits = model.language_model.lm_head(states)[0, -1]
            assert torch.allclose(output.logits[len(losses)], logits, atol=1e-5)
            losses.append(smoothed(logits.tolist(), int(ids[row, place])))
    assert len(output.logits) == mask.sum()
    assert float(output.losses["caption"]) == pytest.approx(sum(losses) / len(losses), rel=1e-5)


@torch.no_grad()
def test_the_loss_is_the_sum_of_the_losses_by_their_weights(small):
    model = small()
    given = batch(torch.tensor([[11, 12], [14, 0], [3, 4]]), torch.tensor([[1, 1], [1, 0], [1, 1]]))
    given.targets = MaskTargets(
        torch.zeros(3, 32, 32), torch.ones(3, 32, 32, dtype=torch.bool), torch.ones(3, dtype=torch.bool)
    )
    output = model(given, {"mask": 0.5, "iou": 0.0})
    assert output.losses.keys() == {"caption", "mask", "iou"}
    assert torch.allclose(output.loss, output.losses["caption"] + 0.5 * output.losses["mask"])
    features = Batch(
        given.prompts,
        given.task_ids,
        features=model.encode(given.pixel_values),
        input_ids=given.input_ids,
        attention_mask=given.attention_mask,
    )
    assert torch.equal(model(features).loss, output.losses["caption"])
    assert model(Batch(given.prompts, given.task_ids, given.pixel_values)).loss is None


# --- masks ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_several_texts_of_a_region_cost_one_look_at_it_and_lose_what_they_lose_alone(small):
    model = small()
    ids = torch.tensor([[11, 12], [13, 14], [15, 16], [17, 18]])
    mask, region, task = torch.ones_like(ids), torch.tensor([0, 0, 2, 2]), torch.tensor([0, 1, 1, 0])
    given = batch(ids, mask)
    together = model(replace(given, task_ids=task, region_index=region))
    assert len(together.regions) == 3
    logits = together.logits.unflatten(0, ids.shape)
    for row, place in enumerate(region.tolist()):
        repeated = replace(
            given, task_ids=task[row].expand(3), input_ids=ids[row].expand(3, -1), attention_mask=mask[:3]
        )
        assert torch.allclose(logits[row], model(repeated).logits.unflatten(0, (3, -1))[place], atol=1e-5)


def regions(masks, scores):
    count = len(masks)
    nothing = torch.zeros(count, 1, 1)
    return SegmenterOutput(
        torch.zeros(count, dtype=torch.long),
        nothing,
        8,
        nothing,
        nothing,
        nothing,
        nothing,
        masks=masks,
        iou_scores=scores,
    )


def by_hand(logits, truth, valid):
    """20 focal + dice of one mask, and its intersection over union, cell by cell."""
    focal = both = shared = overlap = union = cells = 0.0
    for logit, true, counts in zip(logits, truth, valid, strict=True):
        if not counts:
            continue
        share = 1 / (1 + math.exp(-logit))
        surprise = -true * math.log(share) - (1 - true) * math.log(1 - share)
        right = share * true + (1 - share) * (1 - true)
        focal += (0.25 * true + 0.75 * (1 - true)) * (1 - right) ** 2 * surprise
        both, shared, cells = both + share + true, shared + share * true, cells + 1
        overlap += logit > 0 and true > 0.5
        union += logit > 0 or true > 0.5
    return 20 * focal / cells + 1 - (2 * shared + 1) / (both + 1), overlap / max(union, 1)


@pytest.fixture
def example():
    """Two regions with two masks of 2 x 2 cells each, one cell of the second in the padding, soft truth."""
    masks = torch.tensor([[[[2.0, -1], [0.5, -3]], [[-1, -1], [3, 0.2]]], [[[1, 1], [1, 1]], [[-2, -2], [2, 9]]]])
    scores = torch.tensor([[0.9, 0.2], [0.4, 0.6]])
    truth = torch.tensor([[[1.0, 0], [0.75, 0]], [[0, 0], [1, 0]]])
    valid = torch.tensor([[[True, True], [True, True]], [[True, True], [True, False]]])
    return masks, scores, truth, valid


def test_the_mask_losses_are_those_of_the_best_mask_and_every_iou_is_learned(small, example):
    masks, scores, truth, valid = example
    hand = [
        [by_hand(mask.flatten().tolist(), t.flatten().tolist(), v.flatten().tolist()) for mask in candidates]
        for candidates, t, v in zip(masks, truth, valid, strict=True)
    ]
    losses = small().segmenter.compute_losses(
        regions(masks, scores), MaskTargets(truth, valid, torch.tensor([True, True]))
    )
    best = [min(loss for loss, _ in candidates) for candidates in hand]
    assert float(losses["mask"]) == pytest.approx(sum(best) / 2, rel=1e-5)
    errors = [(float(scores[n, m]) - hand[n][m][1]) ** 2 for n in range(2) for m in range(2)]
    assert float(losses["iou"]) == pytest.approx(sum(errors) / 4, rel=1e-5)


def test_only_the_best_mask_gets_a_gradient(small, example):
    masks, scores, truth, valid = example
    masks.requires_grad_()
    small().segmenter.compute_losses(regions(masks, scores), MaskTargets(truth, valid, torch.tensor([True, True])))[
        "mask"
    ].backward()
    learns = masks.grad.flatten(2).any(2)
    assert learns.sum(1).tolist() == [1, 1]
    assert not masks.grad[1, :, 1, 1].any()  # padding


def test_regions_without_a_true_mask_do_not_count(small, example):
    masks, scores, truth, valid = example
    segmenter = small().segmenter
    alone = segmenter.compute_losses(
        regions(masks[:1], scores[:1]), MaskTargets(truth[:1], valid[:1], torch.tensor([True]))
    )
    both = segmenter.compute_losses(regions(masks, scores), MaskTargets(truth, valid, torch.tensor([True, False])))
    assert {name: float(value) for name, value in both.items()} == pytest.approx(
        {name: float(value) for name, value in alone.items()}
    )
    masks.requires_grad_()
    none = segmenter.compute_losses(regions(masks, scores), MaskTargets(truth, valid, torch.tensor([False, False])))
    assert none["mask"] == none["iou"] == 0
    none["mask"].backward()  # every process of a group goes backwards, even one without masks
