"""Fine-tuning a PAM checkpoint with the recipe `pam-finetune`: prompts of tasks, questions and LoRA."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from sca_registry import RegistryError
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import sca
from sca.language_models.pam_prompts import TASK_PROMPTS
from sca.training.examples import collate_examples
from sca.training.recipe import Recipe
from sca.training.train import prepare_training, train

pytest.importorskip("datasets", reason="requires the extra data")

GOLDEN_FOLDER = Path(__file__).resolve().parents[1] / "data" / "golden" / "pam-tiny"
TOKENS = ["system", "user", "assistant", "this", "subject", "dog", "brown", "<|im_start|>", "<|im_end|>"]


@pytest.fixture
def recipe(tmp_path):
    """The recipe on a tiny checkpoint and two records."""
    shutil.copytree(GOLDEN_FOLDER, tmp_path / "pam")
    tokens = [*(f"w{index}" for index in range(97 - len(TOKENS))), *TOKENS]
    tokenizer = Tokenizer(models.WordLevel({token: index for index, token in enumerate(tokens)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", additional_special_tokens=["<|im_start|>"]
    ).save_pretrained(tmp_path / "pam")
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


def test_lora_rank_is_for_checkpoints_without_lora(recipe, small_model_table):
    with pytest.raises(RegistryError, match=r"train\.lora_rank adds LoRA to a checkpoint; for a new model, set lora="):
        Recipe.from_dict(
            "mine",
            {"model": small_model_table, "data": {"scenes": {"name": "scenes"}}, "train": {"lora_rank": 2}},
        )
