"""Causal language models of transformers: captions equal those of `generate`, or loading is rejected.

The reasons are listed in docs/language-models.md.
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

DOCS_PAGE = Path(__file__).parents[2] / "docs" / "language-models.md"
NUM_ROWS, PREFIX_LENGTH, NUM_STEPS = 4, 9, 8
CONFIG_OVERRIDES = {  # what default configurations lack, or have too many layers for
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
UNBUILDABLE_ARCHITECTURES = {  # default configurations that transformers 5.23 builds no model from
    *("cohere_compass_text", "dbrx", "dots3_note", "gemma4_assistant", "gemma4_unified_assistant"),
    *("musicgen", "musicgen_melody", "qwen4_exp", "qwen4_exp_text"),
}
LM_HEAD_OVERRIDES = {  # one architecture for each way to compute logits from states
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
NEEDS_TRANSFORMERS_5_23 = ("recurrent_gemma",)
TRANSFORMERS_VERSION = tuple(map(int, transformers.__version__.split(".")[:2]))
REJECTED_ARCHITECTURES = ("cpmant", "ctrl", "falcon_h1", "gemma3n_text", "gemma4_text", "openai-gpt", "roberta", "xlm")


def build_tiny_model(name, **fields):
    """Build a tiny model with random weights that differ from those of the language model's probe."""
    config = AutoConfig.for_model(name)
    if getattr(config, "is_decoder", None) is False:
        fields = {"is_decoder": True, **fields}
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(make_tiny_config(config, **CONFIG_OVERRIDES.get(name, {}) | fields)).eval()
    for parameter in model.parameters():
        parameter.data += torch.randn_like(parameter) * (0.3 if parameter.dim() > 1 else 0.05)
    return model


def read_rejection_reasons():
    """Return the architectures in the table of the documentation, with the reasons."""
    return dict(re.findall(r"^\| `(\S+)` \| (.+) \|$", DOCS_PAGE.read_text("utf-8"), re.MULTILINE))


@torch.no_grad()
def assert_matches_transformers(name, **fields):
    """Compare logits for embeddings and for ids, greedy ids and scores with those of the model's forward."""
    model = build_tiny_model(name, **fields)
    language_model = CausalLanguageModel(model, None)
    ids = torch.randint(5, 60, (NUM_ROWS, PREFIX_LENGTH))
    prefix = torch.randn(NUM_ROWS, PREFIX_LENGTH, language_model.hidden_size)
    for embeddings, inputs in (
        (language_model.embed_tokens(ids), {"input_ids": ids}),
        (prefix, {"inputs_embeds": prefix}),
    ):
        expected = model(**inputs).logits
        logits = language_model.lm_head(
            language_model.hidden_states(embeddings, torch.ones(NUM_ROWS, PREFIX_LENGTH, dtype=torch.long))
        )
        assert (logits - expected).abs().max() <= 1e-4 * expected.abs().max()
    generation_options = {
        "attention_mask": torch.ones(NUM_ROWS, PREFIX_LENGTH, dtype=torch.long),
        "max_new_tokens": NUM_STEPS,
        "pad_token_id": 0,
    }
    ids_without_eos = model.generate(inputs_embeds=prefix, eos_token_id=None, **generation_options)
    eos_token_ids = [int(ids_without_eos[0, 2]), int(ids_without_eos[1, 4])]
    model.generation_config.eos_token_id = eos_token_ids
    expected_output = model.generate(
        inputs_embeds=prefix,
        eos_token_id=eos_token_ids,
        return_dict_in_generate=True,
        output_logits=True,
        **generation_options,
    )
    generated = language_model.generate(prefix, NUM_STEPS)
    is_counted = torch.isin(expected_output.sequences, torch.tensor(eos_token_ids)).int()
    is_counted = is_counted.cumsum(1) - is_counted == 0
    pad_token_id = language_model.pad_token_id
    assert (
        generated.sequences[:, 0].tolist() == expected_output.sequences.masked_fill(~is_counted, pad_token_id).tolist()
    )
    log_probs = (
        torch.stack(expected_output.logits, dim=1)
        .float()
        .log_softmax(2)
        .gather(2, expected_output.sequences[..., None])[..., 0]
    )
    expected = (log_probs * is_counted).sum(1) / is_counted.sum(1)
    torch.testing.assert_close(generated.scores[:, 0], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", LM_HEAD_OVERRIDES)
@pytest.mark.slow
def test_language_model_matches_logits_and_ids_of_transformers(name):
    if name in NEEDS_TRANSFORMERS_5_23 and TRANSFORMERS_VERSION < (5, 23):
        pytest.skip("fails on embeddings before transformers 5.23")
    assert_matches_transformers(name, **LM_HEAD_OVERRIDES[name])


@pytest.mark.parametrize("name", REJECTED_ARCHITECTURES)
def test_language_model_rejects_unsupported_architectures_with_the_listed_reason(name):
    with pytest.raises(ValueError, match=f"the language model '{name}' .*; choose a decoder-only model") as error:
        CausalLanguageModel(build_tiny_model(name), None)
    assert read_rejection_reasons()[name] in str(error.value)
    assert "\n" not in str(error.value)


def test_language_model_rejects_bert_encoder_as_not_causal():
    with pytest.raises(ValueError, match=r"'bert' is not causal: .* \(is_decoder is false in its configuration\)"):
        CausalLanguageModel(build_tiny_model("bert", is_decoder=False), None)


@pytest.mark.all
@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_every_architecture_matches_transformers_or_is_rejected_as_documented(name):
    try:
        model = build_tiny_model(name)
    except Exception:
        assert name in UNBUILDABLE_ARCHITECTURES
        return
    assert name not in UNBUILDABLE_ARCHITECTURES
    if name not in read_rejection_reasons():
        assert_matches_transformers(name)
        return
    with pytest.raises(ValueError, match=re.escape(read_rejection_reasons()[name])):
        CausalLanguageModel(model, None)


@pytest.mark.all
def test_language_model_supports_at_least_105_of_120_architectures():
    buildable = set(ARCHITECTURES) - UNBUILDABLE_ARCHITECTURES
    assert len(buildable) >= 120
    assert len(buildable - read_rejection_reasons().keys()) >= 105
