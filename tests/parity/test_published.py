"""The published layout: read, written back to the bit, and refused where something is wrong with it."""

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
from sca.io.errors import InputError


@pytest.fixture(scope="module")
def composed(sam_folder, lm_folder):
    """Builds a model on a tiny SAM and a tiny language model."""

    def build(family="gpt2", mixer="query", num_heads=4, mlp_dim=48, **fields):
        torch.manual_seed(3)
        return sca.compose(
            {"name": "sam", "weights": str(sam_folder)},
            {"name": mixer, "num_queries": 2, "depth": 1, "num_heads": num_heads, "mlp_dim": mlp_dim},
            {"name": "hf", "weights": str(lm_folder(family))},
            task_tokens=2,
            **fields,
        )

    return build


@pytest.fixture
def published(composed, tmp_path):
    """Writes such a model in the published layout."""

    def write(**parts):
        return write_published_checkpoint(composed(**parts), tmp_path / "published")

    return write


def batch():
    draw = torch.Generator().manual_seed(0)
    return Batch(
        pixel_values=torch.randn(1, 3, 64, 64, generator=draw),
        prompts=PromptBatch(torch.tensor([0, 0]), boxes=torch.tensor([[4.0, 4, 30, 30], [8, 8, 60, 50]])),
        task_ids=torch.tensor([0, 1]),
        input_ids=torch.tensor([[5, 6, 2], [8, 9, 2]]),
        attention_mask=torch.ones(2, 3, dtype=torch.long),
    )


@pytest.mark.parametrize(("family", "mixer"), [("gpt2", "query"), ("llama", "query"), ("opt", "split")])
@torch.no_grad()
def test_a_model_written_and_read_is_the_same(composed, family, mixer, tmp_path):
    model = composed(family, mixer)
    again = sca.load(write_published_checkpoint(model, tmp_path / "published"))
    assert again.spec.mixer.name == mixer
    assert torch.equal(model(batch()).logits, again(batch()).logits)
    assert again.summarize_parameters() == model.summarize_parameters()


@torch.no_grad()
def test_our_own_layout_takes_it_over_whole_or_by_name(published, composed, sam_folder, lm_folder, tmp_path):
    model = sca.load(published())
    expected = model(batch()).logits
    whole = sca.save(model, tmp_path / "whole")
    assert torch.equal(sca.load(whole)(batch()).logits, expected)
    sources = {"encoder": ComponentSpec("sam", {"weights": str(sam_folder)})}
    sources["language_model"] = ComponentSpec("hf", {"weights": str(lm_folder("gpt2"))})
    named = sca.save(attach_sources(model, **sources), tmp_path / "named")
    assert torch.equal(sca.load(named, allow_external=True)(batch()).logits, expected)
    held = load_file(named / "weights.safetensors")
    assert {name.split(".")[0] for name in held} == {"mixer", "projection", "task_tokens"}


def test_a_source_with_other_weights_is_refused(published, lm_folder, tmp_path):
    model = sca.load(published())
    other = tmp_path / "other"
    shutil.copytree(lm_folder("gpt2"), other)
    tensors = load_file(other / "model.safetensors")
    tensors["transformer.ln_f.weight"][0] += 1e-3
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"differ from those of the model: language_model\.model\.transformer\.ln_f"):
        attach_sources(model, language_model=ComponentSpec("hf", {"weights": str(other)}))


@torch.no_grad()
def test_options_of_use_survive_and_lower_precision_is_no_difference(composed, lm_folder, sam_folder):
    model = composed(segmenter={"name": "sam", "box_masks": True})
    assert attach_sources(model, encoder=ComponentSpec("sam", {"weights": str(sam_folder)})).segmenter.box_masks
    half = sca.compose(
        {"name": "sam", "weights": str(sam_folder)},
        {"name": "query", "num_queries": 2, "depth": 1, "num_heads": 4, "mlp_dim": 48},
        {"name": "hf", "weights": str(lm_folder("gpt2")), "dtype": "bfloat16"},
    )
    again = attach_sources(half, language_model=ComponentSpec("hf", {"weights": str(lm_folder("gpt2"))}))
    assert next(again.language_model.parameters()).dtype == torch.bfloat16


