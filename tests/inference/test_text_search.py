"""Search by text: scores equal a slow reference, do not depend on the batch, and rank the right region first."""

import math
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from sca_registry.contracts import TASKS, Prompt, Proposals

import sca
from sca.inference import predictor as predictor_module
from sca.inference import text_search
from sca.inference.engine import Engine
from sca.inference.find_options import DEFAULT_THRESHOLD
from sca.inference.predictor import Predictor
from sca.inference.text_search import MAX_SKIPPED_TOKENS, MIN_TEXT_INFORMATION, index_regions
from sca.io.masks import decode_rle, mask_to_box

SCENE = Path(__file__).parents[2] / "examples" / "scene.png"

TEXTS = ["a red circle", "square", "a small dotted blue star left of a green cross"]


@pytest.fixture
def engine(build_small_model):
    return Engine(build_small_model().double())


@pytest.fixture
def encoded(engine, scene):
    return engine.encode([scene.image])


def make_prompts(scene):
    """Boxes, and a point and a mask, which are other kinds of prompt."""
    prompts = [Prompt(box=region.box) for region in scene.regions]
    x1, y1, _, _ = scene.regions[0].box
    return [
        *prompts[:2],
        Prompt(points=((x1 + 1, y1 + 1, 1),)),
        *prompts[2:],
        Prompt(mask=decode_rle(scene.regions[0].mask)),
    ]


def compute_next_log_probs(model, prefix, token_ids):
    """The (V,) log-probabilities of the token after a prefix and tokens, without padding, chunks or other rows."""
    inputs = prefix
    if token_ids:
        inputs = torch.cat((prefix, model.language_model.embed_tokens(torch.tensor([token_ids]))), dim=1)
    states = model.language_model.hidden_states(inputs, torch.ones(inputs.shape[:2], dtype=torch.long))
    return model.language_model.lm_head(states[:, -1])[0].log_softmax(-1)


def list_positions(num_tokens, num_positions):
    """All positions of the first tokens of a text in a caption, with at most MAX_SKIPPED_TOKENS between them."""
    for positions in combinations(range(num_positions), num_tokens):
        if all(0 < b - a <= MAX_SKIPPED_TOKENS + 1 for a, b in zip((-1, *positions), positions, strict=False)):
            yield positions


def compute_reference(model, prefix, text):
    """The log-likelihood of a text for one (1, K, E) prefix: the maximum over all readings, one forward each."""
    tokenizer = model.language_model.tokenizer
    token_ids = tokenizer.encode(text)[:-1]
    generated = model.language_model.generate(prefix, max_new_tokens=model.spec.generation["max_new_tokens"])
    caption = generated.sequences[0, 0].tolist()
    caption = caption[: caption.index(tokenizer.eos_token_id)] if tokenizer.eos_token_id in caption else caption
    in_text = [compute_next_log_probs(model, prefix, token_ids[:i])[token].item() for i, token in enumerate(token_ids)]
    in_caption = [compute_next_log_probs(model, prefix, caption[:j]) for j in range(len(caption) + 1)]
    return max(
        sum(in_caption[j][token].item() for j, token in zip(positions, token_ids, strict=False)) + sum(in_text[count:])
        for count in range(len(token_ids) + 1)
        for positions in list_positions(count, len(in_caption))
    )


@pytest.mark.slow
@torch.no_grad()
def test_scores_equal_slow_reference_in_float64(engine, encoded, scene):
    model, prompts = engine.model, make_prompts(scene)
    scores = index_regions(engine, encoded, [prompts]).score_texts(TEXTS)
    task_ids = torch.tensor([TASKS.index("caption")])
    no_image = model.build_prefix(torch.zeros(1, model.mixer.num_queries, model.mixer.hidden_size).double(), task_ids)
    for row, prompt in enumerate(prompts):
        ((_, batch),) = engine.processor.group_prompts([[prompt]], encoded.frames)
        prefix = model.build_prefix(model.mix(model.segment(encoded.features, batch)), task_ids)
        for column, text in enumerate(TEXTS):
            without_image, log_likelihood = (compute_reference(model, each, text) for each in (no_image, prefix))
            expected = (log_likelihood - without_image) / max(-without_image, MIN_TEXT_INFORMATION)
            assert scores[row, column].item() == pytest.approx(expected, abs=1e-12)


def test_reading_skips_caption_tokens_but_no_more_than_the_limit():
    caption_length = MAX_SKIPPED_TOKENS + 4
    in_text = torch.full((1, 2), -50.0)
    for position, is_within_limit in ((MAX_SKIPPED_TOKENS + 1, True), (MAX_SKIPPED_TOKENS + 2, False)):
        in_caption = torch.full((1, caption_length + 1, 2), -40.0)
        in_caption[0, 0, 0] = in_caption[0, position, 1] = -1.0
        log_likelihood = text_search._sum_best_reading(in_text, in_caption, torch.tensor([caption_length]))
        assert log_likelihood.item() == (-2.0 if is_within_limit else -41.0)


