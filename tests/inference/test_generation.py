"""Texts are generated in pieces whatever asks for them, and scores that mean nothing are an error."""

import pytest
import torch
from PIL import Image
from sca_registry.contracts import Prompt, PromptBatch

from sca import model as models
from sca.evaluation.evaluate import evaluate
from sca.evaluation.predictions import PromptingOptions
from sca.inference.engine import Engine
from sca.inference.predictor import Predictor
from sca.language_models.token_usage import count_tokens

BOXES = [(n % 40, n // 40, n % 40 + 20, n // 40 + 20) for n in range(40)]


@pytest.fixture
def rows(small, monkeypatch):
    """A model, and the rows of each call of its language model."""
    model, seen = small(), []
    generate = model.language_model.generate

    def watched(prefix, **options):
        seen.append(len(prefix))
        return generate(prefix, **options)

    monkeypatch.setattr(model.language_model, "generate", watched)
    return model, seen


@pytest.mark.parametrize("options", [{}, {"num_beams": 3, "num_captions": 2}])
def test_generate_from_prefix_returns_the_same_in_pieces(rows, monkeypatch, options):
    model, seen = rows
    prefix = torch.randn(23, 4, model.language_model.hidden_size, generator=torch.Generator().manual_seed(0))
    whole = model.generate_from_prefix(prefix, **options)
    monkeypatch.setattr(models, "MAX_SEQUENCES_PER_CALL", 6)
    pieces = model.generate_from_prefix(prefix, **options)
    assert torch.equal(whole.sequences, pieces.sequences)
    torch.testing.assert_close(whole.scores, pieces.scores)
    assert max(seen[1:]) == 6 // options.get("num_beams", 1)


def test_generate_from_prefix_with_a_seed_depends_on_nothing_else(small):
    model, options = small(), {"do_sample": True, "temperature": 2.0, "num_captions": 2}
    prefix = torch.randn(3, 4, model.language_model.hidden_size, generator=torch.Generator().manual_seed(0))
    state = torch.get_rng_state()
    together = model.generate_from_prefix(prefix, seed=7, **options).sequences
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(5)
    alone = model.generate_from_prefix(prefix[1:2], seed=7, **options).sequences
    assert together[1, :, : alone.shape[2]].tolist() == alone[0].tolist()
    other = model.generate_from_prefix(prefix, seed=8, **options).sequences
    assert other.tolist() != together.tolist()


def test_captions_count_their_tokens_and_say_whether_they_were_cut(small):
    predictor = Predictor(small())
    predictor.set_image(Image.new("RGB", (64, 64), "blue"))
    (caption,) = predictor.predict(boxes=BOXES[:1], num_beams=2, num_captions=2, max_new_tokens=3)
    assert len(caption.usage.completion_tokens) == len(caption.usage.is_truncated) == 2
    for tokens, is_cut in zip(caption.usage.completion_tokens, caption.usage.is_truncated, strict=True):
        assert tokens == 3 or not is_cut
    model = predictor.model
    assert caption.usage.prompt_tokens == model.spec.task_tokens + model.spec.mixer.options["num_queries"]


def test_count_tokens_counts_the_end_and_no_padding():
    assert count_tokens(4, [[5, 6, 2, 2], [5, 6, 7, 8], [2], [5, 0, 0]], (2, 0)) == (
        4,
        (3, 4, 1, 2),
        (False, True, False, False),
    )


def test_pieces_of_different_length_are_padded_as_one_batch_is(small):
    model = small()
    pad = model.language_model.tokenizer.pad_token_id
    short = models.GenerationOutput(torch.tensor([[[5, 2]]]), torch.zeros(1, 1))
    long = models.GenerationOutput(torch.tensor([[[5, 6, 7, 2]]]), torch.zeros(1, 1))
    assert models._concat_generated([short, long], pad).sequences.tolist() == [[[5, 2, pad, pad]], [[5, 6, 7, 2]]]


@pytest.mark.slow
def test_every_caller_generates_in_pieces(rows, monkeypatch):
    model, seen = rows
    monkeypatch.setattr(models, "MAX_SEQUENCES_PER_CALL", 16)
    predictor = Predictor(model)
    predictor.set_image(Image.new("RGB", (64, 64), "blue"))
    assert len(predictor.predict(boxes=BOXES)) == 40
    found = predictor.engine.predict_best_masks(predictor.encoded, [[Prompt(box=box) for box in BOXES]])
    predictor.engine.caption_masks(predictor.encoded, found, [Prompt(box=box) for box in BOXES])
    evaluate(
        model,
        {"name": "scenes", "num_images": 12, "image_size": 64},
        "test",
        prompting=PromptingOptions(),
        batch_size=12,
    )
    features = model.encode(torch.zeros(1, 3, 64, 64))
    prompts = PromptBatch(torch.zeros(40, dtype=torch.long), boxes=torch.tensor(BOXES, dtype=torch.float))
    model.generate(features, prompts, torch.zeros(40, dtype=torch.long))
    assert sum(seen) > 120
    assert max(seen) <= 16


def test_non_finite_features_scores_and_ious_are_an_error(small):
    image = Image.new("RGB", (64, 64), "blue")
    for part, told in (
        ("encoder", "encoder returned NaN"),
        ("segmenter.decoder.iou", "NaN as predicted IoU"),
        ("projection", "language model 'tiny-gpt2' returned NaN or infinite scores for 1 of 1"),
    ):
        model = small()
        broken = [parameter for name, parameter in model.named_parameters() if name.startswith(part)]
        assert broken, part
        with torch.no_grad():
            broken[-1].fill_(torch.nan)
        with pytest.raises(ValueError, match=told):
            Engine(model).caption(image, [Prompt(box=(1, 2, 30, 40))])


def test_float16_overflow_is_an_error(small):
    model = small()
    with torch.no_grad():
        for parameter in model.language_model.parameters():
            parameter.mul_(1e4)
    predictor, image = Engine(model.half()), Image.new("RGB", (64, 64), "blue")
    with pytest.raises(ValueError, match="if this is float16, use"):
        predictor.caption(image, [Prompt(box=(1, 2, 30, 40))])