def test_a_tokenizer_that_was_given_stays_with_the_checkpoint(composed, tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    from sca.language_models.causal import TextTokenizer

    words = Tokenizer(models.WordLevel({"<end>": 0, "car": 1}, unk_token="<end>"))
    model = composed()
    model.language_model.tokenizer = TextTokenizer(PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>"))
    again = sca.load(sca.save(model, tmp_path / "model"), allow_external=True)
    assert again.language_model.tokenizer.encode("car") == model.language_model.tokenizer.encode("car")
    plain = sca.save(composed(), tmp_path / "plain")
    assert not (plain / "tokenizer").exists()


def test_a_language_model_written_alone_has_its_lora_merged(composed, tmp_path):
    from transformers import AutoModelForCausalLM

    model = composed(lora=2)
    for name, parameter in model.language_model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    ids, mask = torch.tensor([[5, 6, 7]]), torch.ones(1, 3, dtype=torch.long)
    states = model.language_model.hidden_states(model.language_model.embed_tokens(ids), mask)
    folder = write_language_model(model, tmp_path / "lm")
    alone = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.allclose(alone(ids).logits, model.language_model.lm_head(states), atol=1e-5)
    assert not any("lora" in name for name in alone.state_dict())


@pytest.mark.parametrize(
    ("changes", "told"),
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
def test_what_the_published_layout_cannot_hold_is_refused(composed, tmp_path, changes, told):
    with pytest.raises(InputError, match=told):
        write_published_checkpoint(composed(**changes), tmp_path / "published")
    assert not (tmp_path / "published").exists()


# --- what may be wrong with a folder ----------------------------------------------------------------------------------


def in_shards(folder):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, mine in halves.items():
        save_file({name: tensors[name] for name in mine}, folder / file)
    index = {"weight_map": {name: file for file, mine in halves.items() for name in mine}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@torch.no_grad()
def test_shards_and_old_files_are_read_too(published):
    folder = published()
    expected = sca.load(folder)(batch()).logits
    tensors = load_file(folder / "model.safetensors")
    in_shards(folder)
    assert torch.equal(sca.load(folder)(batch()).logits, expected)
    (folder / "model.safetensors.index.json").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    assert torch.equal(sca.load(folder)(batch()).logits, expected)


def without_a_shard(folder):
    in_shards(folder)
    (folder / "b.safetensors").unlink()


def cut(folder):
    os.truncate(folder / "model.safetensors", 5000)


def changed(**figures):
    def damage(folder):
        config = json.loads((folder / "config.json").read_text())
        for part, values in figures.items():
            config[part] = {**config[part], **values} if isinstance(values, dict) else values
        (folder / "config.json").write_text(json.dumps(config))

    return damage


def tensors(change):
    def damage(folder):
        held = load_file(folder / "model.safetensors")
        change(held)
        save_file(held, folder / "model.safetensors")

    return damage


class Code:
    def __reduce__(self):
        return os.system, ("echo this must never run > ran",)


def code(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"weight": Code()}))


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (without_a_shard, "no b.safetensors"),
        (cut, "cannot be read"),
        (code, "contains more than tensors"),
        (lambda folder: (folder / "model.safetensors").unlink(), "neither model.safetensors nor pytorch_model.bin"),
        (lambda folder: (folder / "config.json").write_text('{"model_type": "sca"}'), "not that of a published model"),
        (changed(architectures=["ScaModel"]), "no model is called 'ScaModel'"),
        (changed(mask_caption_decoder_config={"num_caption_heads": 3}), "num_caption_heads is 3, and only 1"),
        (changed(text_config={"n_embd": 64}), r"c_attn\.bias is \(96,\) and the config\.json requires \(192,\)"),
        (tensors(lambda held: held.pop("language_project.bias")), r"missing projection\.0\.bias"),
        (tensors(lambda held: held.update(more=torch.zeros(1))), "unexpected more"),
    ],
    ids=range(10),
)
@pytest.mark.slow
def test_a_broken_folder_is_told_in_one_line(published, damage, told, monkeypatch):
    folder = published()
    damage(folder)
    monkeypatch.chdir(folder)
    with pytest.raises(InputError, match=told) as error:
        sca.load(folder)
    assert "\n" not in str(error.value)
    assert not (folder / "ran").exists()


def test_a_folder_of_another_kind_is_no_model(lm_folder):
    with pytest.raises(InputError, match=r"has no spec\.json"):
        sca.load(lm_folder("gpt2"))


@pytest.mark.parametrize("damage", [cut, code, lambda folder: os.truncate(folder / "config.json", 20)])
def test_broken_pretrained_weights_are_told_in_one_line(lm_folder, tmp_path, damage, monkeypatch):
    from sca.language_models.hf import HfLanguageModel

    folder = tmp_path / "lm"
    shutil.copytree(lm_folder("llama"), folder)
    damage(folder)
    monkeypatch.chdir(folder)
    with pytest.raises(InputError, match=str(folder)) as error:
        HfLanguageModel(str(folder))
    assert "\n" not in str(error.value)
    assert not (folder / "ran").exists()


def test_pretrained_weights_that_lack_a_tensor_are_not_filled_with_random_ones(lm_folder, tmp_path):
    from sca.language_models.hf import HfLanguageModel

    folder = tmp_path / "lm"
    shutil.copytree(lm_folder("llama"), folder)
    tensors(lambda held: held.pop("model.norm.weight"))(folder)
    with pytest.raises(InputError, match=r"it lacks model\.norm\.weight"):
        HfLanguageModel(str(folder))
