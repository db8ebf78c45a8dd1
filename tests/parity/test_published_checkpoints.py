"""The published layout: exact round trip, and errors for damaged folders."""

import json
import os
import pickle
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from sca_registry.contracts import Batch, PromptBatch
from sca_registry.spec import ComponentSpec

import sca
from sca.checkpoints.export import attach_sources, write_language_model, write_published_checkpoint
from sca.checkpoints.inspection import describe_checkpoint
from sca.io.errors import InputError


@pytest.fixture(scope="module")
def compose_model(sam_folder, save_language_model):
    """Function that builds a model with a tiny SAM and a tiny language model."""

    def build(family="gpt2", mixer="query", num_heads=4, mlp_dim=48, **fields):
        torch.manual_seed(3)
        return sca.compose(
            {"name": "sam", "weights": str(sam_folder)},
            {"name": mixer, "num_queries": 2, "depth": 1, "num_heads": num_heads, "mlp_dim": mlp_dim},
            {"name": "hf", "weights": str(save_language_model(family))},
            task_tokens=2,
            **fields,
        )

    return build


@pytest.fixture
def write_published(compose_model, tmp_path):
    """Function that writes such a model in the published layout."""

    def write(**parts):
        return write_published_checkpoint(compose_model(**parts), tmp_path / "published")

    return write


def make_batch():
    generator = torch.Generator().manual_seed(0)
    return Batch(
        pixel_values=torch.randn(1, 3, 64, 64, generator=generator),
        prompts=PromptBatch(torch.tensor([0, 0]), boxes=torch.tensor([[4.0, 4, 30, 30], [8, 8, 60, 50]])),
        task_ids=torch.tensor([0, 1]),
        input_ids=torch.tensor([[5, 6, 2], [8, 9, 2]]),
        attention_mask=torch.ones(2, 3, dtype=torch.long),
    )


@pytest.mark.parametrize(("family", "mixer"), [("gpt2", "query"), ("llama", "query"), ("opt", "split")])
@torch.no_grad()
def test_published_checkpoint_round_trip_has_equal_logits(compose_model, family, mixer, tmp_path):
    model = compose_model(family, mixer)
    reloaded = sca.load(write_published_checkpoint(model, tmp_path / "published"))
    assert reloaded.spec.mixer.name == mixer
    assert torch.equal(model(make_batch()).logits, reloaded(make_batch()).logits)
    assert reloaded.summarize_parameters() == model.summarize_parameters()


def test_describe_checkpoint_returns_the_components_and_tasks_of_a_published_model(write_published):
    folder = write_published()
    facts = describe_checkpoint(folder)
    assert (facts["layout"], facts["use"]) == ("published", f"sca import {folder}")
    assert facts["tasks"] == "recognition, caption"
    assert facts["mixer"].startswith("query(")


@torch.no_grad()
def test_save_stores_a_published_model_with_or_without_pretrained_weights(
    write_published, compose_model, sam_folder, save_language_model, tmp_path
):
    model = sca.load(write_published())
    expected = model(make_batch()).logits
    complete_folder = sca.save(model, tmp_path / "whole")
    assert torch.equal(sca.load(complete_folder)(make_batch()).logits, expected)
    sources = {"encoder": ComponentSpec("sam", {"weights": str(sam_folder)})}
    sources["language_model"] = ComponentSpec("hf", {"weights": str(save_language_model("gpt2"))})
    referencing_folder = sca.save(attach_sources(model, **sources), tmp_path / "named")
    assert torch.equal(sca.load(referencing_folder, allow_external=True)(make_batch()).logits, expected)
    stored_tensors = load_file(referencing_folder / "weights.safetensors")
    assert {name.split(".")[0] for name in stored_tensors} == {"mixer", "projection", "task_tokens"}


def test_attach_sources_rejects_different_weights(write_published, save_language_model, tmp_path):
    model = sca.load(write_published())
    other_folder = tmp_path / "other"
    shutil.copytree(save_language_model("gpt2"), other_folder)
    tensors = load_file(other_folder / "model.safetensors")
    tensors["transformer.ln_f.weight"][0] += 1e-3
    save_file(tensors, other_folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"differ from those of the model: language_model\.model\.transformer\.ln_f"):
        attach_sources(model, language_model=ComponentSpec("hf", {"weights": str(other_folder)}))


