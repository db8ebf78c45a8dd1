"""Any causal language model: its words, its precision, its memory, and LoRA on all of its blocks or none."""

import os

import pytest
import torch
from sca_registry import RegistryError, language_models
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import sca
from sca.io.errors import InputError
from sca.language_models.hf import HfLanguageModel, load_tokenizer
from sca.language_models.tiny_gpt2 import TinyGpt2

WORDS = ["a", "red", "car", "<end>", "<pad>", "<unk>", "<start>"]


@pytest.fixture
def tokenizer(tmp_path):
    """Saves a word-level tokenizer with the special tokens that are named."""

    def save(**special):
        words = Tokenizer(
            models.WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token=special.get("unk_token"))
        )
        words.pre_tokenizer = pre_tokenizers.Whitespace()
        PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(tmp_path)
        return tmp_path

    return save


@pytest.mark.parametrize(
    "special", [{}, {"pad_token": "<pad>"}, {"unk_token": "<unk>", "bos_token": "<start>"}], ids=str
)
def test_neither_pad_nor_unknown_nor_beginning_is_needed(tokenizer, special):
    text = load_tokenizer(tokenizer(eos_token="<end>", **special))
    assert text.encode("a red car") == [0, 1, 2, 3]
    assert text.encode("a red car", max_length=2) == [0, 3]
    assert text.decode([0, 1, 3, 2]) == "a red"
    assert text.pad_token_id == (4 if "pad_token" in special else 3)


def test_an_end_is_needed_and_can_be_named(tokenizer):
    folder = tokenizer(pad_token="<pad>")
    with pytest.raises(InputError, match=r"name one of its tokens with eos_token="):
        load_tokenizer(folder)
    with pytest.raises(InputError, match="'<stop>' is not in the vocabulary"):
        load_tokenizer(folder, eos_token="<stop>")
    assert load_tokenizer(folder, eos_token="<end>").encode("car") == [2, 3]


def test_a_folder_without_a_tokenizer_works_with_ids(lm_folder):
    assert HfLanguageModel(str(lm_folder("gpt2"))).tokenizer is None


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_language_model_may_be_of_lower_precision_than_the_rest(lm_folder, family):
    model = HfLanguageModel(str(lm_folder(family)), dtype="bfloat16")
    assert all(parameter.dtype == torch.bfloat16 for parameter in model.parameters())
    prefix, mask = torch.randn(2, 3, model.hidden_size), torch.ones(2, 3, dtype=torch.long)
    assert model.lm_head(model.hidden_states(prefix, mask)).isfinite().all()
    assert model.generate(prefix, max_new_tokens=3).sequences.shape[:2] == (2, 1)
    with pytest.raises(ValueError, match="unknown dtype 'half'"):
        HfLanguageModel(str(lm_folder(family)), dtype="half")


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_checkpointing_forgets_the_layers_and_gives_the_same_gradients(lm_folder, family):
    plain, saving = (HfLanguageModel(str(lm_folder(family)), gradient_checkpointing=on).eval() for on in (False, True))
    mask, remembered, gradients = torch.ones(2, 5, dtype=torch.long), [], []
    for model in (plain, saving):
        model.requires_grad_(False)
        torch.manual_seed(0)
        prefix = torch.randn(2, 5, model.hidden_size, requires_grad=True)
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor, kept=kept: kept.append(tensor) or tensor, lambda t: t
        ):
            states = model.hidden_states(prefix, mask)
        states.square().sum().backward()
        remembered.append(len(kept))
        gradients.append(prefix.grad)
    assert torch.allclose(*gradients, atol=1e-5)
    assert remembered[1] < remembered[0] / 2
    assert not any(module.training for module in saving.modules())


def test_several_ends_and_none_are_both_fine(lm_folder):
    model = HfLanguageModel(str(lm_folder("llama")))
    prefix = torch.randn(3, 2, model.hidden_size, generator=torch.Generator().manual_seed(0))
    model.model.generation_config.eos_token_id = None
    free = model.generate(prefix, max_new_tokens=5).sequences[:, 0]
    assert free.shape == (3, 5)
    model.model.generation_config.eos_token_id = [int(free[0, 1]), int(free[1, 2])]
    ended = model.generate(prefix, max_new_tokens=5).sequences[:, 0].tolist()
    pad = model.model.generation_config.pad_token_id
    for row, whole in zip(ended, free.tolist(), strict=True):
        at = next((n for n, word in enumerate(whole) if word in model.model.generation_config.eos_token_id), len(whole))
        assert row[: at + 1] == whole[: at + 1]
        assert set(row[at + 1 :]) <= {pad}


