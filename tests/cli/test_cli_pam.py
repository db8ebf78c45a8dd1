"""Commands on a checkpoint in PAM's layout: captions of its tasks, facts, plans and export."""

import json
import shutil
import warnings
from pathlib import Path

import pytest
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

GOLDEN_FOLDER = Path(__file__).resolve().parents[1] / "data" / "golden" / "pam-tiny"
TOKENS = ["system", "user", "assistant", "this", "subject", ".", "label", "<|im_start|>", "<|im_end|>"]


@pytest.fixture
def pam_folder(working_folder):
    """A copy of the golden checkpoint with a tokenizer."""
    shutil.copytree(GOLDEN_FOLDER, working_folder / "pam")
    vocabulary = [*(f"w{index}" for index in range(97 - len(TOKENS))), *TOKENS]
    tokenizer = Tokenizer(models.WordLevel({token: index for index, token in enumerate(vocabulary)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", additional_special_tokens=["<|im_start|>"]
    ).save_pretrained(working_folder / "pam")
    return "./pam"


def test_caption_generates_the_text_of_a_task_of_pam(run_sca, write_image, pam_folder):
    arguments = ("caption", write_image("a.png"), "--box", "4,4,40,40", "--model", pam_folder, "--max-new-tokens", 8)
    texts = {}
    for task in ("explain", "caption"):
        result = run_sca(*arguments, "--task", task, "--out", "-")
        assert result.status == 0, result.err
        (line,) = result.out.splitlines()
        texts[task] = json.loads(line)
    assert texts["explain"]["caption"]
    assert texts["explain"]["mask"]
    result = run_sca(*arguments, "--task", "translate")
    assert result.status == 2
    assert "Choose from: recognition, caption, explain, detail, recognition-zh" in result.err[-1]


def test_export_to_the_layout_of_pam_keeps_tensors(run_sca, pam_folder, working_folder):
    result = run_sca("export", pam_folder, "out", "--layout", "pam")
    assert result.err == ["sca: wrote out"]
    original, exported = (load_file(working_folder / each / "model.safetensors") for each in ("pam", "out"))
    assert all(exported[name].equal(original[name]) for name in exported)
    facts = dict(line.split(":", 1) for line in run_sca("show", "model", "./out").out.splitlines())
    assert facts["layout"].strip() == "pam"


def test_import_adds_a_tokenizer_to_a_checkpoint_of_pam(run_sca, pam_folder, working_folder):
    shutil.copytree(GOLDEN_FOLDER, working_folder / "without")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = run_sca("import", "./without", "native", "--tokenizer", pam_folder)
    assert result.status == 0, result.err
    assert (working_folder / "native" / "tokenizer" / "tokenizer.json").is_file()


def test_show_model_prints_the_tasks_and_terms_of_pam(run_sca):
    facts = dict(line.split(":", 1) for line in run_sca("show", "model", "pam-3b").out.splitlines())
    assert "explain, detail" in facts["tasks"]
    assert "forbids commercial use" in facts["terms"]


def test_plan_reads_the_sizes_of_a_folder(run_sca, pam_folder):
    result = run_sca("plan", pam_folder, "--regions-per-image", 2, "--max-new-tokens", 2, "--json")
    assert result.status == 0, result.err
    assert json.loads(result.out)["parameters"]["mixer"] > 0


@pytest.mark.slow
def test_plan_counts_the_positions_of_pam(run_sca):
    result = run_sca("plan", "pam-1.5b", "--regions-per-image", 1, "--json")
    assert result.status == 0, result.err
    plan = json.loads(result.out)
    num_parameters = plan["parameters"]["language_model"] - 151_936 * 1536  # without the embeddings
    assert plan["flops"]["prefill"] == pytest.approx(2 * num_parameters * 1071, rel=0.1)