@torch.no_grad()
def test_attach_sources_keeps_segmenter_options_and_accepts_bfloat16(compose_model, save_language_model, sam_folder):
    model = compose_model(segmenter={"name": "sam", "box_masks": True})
    assert attach_sources(model, encoder=ComponentSpec("sam", {"weights": str(sam_folder)})).segmenter.box_masks
    half_model = sca.compose(
        {"name": "sam", "weights": str(sam_folder)},
        {"name": "query", "num_queries": 2, "depth": 1, "num_heads": 4, "mlp_dim": 48},
        {"name": "hf", "weights": str(save_language_model("gpt2")), "dtype": "bfloat16"},
    )
    attached_model = attach_sources(
        half_model, language_model=ComponentSpec("hf", {"weights": str(save_language_model("gpt2"))})
    )
    assert next(attached_model.language_model.parameters()).dtype == torch.bfloat16


def test_save_stores_a_replaced_tokenizer(compose_model, tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    from sca.language_models.causal import TextTokenizer

    word_level_tokenizer = Tokenizer(models.WordLevel({"<end>": 0, "car": 1}, unk_token="<end>"))
    model = compose_model()
    model.language_model.tokenizer = TextTokenizer(
        PreTrainedTokenizerFast(tokenizer_object=word_level_tokenizer, eos_token="<end>")
    )
    reloaded = sca.load(sca.save(model, tmp_path / "model"), allow_external=True)
    assert reloaded.language_model.tokenizer.encode("car") == model.language_model.tokenizer.encode("car")
    folder_without_tokenizer = sca.save(compose_model(), tmp_path / "plain")
    assert not (folder_without_tokenizer / "tokenizer").exists()


def test_write_language_model_merges_lora(compose_model, tmp_path):
    from transformers import AutoModelForCausalLM

    model = compose_model(lora=2)
    for name, parameter in model.language_model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    ids, mask = torch.tensor([[5, 6, 7]]), torch.ones(1, 3, dtype=torch.long)
    states = model.language_model.hidden_states(model.language_model.embed_tokens(ids), mask)
    folder = write_language_model(model, tmp_path / "lm")
    exported_model = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.allclose(exported_model(ids).logits, model.language_model.lm_head(states), atol=1e-5)
    assert not any("lora" in name for name in exported_model.state_dict())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora": 2}, "does not support LoRA"),
        ({"projection": "mlp"}, "does not support the projection"),
        ({"mixer": "resampler"}, "does not support the mixer 'resampler'"),
        ({"segmenter": "box"}, r"does not support the tensor segmenter\.frequencies"),
        ({"num_heads": 2}, "a mixer with num_heads=2 and a segmenter with num_heads=4"),
        ({"mlp_dim": 64}, "a mixer with mlp_dim=64 and a segmenter with mlp_dim=48"),
        ({"segmenter": {"name": "sam", "box_masks": True}}, "box masks"),
    ],
)
def test_write_published_checkpoint_rejects_unsupported_models(compose_model, tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        write_published_checkpoint(compose_model(**changes), tmp_path / "published")
    assert not (tmp_path / "published").exists()


# --- damaged folders --------------------------------------------------------------------------------------------------


def split_into_shards(folder):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    names_by_file = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, shard_names in names_by_file.items():
        save_file({name: tensors[name] for name in shard_names}, folder / file)
    index = {"weight_map": {name: file for file, shard_names in names_by_file.items() for name in shard_names}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@torch.no_grad()
def test_load_reads_sharded_and_pytorch_bin_weights(write_published):
    folder = write_published()
    expected = sca.load(folder)(make_batch()).logits
    tensors = load_file(folder / "model.safetensors")
    split_into_shards(folder)
    assert torch.equal(sca.load(folder)(make_batch()).logits, expected)
    (folder / "model.safetensors.index.json").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    assert torch.equal(sca.load(folder)(make_batch()).logits, expected)


def remove_a_shard(folder):
    split_into_shards(folder)
    (folder / "b.safetensors").unlink()


def truncate_weights(folder):
    os.truncate(folder / "model.safetensors", 5000)


def damage_config(**changes):
    def damage_folder(folder):
        config = json.loads((folder / "config.json").read_text())
        for part, values in changes.items():
            config[part] = {**config[part], **values} if isinstance(values, dict) else values
        (folder / "config.json").write_text(json.dumps(config))

    return damage_folder


def damage_tensors(edit_tensors):
    def damage_folder(folder):
        weights = load_file(folder / "model.safetensors")
        edit_tensors(weights)
        save_file(weights, folder / "model.safetensors")

    return damage_folder


class MaliciousPickle:
    def __reduce__(self):
        return os.system, ("echo this must never run > ran",)


def write_malicious_pickle(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"weight": MaliciousPickle()}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove_a_shard, "no b.safetensors"),
        (truncate_weights, "cannot be read"),
        (write_malicious_pickle, "contains more than tensors"),
        (lambda folder: (folder / "model.safetensors").unlink(), "neither model.safetensors nor pytorch_model.bin"),
        (
            lambda folder: (folder / "config.json").write_text('{"model_type": "sca"}'),
            "not the configuration of an original SCA model",
        ),
        (damage_config(architectures=["ScaModel"]), "unknown architecture 'ScaModel'. Choose from: Sca"),
        (
            damage_config(mask_caption_decoder_config={"num_caption_heads": 3}),
            "num_caption_heads is 3, but only 1 is",
        ),
        (damage_config(text_config={"n_embd": 64}), r"c_attn\.bias is \(96,\) and the config\.json requires \(192,\)"),
        (damage_tensors(lambda tensors: tensors.pop("language_project.bias")), r"missing projection\.0\.bias"),
        (damage_tensors(lambda tensors: tensors.update(more=torch.zeros(1))), "unexpected more"),
    ],
    ids=(
        "missing-shard",
        "truncated",
        "pickle",
        "no-weights",
        "other-config",
        "unknown-architecture",
        "several-caption-heads",
        "other-width",
        "missing-tensor",
        "unexpected-tensor",
    ),
)
@pytest.mark.slow
def test_load_rejects_a_damaged_published_folder_in_one_line(write_published, damage, message, monkeypatch):
    folder = write_published()
    damage(folder)
    monkeypatch.chdir(folder)
    with pytest.raises(InputError, match=message) as error:
        sca.load(folder)
    assert "\n" not in str(error.value)
    assert not (folder / "ran").exists()


