"""Quantized language models with torchao and bitsandbytes: captions, checkpoints, LoRA, precision and memory."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

import sca
from sca.checkpoints.export import write_language_model
from sca.checkpoints.portable import write_portable_checkpoint
from sca.language_models.quantization import QUANTIZATIONS
from sca.nn.quantized_layers import iter_quantized_layers, list_inner_tensors
from sca.plan import plan_model
from sca.precision import describe_precision, set_precision
from sca.training.recipe import Recipe
from sca.training.train import train

pytest.importorskip("torchao")
pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.all

ROOT = Path(__file__).resolve().parents[2]
TOKENIZER = ROOT / "sca/bundled/sca-tiny/tokenizer"
SIZES = {"vocab_size": 726, "bos_token_id": 0, "eos_token_id": 0}
CONFIGS = {
    "llama": {
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        **SIZES,
    },
    "gpt2": {"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, **SIZES},
}
CASES = [("llama", "int4"), ("llama", "int8"), ("llama", "nf4"), ("gpt2", "nf4")]
TRAINABLE_CASES = [case for case in CASES if QUANTIZATIONS[case[1]].has_gradients]
RELATIVE_ERRORS = {"int4": 0.12, "nf4": 0.12, "int8": 0.01}  # limits, of logits of random models
RECIPE = {
    "data": {"scenes": {"name": "scenes", "num_images": 8, "image_size": 64}},
    "train": {"steps": 4, "batch_size": 2, "warmup_steps": 0, "learning_rate": 1e-2, "save_steps": 2},
}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Folders of random language models by family."""
    folders = {}
    for family, config in CONFIGS.items():
        torch.manual_seed(0)
        folders[family] = tmp_path_factory.mktemp(family)
        AutoModelForCausalLM.from_config(AutoConfig.for_model(**config)).save_pretrained(folders[family])
    return folders


@pytest.fixture
def make_table(small_model_table, weights):
    """Function that returns the table [model] of a small model with a language model of a family."""

    def make(family, quantization, **fields):
        language_model = {"name": "hf", "weights": str(weights[family]), "tokenizer": str(TOKENIZER)}
        if quantization:
            language_model["quantization"] = quantization
        trainable = ["mixer", "projection", "task_tokens", *(["lora"] if "lora" in fields else [])]
        return {**small_model_table, "language_model": language_model, "trainable": trainable, **fields}

    return make


@pytest.fixture
def build_model(make_table):
    def build(family, quantization, **fields):
        torch.manual_seed(0)
        return sca.compose(**make_table(family, quantization, **fields))

    return build


def compute_logits(model, inputs):
    language_model = model.language_model
    with torch.no_grad():
        return language_model.lm_head(language_model.hidden_states(inputs, torch.ones(inputs.shape[:2])))


def caption_scene(model, scene):
    predictor = sca.Predictor(model)
    predictor.set_image(scene.image)
    captions = predictor.predict(boxes=[region.box for region in scene.regions])
    return [(caption.text, caption.score) for caption in captions]


def list_weight_tensors(layer):
    """Return all tensors of a quantized weight."""
    state = getattr(layer.weight, "quant_state", None)
    if state is None:
        return list_inner_tensors(layer.weight)
    return [layer.weight, state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]


@pytest.mark.parametrize(("family", "quantization"), CASES)
def test_quantized_model_is_close_to_the_full_one(build_model, family, quantization):
    model, full_model = build_model(family, quantization), build_model(family, None)
    inputs = torch.randn(2, 6, 64, generator=torch.Generator().manual_seed(0)) / 10
    expected = compute_logits(full_model, inputs)
    error = (compute_logits(model, inputs) - expected).norm() / expected.norm()
    assert 0 < error < RELATIVE_ERRORS[quantization]
    num_layers = len(list(iter_quantized_layers(model)))
    assert num_layers == {"llama": 14, "gpt2": 8}[family]
    assert describe_precision(model) == f"{quantization} weights ({num_layers} linear layers), float32"
    assert model.summarize_parameters() == full_model.summarize_parameters()


