"""What is planned without weights is what a run really takes."""

import pytest
import torch
from safetensors.torch import load_file
from sca_bench.plan_accuracy import compare_plan
from sca_registry.spec import ModelSpec
from tiny import SAM, tiny

import sca
from sca.nn.two_way_transformer import TwoWayTransformer
from sca.plan import _compute_layer_signature, _find_max_regions, plan_model
from sca.plan_cache import MAX_PLANNED_REGIONS
from sca.stage_costs import StageMeter

pytestmark = pytest.mark.slow

WORDS = 6
LM = {"name": "hf", "pretrained": False}
TINY_VIT = {"name": "tiny-vit"}
MODELS = {
    "tiny": {
        "encoder": {
            **TINY_VIT,
            "image_size": 64,
            "hidden_size": 32,
            "depth": 1,
            "output_channels": 32,
            "stem_channels": [8, 16],
        },
        "mixer": {"name": "query", "depth": 1, "mlp_dim": 64, "num_heads": 4},
        "language_model": {**LM, "config": tiny("gpt2")},
    },
    "middle": {
        "encoder": {
            **TINY_VIT,
            "image_size": 192,
            "hidden_size": 192,
            "depth": 4,
            "output_channels": 128,
            "stem_channels": [32, 64],
        },
        "mixer": {"name": "query", "depth": 3},
        "language_model": {**LM, "config": {**tiny("llama"), "hidden_size": 256, "vocab_size": 4000}},
        "lora": 4,
    },
    "without a grid": {
        "encoder": {**TINY_VIT, "image_size": 128, "hidden_size": 96, "output_channels": 64, "stem_channels": [16, 32]},
        "segmenter": "box",
        "mixer": {"name": "resampler", "depth": 2},
        "language_model": {**LM, "config": {**tiny("opt"), "hidden_size": 128, "word_embed_proj_dim": 128}},
    },
}


def spec_of(name):
    return ModelSpec.from_dict(MODELS[name])


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("images", "regions"), [(1, 3), pytest.param(2, 40, marks=pytest.mark.all)])
@pytest.mark.parametrize("train", [False, True])
def test_parameters_operations_and_memory_are_those_of_a_run(name, images, regions, train):
    row = compare_plan(spec_of(name), images, regions, WORDS, train)
    planned, counted = row["parameters"]
    assert planned == counted
    planned, counted = row["flops"]
    assert planned == pytest.approx(counted, rel=0.05)
    planned, used = row["memory"]
    assert planned == pytest.approx(used, rel=0.15)


@pytest.mark.parametrize("name", MODELS)
def test_what_trains_is_counted(name):
    trained = sum(p.numel() for p in sca.build(spec_of(name)).parameters() if p.requires_grad)
    assert plan_model(spec_of(name), regions_per_image=1, max_new_tokens=1).trainable_parameters == trained


