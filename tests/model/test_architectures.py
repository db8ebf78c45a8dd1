"""Every architecture of transformers' causal language models: captioned as its own `generate` does, or refused.

The reasons of those that are refused are listed in docs/language-models.md.
"""

import re
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as ARCHITECTURES

from sca.language_models.causal import CausalLanguageModel
from sca.language_models.tiny_config import make_tiny_config

PAGE = Path(__file__).parents[2] / "docs" / "language-models.md"
ROWS, PREFIX, STEPS = 4, 9, 8
FIELDS = {  # what default configurations lack, or have too many layers for
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "hrm_text": {"num_hidden_layers": 16},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"], "num_hidden_layers": 3},
    "ministral": {"head_dim": 16},
    "nemotron": {"num_key_value_heads": 2},
    "reformer": {"axial_pos_embds": False},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid"] * 2, "num_hidden_layers": 4},
}
NOT_BUILT = {  # default configurations that transformers 5.23 builds no model from
    *("cohere_compass_text", "dbrx", "dots3_note", "gemma4_assistant", "gemma4_unified_assistant"),
    *("musicgen", "musicgen_melody", "qwen4_exp", "qwen4_exp_text"),
}
HEADS = {  # one architecture for each way to compute logits from states
    "gpt2": {},  # a linear layer
    "codegen": {},  # no padding in its configuration
    "bloom": {},  # of tied weights
    "cohere": {"logit_scale": 0.3},
    "granite": {"logits_scaling": 3.0},
    "gemma2": {"final_logit_softcapping": 5.0},
    "nanochat": {},  # a cap that the configuration does not call one
    "recurrent_gemma": {"logits_soft_cap": 5.0},
    "mpt": {"logit_scale": 0.5},
    "bert": {},  # a layer before the output projection
    "modernbert-decoder": {},
    "bart": {},  # a decoder within the body, with a token that generation_config forces
    "llama4_text": {},  # its class names its body wrongly
    "opt": {"word_embed_proj_dim": 32},  # embeddings narrower than states
}
NEWER = ("recurrent_gemma",)
VERSION = tuple(map(int, transformers.__version__.split(".")[:2]))
REFUSED = ("cpmant", "ctrl", "falcon_h1", "gemma3n_text", "gemma4_text", "openai-gpt", "roberta", "xlm")


def build(name, **fields):
    """A tiny model with random weights; other weights than those that the probe of a language model draws."""
    config = AutoConfig.for_model(name)
    if getattr(config, "is_decoder", None) is False:
        fields = {"is_decoder": True, **fields}
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(make_tiny_config(config, **FIELDS.get(name, {}) | fields)).eval()
    for parameter in model.parameters():
        parameter.data += torch.randn_like(parameter) * (0.3 if parameter.dim() > 1 else 0.05)
    return model


def refused():
    """The architectures in the table of the manual, with their reasons."""
    return dict(re.findall(r"^\| `(\S+)` \| (.+) \|$", PAGE.read_text("utf-8"), re.MULTILINE))


@torch.no_grad()
def check_equals_its_model(name, **fields):
    """Logits for embeddings and for ids, greedy ids and their scores against those of the model's own forward."""
    model = build(name, **fields)
    language_model = CausalLanguageModel(model, None)
    ids = torch.randint(5, 60, (ROWS, PREFIX))
    prefix = torch.randn(ROWS, PREFIX, language_model.hidden_size)
    for embeddings, inputs in (
        (language_model.embed_tokens(ids), {"input_ids": ids}),
        (prefix, {"inputs_embeds": prefix}),
    ):
        expected = model(**inputs).logits
        found = language_model.lm_head(
            language_model.hidden_states(embeddings, torch.ones(ROWS, PREFIX, dtype=torch.long))
        )
        assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()
    plain = {"attention_mask": torch.ones(ROWS, PREFIX, dtype=torch.long), "max_new_tokens": STEPS, "pad_token_id": 0}
    free = model.generate(inputs_embeds=prefix, eos_token_id=None, **plain)
    ends = [int(free[0, 2]), int(free[1, 4])]
    model.generation_config.eos_token_id = ends
    own = model.generate(
        inputs_embeds=prefix, eos_token_id=ends, return_dict_in_generate=True, output_logits=True, **plain
    )
    generated = language_model.generate(prefix, STEPS)
    counted = torch.isin(own.sequences, torch.tensor(ends)).int()
    counted = counted.cumsum(1) - counted == 0
    pad = language_model.pad_token_id
    assert generated.sequences[:, 0].tolist() == own.sequences.masked_fill(~counted, pad).tolist()
    logs = torch.stack(own.logits, dim=1).float().log_softmax(2).gather(2, own.sequences[..., None])[..., 0]
    expected = (logs * counted).sum(1) / counted.sum(1)
    torch.testing.assert_close(generated.scores[:, 0], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.slow
def test_language_model_has_the_logits_and_ids_of_its_own_model(name):
    if name in NEWER and VERSION < (5, 23):
        pytest.skip("transformers 5.17 does not run it on embeddings, so that it is refused there")
    check_equals_its_model(name, **HEADS[name])


@pytest.mark.parametrize("name", REFUSED)
def test_language_model_that_cannot_caption_is_refused_when_built(name):
    with pytest.raises(ValueError, match=f"the language model '{name}' .*; choose a decoder-only model") as error:
        CausalLanguageModel(build(name), None)
    assert refused()[name] in str(error.value)
    assert "\n" not in str(error.value)


def test_bert_that_is_no_decoder_is_refused_as_not_causal():
    with pytest.raises(ValueError, match=r"'bert' is not causal: .* \(is_decoder is false in its configuration\)"):
        CausalLanguageModel(build("bert", is_decoder=False), None)


@pytest.mark.all
@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_every_architecture_is_equal_to_its_own_model_or_refused_for_the_listed_reason(name):
    try:
        model = build(name)
    except Exception:
        assert name in NOT_BUILT
        return
    assert name not in NOT_BUILT
    if name not in refused():
        check_equals_its_model(name)
        return
    with pytest.raises(ValueError, match=re.escape(refused()[name])):
        CausalLanguageModel(model, None)


@pytest.mark.all
def test_at_least_105_of_120_architectures_caption():
    built = set(ARCHITECTURES) - NOT_BUILT
    assert len(built) >= 120
    assert len(built - refused().keys()) >= 105
