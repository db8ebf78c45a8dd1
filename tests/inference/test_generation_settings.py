"""Captions follow our own settings for generation, whatever a hub model's files ask for."""

import json
import shutil

import pytest
import torch
from transformers import GenerationConfig

from sca.io.errors import InputError
from sca.language_models import model_inspection
from sca.language_models.causal import CausalLanguageModel
from sca.language_models.hf import HfLanguageModel

SETTINGS = {
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
def folder(lm_folder, tmp_path):
    """Copies a tiny language model, with fields added to one of its files."""

    def copy(file="generation_config.json", **fields):
        path = shutil.copytree(lm_folder("gpt2"), tmp_path / "lm", dirs_exist_ok=True) / file
        path.write_text(json.dumps(json.loads((lm_folder("gpt2") / file).read_text()) | fields))
        return str(path.parent)

    return copy


def draw_prefix():
    return torch.randn(3, 4, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def expected(lm_folder):
    """What a model without any settings generates, by the number of beams."""
    model = HfLanguageModel(str(lm_folder("gpt2")))
    return {beams: model.generate(draw_prefix(), 6, beams) for beams in (1, 2)}


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.slow
def test_generation_ignores_a_setting_of_a_hub_model(folder, expected, name):
    generated = HfLanguageModel(folder(**{name: SETTINGS[name]})).generate(draw_prefix(), 6)
    assert torch.equal(generated.sequences, expected[1].sequences)
    assert torch.equal(generated.scores, expected[1].scores)


@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
@pytest.mark.parametrize("beams", [1, 2])
def test_generation_ignores_all_settings_of_a_hub_model(folder, expected, file, beams):
    generated = HfLanguageModel(folder(file, **SETTINGS)).generate(draw_prefix(), 6, beams)
    assert torch.equal(generated.sequences, expected[beams].sequences)
    assert torch.equal(generated.scores, expected[beams].scores)


def test_generation_ignores_settings_of_a_model_in_memory(folder, expected):
    model = HfLanguageModel(folder()).model
    model.generation_config = GenerationConfig(repetition_penalty=1.8, max_time=1e-4, eos_token_id=2, pad_token_id=0)
    generated = CausalLanguageModel(model, None).generate(draw_prefix(), 6)
    assert torch.equal(generated.sequences, expected[1].sequences)


def test_ids_of_the_end_and_of_padding_are_those_of_generation_config(folder):
    prefix = draw_prefix()
    free = HfLanguageModel(folder()).generate(prefix, 12).sequences[0, 0].tolist()
    model = HfLanguageModel(folder(eos_token_id=[96, free[3]], pad_token_id=7))
    end = free.index(free[3])
    assert model.generate(prefix, 12).sequences[0, 0].tolist()[: end + 1] == free[: end + 1]
    assert model.pad_token_id == 7
    assert set(model.generate(prefix, 12).sequences[0, 0].tolist()[end + 1 :]) <= {7}


@pytest.mark.parametrize("value", ["a", -1, 1.5, [2, "a"], True])
def test_an_id_that_is_no_number_is_refused_in_one_line(folder, value):
    with pytest.raises(InputError, match=r"eos_token_id in .*generation_config.json is .*; give the id of a token"):
        HfLanguageModel(folder(eos_token_id=value))


def test_probe_runs_once_per_configuration_and_changes_no_random_numbers(folder, monkeypatch):
    runs, examine = [], model_inspection._examine_model
    monkeypatch.setattr(model_inspection, "_examine_model", lambda model: runs.append(model) or examine(model))
    monkeypatch.setattr(model_inspection, "_structures", {})
    model = HfLanguageModel(folder()).model
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    for _ in range(2):
        model_inspection._structures.clear()
        model_inspection.inspect_model(model)
    assert torch.equal(torch.rand(3), expected)
    assert model_inspection.inspect_model(model) == model_inspection.inspect_model(model)
    assert len(runs) == 3
    assert all(sum(each.numel() for each in run.parameters()) < 300_000 for run in runs)


def test_probe_falls_back_on_the_model_itself(folder, monkeypatch):
    model = HfLanguageModel(folder()).model
    expected = model_inspection.inspect_model(model)

    def cannot(_):
        raise KeyError("no such size")

    monkeypatch.setattr(model_inspection, "_structures", {})
    monkeypatch.setattr(model_inspection, "_build_tiny_model", cannot)
    assert model_inspection.inspect_model(model) == expected
    model.config.n_inner = 7
    with pytest.raises(ValueError, match=r"fails on embeddings.*no such size"):
        model_inspection.inspect_model(model.to("meta"))
