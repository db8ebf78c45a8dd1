"""Modules that replace those of transformers: same parameters, same outputs."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, SamConfig, SamVisionConfig
from transformers.models.sam.modeling_sam import SamMaskDecoder, SamPromptEncoder, SamVisionNeck

from sca.checkpoints.load import locate_checkpoint
from sca.language_models.causal import CausalLanguageModel, TextTokenizer
from sca.language_models.hf import load_tokenizer
from sca.language_models.plain_tokenizer import PlainTokenizer, read_plain_tokenizer
from sca.language_models.tiny_gpt2 import TinyGpt2
from sca.nn.parameters import share_parameters
from sca.nn.sam import MaskDecoder, MaskDecoderConfig, PromptEncoder, VisionNeck

HIDDEN_SIZE, IMAGE_SIZE, GRID_SIZE, NUM_REGIONS = 32, 64, 8, 5
TEXTS = ("", " ", "a small red circle", "Zwölf  Boxkämpfer!\n", "a<|end|>b", "\U0001f600 <|end|>", "x" * 300)


@pytest.fixture
def sam_config():
    return SamConfig(
        vision_config={"hidden_size": 2, "num_pos_feats": HIDDEN_SIZE // 2},
        prompt_encoder_config={
            "hidden_size": HIDDEN_SIZE,
            "image_size": IMAGE_SIZE,
            "patch_size": IMAGE_SIZE // GRID_SIZE,
            "mask_input_channels": 8,
        },
        mask_decoder_config={
            "hidden_size": HIDDEN_SIZE,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "mlp_dim": 48,
            "iou_head_depth": 4,
            "iou_head_hidden_dim": 24,
        },
    )


@pytest.fixture
def language_model():
    torch.manual_seed(0)
    model = TinyGpt2(hidden_size=32, depth=3, num_heads=4, max_positions=40, vocab_size=300).eval()
    for parameter in model.parameters():  # biases and norms that matter, and clear choices
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture
def prefix():
    return torch.randn(NUM_REGIONS, 4, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kinds", ["points", "points and box", "box", "mask", "points and mask"])
def test_prompt_encoder_matches_transformers(sam_config, kinds):
    torch.manual_seed(0)
    expected_encoder = SamPromptEncoder(sam_config)
    encoder = PromptEncoder(HIDDEN_SIZE, IMAGE_SIZE, GRID_SIZE, 8)
    encoder.load_state_dict(expected_encoder.state_dict())
    points = torch.rand(NUM_REGIONS, 1, 3, 2) * IMAGE_SIZE if "points" in kinds else None
    labels = torch.randint(-1, 2, (NUM_REGIONS, 1, 3)) if "points" in kinds else None
    boxes = torch.rand(NUM_REGIONS, 1, 4) * IMAGE_SIZE if "box" in kinds else None
    masks = torch.randn(NUM_REGIONS, 1, 4 * GRID_SIZE, 4 * GRID_SIZE) if "mask" in kinds else None
    tokens, embeddings = encoder(points, labels, boxes, masks)
    expected_tokens, expected_embeddings = expected_encoder(points, labels, boxes, masks)
    assert tokens is expected_tokens is None or torch.equal(tokens, expected_tokens)
    assert torch.equal(embeddings, expected_embeddings)


def test_mask_decoder_has_the_parameters_of_transformers(sam_config):
    decoder = MaskDecoder(MaskDecoderConfig(HIDDEN_SIZE, 1, 4, 48, 4, 24))
    expected = SamMaskDecoder(sam_config.mask_decoder_config).state_dict()
    assert {name: each.shape for name, each in decoder.state_dict().items()} == {
        name: each.shape for name, each in expected.items()
    }
    decoder.load_state_dict(expected)
    token = torch.randn(NUM_REGIONS, HIDDEN_SIZE)
    expected_decoder = SamMaskDecoder(sam_config.mask_decoder_config)
    expected_decoder.load_state_dict(expected)
    assert torch.equal(decoder.iou_prediction_head(token), expected_decoder.iou_prediction_head(token))


def test_vision_neck_matches_transformers():
    torch.manual_seed(0)
    expected_neck = SamVisionNeck(SamVisionConfig(hidden_size=12, output_channels=8))
    neck = VisionNeck(12, 8)
    neck.load_state_dict(expected_neck.state_dict())
    features = torch.randn(2, 5, 6, 12)
    assert torch.equal(neck(features), expected_neck(features))


@pytest.mark.parametrize("is_padded", [False, True])
def test_tiny_gpt2_matches_transformers(language_model, prefix, is_padded):
    reference = language_model.to_transformers()
    assert type(reference.model) is GPT2LMHeadModel
    mask = torch.ones(NUM_REGIONS, 4)
    mask[0, 2:] = 0 if is_padded else 1
    states, expected = (each.hidden_states(prefix, mask) for each in (language_model, reference))
    assert torch.allclose(states, expected, atol=1e-5)
    assert torch.allclose(language_model.lm_head(states), reference.lm_head(expected), atol=1e-5)


def test_tiny_gpt2_generates_the_captions_of_transformers(language_model, prefix):
    output = language_model.generate(prefix, 20)
    expected = language_model.to_transformers().generate(prefix, 20)
    assert torch.equal(output.sequences, expected.sequences)
    assert torch.allclose(output.scores, expected.scores, atol=1e-5)
    assert len({tuple(row) for row in output.sequences[:, 0].tolist()}) > 1


def test_tiny_gpt2_samples_and_searches_with_transformers(language_model, prefix):
    beams = language_model.generate(prefix, 6, num_beams=3, num_captions=2)
    assert beams.sequences.shape[:2] == (NUM_REGIONS, 2)
    assert (beams.scores[:, 0] >= beams.scores[:, 1]).all()
    with pytest.raises(ValueError, match="num_captions=2 requires num_beams >= 2"):
        language_model.generate(prefix, 6, num_captions=2)


def test_tiny_gpt2_with_lora_matches_transformers(language_model, prefix):
    language_model.requires_grad_(False)
    language_model.add_lora(rank=2, alpha=4)
    for name, parameter in language_model.named_parameters():
        assert parameter.requires_grad == ("lora_" in name)
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    reference = language_model.to_transformers()
    assert reference.model.state_dict().keys() == language_model.model.state_dict().keys()
    states, expected = (each.hidden_states(prefix, torch.ones(NUM_REGIONS, 4)) for each in (language_model, reference))
    assert torch.allclose(states, expected, atol=1e-5)


def test_to_transformers_shares_parameters_and_their_gradients(language_model, prefix):
    language_model.model.transformer.wpe.requires_grad_(False)
    reference = language_model.to_transformers()
    parameters = dict(language_model.model.named_parameters())
    assert all(parameters[name] is parameter for name, parameter in reference.model.named_parameters())
    assert not language_model.model.transformer.wpe.weight.requires_grad
    assert language_model.model.transformer.wte.weight.requires_grad


def test_share_parameters_rejects_other_names():
    with pytest.raises(RuntimeError, match="Missing key"):
        share_parameters(torch.nn.Linear(2, 3, bias=False), torch.nn.Linear(2, 3))


def test_tiny_gpt2_initializes_as_transformers():
    torch.manual_seed(0)
    model = TinyGpt2(hidden_size=128, depth=4)
    config = GPT2Config(vocab_size=model.tokenizer.vocab_size, n_positions=96, n_embd=128, n_layer=4, n_head=4)
    expected = GPT2LMHeadModel(config).state_dict()
    for name, parameter in model.model.state_dict().items():
        assert parameter.mean().item() == pytest.approx(expected[name].mean().item(), abs=2e-3), name
        assert parameter.std().item() == pytest.approx(expected[name].std().item(), rel=0.05, abs=1e-6), name


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("vocab_size", [300, None])
def test_plain_tokenizer_matches_transformers(text, vocab_size):
    tokenizer = TinyGpt2(hidden_size=8, depth=1, num_heads=1, vocab_size=vocab_size).tokenizer
    expected = TextTokenizer(tokenizer.to_transformers())
    assert tokenizer.encode(text) == expected.encode(text)
    assert tokenizer.encode(text, max_length=3) == expected.encode(text, max_length=3)
    ids = tokenizer.encode(text)[:-1]
    assert tokenizer.decode(ids) == expected.decode(ids)
    assert tokenizer.special_token_ids == expected.special_token_ids
    assert tokenizer.vocab_size == expected.vocab_size


@pytest.mark.parametrize("name", ["sca-tiny", "sca-street"])
def test_bundled_tokenizer_is_plain_and_matches_transformers(name):
    folder = locate_checkpoint(name) / "tokenizer"
    tokenizer, expected = read_plain_tokenizer(folder), load_tokenizer(folder)
    assert isinstance(tokenizer, PlainTokenizer)
    ids = list(range(tokenizer.vocab_size))
    assert [tokenizer.decode([each]) for each in ids] == [expected.decode([each]) for each in ids]
    for text in TEXTS:
        assert tokenizer.encode(text) == expected.encode(text)


def test_read_plain_tokenizer_leaves_settings_of_transformers_to_it(tmp_path):
    TinyGpt2(hidden_size=8, depth=1, num_heads=1).tokenizer.save(str(tmp_path))
    assert read_plain_tokenizer(tmp_path) is not None
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    assert read_plain_tokenizer(tmp_path) is None
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / "tokenizer.json").write_text("{")
    assert read_plain_tokenizer(tmp_path) is None


def test_language_models_share_their_limits(language_model):
    other = CausalLanguageModel(language_model.to_transformers().model, None)
    for model in (language_model, other):
        with pytest.raises(ValueError, match="have 41 positions, but the language model supports at most 40"):
            model.hidden_states(torch.zeros(1, 41, 32), torch.ones(1, 41))
        with pytest.raises(ValueError, match="the language model has 300 embeddings"):
            model.tokenizer = TinyGpt2(hidden_size=8, depth=1, num_heads=1).tokenizer