@pytest.mark.parametrize(("family", "quantization"), CASES)
def test_quantized_region_does_not_depend_on_other_regions(build_model, family, quantization):
    model = build_model(family, quantization)
    inputs = torch.randn(3, 6, 64, generator=torch.Generator().manual_seed(0))
    inputs[1] *= 100
    alone = compute_logits(model, inputs[:1])
    torch.testing.assert_close(compute_logits(model, inputs)[:1], alone, rtol=1e-4, atol=1e-4 * alone.abs().max())


@pytest.mark.parametrize(("family", "quantization"), CASES)
def test_plan_counts_the_bytes_that_quantized_weights_take(make_table, family, quantization):
    table = make_table(family, quantization)
    model = sca.compose(**table)
    layers = [layer for _, layer in iter_quantized_layers(model)]
    num_bytes = sum(each.numel() * each.element_size() for layer in layers for each in list_weight_tensors(layer))
    assert plan_model(model.spec, regions_per_image=1, max_new_tokens=2).quantized_bytes == num_bytes


@pytest.mark.parametrize(("family", "quantization"), CASES)
def test_quantized_checkpoint_stores_no_base_weights_and_captions_the_same(
    build_model, scene, tmp_path, family, quantization
):
    model = build_model(family, quantization)
    sca.save(model, tmp_path / "model")
    stored = load_file(tmp_path / "model/weights.safetensors")
    assert not [name for name in stored if name.startswith("language_model")]
    origin = json.loads((tmp_path / "model/origin.json").read_text())["components"]["language_model"]
    assert origin["quantization"]["name"] == quantization
    assert origin["quantization"]["library"] == QUANTIZATIONS[quantization].library
    loaded = sca.load(tmp_path / "model", allow_external=True)
    assert loaded.language_model.quantization == quantization
    assert caption_scene(loaded, scene) == caption_scene(model, scene)
    write_portable_checkpoint(model, tmp_path / "portable")
    portable = sca.load(tmp_path / "portable")
    inputs = torch.randn(2, 6, 64)
    assert torch.equal(compute_logits(portable, inputs), compute_logits(model, inputs))


@pytest.mark.parametrize(("family", "quantization"), CASES)
def test_quantized_model_changes_its_precision(build_model, family, quantization):
    model = build_model(family, quantization)
    inputs = torch.randn(2, 6, 64, generator=torch.Generator().manual_seed(0)) / 10
    expected = compute_logits(model, inputs)
    for precision, tolerance in (("bfloat16", 0.03), ("float32", 1e-2), ("auto", 1e-2)):
        set_precision(model, precision)
        logits = compute_logits(model, inputs)
        compute_dtypes = {getattr(layer, "compute_dtype", logits.dtype) for _, layer in iter_quantized_layers(model)}
        assert compute_dtypes == {logits.dtype}
        assert logits.dtype == (torch.bfloat16 if precision == "bfloat16" else torch.float32)
        assert (logits - expected).norm() < tolerance * expected.norm()
    with pytest.raises(ValueError, match="int8 does not support models with quantized weights; use precision=float32"):
        set_precision(model, "int8")