def test_what_is_drawn_comes_best_first_too(lm_folder):
    model = HfLanguageModel(str(lm_folder("gpt2")))
    prefix = torch.randn(3, 2, model.hidden_size, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    drawn = model.generate(prefix, max_new_tokens=4, num_captions=5, do_sample=True, temperature=3.0)
    assert torch.equal(drawn.scores, drawn.scores.sort(dim=1, descending=True).values)
    assert (drawn.scores[:, 0] > drawn.scores[:, -1]).all()
    with pytest.raises(ValueError, match="num_captions is 0"):
        model.generate(prefix, max_new_tokens=4, num_captions=0)


GENERATION = [
    {},
    {"num_beams": 3, "num_captions": 2},
    {"do_sample": True, "temperature": 0.2, "num_captions": 3},
    {"do_sample": True, "temperature": 5.0, "top_p": 0.3},
    {"do_sample": True, "temperature": 3.0, "num_beams": 2},
]


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("options", GENERATION, ids=str)
@torch.no_grad()
def test_scores_are_mean_log_probabilities_of_untempered_logits(lm_folder, family, options):
    model = HfLanguageModel(str(lm_folder(family))).eval()
    torch.manual_seed(0)
    prefix = torch.randn(3, 2, model.hidden_size)
    generated = model.generate(prefix, max_new_tokens=6, **options)
    _, ends = model._resolve_special_tokens()
    for row, texts in enumerate(generated.sequences.tolist()):
        for ids, score in zip(texts, generated.scores[row].tolist(), strict=True):
            length = next((place + 1 for place, token in enumerate(ids) if token in ends), len(ids))
            tokens = torch.tensor(ids[:length])
            embeddings = torch.cat((prefix[row], model.embed_tokens(tokens)))[None]
            states = model.hidden_states(embeddings, torch.ones(embeddings.shape[:2], dtype=torch.long))
            likelihoods = model.lm_head(states)[0, 1:-1].log_softmax(1).gather(1, tokens[:, None])
            assert score == pytest.approx(likelihoods.mean().item(), abs=1e-4)


def test_a_prefix_that_leaves_no_room_for_words_is_refused():
    with pytest.raises(RegistryError, match="the prefix of 100 queries and 6 task tokens fills the 96 positions"):
        sca.compose("tiny-vit", {"name": "roi-pool", "output_size": 10}, "tiny-gpt2")


def test_a_folder_in_place_of_a_card_s_own_weights_has_its_own_configuration(lm_folder):
    folder = str(lm_folder("gpt2"))
    with torch.device("meta"):
        model = language_models.build("gpt2", weights=folder, pretrained=False)
    assert model.hidden_size == 32


def test_lora_on_a_name_that_no_block_has_or_only_some_is_refused(lm_folder):
    def adapted(*targets):
        HfLanguageModel(str(lm_folder("llama"))).add_lora(2, 4, target_modules=targets)

    adapted("q_proj", "down_proj")
    with pytest.raises(ValueError, match=r"no layer named 'q_prj'. choose from the linear layers.*q_proj \(2\)"):
        adapted("q_proj", "q_prj")
    model = HfLanguageModel(str(lm_folder("llama")))
    model.model.model.layers[1].self_attn.k_proj = torch.nn.Identity()
    with pytest.raises(ValueError, match="only 1 of 2 blocks have a 'k_proj'"):
        model.add_lora(2, 4, target_modules=["q_proj", "k_proj"])


def test_lora_reaches_every_block(lm_folder):
    model = HfLanguageModel(str(lm_folder("mistral")))
    model.add_lora(2, 4)
    adapted = {name.split(".lora_")[0] for name, _ in model.named_parameters() if "lora_" in name}
    assert len(adapted) == 2 * 2  # two layers, two projections each


@pytest.mark.skipif(not os.environ.get("SCA_GGUF"), reason="SCA_GGUF does not name a GGUF file")
def test_a_language_model_out_of_a_gguf_file_writes_english():
    model = language_models.build("gguf", weights=os.environ["SCA_GGUF"])
    ids = torch.tensor([model.tokenizer.tokenizer("The capital of France is", add_special_tokens=False)["input_ids"]])
    told = model.generate(model.embed_tokens(ids), max_new_tokens=6)
    assert "Paris" in model.tokenizer.decode(told.sequences[0, 0].tolist())


def test_a_gguf_file_that_is_none_is_told(tmp_path):
    with pytest.raises(RegistryError, match="no GGUF file"):
        language_models.build("gguf", weights=str(tmp_path / "absent.gguf"))
    (tmp_path / "empty.gguf").write_bytes(b"")
    with pytest.raises(RegistryError, match=r"empty\.gguf cannot be read|needs extra: gguf"):
        language_models.build("gguf", weights=str(tmp_path / "empty.gguf"))


def test_a_tokenizer_with_more_tokens_than_embeddings_is_refused(lm_folder, tmp_path):
    weights = str(lm_folder("gpt2"))
    tokenizer = TinyGpt2(hidden_size=8, depth=1, num_heads=1).tokenizer
    tokenizer.save(str(tmp_path / "words"))
    said = "the tokenizer has 726 tokens, but the language model has 97 embeddings; use the tokenizer of these weights"
    with pytest.raises(RegistryError, match=said):
        language_models.build("hf", weights=weights, tokenizer=str(tmp_path / "words"))
    model = language_models.build("hf", weights=weights)
    with pytest.raises(ValueError, match=said):
        model.tokenizer = tokenizer