@pytest.mark.all
@pytest.mark.parametrize(("name", "train", "room"), [("tiny", True, 0.05), ("middle", False, 0.25)])
def test_the_most_regions_that_fit_do_fit_and_more_do_not(name, train, room):
    found = plan_model(spec_of(name), regions_per_image=1, max_new_tokens=WORDS, gpu=room, training=train)
    most = found.max_regions_per_image
    assert most > 8
    fitting, larger = (
        plan_model(spec_of(name), regions_per_image=number, max_new_tokens=WORDS, training=train, on_gpu=True)
        for number in (most, most + 2 + most // 50)
    )
    assert fitting.peak_memory <= found.usable_gpu_memory < larger.peak_memory


@pytest.mark.parametrize("memory", [lambda n: 7 * n, lambda n: 2000 + min(n, 64) * 900 + n, lambda n: n * n])
@pytest.mark.parametrize("most", [1, 2, 8, 63, 1000, 16000])
def test_the_search_for_the_most_regions_is_exact_to_two_percent_and_short(memory, most):
    asked = []
    found = _find_max_regions(lambda number: asked.append(number) or memory(number), memory(most))
    assert 0.98 * most <= found <= most
    assert len(asked) <= 20


def test_the_search_for_the_most_regions_ends_at_once_if_none_or_all_fit():
    assert _find_max_regions(lambda number: number, 0) == 0
    assert _find_max_regions(lambda number: number, MAX_PLANNED_REGIONS) is None


def test_a_gpu_that_is_too_small_holds_no_region():
    none = plan_model(spec_of("middle"), max_new_tokens=WORDS, gpu=0.01)
    assert (none.fits_gpu, none.max_regions_per_image) == (False, 0)


@pytest.mark.parametrize("mixer", ["query", "split", "mask-tokens", "resampler", "roi-pool", "masked-pool"])
def test_every_mixer_can_be_planned(mixer):
    table = {**MODELS["tiny"], "mixer": mixer, "segmenter": "sam"}
    for train, words in ((False, 1), (False, 2), (True, 1)):
        row = compare_plan(ModelSpec.from_dict(table), 2, 3, words, train)
        assert row["flops"][0] == pytest.approx(row["flops"][1], rel=0.05)
        assert row["memory"][0] == pytest.approx(row["memory"][1], rel=0.15)


def test_chunks_beyond_the_first_are_counted_without_being_run():
    row = compare_plan(spec_of("tiny"), 2, 100, WORDS)
    assert row["flops"][0] == pytest.approx(row["flops"][1], rel=0.05)
    assert row["memory"][0] == pytest.approx(row["memory"][1], rel=0.15)


SAM_MODEL = {
    "encoder": {"name": "sam", "pretrained": False, "config": SAM},
    "mixer": {"name": "query", "depth": 2, "num_heads": 4, "mlp_dim": 48},
    "language_model": {**LM, "config": tiny("llama")},
}


@pytest.mark.parametrize("name", [*MODELS, "sam"])
def test_alike_layers_and_steps_cost_what_running_each_would(name, monkeypatch):
    spec = ModelSpec.from_dict({**MODELS, "sam": SAM_MODEL}[name])
    monkeypatch.setattr(TwoWayTransformer, "max_elements_per_chunk", 1)  # a step for each region
    plan_model(spec, regions_per_image=1, max_new_tokens=1)  # the probe of a language model is run once
    calls = []
    linear = torch.nn.functional.linear
    monkeypatch.setattr(torch.nn.functional, "linear", lambda *args: calls.append(1) or linear(*args))
    found = plan_model(spec, regions_per_image=5, max_new_tokens=WORDS)
    quick = len(calls)
    monkeypatch.setattr(StageMeter, "count_once", lambda self, run, *_: run)
    assert plan_model(spec, regions_per_image=5, max_new_tokens=WORDS) == found
    assert quick < 0.8 * (len(calls) - quick)


def test_layers_with_other_options_are_not_alike():
    def layer(dilations, activation=torch.relu):
        made = torch.nn.Linear(2, 2)
        made.dilations, made.activation = dilations, activation
        return made

    shared = [1]
    assert _compute_layer_signature(layer(shared)) == _compute_layer_signature(layer(shared))
    assert _compute_layer_signature(layer([1])) != _compute_layer_signature(layer([1, 2]))
    assert _compute_layer_signature(layer(shared)) != _compute_layer_signature(layer(shared, torch.tanh))


def test_weights_that_lie_elsewhere_are_no_part_of_a_checkpoint(sam_folder, lm_folder, tmp_path):
    table = {
        "encoder": {"name": "sam", "weights": str(sam_folder)},
        "mixer": {"name": "query", "depth": 1, "mlp_dim": 64, "num_heads": 4},
        "language_model": {"name": "hf", "weights": str(lm_folder("gpt2"))},
    }
    spec = ModelSpec.from_dict(table)
    planned = plan_model(spec, regions_per_image=2, max_new_tokens=3)
    written = sca.save(sca.build(spec), tmp_path / "model") / "weights.safetensors"
    assert planned.checkpoint_bytes == sum(tensor.nbytes for tensor in load_file(written).values())
    assert planned.weight_bytes > planned.checkpoint_bytes


def test_half_precision_takes_half_the_memory():
    whole, half = (
        plan_model(spec_of("middle"), regions_per_image=4, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)
    )
    assert half.memory["encode"] == pytest.approx(whole.memory["encode"] / 2, rel=0.05)
    assert half.weight_bytes == whole.weight_bytes  # in float32 both


def test_the_command_line_tells_what_fits_and_reaches_for_nothing(capsys, monkeypatch):
    import json

    from sca import cli

    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert (
        cli.run_command(["plan", "sam-vit-b+query+gpt2", "lora=4", "--gpu", "t4", "--regions-per-image", "4", "--json"])
        == 0
    )
    told = json.loads(capsys.readouterr().out)
    assert told["parameters"]["mixer"] == 19_088_512
    assert told["fits_gpu"] is True
    assert (
        told["max_regions_per_image"] is None
    )  # regions are computed in chunks and generated in pieces, so any number fits
    assert cli.run_command(["plan", "sca-tiny", "--gpu", "24"]) == 0
    assert "the workload fits; maximum regions per image: at least 16,384" in capsys.readouterr().out
    for wrong, told in (
        (["plan", "sca-tny"], "Did you mean 'sca-tiny'"),
        (["plan", "sca-tiny", "--gpu", "h20"], "Did you mean 'h200'"),
        (["plan", "sca-tiny", "--gpu", "-3"], "a number above 0"),
        (["plan", "sca-tiny", "--gpu", "inf"], "give a name"),
        (["plan", "sca-tiny", "--dtype", "int8"], "no dtype 'int8'"),
        (["plan", "tiny-vit+qury+gpt2"], "Did you mean 'query'"),
        (["plan", "sca-gpt2-large-vg"], "plan its components"),
    ):
        assert cli.run_command(wrong) == 2
        assert told in capsys.readouterr().err


def test_a_model_whose_parts_all_train_can_be_planned_in_use(small_table):
    assert plan_model(ModelSpec.from_dict(small_table), regions_per_image=2, max_new_tokens=3).flops["segment"] > 0