def test_quantized_model_is_not_exported_with_full_weights(build_model, tmp_path):
    with pytest.raises(ValueError, match="a model with quantized weights cannot be exported, except in the layout por"):
        write_language_model(build_model("llama", "int8"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_quantization_rejects_layers_of_gpt2_in_int8(build_model):
    with pytest.raises(ValueError, match=r"does not support the layer transformer.h.0.attn.c_attn, which is a Conv1D"):
        build_model("gpt2", "int8")


def test_int4_rejects_training(make_table, tmp_path):
    recipe = Recipe.from_dict("quantized", {**RECIPE, "model": make_table("llama", "int4", lora=2)})
    with pytest.raises(ValueError, match="int4 weights have no gradients"):
        train(recipe, tmp_path / "run", quiet=True)


def read_base_weights(model):
    return [tensor.clone() for _, layer in iter_quantized_layers(model.eval()) for tensor in list_weight_tensors(layer)]


@pytest.mark.parametrize(("family", "quantization"), TRAINABLE_CASES)
def test_lora_trains_on_quantized_weights_which_stay(make_table, tmp_path, family, quantization):
    recipe = Recipe.from_dict("quantized", {**RECIPE, "model": make_table(family, quantization, lora=2)})
    base_weights = read_base_weights(sca.build(recipe.model))
    train(recipe, tmp_path / "run", quiet=True, stop_step=2)
    trained = train(recipe, tmp_path / "run", quiet=True)  # resumes
    assert any(each.any() for name, each in trained.named_parameters() if "lora_B" in name)
    assert all(torch.equal(*pair) for pair in zip(read_base_weights(trained), base_weights, strict=True))
    stored = load_file(tmp_path / "run/model/weights.safetensors")
    language_model_names = [name for name in stored if name.startswith("language_model")]
    assert language_model_names
    assert all("lora_" in name for name in language_model_names)
    loaded = sca.load(tmp_path / "run/model", allow_external=True)
    inputs = torch.randn(2, 6, 64)
    assert torch.equal(compute_logits(loaded, inputs), compute_logits(trained.eval(), inputs))
    uninterrupted = train(recipe, tmp_path / "whole", quiet=True)
    assert torch.equal(compute_logits(uninterrupted.eval(), inputs), compute_logits(trained, inputs))


@pytest.mark.parametrize(("quantization", "fsdp"), [("int8", "false"), ("nf4", "true")])
def test_quantized_model_trains_in_two_processes(make_table, tmp_path, quantization, fsdp):
    table = make_table("llama", quantization, lora=2)
    settings = [f"{key} = {json.dumps(value)}".replace('": ', '" = ') for key, value in table.items()]
    data = ["[data.scenes]", 'name = "scenes"', "num_images = 8", "image_size = 64"]
    recipe = ["[model]", *settings, *data, "[train]", "steps = 2", "batch_size = 2"]
    (tmp_path / "recipe.toml").write_text("\n".join(recipe))
    options = ["--out", "run", "train.num_processes=2", f"train.fsdp={fsdp}"]
    command = [sys.executable, "-m", "sca", "train", "recipe.toml", *options]
    trained = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=600)
    assert trained.returncode == 0, trained.stderr
    assert sca.load(tmp_path / "run/model", allow_external=True).language_model.quantization == quantization


def test_commands_do_not_show_warnings_of_the_libraries(build_model, scene, tmp_path):
    sca.save(build_model("llama", "int8"), tmp_path / "model")
    scene.image.save(tmp_path / "scene.png")
    command = [sys.executable, "-m", "sca", "caption", "scene.png", "--box", "8,8,40,40", "--model", "./model"]
    captioned = subprocess.run([*command, "--allow-external"], capture_output=True, text=True, cwd=tmp_path)
    assert captioned.returncode == 0, captioned.stderr
    assert "torchao" not in captioned.stderr
    assert "_pytree" not in captioned.stderr


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_int8_layers_keep_no_dequantized_weights_for_the_backward_pass(build_model, precision):
    (_, layer), *_ = iter_quantized_layers(build_model("llama", "int8"))
    inputs = torch.randn(3, 64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    saved_shapes = []
    autocast = torch.autocast("cpu", getattr(torch, precision), enabled=precision != "float32")
    with (
        torch.autograd.graph.saved_tensors_hooks(
            lambda each: saved_shapes.append(each.shape) or each, lambda each: each
        ),
        autocast,
    ):
        outputs = layer(inputs)
    outputs.square().sum().backward()
    assert (64, 64) not in saved_shapes
    expected_inputs = inputs.detach().requires_grad_()
    (expected_inputs @ layer.weight.dequantize().T).square().sum().backward()
    tolerance = 1e-4 if precision == "float32" else 0.05
    assert (inputs.grad - expected_inputs.grad).norm() < tolerance * expected_inputs.grad.norm()
