"""Fine-tuning a PAM checkpoint with the recipe `pam-finetune`: prompts of tasks, questions and LoRA."""

import json

import pytest
import torch
from pam_tiny import copy_pam_checkpoint
from PIL import Image
from safetensors.torch import load_file, save_file
from sca_registry import RegistryError

import sca
from sca.checkpoints.pam_export import write_pam_checkpoint
from sca.language_models.pam_prompts import TASK_PROMPTS
from sca.model import compute_caption_loss
from sca.training.examples import collate_examples
from sca.training.recipe import Recipe
from sca.training.train import prepare_training, train

pytest.importorskip("datasets", reason="requires the extra data")


@pytest.fixture
def recipe(tmp_path):
    """The recipe on a tiny checkpoint and two records."""
    copy_pam_checkpoint(tmp_path / "pam", with_tokenizer=True)
    Image.new("RGB", (64, 48), (200, 30, 30)).save(tmp_path / "a.png")
    records = [
        {
            "type": "image",
            "image": "a.png",
            "bbox": [4, 4, 30, 20],
            "conversations": [
                {"from": "human", "value": f"<image>\n{TASK_PROMPTS[task]}"},
                {"from": "gpt", "value": answer},
            ],
        }
        for task, answer in (("recognition", "dog"), ("caption", "brown dog"), ("detail", "this dog"))
    ]
    (tmp_path / "pam.json").write_text(json.dumps(records))
    overrides = [
        f"model='{tmp_path / 'pam'}'",
        f"data.pam.file='{tmp_path / 'pam.json'}'",
        *("train.steps=2", "train.batch_size=1", "train.warmup_steps=0", "train.save_steps=2", "train.lora_rank=2"),
        *("train.precision=float32", "train.num_workers=0", "train.max_tokens=8"),
    ]
    return Recipe.read("pam-finetune", overrides)


def test_texts_follow_the_prompts_of_their_tasks(recipe):
    model, mixture, *_ = prepare_training(recipe)
    batch = collate_examples([mixture[0]], 96, embeddings_per_region=model.positions_per_region)
    assert batch.questions.has_question.all()
    prompts = {task: model.encode_task_prompt(task) for task in ("recognition", "caption", "detail")}
    for ids, question in zip(mixture[0].input_ids, mixture[0].questions, strict=True):
        task = {"dog": "recognition", "brown dog": "caption", "this dog": "detail"}[
            model.language_model.tokenizer.decode(ids)
        ]
        assert question == prompts[task]
    assert model(batch).loss.isfinite()


def test_recipe_trains_lora_of_a_checkpoint(recipe, tmp_path):
    train(recipe, tmp_path / "run", quiet=True)
    trained, base = sca.load(tmp_path / "run" / "model"), sca.load(tmp_path / "pam")
    assert trained.spec.lora["rank"] == 2
    assert trained.spec.task_names == base.spec.task_names
    assert any(parameter.any() for name, parameter in trained.named_parameters() if "lora_B" in name)
    assert not torch.equal(trained.mixer.tokens.weight, base.mixer.tokens.weight)
    embeddings = [each.language_model.model.get_input_embeddings().weight for each in (trained, base)]
    assert torch.equal(*embeddings)


def convert_to_bfloat16(folder):
    tensors = load_file(folder / "model.safetensors")
    save_file({name: tensor.bfloat16() for name, tensor in tensors.items()}, folder / "model.safetensors")


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_lora_of_a_bfloat16_checkpoint_trains_in_float32(recipe, tmp_path, precision):
    convert_to_bfloat16(tmp_path / "pam")
    trained = train(recipe, tmp_path / "run", quiet=True, changes=[f"train.precision={precision}"])
    parameters = dict(trained.named_parameters())
    assert {each.dtype for name, each in parameters.items() if "lora_" in name} == {torch.float32}
    assert parameters["language_model.model.model.embed_tokens.weight"].dtype == torch.bfloat16
    assert any(each.any() for name, each in parameters.items() if "lora_B" in name)
    changes = ["train.lora_rank=0", f"model='{tmp_path / 'run' / 'model'}'"]
    resumed, *_ = prepare_training(Recipe.from_dict(recipe.name, recipe.to_dict(), changes))
    assert {each.dtype for name, each in resumed.named_parameters() if "lora_" in name} == {torch.float32}


def test_finetuned_model_can_be_exported_to_the_layout_of_pam(recipe, tmp_path):
    train(recipe, tmp_path / "run", quiet=True)
    write_pam_checkpoint(sca.load(tmp_path / "run" / "model"), tmp_path / "out")
    assert sca.load(tmp_path / "out").spec.lora is None


@pytest.mark.slow
def test_own_data_trains_lora_of_a_checkpoint_of_pam(recipe, tmp_path):
    (tmp_path / "own").mkdir()
    for index in range(6):
        Image.new("RGB", (64, 48), (40 * index, 30, 30)).save(tmp_path / "own" / f"{index}.png")
    lines = [{"image": f"{index}.png", "box": [4, 4, 30, 20], "caption": "brown dog"} for index in range(6)]
    (tmp_path / "own" / "mine.jsonl").write_text("\n".join(map(json.dumps, lines)))
    changes = [
        *(f"model='{tmp_path / 'pam'}'", f"data='{tmp_path / 'own'}'", "train.lora_rank=2", "train.steps=1"),
        *("train.warmup_steps=0", "train.num_processes=1", "train.batch_size=2", "validate.max_images=1"),
    ]
    trained = train(Recipe.read("own-data", changes), tmp_path / "run", quiet=True)
    assert any(parameter.any() for name, parameter in trained.named_parameters() if "lora_B" in name)
    assert sca.load(tmp_path / "run" / "model").spec.tasks == TASK_PROMPTS


def test_recipe_trains_as_pam():
    options = Recipe.read("pam-finetune").train
    assert options.label_smoothing == 0
    assert options.prompt_weights == {"box": 1.0}  # the reader ignores points
    assert (options.max_tokens, options.chunk_size) == (512, 2)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_label_smoothing_of_the_recipe_is_used(recipe, tmp_path, monkeypatch, label_smoothing):
    used = []

    def compute_loss(language_model, states, labels, label_smoothing):
        used.append(label_smoothing)
        return compute_caption_loss(language_model, states, labels, label_smoothing)

    monkeypatch.setattr("sca.model.compute_caption_loss", compute_loss)
    train(recipe, tmp_path / "run", quiet=True, changes=[f"train.label_smoothing={label_smoothing}"])
    assert set(used) == {label_smoothing}


def test_lora_rank_is_for_checkpoints_without_lora(recipe, small_model_table):
    with pytest.raises(RegistryError, match=r"train\.lora_rank adds LoRA to a checkpoint; for a new model, set lora="):
        Recipe.from_dict(
            "mine",
            {"model": small_model_table, "data": {"scenes": {"name": "scenes"}}, "train": {"lora_rank": 2}},
        )
