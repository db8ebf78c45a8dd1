"""Commands on a checkpoint in PAM's layout: captions of its tasks, facts, plans and export."""

import json
import warnings

import pytest
from pam_tiny import copy_pam_checkpoint
from safetensors.torch import load_file

from sca.language_models.pam_prompts import PROMPT_TEMPLATE, TASK_PROMPTS
from sca.model import CHARACTERS_PER_TOKEN


@pytest.fixture
def pam_folder(working_folder):
    """A copy of the golden checkpoint with a tokenizer."""
    copy_pam_checkpoint(working_folder / "pam", with_tokenizer=True)
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
    assert texts["explain"]["caption"] != texts["caption"]["caption"]
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


def test_show_model_prints_the_components_and_tasks_of_a_folder(run_sca, pam_folder):
    facts = dict(line.split(":", 1) for line in run_sca("show", "model", pam_folder).out.splitlines())
    assert facts["mixer"].strip().startswith("semantic-perceiver(num_queries=5, ")
    assert facts["segmenter"].strip() == "sam2(single_mask=True)"
    assert facts["tasks"].strip().startswith("recognition, caption, explain, detail, recognition-zh")


@pytest.mark.slow
def test_warning_of_a_checkpoint_is_one_line(start_sca, write_image, working_folder):
    copy_pam_checkpoint(working_folder / "pam")
    arguments = ("caption", write_image("a.png"), "--box", "4,4,40,40", "--model", "./pam")
    _, error = start_sca(*arguments).communicate()
    warning, problem = error.splitlines()
    assert warning == "sca: pam has no tokenizer, so captions are lists of token ids without text; add tokenizer.json"
    assert problem.startswith("sca: the language model has no tokenizer")


def test_import_adds_a_tokenizer_to_a_checkpoint_of_pam(run_sca, pam_folder, working_folder):
    copy_pam_checkpoint(working_folder / "without")
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
    positions = 1042 + (len(TASK_PROMPTS["caption"]) + len(PROMPT_TEMPLATE)) // CHARACTERS_PER_TOKEN
    attention = 4 * positions**2 * 1536 * 28  # scores and their product with the values, in 28 layers
    assert plan["flops"]["prefill"] == pytest.approx(2 * num_parameters * positions + attention, rel=0.01)