def test_reading_ignores_padding_after_the_caption():
    in_caption = torch.full((1, 5, 1), -3.0)
    in_caption[0, 3] = 0.0
    log_likelihood = text_search._sum_best_reading(torch.tensor([[-9.0]]), in_caption, torch.tensor([2]))
    assert log_likelihood.item() == -3.0


def test_scores_do_not_depend_on_other_regions_images_texts_and_chunks(engine, scene, monkeypatch):
    other = scene._replace(image=scene.image.rotate(90))
    prompts = make_prompts(scene)
    encoded = engine.encode([other.image, scene.image])
    scores = index_regions(engine, encoded, [prompts[1:3], prompts]).score_texts(TEXTS)[2:]
    (single,) = index_regions(engine, engine.encode([scene.image]), [prompts[3:4]]).score_texts(TEXTS[2:])
    torch.testing.assert_close(scores[3, 2:], single, rtol=1e-10, atol=1e-10)
    monkeypatch.setattr(text_search, "LOG_PROB_BYTES_PER_CHUNK", 1)
    engine.region_batch_size = 2
    index = index_regions(engine, encoded, [prompts[1:3], prompts])
    torch.testing.assert_close(index.score_texts(TEXTS)[2:], scores, rtol=1e-10, atol=1e-10)


def test_chunks_limit_the_size_of_log_probs(engine, encoded, scene, monkeypatch):
    index = index_regions(engine, encoded, [make_prompts(scene)])
    vocabulary_size = index._compute_log_probs(index._caption_states[:1, :1]).shape[-1]
    row_bytes = index._caption_states.shape[1] * vocabulary_size * 8
    monkeypatch.setattr(text_search, "LOG_PROB_BYTES_PER_CHUNK", 2 * row_bytes)
    sizes, lm_head = [], engine.model.language_model.lm_head
    monkeypatch.setattr(
        engine.model.language_model, "lm_head", lambda states: sizes.append(states.shape[0]) or lm_head(states)
    )
    index.score_texts(["a red circle"])
    assert max(sizes) == 2


@pytest.fixture(scope="module")
def predictor():
    predictor = Predictor(sca.load("sca-tiny"))
    predictor.set_image(sca.open_image(SCENE))
    return predictor


@pytest.mark.slow
def test_find_returns_the_described_region_first_and_rejects_others(predictor):
    matches = predictor.find("a striped circle")
    assert matches[0].text.startswith("a small striped red circle")
    assert (matches[0].name, matches[0].box) == ("a striped circle", mask_to_box(matches[0].mask))
    scores = [match.proposal_score for match in matches]
    assert scores == sorted(scores, reverse=True)
    assert scores[0] > DEFAULT_THRESHOLD > scores[1]
    assert [match.name for match in predictor.find(["a cyan star", "a plain cross"], threshold=0.6)] == ["a cyan star"]


@pytest.mark.slow
def test_find_in_given_regions_returns_their_ids_boxes_and_masks(predictor):
    boxes = [(15, 270, 99, 354), (186, 357, 323, 500)]
    first, second = predictor.find("a cyan star", boxes=boxes)
    assert (first.region_id, second.region_id) == (1, 0)
    assert (first.box, first.prompt) == (boxes[1], Prompt(box=boxes[1]))
    assert first.mask == predictor.predict(boxes=boxes)[1].mask
    (best,) = predictor.find("a cyan star", boxes=boxes, top=1)
    assert best.predicted_iou == pytest.approx(first.predicted_iou, abs=1e-5)  # of another batch
    assert replace(best, predicted_iou=first.predicted_iou) == first


@pytest.mark.slow
def test_find_searches_and_embeds_the_same_regions_once(predictor, monkeypatch):
    predictor.set_image(sca.open_image(SCENE))
    indexed = []
    monkeypatch.setattr(predictor_module, "index_regions", lambda *args: indexed.append(1) or index_regions(*args))
    for options in ({}, {}, {"points_per_side": 6}, {"points_per_side": 6}):
        predictor.find("a star", **options)
    assert len(indexed) == 2
    predictor.set_image(sca.open_image(SCENE))
    proposals = Proposals((Prompt(box=(186, 357, 323, 500)),), (1.0,), ("star",))
    (match,) = predictor.find("a cyan star", proposals=proposals)
    assert (match.box, match.name) == ((186, 357, 323, 500), "a cyan star")
    assert match.proposal_score > 0.6
    assert len(indexed) == 3