def test_load_rejects_a_language_model_folder(save_language_model):
    with pytest.raises(InputError, match="has the model type 'gpt2', which is not a promptable segmenter"):
        sca.load(save_language_model("gpt2"))


@pytest.mark.parametrize(
    "damage", [truncate_weights, write_malicious_pickle, lambda folder: os.truncate(folder / "config.json", 20)]
)
def test_language_model_rejects_damaged_weights_in_one_line(save_language_model, tmp_path, damage, monkeypatch):
    from sca.language_models.hf import HfLanguageModel

    folder = tmp_path / "lm"
    shutil.copytree(save_language_model("llama"), folder)
    damage(folder)
    monkeypatch.chdir(folder)
    with pytest.raises(InputError, match=str(folder)) as error:
        HfLanguageModel(str(folder))
    assert "\n" not in str(error.value)
    assert not (folder / "ran").exists()


def test_language_model_rejects_weights_with_a_missing_tensor(save_language_model, tmp_path):
    from sca.language_models.hf import HfLanguageModel

    folder = tmp_path / "lm"
    shutil.copytree(save_language_model("llama"), folder)
    damage_tensors(lambda tensors: tensors.pop("model.norm.weight"))(folder)
    with pytest.raises(InputError, match=r"it lacks model\.norm\.weight"):
        HfLanguageModel(str(folder))
