"""Causal language models: tokenization, precision, memory and LoRA."""

import json
import os

import pytest
import tiny_tokenizer
import torch
from sca_registry import RegistryError, language_models
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import sca
from sca.io.errors import InputError
from sca.language_models.causal import TextTokenizer
from sca.language_models.hf import HfLanguageModel, load_tokenizer
from sca.language_models.tiny_gpt2 import TinyGpt2
from sca.language_models.token_usage import count_tokens

VOCABULARY = ["a", "red", "car", "<end>", "<pad>", "<unk>", "<start>"]
QUESTION_TOKENS = ("Ġwhat", "Ġcolor", "Ġis", "Ġit", "?")


@pytest.fixture
def save_tokenizer(tmp_path):
    """Function that saves a word-level tokenizer with the given special tokens."""

    def save(**special_tokens):
        word_level_tokenizer = Tokenizer(
            models.WordLevel({word: n for n, word in enumerate(VOCABULARY)}, unk_token=special_tokens.get("unk_token"))
        )
        word_level_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        PreTrainedTokenizerFast(tokenizer_object=word_level_tokenizer, **special_tokens).save_pretrained(tmp_path)
        return tmp_path

    return save


@pytest.mark.parametrize(
    "special_tokens", [{}, {"pad_token": "<pad>"}, {"unk_token": "<unk>", "bos_token": "<start>"}], ids=str
)
def test_load_tokenizer_needs_no_pad_unknown_or_bos_token(save_tokenizer, special_tokens):
    text_tokenizer = load_tokenizer(save_tokenizer(eos_token="<end>", **special_tokens))
    assert text_tokenizer.encode("a red car") == [0, 1, 2, 3]
    assert text_tokenizer.encode("a red car", max_length=2) == [0, 3]
    assert text_tokenizer.decode([0, 1, 3, 2]) == "a red"
    assert text_tokenizer.pad_token_id == (4 if "pad_token" in special_tokens else 3)


def test_load_tokenizer_requires_an_eos_token_that_can_be_passed_by_name(save_tokenizer):
    folder = save_tokenizer(pad_token="<pad>")
    with pytest.raises(InputError, match=r"choose one of its tokens with eos_token="):
        load_tokenizer(folder)
    with pytest.raises(InputError, match="'<stop>' is not in the vocabulary"):
        load_tokenizer(folder, eos_token="<stop>")
    assert load_tokenizer(folder, eos_token="<end>").encode("car") == [2, 3]


def test_language_model_of_a_folder_without_tokenizer_has_none(save_language_model):
    assert HfLanguageModel(str(save_language_model("gpt2"))).tokenizer is None


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_language_model_runs_in_bfloat16_on_float32_inputs(save_language_model, family):
    model = HfLanguageModel(str(save_language_model(family)), dtype="bfloat16")
    assert all(parameter.dtype == torch.bfloat16 for parameter in model.parameters())
    prefix, mask = torch.randn(2, 3, model.hidden_size), torch.ones(2, 3, dtype=torch.long)
    assert model.lm_head(model.hidden_states(prefix, mask)).isfinite().all()
    assert model.generate(prefix, max_new_tokens=3).sequences.shape[:2] == (2, 1)
    with pytest.raises(ValueError, match="unknown dtype 'half'"):
        HfLanguageModel(str(save_language_model(family)), dtype="half")


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_gradient_checkpointing_saves_fewer_tensors_with_equal_gradients(save_language_model, family):
    plain_model, checkpointed_model = (
        HfLanguageModel(str(save_language_model(family)), gradient_checkpointing=checkpointing).eval()
        for checkpointing in (False, True)
    )
    mask, num_saved_tensors, gradients = torch.ones(2, 5, dtype=torch.long), [], []
    for model in (plain_model, checkpointed_model):
        model.requires_grad_(False)
        torch.manual_seed(0)
        prefix = torch.randn(2, 5, model.hidden_size, requires_grad=True)
        saved_tensors = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor, saved_tensors=saved_tensors: saved_tensors.append(tensor) or tensor, lambda t: t
        ):
            states = model.hidden_states(prefix, mask)
        states.square().sum().backward()
        num_saved_tensors.append(len(saved_tensors))
        gradients.append(prefix.grad)
    assert torch.allclose(*gradients, atol=1e-5)
    assert num_saved_tensors[1] < num_saved_tensors[0] / 2
    assert not any(module.training for module in checkpointed_model.modules())


