"""Quantization of language models without its libraries: what is rejected, and plans."""

import json
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from sca_registry import RegistryError
from sca_registry.spec import ModelSpec
from tool_environment import create_tool_environment

import sca
from sca.checkpoints.trust import is_settable
from sca.io.errors import InputError
from sca.language_models.hf import HfLanguageModel
from sca.language_models.quantization import QUANTIZATIONS, check_quantization
from sca.plan import plan_model

ROOT = Path(__file__).resolve().parents[2]
LLAMA_CONFIG = {
    "model_type": "llama",
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}

NUM_WEIGHTS = 2 * (4 * 64 * 64 + 3 * 64 * 128)  # of the linear layers in two blocks


def make_spec(quantization, **fields):
    language_model = {"name": "hf", "config": LLAMA_CONFIG, "quantization": quantization}
    return ModelSpec.from_dict(
        {"encoder": "tiny-vit", "mixer": "query", "language_model": language_model, "segmenter": "sam", **fields}
    )


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_quantization_names_the_extra_of_a_missing_library(save_language_model, monkeypatch, quantization):
    library = QUANTIZATIONS[quantization].library
    monkeypatch.setitem(sys.modules, library, None)
    message = rf"quantization={quantization} requires {library}; run pip install 'segment-caption-anything\[quant"
    with pytest.raises(InputError, match=message):
        HfLanguageModel(str(save_language_model("llama")), quantization=quantization)


@pytest.mark.parametrize(
    ("quantization", "use", "message"),
    [
        ("int3", {}, r"unknown quantization 'int3'\. Did you mean 'int8'"),
        (4, {}, "unknown quantization 4"),
        ("int4", {"training": True}, "int4 weights have no gradients, .* set language_model.quantization to nf4"),
        ("int4", {"device_type": "cuda"}, "run on a CPU only, and the device is cuda; set language_model.quant"),
        ("nf4", {"precision": "int8"}, "precision int8 does not support a language model with nf4 weights; use"),
    ],
)
def test_check_quantization_rejects_uses(quantization, use, message):
    with pytest.raises(RegistryError, match=message):
        check_quantization(make_spec(quantization), **use)


def test_check_quantization_accepts_training_on_a_gpu_with_nf4_and_int8():
    for quantization in (None, "nf4", "int8"):
        check_quantization(make_spec(quantization), "cuda", "bfloat16", training=True)


def test_build_rejects_training_of_quantized_weights():
    spec = make_spec("nf4", trainable=["mixer", "projection", "task_tokens", "language_model"])
    with pytest.raises(RegistryError, match=r"in nf4 cannot be trained; remove language_model from trainable .* lora="):
        sca.build(spec, "meta")


def test_quantization_is_an_option_of_transformers_models_only():
    with pytest.raises(RegistryError, match=r"tiny-gpt2.* has no option 'quantization'"):
        sca.compose("tiny-vit", "query", {"name": "tiny-gpt2", "quantization": "int8"})


def test_quantization_requires_pretrained_weights():
    with pytest.raises(ValueError, match="random weights cannot be quantized; omit quantization, or set weights"):
        HfLanguageModel(config=LLAMA_CONFIG, quantization="int8")