def test_find_accepts_arrays_in_proposals(build_small_model, scene, monkeypatch):
    predictor = Predictor(build_small_model())
    predictor.set_image(scene.image)
    indexed = []
    monkeypatch.setattr(predictor_module, "index_regions", lambda *args: indexed.append(1) or index_regions(*args))

    def find(boxes, scores):
        prompts = tuple(Prompt(box=box) for box in boxes)
        proposals = Proposals(prompts, scores, (None,) * len(prompts))
        return [match.box for match in predictor.find("a star", proposals=proposals)]

    boxes = [region.box for region in scene.regions[:2]]
    expected = find(boxes, (0.5, 0.25))
    assert find(boxes, np.array([0.5, 0.25])) == expected
    assert find(boxes, torch.tensor([0.5, 0.25])) == expected
    find([np.array(box) for box in boxes], (0.5, 0.25))
    assert len(indexed) == 1
    find(boxes[::-1], np.array([0.5, 0.25]))
    assert len(indexed) == 2


def test_find_leaves_predictions_unchanged(build_small_model, scene):
    predictor = Predictor(build_small_model())
    predictor.set_image(scene.image)
    boxes = [region.box for region in scene.regions]
    expected = predictor.predict(boxes=boxes)
    predictor.find("a star", boxes=boxes)
    assert predictor.predict(boxes=boxes) == expected


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("", {}, "the text is empty; pass a word or a phrase"),
        (" \n", {}, "the text is empty; pass a word or a phrase"),
        ([], {}, "the text is empty; pass a word or a phrase"),
        (["a star", ""], {}, "the text is empty; pass a word or a phrase"),
        ("a star " * 30, {}, "the text has 60 tokens, but the model reads at most 37; shorten it"),
        ("a \ud800", {}, "the text contains .*, half of a surrogate pair, which is not text; remove it"),
        ("a star", {"top": 0}, "top is 0"),
        ("a star", {"threshold": "high"}, "threshold is 'high'; expected a number"),
        ("a star", {"threshold": math.nan}, "threshold is nan; expected a number"),
        ("a star", {"points_per_side": 4}, "regions cannot be combined with proposals or search options; omit one"),
    ],
)
def test_find_rejects_invalid_arguments(build_small_model, scene, text, options, message):
    predictor = Predictor(build_small_model())
    predictor.set_image(scene.image)
    with pytest.raises(ValueError, match=message):
        predictor.find(text, boxes=[scene.regions[0].box], **options)


@pytest.mark.parametrize("text", [3, ["a star", None], {"a star"}])
def test_find_rejects_texts_of_other_types(build_small_model, scene, text):
    predictor = Predictor(build_small_model())
    predictor.set_image(scene.image)
    with pytest.raises(ValueError, match="expected a string or a list of strings"):
        predictor.find(text)


@pytest.mark.parametrize(
    ("regions", "message"),
    [
        ({"boxes": []}, "no regions; pass prompts, boxes, points or masks"),
        ({"points": np.zeros((0, 2))}, "no regions; pass prompts, boxes, points or masks"),
        ({"boxes": 5}, "boxes is of type int; expected a list of boxes"),
        ({"prompts": Prompt(box=(0, 0, 9, 9))}, "prompts is of type Prompt; expected a list of prompts"),
    ],
)
def test_find_checks_regions_as_predict_does(build_small_model, scene, regions, message):
    predictor = Predictor(build_small_model())
    predictor.set_image(scene.image)
    for call in (lambda: predictor.find("a star", **regions), lambda: predictor.predict(**regions)):
        with pytest.raises(ValueError, match=message):
            call()


def test_find_returns_nothing_if_no_region_is_found(build_small_model, scene):
    predictor = Predictor(build_small_model())
    predictor.set_image(scene.image)
    assert predictor.find("a star", points_per_side=1, pred_iou_thresh=1.0) == []
    assert predictor.find("a star", proposals=Proposals((), (), ())) == []
    with pytest.raises(ValueError, match="the text is empty"):
        predictor.find(" ", proposals=Proposals((), (), ()))


def test_find_reports_missing_image_and_language_model(build_small_model, scene):
    predictor = Predictor(build_small_model())
    with pytest.raises(ValueError, match="no image is set; call set_image"):
        predictor.find("a star")
    predictor.set_image(scene.image)
    with pytest.raises(TypeError, match="point_per_side"):
        predictor.find("a star", point_per_side=1)
    masks_only = Predictor(sca.load_captioner({"name": "none", "encoder": {"name": "tiny-vit", "image_size": 64}}))
    masks_only.set_image(scene.image)
    with pytest.raises(ValueError, match=r"MaskOnly.* cannot score a text; use a model with a language model, such as"):
        masks_only.find("a star")


def test_find_accepts_text_up_to_the_positions_of_the_model(engine, encoded, scene):
    index = index_regions(engine, encoded, [make_prompts(scene)[:1]])
    (score,) = index.score_texts(["star " * 37])[0].tolist()
    assert math.isfinite(score)