def test_language_model_generates_with_several_or_no_eos_tokens(save_language_model):
    model = HfLanguageModel(str(save_language_model("llama")))
    prefix = torch.randn(3, 2, model.hidden_size, generator=torch.Generator().manual_seed(0))
    model.model.generation_config.eos_token_id = None
    ids_without_eos = model.generate(prefix, max_new_tokens=5).sequences[:, 0]
    assert ids_without_eos.shape == (3, 5)
    model.model.generation_config.eos_token_id = [int(ids_without_eos[0, 1]), int(ids_without_eos[1, 2])]
    ids_with_eos = model.generate(prefix, max_new_tokens=5).sequences[:, 0].tolist()
    pad_token_id = model.model.generation_config.pad_token_id
    for row, expected_row in zip(ids_with_eos, ids_without_eos.tolist(), strict=True):
        eos_position = next(
            (n for n, token_id in enumerate(expected_row) if token_id in model.model.generation_config.eos_token_id),
            len(expected_row),
        )
        assert row[: eos_position + 1] == expected_row[: eos_position + 1]
        assert set(row[eos_position + 1 :]) <= {pad_token_id}


def test_language_model_sorts_sampled_captions_by_score(save_language_model):
    model = HfLanguageModel(str(save_language_model("gpt2")))
    prefix = torch.randn(3, 2, model.hidden_size, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    sampled = model.generate(prefix, max_new_tokens=4, num_captions=5, do_sample=True, temperature=3.0)
    assert torch.equal(sampled.scores, sampled.scores.sort(dim=1, descending=True).values)
    assert (sampled.scores[:, 0] > sampled.scores[:, -1]).all()
    with pytest.raises(ValueError, match="num_captions is 0"):
        model.generate(prefix, max_new_tokens=4, num_captions=0)


GENERATION_OPTIONS = [
    {},
    {"num_beams": 3, "num_captions": 2},
    {"do_sample": True, "temperature": 0.2, "num_captions": 3},
    {"do_sample": True, "temperature": 5.0, "top_p": 0.3},
    {"do_sample": True, "temperature": 3.0, "num_beams": 2},
]


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("options", GENERATION_OPTIONS, ids=str)
@torch.no_grad()
def test_generation_scores_are_mean_log_probabilities_of_unscaled_logits(save_language_model, family, options):
    model = HfLanguageModel(str(save_language_model(family))).eval()
    torch.manual_seed(0)
    prefix = torch.randn(3, 2, model.hidden_size)
    generated = model.generate(prefix, max_new_tokens=6, **options)
    _, eos_token_ids = model._resolve_special_tokens()
    for row, captions in enumerate(generated.sequences.tolist()):
        for ids, score in zip(captions, generated.scores[row].tolist(), strict=True):
            length = next((position + 1 for position, token in enumerate(ids) if token in eos_token_ids), len(ids))
            tokens = torch.tensor(ids[:length])
            embeddings = torch.cat((prefix[row], model.embed_tokens(tokens)))[None]
            states = model.hidden_states(embeddings, torch.ones(embeddings.shape[:2], dtype=torch.long))
            log_probs = model.lm_head(states)[0, 1:-1].log_softmax(1).gather(1, tokens[:, None])
            assert score == pytest.approx(log_probs.mean().item(), abs=1e-4)


def test_compose_rejects_a_prefix_longer_than_the_language_model_context():
    message = r"the prefix of 106 positions \(100 queries, 6 task tokens\) fills the 96 positions"
    with pytest.raises(RegistryError, match=message):
        sca.compose("tiny-vit", {"name": "roi-pool", "output_size": 10}, "tiny-gpt2")


def test_language_model_weights_folder_replaces_the_configuration_of_the_card(save_language_model):
    folder = str(save_language_model("gpt2"))
    with torch.device("meta"):
        model = language_models.build("gpt2", weights=folder, pretrained=False)
    assert model.hidden_size == 32


def test_add_lora_rejects_target_modules_missing_from_blocks(save_language_model):
    def add_lora(*target_modules):
        HfLanguageModel(str(save_language_model("llama"))).add_lora(2, 4, target_modules=target_modules)

    add_lora("q_proj", "down_proj")
    with pytest.raises(ValueError, match=r"no layer named 'q_prj'; choose from the linear layers.*q_proj \(2\)"):
        add_lora("q_proj", "q_prj")
    model = HfLanguageModel(str(save_language_model("llama")))
    model.model.model.layers[1].self_attn.k_proj = torch.nn.Identity()
    with pytest.raises(ValueError, match="only 1 of 2 blocks have a layer 'k_proj'"):
        model.add_lora(2, 4, target_modules=["q_proj", "k_proj"])


def test_add_lora_adapts_every_block(save_language_model):
    model = HfLanguageModel(str(save_language_model("mistral")))
    model.add_lora(2, 4)
    adapted_layers = {name.split(".lora_")[0] for name, _ in model.named_parameters() if "lora_" in name}
    assert len(adapted_layers) == 2 * 2  # two layers, two projections each


@pytest.mark.skipif(not os.environ.get("SCA_GGUF"), reason="SCA_GGUF does not name a GGUF file")
def test_gguf_language_model_generates_english():
    model = language_models.build("gguf", weights=os.environ["SCA_GGUF"])
    ids = torch.tensor([model.tokenizer.tokenizer("The capital of France is", add_special_tokens=False)["input_ids"]])
    generated = model.generate(model.embed_tokens(ids), max_new_tokens=6)
    assert "Paris" in model.tokenizer.decode(generated.sequences[0, 0].tolist())


def test_gguf_language_model_rejects_missing_and_invalid_files(tmp_path):
    with pytest.raises(RegistryError, match="no GGUF file"):
        language_models.build("gguf", weights=str(tmp_path / "absent.gguf"))
    (tmp_path / "empty.gguf").write_bytes(b"")
    with pytest.raises(RegistryError, match=r"empty\.gguf cannot be read|needs the extra 'gguf'"):
        language_models.build("gguf", weights=str(tmp_path / "empty.gguf"))


def test_tiny_gpt2_has_one_token_per_word_of_questions_and_the_vocabulary_of_the_bundled_models():
    tokenizer = TinyGpt2(hidden_size=8, depth=1, num_heads=1).tokenizer
    assert tokenizer.encode("what color is it?")[:-1] == [*map(tokenizer.tokenizer.token_to_id, QUESTION_TOKENS)]
    assert [word for word in tiny_tokenizer.list_words() if len(tokenizer.encode(word)) != 2] == []
    smaller = TinyGpt2(hidden_size=8, depth=1, num_heads=1, vocab_size=726)
    bundled = sca.load("sca-tiny").language_model.tokenizer
    assert smaller.embed_tokens(torch.tensor([[725]])).shape == (1, 1, 8)
    contents = [json.loads(each.tokenizer.to_str()) for each in (smaller.tokenizer, bundled)]
    assert contents[0]["model"] == contents[1]["model"]
    phrase = "a large red circle to the left of a blue star"
    assert tokenizer.encode(phrase) == smaller.tokenizer.encode(phrase)
    assert smaller.tokenizer.decode(smaller.tokenizer.encode("what color is it?")) == "what color is it?"
    for vocab_size in (256, 10_000):
        with pytest.raises(ValueError, match="expected a number from 257 to"):
            TinyGpt2(hidden_size=8, depth=1, num_heads=1, vocab_size=vocab_size)


def test_captions_end_at_every_special_token_of_the_generation_config():
    torch.manual_seed(0)
    tiny_model = TinyGpt2(hidden_size=8, depth=1, num_heads=1)
    model = tiny_model.to_transformers()
    prefix = torch.randn(1, 2, 8)
    first_id = int(model.generate(prefix, max_new_tokens=3).sequences[0, 0, 0])
    tokenizer, end_id = tiny_model.tokenizer.to_transformers(), tiny_model.tokenizer.eos_token_id
    model.model.generation_config.eos_token_id = [end_id, first_id]
    assert model.eos_token_ids == [end_id]  # not a special token, as in another vocabulary
    tokenizer.add_special_tokens({"additional_special_tokens": [tokenizer.convert_ids_to_tokens(first_id)]})
    model.tokenizer = TextTokenizer(tokenizer)
    assert model.eos_token_ids == [end_id, first_id]
    for num_beams in (1, 2):
        sequences = model.generate(prefix, max_new_tokens=3, num_beams=num_beams).sequences
        assert num_beams == 2 or sequences.tolist() == [[[first_id]]]
    usage = count_tokens(2, model.generate(prefix, max_new_tokens=3).sequences[0].tolist(), model.eos_token_ids)
    assert (usage.completion_tokens, usage.is_truncated) == ((1,), (False,))


def test_language_model_rejects_sequences_longer_than_its_positions():
    model = TinyGpt2(hidden_size=8, depth=1, num_heads=1, max_positions=12)
    model.hidden_states(torch.zeros(1, 12, 8), torch.ones(1, 12, dtype=torch.long))
    with pytest.raises(
        ValueError, match="have 13 positions, but the language model supports at most 12; use fewer queries"
    ):
        model.hidden_states(torch.zeros(1, 13, 8), torch.ones(1, 13, dtype=torch.long))


def test_language_model_rejects_a_tokenizer_larger_than_its_embeddings(save_language_model, tmp_path):
    weights = str(save_language_model("gpt2"))
    tokenizer = TinyGpt2(hidden_size=8, depth=1, num_heads=1).tokenizer
    tokenizer.save(str(tmp_path / "words"))
    message = (
        "the tokenizer has 850 tokens, but the language model has 97 embeddings; use the tokenizer of these weights"
    )
    with pytest.raises(RegistryError, match=message):
        language_models.build("hf", weights=weights, tokenizer=str(tmp_path / "words"))
    model = language_models.build("hf", weights=weights)
    with pytest.raises(ValueError, match=message):
        model.tokenizer = tokenizer