def test_quantization_rejects_weights_that_are_quantized_already(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama", "quantization_config": {"quant_method": "gptq"}}')
    with pytest.raises(InputError, match=r"is quantized already \(gptq\); omit quantization"):
        HfLanguageModel(str(tmp_path), quantization="int8")


@pytest.mark.parametrize(
    ("config", "quantization", "message"),
    [
        (
            {"model_type": "gpt2"},
            "int8",
            r"layer transformer\.h\.0\.attn\.c_attn, which is a Conv1D layer",
        ),
        ({**LLAMA_CONFIG, "intermediate_size": 48}, "int4", "down_proj, which has 48 inputs, not a multiple of 64"),
    ],
)
def test_quantization_rejects_layers_that_would_stay_in_full_size(config, quantization, message):
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        HfLanguageModel(config=config, quantization=quantization)


def test_quantization_rejects_a_model_that_transformers_did_not_quantize(save_language_model, monkeypatch):
    monkeypatch.setattr("sca.language_models.hf.make_load_options", lambda *_: {})
    with pytest.raises(
        ValueError, match=r"layer model\.layers\.0\.self_attn\.q_proj, which was not quantized by torchao"
    ):
        HfLanguageModel(str(save_language_model("llama")), quantization="int8")


def test_load_rejects_precision_int8_of_a_quantized_checkpoint(build_small_model, tmp_path, monkeypatch):
    sca.save(build_small_model(), tmp_path / "model")
    table = json.loads((tmp_path / "model/spec.json").read_text())
    table["language_model"] = {"name": "gpt2", "quantization": "int4"}
    (tmp_path / "model/spec.json").write_text(json.dumps(table))
    monkeypatch.setattr("sca.checkpoints.load.check_int8_support", lambda device: None)
    with pytest.raises(InputError, match="model: precision int8 does not support a language model with int4 weights"):
        sca.load(tmp_path / "model", precision="int8")


def test_checkpoint_may_set_the_quantization():
    assert is_settable("language_model", "gpt2", "quantization", "nf4")


@pytest.fixture
def plan_llama(small_model_table):
    """Function that plans a small model with LoRA."""

    def plan(quantization, **options):
        language_model = {"name": "hf", "config": LLAMA_CONFIG, "quantization": quantization}
        trainable = ["mixer", "projection", "task_tokens", "lora"]
        table = {**small_model_table, "language_model": language_model, "lora": 2, "trainable": trainable}
        return plan_model(ModelSpec.from_dict(table), regions_per_image=2, max_new_tokens=3, **options)

    return plan


def test_plan_counts_the_bytes_of_quantized_weights(plan_llama):
    plans = {name: plan_llama(name) for name in (None, *QUANTIZATIONS)}
    assert {name: round(8 * plan.quantized_bytes / NUM_WEIGHTS, 2) for name, plan in plans.items()} == {
        None: 0,
        "int4": 4.5,  # a scale and a zero point in bfloat16 per 64 weights
        "nf4": 5.62,  # tables of a kilobyte per layer, which matter in tiny layers only
        "int8": 8.56,
    }
    for name, plan in plans.items():
        assert plan.parameters == plans[None].parameters
        assert plan.flops == plans[None].flops
        saved_bytes = plans[None].memory["encode"] - plan.memory["encode"]
        assert saved_bytes == pytest.approx(4 * NUM_WEIGHTS - plan.quantized_bytes if name else 0, rel=0.03)


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_plan_of_training_keeps_no_dequantized_weights(plan_llama, quantization):
    plans = [plan_llama(name, training=True) for name in (None, quantization)]
    saved_bytes = plans[0].memory["forward"] - plans[1].memory["forward"]
    assert saved_bytes > 0.8 * (4 * NUM_WEIGHTS - plans[1].quantized_bytes)


def test_plan_rejects_int4_for_training_and_gpus(plan_llama):
    with pytest.raises(RegistryError, match="no gradients"):
        plan_llama("int4", training=True)
    with pytest.raises(RegistryError, match="CPU only"):
        plan_llama("int4", gpu=80)


@pytest.mark.slow
def test_plan_command_prints_quantized_bytes(tmp_path):
    command = [sys.executable, "-m", "sca", "plan", "tiny-vit+query+qwen3-0.6b", "language_model.quantization=nf4"]
    printed = subprocess.run(command, capture_output=True, text=True)
    assert printed.returncode == 0, printed.stderr
    assert "nf4 weights" in printed.stdout


@pytest.mark.all
def test_quantized_models_pass_their_tests_with_the_libraries(tmp_path_factory):
    """They are in an environment of their own: with torchao, every import of transformers takes seconds longer."""
    site_packages = sysconfig.get_path("purelib")
    interpreter = create_tool_environment(
        tmp_path_factory.mktemp("quantization"),
        *("torchao", "bitsandbytes"),
        pip_options=("-c", ROOT / "constraints.txt"),
        path_file=f"import site; site.addsitedir({site_packages!r})\n",
    )
    tests = ROOT / "tests/model/test_quantized_models.py"
    command = [interpreter, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "", tests]
    tested = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert tested.returncode == 0, tested.stdout[-5000:]
    assert "skipped" not in tested.stdout
