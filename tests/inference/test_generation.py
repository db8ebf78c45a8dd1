"""Generation: every caller generates in chunks, and invalid scores raise an error."""

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
def model_and_batch_sizes(build_small_model, monkeypatch):
    """A model, and the batch size of each call of its language model."""
    model, batch_sizes = build_small_model(), []
    generate = model.language_model.generate

    def generate_and_count(prefix, **options):
        batch_sizes.append(len(prefix))
        return generate(prefix, **options)

    monkeypatch.setattr(model.language_model, "generate", generate_and_count)
    return model, batch_sizes


@pytest.mark.parametrize("options", [{}, {"num_beams": 3, "num_captions": 2}])
def test_generate_from_prefix_matches_if_split_into_several_calls(model_and_batch_sizes, monkeypatch, options):
    model, batch_sizes = model_and_batch_sizes
    prefix = torch.randn(23, 4, model.language_model.hidden_size, generator=torch.Generator().manual_seed(0))
    expected = model.generate_from_prefix(prefix, **options)
    monkeypatch.setattr(models, "MAX_SEQUENCES_PER_CALL", 6)
    split_output = model.generate_from_prefix(prefix, **options)
    assert torch.equal(expected.sequences, split_output.sequences)
    torch.testing.assert_close(expected.scores, split_output.scores)
    assert max(batch_sizes[1:]) == 6 // options.get("num_beams", 1)


def test_generate_from_prefix_with_a_seed_is_reproducible(build_small_model):
    model, options = build_small_model(), {"do_sample": True, "temperature": 2.0, "num_captions": 2}
    prefix = torch.randn(3, 4, model.language_model.hidden_size, generator=torch.Generator().manual_seed(0))
    rng_state = torch.get_rng_state()
    sequences = model.generate_from_prefix(prefix, seed=7, **options).sequences
    assert torch.equal(torch.get_rng_state(), rng_state)
    torch.rand(5)
    sequences_of_one = model.generate_from_prefix(prefix[1:2], seed=7, **options).sequences
    assert sequences[1, :, : sequences_of_one.shape[2]].tolist() == sequences_of_one[0].tolist()
    other_sequences = model.generate_from_prefix(prefix, seed=8, **options).sequences
    assert other_sequences.tolist() != sequences.tolist()


def test_predict_returns_token_counts_and_truncation(build_small_model):
    predictor = Predictor(build_small_model())
    predictor.set_image(Image.new("RGB", (64, 64), "blue"))
    (caption,) = predictor.predict(boxes=BOXES[:1], num_beams=2, num_captions=2, max_new_tokens=3)
    assert len(caption.usage.completion_tokens) == len(caption.usage.is_truncated) == 2
    for num_tokens, is_truncated in zip(caption.usage.completion_tokens, caption.usage.is_truncated, strict=True):
        assert num_tokens == 3 or not is_truncated
    model = predictor.model
    assert caption.usage.prompt_tokens == model.spec.task_tokens + model.spec.mixer.options["num_queries"]


def test_count_tokens_includes_eos_and_excludes_padding():
    assert count_tokens(4, [[5, 6, 2, 2], [5, 6, 7, 8], [2], [5, 0, 0]], (2, 0)) == (
        4,
        (3, 4, 1, 2),
        (False, True, False, False),
    )


def test_concat_generated_pads_outputs_of_different_lengths(build_small_model):
    model = build_small_model()
    pad_token_id = model.language_model.tokenizer.pad_token_id
    short_output = models.GenerationOutput(torch.tensor([[[5, 2]]]), torch.zeros(1, 1))
    long_output = models.GenerationOutput(torch.tensor([[[5, 6, 7, 2]]]), torch.zeros(1, 1))
    assert models._concat_generated([short_output, long_output], pad_token_id).sequences.tolist() == [
        [[5, 2, pad_token_id, pad_token_id]],
        [[5, 6, 7, 2]],
    ]


@pytest.mark.slow
def test_every_generation_caller_limits_sequences_per_call(model_and_batch_sizes, monkeypatch):
    model, batch_sizes = model_and_batch_sizes
    monkeypatch.setattr(models, "MAX_SEQUENCES_PER_CALL", 16)
    predictor = Predictor(model)
    predictor.set_image(Image.new("RGB", (64, 64), "blue"))
    assert len(predictor.predict(boxes=BOXES)) == 40
    best_masks = predictor.engine.predict_best_masks(predictor.encoded, [[Prompt(box=box) for box in BOXES]])
    predictor.engine.caption_masks(predictor.encoded, best_masks, [Prompt(box=box) for box in BOXES])
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
    assert sum(batch_sizes) > 120
    assert max(batch_sizes) <= 16


def test_engine_caption_rejects_non_finite_features_scores_and_ious(build_small_model):
    image = Image.new("RGB", (64, 64), "blue")
    for module_name, message in (
        ("encoder", "encoder returned NaN"),
        ("segmenter.decoder.iou", "NaN as predicted IoU"),
        ("projection", "language model 'tiny-gpt2' returned NaN or infinite scores for 1 of 1"),
    ):
        model = build_small_model()
        parameters = [parameter for name, parameter in model.named_parameters() if name.startswith(module_name)]
        assert parameters, module_name
        with torch.no_grad():
            parameters[-1].fill_(torch.nan)
        with pytest.raises(ValueError, match=message):
            Engine(model).caption(image, [Prompt(box=(1, 2, 30, 40))])


def test_engine_caption_rejects_float16_overflow(build_small_model):
    model = build_small_model()
    with torch.no_grad():
        for parameter in model.language_model.parameters():
            parameter.mul_(1e4)
    engine, image = Engine(model.half()), Image.new("RGB", (64, 64), "blue")
    with pytest.raises(ValueError, match="if the model runs in float16, load it with"):
        engine.caption(image, [Prompt(box=(1, 2, 30, 40))])
