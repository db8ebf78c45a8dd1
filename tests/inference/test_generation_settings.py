"""Generation settings: our defaults override those in the files of a hub model."""

import json
import shutil

import pytest
import torch
from transformers import GenerationConfig

from sca.io.errors import InputError
from sca.language_models import model_inspection
from sca.language_models.causal import CausalLanguageModel
from sca.language_models.hf import HfLanguageModel

GENERATION_SETTINGS = {
    "max_time": 1e-4,
    "stop_strings": ["a"],
    "num_return_sequences": 3,
    "repetition_penalty": 1.8,
    "no_repeat_ngram_size": 1,
    "do_sample": True,
    "temperature": 9.0,
    "top_k": 1,
    "num_beams": 4,
    "length_penalty": -3.0,
    "max_length": 3,
    "min_length": 40,
    "min_new_tokens": 40,
    "suppress_tokens": list(range(3, 97)),
    "begin_suppress_tokens": list(range(3, 97)),
    "bad_words_ids": [[each] for each in range(3, 97)],
    "forced_bos_token_id": 5,
    "forced_eos_token_id": 5,
    "guidance_scale": 4.0,
    "cache_implementation": "static",
    "use_cache": False,
    "custom_generate": "someone/else",
}


@pytest.fixture
def copy_language_model(save_language_model, tmp_path):
    """Function that copies a tiny language model with fields added to one of its files."""

    def copy_with_fields(file_name="generation_config.json", **fields):
        path = shutil.copytree(save_language_model("gpt2"), tmp_path / "lm", dirs_exist_ok=True) / file_name
        path.write_text(json.dumps(json.loads((save_language_model("gpt2") / file_name).read_text()) | fields))
        return str(path.parent)

    return copy_with_fields


def draw_prefix():
    return torch.randn(3, 4, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def expected_outputs(save_language_model):
    """Captions of a model without generation settings, by number of beams."""
    model = HfLanguageModel(str(save_language_model("gpt2")))
    return {num_beams: model.generate(draw_prefix(), 6, num_beams) for num_beams in (1, 2)}


@pytest.mark.parametrize("name", GENERATION_SETTINGS)
@pytest.mark.slow
def test_generate_ignores_a_generation_setting_of_a_hub_model(copy_language_model, expected_outputs, name):
    output = HfLanguageModel(copy_language_model(**{name: GENERATION_SETTINGS[name]})).generate(draw_prefix(), 6)
    assert torch.equal(output.sequences, expected_outputs[1].sequences)
    assert torch.equal(output.scores, expected_outputs[1].scores)


@pytest.mark.parametrize("file_name", ["generation_config.json", "config.json"])
@pytest.mark.parametrize("num_beams", [1, 2])
def test_generate_ignores_all_generation_settings_of_a_hub_model(
    copy_language_model, expected_outputs, file_name, num_beams
):
    output = HfLanguageModel(copy_language_model(file_name, **GENERATION_SETTINGS)).generate(
        draw_prefix(), 6, num_beams
    )
    assert torch.equal(output.sequences, expected_outputs[num_beams].sequences)
    assert torch.equal(output.scores, expected_outputs[num_beams].scores)


def test_generate_ignores_generation_settings_of_a_model_in_memory(copy_language_model, expected_outputs):
    model = HfLanguageModel(copy_language_model()).model
    model.generation_config = GenerationConfig(repetition_penalty=1.8, max_time=1e-4, eos_token_id=2, pad_token_id=0)
    output = CausalLanguageModel(model, None).generate(draw_prefix(), 6)
    assert torch.equal(output.sequences, expected_outputs[1].sequences)


def test_generate_uses_eos_and_pad_ids_of_generation_config(copy_language_model):
    prefix = draw_prefix()
    unrestricted_ids = HfLanguageModel(copy_language_model()).generate(prefix, 12).sequences[0, 0].tolist()
    model = HfLanguageModel(copy_language_model(eos_token_id=[96, unrestricted_ids[3]], pad_token_id=7))
    end_index = unrestricted_ids.index(unrestricted_ids[3])
    assert model.generate(prefix, 12).sequences[0, 0].tolist()[: end_index + 1] == unrestricted_ids[: end_index + 1]
    assert model.pad_token_id == 7
    assert set(model.generate(prefix, 12).sequences[0, 0].tolist()[end_index + 1 :]) <= {7}


@pytest.mark.parametrize("value", ["a", -1, 1.5, [2, "a"], True])
def test_language_model_rejects_a_non_integer_eos_token_id(copy_language_model, value):
    with pytest.raises(InputError, match=r"eos_token_id in .*generation_config.json is .*; expected the id of a token"):
        HfLanguageModel(copy_language_model(eos_token_id=value))


def test_probe_runs_once_per_configuration_and_keeps_the_random_state(copy_language_model, monkeypatch):
    examined_models, examine_model = [], model_inspection._examine_model
    monkeypatch.setattr(
        model_inspection, "_examine_model", lambda model: examined_models.append(model) or examine_model(model)
    )
    monkeypatch.setattr(model_inspection, "_structures", {})
    model = HfLanguageModel(copy_language_model()).model
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    for _ in range(2):
        model_inspection._structures.clear()
        model_inspection.inspect_model(model)
    assert torch.equal(torch.rand(3), expected)
    assert model_inspection.inspect_model(model) == model_inspection.inspect_model(model)
    assert len(examined_models) == 3
    assert all(
        sum(each.numel() for each in examined_model.parameters()) < 300_000 for examined_model in examined_models
    )


def test_probe_falls_back_to_the_model_itself(copy_language_model, monkeypatch):
    model = HfLanguageModel(copy_language_model()).model
    expected = model_inspection.inspect_model(model)

    def fail_to_build(_):
        raise KeyError("no such size")

    monkeypatch.setattr(model_inspection, "_structures", {})
    monkeypatch.setattr(model_inspection, "_build_tiny_model", fail_to_build)
    assert model_inspection.inspect_model(model) == expected
    model.config.n_inner = 7
    with pytest.raises(ValueError, match=r"fails on embeddings.*no such size"):
        model_inspection.inspect_model(model.to("meta"))
