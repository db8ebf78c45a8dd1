"""Plans: estimates without weights equal the requirements of a real run."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from sca_bench.plan_accuracy import compare_plan
from sca_registry.spec import ModelSpec
from tiny import TINY_SAM_CONFIG, make_tiny_config

import sca
from sca.cli.plan import print_plan
from sca.nn.two_way_transformer import TwoWayTransformer
from sca.plan import (
    USABLE_MEMORY_FRACTION,
    _compute_layer_signature,
    _find_max_chunk_size,
    _find_max_regions,
    plan_model,
)
from sca.plan_cache import MAX_PLANNED_REGIONS
from sca.stage_costs import StageMeter, make_flop_counter
from sca.testing.tiny import get_tiny_options

pytestmark = pytest.mark.slow

MAX_NEW_TOKENS = 6
HF_LANGUAGE_MODEL = {"name": "hf", "pretrained": False}
TINY_VIT_ENCODER = {"name": "tiny-vit"}
MODEL_TABLES = {
    "tiny": {
        "encoder": {
            **TINY_VIT_ENCODER,
            "image_size": 64,
            "hidden_size": 32,
            "depth": 1,
            "output_channels": 32,
            "stem_channels": [8, 16],
        },
        "mixer": {"name": "query", "depth": 1, "mlp_dim": 64, "num_heads": 4},
        "language_model": {**HF_LANGUAGE_MODEL, "config": make_tiny_config("gpt2")},
    },
    "medium": {
        "encoder": {
            **TINY_VIT_ENCODER,
            "image_size": 192,
            "hidden_size": 192,
            "depth": 4,
            "output_channels": 128,
            "stem_channels": [32, 64],
        },
        "mixer": {"name": "query", "depth": 3},
        "language_model": {
            **HF_LANGUAGE_MODEL,
            "config": {**make_tiny_config("llama"), "hidden_size": 256, "vocab_size": 4000},
        },
        "lora": 4,
    },
    "box-segmenter": {
        "encoder": {
            **TINY_VIT_ENCODER,
            "image_size": 128,
            "hidden_size": 96,
            "output_channels": 64,
            "stem_channels": [16, 32],
        },
        "segmenter": "box",
        "mixer": {"name": "resampler", "depth": 2},
        "language_model": {
            **HF_LANGUAGE_MODEL,
            "config": {**make_tiny_config("opt"), "hidden_size": 128, "word_embed_proj_dim": 128},
        },
    },
}


def build_spec(name):
    return ModelSpec.from_dict(MODEL_TABLES[name])


@pytest.mark.parametrize("name", MODEL_TABLES)
@pytest.mark.parametrize(("num_images", "num_regions"), [(1, 3), pytest.param(2, 40, marks=pytest.mark.all)])
@pytest.mark.parametrize("train", [False, True])
def test_plan_matches_measured_parameters_flops_and_memory(name, num_images, num_regions, train):
    row = compare_plan(build_spec(name), num_images, num_regions, MAX_NEW_TOKENS, train)
    planned, measured = row["parameters"]
    assert planned == measured
    planned, measured = row["flops"]
    assert planned == pytest.approx(measured, rel=0.05)
    planned, measured_bytes = row["memory"]
    assert planned == pytest.approx(measured_bytes, rel=0.15)


@pytest.mark.parametrize("name", MODEL_TABLES)
def test_plan_counts_trainable_parameters(name):
    num_trainable = sum(p.numel() for p in sca.build(build_spec(name)).parameters() if p.requires_grad)
    assert plan_model(build_spec(name), regions_per_image=1, max_new_tokens=1).trainable_parameters == num_trainable


@pytest.mark.all
@pytest.mark.parametrize(("name", "train", "gpu_gib"), [("tiny", True, 0.05), ("medium", False, 0.25)])
def test_plan_most_regions_fits_and_larger_counts_do_not(name, train, gpu_gib):
    plan = plan_model(build_spec(name), regions_per_image=1, max_new_tokens=MAX_NEW_TOKENS, gpu=gpu_gib, training=train)
    most_regions = plan.max_regions_per_image
    assert most_regions > 8
    fitting_plan, larger_plan = (
        plan_model(
            build_spec(name), regions_per_image=num_regions, max_new_tokens=MAX_NEW_TOKENS, training=train, on_gpu=True
        )
        for num_regions in (most_regions, most_regions + 2 + most_regions // 50)
    )
    assert fitting_plan.peak_memory <= plan.usable_gpu_memory < larger_plan.peak_memory


@pytest.mark.parametrize("compute_memory", [lambda n: 7 * n, lambda n: 2000 + min(n, 64) * 900 + n, lambda n: n * n])
@pytest.mark.parametrize("max_regions", [1, 2, 8, 63, 1000, 16000])
def test_find_max_regions_is_within_two_percent_in_at_most_20_probes(compute_memory, max_regions):
    probed_counts = []
    found_regions = _find_max_regions(
        lambda number: probed_counts.append(number) or compute_memory(number), compute_memory(max_regions)
    )
    assert 0.98 * max_regions <= found_regions <= max_regions
    assert len(probed_counts) <= 20


def test_find_max_regions_returns_zero_if_none_fit_and_none_if_all_fit():
    assert _find_max_regions(lambda number: number, 0) == 0
    assert _find_max_regions(lambda number: number, MAX_PLANNED_REGIONS) is None


def test_plan_reports_zero_regions_on_a_too_small_gpu():
    plan = plan_model(build_spec("medium"), max_new_tokens=MAX_NEW_TOKENS, gpu=0.01)
    assert (plan.fits_gpu, plan.max_regions_per_image) == (False, 0)


@pytest.mark.parametrize(
    "mixer",
    ["query", "split", "mask-tokens", "semantic-perceiver", "resampler", "roi-query", "roi-pool", "masked-pool"],
)
def test_plan_matches_measured_flops_and_memory_for_every_mixer(mixer):
    table = {**MODEL_TABLES["tiny"], "mixer": mixer, "segmenter": "sam"}
    for train, max_new_tokens in ((False, 1), (False, 2), (True, 1)):
        row = compare_plan(ModelSpec.from_dict(table), 2, 3, max_new_tokens, train)
        assert row["flops"][0] == pytest.approx(row["flops"][1], rel=0.05)
        assert row["memory"][0] == pytest.approx(row["memory"][1], rel=0.15)


def test_flop_counter_counts_in_place_products():
    with make_flop_counter() as counter:
        torch.zeros(2, 3, 4).baddbmm_(torch.ones(2, 3, 5), torch.ones(2, 5, 4))
    assert counter.get_total_flops() == 2 * 2 * 3 * 4 * 5


def test_flop_counter_counts_attention_on_a_cpu():
    heads, queries, keys, width = 4, 64, 48, 32
    query = torch.randn(1, heads, queries, width, requires_grad=True)
    key = torch.randn(1, heads, keys, width, requires_grad=True)
    product = 2 * heads * queries * keys * width  # of one matrix product between queries and keys
    with make_flop_counter() as counter:
        output = torch.nn.functional.scaled_dot_product_attention(query, key, key)
    assert counter.get_total_flops() == 2 * product
    with make_flop_counter() as counter:
        output.sum().backward()
    assert counter.get_total_flops() == 5 * product


@pytest.mark.parametrize(
    ("encoder", "gigaflops"),
    [("sam-vit-b", 972), ("sam-vit-l", 2986), ("sam2.1-hiera-tiny", 291), ("edgetam", 37), ("sam3-tracker", 5613)],
)
def test_plan_counts_the_flops_of_full_size_encoders(encoder, gigaflops):
    plan = plan_model(ModelSpec.parse(f"{encoder}+query+tiny-gpt2"), regions_per_image=1, max_new_tokens=1)
    assert plan.flops["encode"] == pytest.approx(gigaflops * 1e9, rel=0.05)


@pytest.mark.parametrize("encoder", ["sam2.1-hiera-tiny", "edgetam", "sam3-tracker", "sam-hq-vit-b"])
def test_plan_matches_measured_flops_of_other_segmenters_within_one_percent(encoder):
    table = {**MODEL_TABLES["tiny"], "encoder": {"name": encoder, **get_tiny_options("encoder", encoder)}}
    for train in (False, True):
        row = compare_plan(ModelSpec.from_dict(table), 2, 3, 2, train)
        assert row["flops"][0] == pytest.approx(row["flops"][1], rel=0.01)


def test_plan_matches_measured_flops_and_memory_of_several_chunks():
    row = compare_plan(build_spec("tiny"), 2, 100, MAX_NEW_TOKENS)
    assert row["flops"][0] == pytest.approx(row["flops"][1], rel=0.05)
    assert row["memory"][0] == pytest.approx(row["memory"][1], rel=0.15)


SAM_MODEL_TABLE = {
    "encoder": {"name": "sam", "pretrained": False, "config": TINY_SAM_CONFIG},
    "mixer": {"name": "query", "depth": 2, "num_heads": 4, "mlp_dim": 48},
    "language_model": {**HF_LANGUAGE_MODEL, "config": make_tiny_config("llama")},
}


@pytest.mark.parametrize("name", [*MODEL_TABLES, "sam"])
def test_plan_counts_identical_layers_once_with_equal_result(name, monkeypatch):
    spec = ModelSpec.from_dict({**MODEL_TABLES, "sam": SAM_MODEL_TABLE}[name])
    monkeypatch.setattr(TwoWayTransformer, "max_elements_per_chunk", 1)  # a step for each region
    plan_model(spec, regions_per_image=1, max_new_tokens=1)  # the probe of a language model is run once
    calls = []
    linear = torch.nn.functional.linear
    monkeypatch.setattr(torch.nn.functional, "linear", lambda *args: calls.append(1) or linear(*args))
    plan = plan_model(spec, regions_per_image=5, max_new_tokens=MAX_NEW_TOKENS)
    num_fast_calls = len(calls)
    monkeypatch.setattr(StageMeter, "count_once", lambda self, run, *_: run)
    assert plan_model(spec, regions_per_image=5, max_new_tokens=MAX_NEW_TOKENS) == plan
    assert num_fast_calls < 0.8 * (len(calls) - num_fast_calls)


def test_layer_signature_changes_with_layer_options():
    def make_layer(dilations, activation=torch.relu):
        module = torch.nn.Linear(2, 2)
        module.dilations, module.activation = dilations, activation
        return module

    shared_dilations = [1]
    assert _compute_layer_signature(make_layer(shared_dilations)) == _compute_layer_signature(
        make_layer(shared_dilations)
    )
    assert _compute_layer_signature(make_layer([1])) != _compute_layer_signature(make_layer([1, 2]))
    assert _compute_layer_signature(make_layer(shared_dilations)) != _compute_layer_signature(
        make_layer(shared_dilations, torch.tanh)
    )


def test_plan_checkpoint_size_excludes_external_weights(sam_folder, save_language_model, tmp_path):
    table = {
        "encoder": {"name": "sam", "weights": str(sam_folder)},
        "mixer": {"name": "query", "depth": 1, "mlp_dim": 64, "num_heads": 4},
        "language_model": {"name": "hf", "weights": str(save_language_model("gpt2"))},
    }
    spec = ModelSpec.from_dict(table)
    planned = plan_model(spec, regions_per_image=2, max_new_tokens=3)
    weights_file = sca.save(sca.build(spec), tmp_path / "model") / "weights.safetensors"
    assert planned.checkpoint_bytes == sum(tensor.nbytes for tensor in load_file(weights_file).values())
    assert planned.weight_bytes > planned.checkpoint_bytes


def test_plan_weights_are_in_float32_for_a_model_built_in_another_dtype():
    language_model = MODEL_TABLES["tiny"]["language_model"]
    table = {**MODEL_TABLES["tiny"], "language_model": {**language_model, "dtype": "bfloat16"}}
    plans = [plan_model(ModelSpec.from_dict(each), 1, 2, 3) for each in (MODEL_TABLES["tiny"], table)]
    assert plans[0].weight_bytes == plans[1].weight_bytes


def test_plan_in_bfloat16_halves_encode_memory():
    float32_plan, bfloat16_plan = (
        plan_model(build_spec("medium"), regions_per_image=4, precision=precision)
        for precision in ("float32", "bfloat16")
    )
    assert bfloat16_plan.memory["encode"] == pytest.approx(float32_plan.memory["encode"] / 2, rel=0.05)
    assert bfloat16_plan.weight_bytes == float32_plan.weight_bytes  # in float32 both


def test_plan_command_reports_what_fits_without_network_access(capsys, monkeypatch):
    import json

    from sca import cli

    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert (
        cli.run_command(["plan", "sam-vit-b+query+gpt2", "lora=4", "--gpu", "t4", "--regions-per-image", "4", "--json"])
        == 0
    )
    report = json.loads(capsys.readouterr().out)
    assert report["parameters"]["mixer"] == 19_088_512
    assert report["fits_gpu"] is True
    assert (
        report["max_regions_per_image"] is None
    )  # regions are computed in chunks and generated in pieces, so any number fits
    assert cli.run_command(["plan", "sca-tiny", "--gpu", "24", "--regions", "2"]) == 0
    assert "the workload fits; maximum regions per image: at least 16,384" in capsys.readouterr().out
    for arguments, message in (
        (["plan", "sca-tny"], "Did you mean 'sca-tiny'"),
        (["plan", "sca-tiny", "--gpu", "h20"], "Did you mean 'h200'"),
        (["plan", "sca-tiny", "--gpu", "-3"], "a number above 0"),
        (["plan", "sca-tiny", "--gpu", "inf"], "expected a name"),
        (["plan", "sca-tiny", "--precision", "int3"], "unknown precision 'int3'. Did you mean 'int8'?"),
        (["plan", "tiny-vit+qury+gpt2"], "Did you mean 'query'"),
        (["plan", "sca-gpt2-large-vg"], "name its components instead"),
    ):
        assert cli.run_command(arguments) == 2
        assert message in capsys.readouterr().err


def test_plan_supports_inference_of_fully_trainable_models(small_model_table):
    assert (
        plan_model(ModelSpec.from_dict(small_model_table), regions_per_image=2, max_new_tokens=3).flops["segment"] > 0
    )


@pytest.mark.slow
def test_plan_counts_the_second_captions_of_zoom():
    options = {"batch_size": 2, "regions_per_image": 4, "max_new_tokens": 3, "zoom_crops": 2}
    once, twice = (
        plan_model(replace(build_spec("tiny"), zoom={"keep_best_caption": keeps_best}), **options)
        for keeps_best in (False, True)
    )
    captioning_flops = sum(flops for stage, flops in once.flops.items() if stage not in ("encode", "zoom"))
    assert twice.flops["zoom"] - once.flops["zoom"] == captioning_flops // 2
    assert twice.memory == once.memory


@pytest.mark.slow
def test_plan_counts_the_crops_of_zoom():
    options = {"batch_size": 2, "regions_per_image": 2, "max_new_tokens": 1}
    plain, zoomed = (plan_model(build_spec("tiny"), zoom_crops=count, **options) for count in (0, 10))
    assert "zoom" not in plain.flops
    assert {stage: flops for stage, flops in zoomed.flops.items() if stage != "zoom"} == plain.flops
    assert zoomed.flops["zoom"] == 10 * plain.flops["encode"]
    assert zoomed.memory["zoom"] > plain.memory["encode"]
    with pytest.raises(ValueError, match="zoom_crops is 1, but training has no zoom; omit zoom_crops"):
        plan_model(build_spec("tiny"), training=True, zoom_crops=1)


@pytest.mark.slow
def test_plan_of_a_training_step_in_chunks_needs_less_memory_and_more_flops():
    options = {"regions_per_image": 12, "max_new_tokens": MAX_NEW_TOKENS, "training": True}
    whole, chunked = (plan_model(build_spec("tiny"), chunk_size=size, **options) for size in (0, 2))
    assert chunked.peak_memory < whole.peak_memory
    assert chunked.flops["backward"] > whole.flops["backward"]  # activations are recomputed
    with pytest.raises(ValueError, match="chunk_size is 4, but captioning has no gradients; omit it"):
        plan_model(build_spec("tiny"), chunk_size=4)


@pytest.mark.all
def test_plan_finds_the_largest_chunk_size_with_which_a_training_step_fits():
    options = {"regions_per_image": 40, "max_new_tokens": MAX_NEW_TOKENS, "training": True}
    fours, eights = (plan_model(build_spec("tiny"), chunk_size=size, **options).peak_memory for size in (4, 8))
    gpu_gib = (fours + eights) / 2 / 2**30 / USABLE_MEMORY_FRACTION
    assert plan_model(build_spec("tiny"), gpu=gpu_gib, **options).max_chunk_size == 4
    assert plan_model(build_spec("tiny"), gpu=gpu_gib, chunk_size=4, **options).max_chunk_size is None


@pytest.mark.parametrize(("memory_budget", "expected_size"), [(9, 0), (10, 1), (39, 2), (40, 4), (10_000, 32)])
def test_find_max_chunk_size_is_a_power_of_two_below_the_number_of_regions(memory_budget, expected_size):
    assert _find_max_chunk_size(lambda size: 10 * size, 40, memory_budget) == expected_size


@pytest.mark.parametrize(
    ("max_chunk_size", "text"),
    [(8, "; it fits with train.chunk_size=8"), (0, "; no train.chunk_size fits"), (None, "")],
)
def test_plan_command_prints_the_chunk_size_that_fits(capsys, max_chunk_size, text):
    plan = plan_model(build_spec("tiny"), regions_per_image=1, max_new_tokens=1, gpu=24)
    print_plan(replace(plan, max_chunk_size=max_chunk_size))
    assert capsys.readouterr().out.endswith(f"maximum regions per image: at least 16,384{text}\n")
