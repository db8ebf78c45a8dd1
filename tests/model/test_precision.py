"""Precision: int8 layers, the choice of `auto`, and what int8 models refuse."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from sca_registry.spec import ModelSpec
from torch import nn
from transformers.pytorch_utils import Conv1D

import sca
from sca import precision as precisions
from sca.checkpoints.export import write_language_model, write_published_checkpoint
from sca.nn.int8_linear import Int8Linear, has_fast_int8
from sca.plan import plan_model
from sca.precision import check_int8_support, describe_precision, set_precision

SCENE_PATH = Path(__file__).parents[2] / "examples/scene.png"

requires_int8 = pytest.mark.skipif(not has_fast_int8(), reason="this CPU has no AVX-512 VNNI instructions")


@pytest.fixture
def linear():
    torch.manual_seed(0)
    return nn.Linear(96, 40).requires_grad_(False)


@pytest.fixture
def wide_model():
    """Return a model with a wide layer per component, of which those of the segmenter and the projection are kept."""
    torch.manual_seed(0)
    layers = {name: nn.Linear(512, 512) for name in ("encoder", "mixer", "segmenter", "projection")}
    return nn.ModuleDict({**layers, "head": nn.Linear(512, 8)}).requires_grad_(False).eval()


def get_int8_names(model):
    return {name for name, module in model.named_modules() if isinstance(module, Int8Linear)}


@requires_int8
def test_int8_linear_is_close_to_float32(linear):
    inputs = torch.randn(3, 5, 96) * torch.tensor([1.0, 100.0, 1e-4])[:, None, None]
    outputs, expected = Int8Linear(linear.weight, linear.bias)(inputs), linear(inputs)
    assert outputs.shape == expected.shape
    errors = (outputs - expected).flatten(1).norm(dim=1) / (expected - linear.bias).flatten(1).norm(dim=1)
    assert errors.max() < 0.02  # at every scale of the inputs, which have scales of their own


@requires_int8
def test_int8_linear_reads_transposed_weights():
    layer = Conv1D(40, 96).requires_grad_(False)
    layer.weight.normal_()
    inputs = torch.randn(4, 96)
    outputs = precisions._convert_layer(layer)(inputs)
    assert (outputs - layer(inputs)).norm() < 0.02 * layer(inputs).norm()


@requires_int8
def test_int8_linear_row_does_not_depend_on_other_rows(linear):
    inputs = torch.randn(600, 96)
    inputs[300] *= 1000
    layer = Int8Linear(linear.weight, linear.bias)
    together = layer(inputs)
    assert torch.equal(together[5:7], layer(inputs[5:7]))
    assert torch.equal(together[599:], layer(inputs[599:]))


@requires_int8
def test_int8_linear_propagates_nan_and_maps_zeros_to_the_bias(linear):
    inputs = torch.zeros(2, 96)
    inputs[1, 3] = torch.nan
    outputs = Int8Linear(linear.weight, linear.bias)(inputs)
    assert torch.equal(outputs[0], linear.bias)
    assert outputs[1].isnan().all()
    assert Int8Linear(linear.weight, None)(inputs[:0]).shape == (0, 40)


@requires_int8
def test_int8_linear_dequantizes_its_weight(linear):
    layer = Int8Linear(linear.weight, linear.bias)
    assert (layer.weight - linear.weight).abs().max() <= linear.weight.abs().max() / 127 / 2 * 1.001
    assert layer.state_dict()["weight"].dtype == torch.int8


@requires_int8
def test_int8_linear_rejects_gradients(linear):
    layer = Int8Linear(linear.weight, linear.bias)
    with pytest.raises(RuntimeError, match="int8 layers have no gradients; load the model with precision=float32"):
        layer(torch.randn(2, 96, requires_grad=True))


@requires_int8
def test_int8_converts_wide_layers_except_sensitive_ones(wide_model):
    set_precision(wide_model, "int8")
    assert get_int8_names(wide_model) == {"encoder", "mixer"}
    assert describe_precision(wide_model) == "int8 (2 linear layers), float32"


@requires_int8
def test_int8_rejects_models_without_wide_layers():
    with pytest.raises(ValueError, match=r"no linear layer with at least 384 inputs.*use precision=float32"):
        sca.load("sca-tiny", precision="int8")


def test_int8_rejects_other_devices_and_cpus(monkeypatch):
    with pytest.raises(ValueError, match="int8 is supported on a CPU only, and the device is cuda; use precision="):
        check_int8_support(torch.device("cuda"))
    monkeypatch.setattr(precisions, "has_fast_int8", lambda: False)
    with pytest.raises(ValueError, match=r"int8 requires a CPU with AVX-512 VNNI.*use precision=float32"):
        check_int8_support(torch.device("cpu"))


@requires_int8
def test_auto_converts_all_wide_layers_if_int8_is_faster(wide_model, monkeypatch):
    monkeypatch.setattr(precisions, "_measure_speedup", lambda layers: 2.0)
    set_precision(wide_model, "auto")
    assert get_int8_names(wide_model) == {"encoder", "mixer"}


@pytest.mark.parametrize("is_supported", [False, True])
def test_auto_keeps_float32_where_nothing_is_gained(wide_model, monkeypatch, is_supported):
    monkeypatch.setattr(precisions, "has_fast_int8", lambda: is_supported)
    monkeypatch.setattr(precisions, "_measure_speedup", lambda layers: 1.1)
    wide_model["mixer"].bfloat16()  # as stored
    set_precision(wide_model, "auto")
    assert describe_precision(wide_model) == "float32"


def test_auto_measures_one_layer_of_each_of_the_largest_shapes(monkeypatch):
    monkeypatch.setattr(precisions, "PROBE_SHAPES", 2)
    layers = [nn.Linear(8, 8), nn.Linear(4, 4), nn.Linear(5, 6), nn.Linear(5, 6), nn.Linear(5, 6)]
    assert [*map(precisions._get_shape, precisions._select_largest_layers(layers))] == [(5, 6), (8, 8)]


@requires_int8
def test_auto_stops_measuring_in_time(wide_model, monkeypatch):
    times = iter([0.0, 0.0, 0.0, 0.0, 0.1, 0.4, 0.5, 9.0])  # start, warm-up, one round, and the end
    monkeypatch.setattr(precisions, "time", SimpleNamespace(perf_counter=lambda: next(times)))
    assert precisions._measure_speedup([wide_model["encoder"]]) == pytest.approx(1.0)
    assert next(times, None) is None


@requires_int8
def test_int8_layers_are_called_and_not_read(int8_model, monkeypatch):
    called = set()
    for name, module in int8_model.named_modules():
        if isinstance(module, Int8Linear):
            module.register_forward_hook(lambda module, inputs, output, name=name: called.add(name))
    monkeypatch.setattr(Int8Linear, "weight", property(lambda layer: pytest.fail("weights are read")))
    predictor = sca.Predictor(int8_model)
    predictor.set_image(Image.open(SCENE_PATH))
    predictor.predict(boxes=[(186, 357, 323, 500)])
    assert called == get_int8_names(int8_model)


@pytest.fixture
def int8_model():
    model = sca.load("sca-tiny")
    set_precision(model, "int8", min_width=1)
    return model


@requires_int8
def test_int8_model_captions_like_float32(int8_model):
    image, box = Image.open(SCENE_PATH), (186, 357, 323, 500)
    captions = []
    for model in (sca.load("sca-tiny"), int8_model):
        predictor = sca.Predictor(model)
        predictor.set_image(image)
        captions += predictor.predict(boxes=[box])
    assert captions[0].text == captions[1].text
    assert captions[0].score == pytest.approx(captions[1].score, rel=0.1)
    assert captions[0].score != captions[1].score


@requires_int8
def test_int8_model_cannot_be_saved_or_exported(int8_model, tmp_path):
    for write in (sca.save, write_published_checkpoint, write_language_model):
        with pytest.raises(ValueError, match=r"a model with int8 layers cannot be (saved|exported); load it with"):
            write(int8_model, tmp_path / "model")
    assert not (tmp_path / "model").exists()


@requires_int8
def test_precision_is_part_of_evaluation_runs(int8_model):
    runs = [
        sca.evaluate(model, "scenes", "test", max_images=1, metrics=["class"]).run
        for model in (sca.load("sca-tiny"), int8_model)
    ]
    assert runs[0]["precision"] == "float32"
    assert runs[1]["precision"] == "int8 (18 linear layers), float32"
    assert runs[0]["weights_hash"] != runs[1]["weights_hash"]
    json.dumps(runs)


@pytest.mark.slow
def test_plan_of_int8_counts_a_byte_per_weight_of_wide_layers():
    spec = ModelSpec.parse("sam-vit-b+query+gpt2")
    plans = [plan_model(spec, regions_per_image=2, precision=name) for name in ("float32", "int8")]
    model = sca.build(spec, "meta")
    num_weights = sum(layer.weight.numel() for _, layer in precisions._iter_wide_layers(model, 384))
    head = model.language_model.model.lm_head.weight.numel()  # the embeddings share its float32 weights, which stay
    saved_bytes = plans[0].memory["prefill"] - plans[1].memory["prefill"]
    assert saved_bytes == pytest.approx(3 * num_weights - 4 * head, rel=0.01)
    assert plans[1].flops == plans[0].flops
    assert plans[1].precision == "int8"


@pytest.mark.parametrize(
    ("precision", "training", "message"),
    [
        ("auto", False, "the precision auto depends on the machine; plan one of float32, bfloat16, float16, int8"),
        ("int8", True, "int8 layers have no gradients; plan training with precision float32"),
        ("int3", False, "unknown precision 'int3'"),
    ],
)
def test_plan_rejects_precisions(precision, training, message):
    with pytest.raises(ValueError, match=message):
        plan_model(ModelSpec.parse("tiny-sam+query+tiny-gpt2"), precision=precision, training=training)
