"""What is planned without weights is what a run really takes."""

import pytest
import torch
from safetensors.torch import load_file
from sca_registry.contracts import Batch, Prompts, Targets
from sca_registry.spec import ModelSpec
from tiny import tiny
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import sca
from sca.plan import plan
from sca.predictor import REGIONS

WORDS = 6
LM = {"name": "hf", "pretrained": False}
MODELS = {
    "tiny": {
        "encoder": {"name": "tiny-vit", "size": 64, "width": 32, "depth": 1, "channels": 32, "stem": [8, 16]},
        "mixer": {"name": "query", "depth": 1, "mlp": 64, "heads": 4},
        "language_model": {**LM, "config": tiny("gpt2")},
    },
    "middle": {
        "encoder": {"name": "tiny-vit", "size": 192, "width": 192, "depth": 4, "channels": 128, "stem": [32, 64]},
        "mixer": {"name": "query", "depth": 3},
        "language_model": {**LM, "config": {**tiny("llama"), "hidden_size": 256, "vocab_size": 4000}},
        "lora": 4,
    },
    "without a grid": {
        "encoder": {"name": "tiny-vit", "size": 128, "width": 96, "channels": 64, "stem": [16, 32]},
        "segmenter": "box",
        "mixer": {"name": "resampler", "depth": 2},
        "language_model": {**LM, "config": {**tiny("opt"), "hidden_size": 128, "word_embed_proj_dim": 128}},
    },
}


def spec_of(name):
    return ModelSpec.from_dict(MODELS[name])


def asked(model, images, regions):
    size = model.encoder.image.size
    corner = torch.rand(images * regions, 2) * size / 2
    owner = torch.arange(images).repeat_interleave(regions)
    prompts = Prompts(owner, boxes=torch.cat((corner, corner + size / 3), dim=1))
    return torch.randn(images, 3, size, size), prompts


@torch.no_grad()
def answer(model, pixels, prompts):
    """As `Predictor` goes about it; no word ends a text early."""
    features = model.encode(pixels)
    prefixes = []
    for chunk in prompts.chunks(REGIONS):
        regions = model.segment(features, chunk)
        prefixes.append(model.prefix(model.mix(regions, model.prepare(regions)), torch.zeros_like(chunk.owner)))
        del regions
    model.language_model._ends = lambda: (0, [])
    return model.language_model.generate(torch.cat(prefixes), max_new_tokens=WORDS)


def lesson(model, pixels, prompts):
    rows = len(prompts)
    ids = torch.ones(rows, WORDS, dtype=torch.long)
    batch = Batch(prompts=prompts, task=torch.zeros(rows, dtype=torch.long), pixels=pixels, ids=ids, mask=ids)
    if hasattr(model.segmenter, "loss"):
        side = 4 * pixels.shape[-1] // model.encoder.stride
        truth = torch.rand(rows, side, side)
        batch.targets = Targets(truth, torch.ones_like(truth, dtype=torch.bool), torch.ones(rows, dtype=torch.bool))
    model.train()
    model(batch).loss.backward()


def most_allocated(work):
    """The most bytes at once that torch's own allocator gave out for some work."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        work()
    now = most = 0
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


@pytest.mark.parametrize("name", MODELS)
def test_parameters_are_exact_and_operations_are_those_of_torchs_counter(name):
    planned = plan(spec_of(name), images=2, regions=5, words=WORDS)
    model = sca.build(spec_of(name))
    assert sum(planned.parameters.values()) == sum(p.numel() for p in model.parameters())
    assert planned.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    pixels, prompts = asked(model, 2, 5)
    with FlopCounterMode(display=False) as counter:
        answer(model, pixels, prompts)
    assert sum(planned.flops.values()) == pytest.approx(counter.get_total_flops(), rel=0.05)
    taught = plan(spec_of(name), images=2, regions=5, words=WORDS, train=True)
    with FlopCounterMode(display=False) as counter:
        lesson(model, pixels, prompts)
    assert sum(taught.flops.values()) == pytest.approx(counter.get_total_flops(), rel=0.05)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("images", "regions"), [(1, 3), (2, 40)])
def test_memory_is_what_a_run_takes(name, images, regions):
    planned = plan(spec_of(name), images, regions, WORDS)
    model = sca.build(spec_of(name))
    weights = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    pixels, prompts = asked(model, images, regions)
    given = pixels.numel() * 4
    used = weights + given + most_allocated(lambda: answer(model, pixels, prompts))
    assert planned.peak == pytest.approx(used, rel=0.15)


@pytest.mark.parametrize("name", MODELS)
def test_memory_of_training_is_what_a_step_takes(name):
    planned = plan(spec_of(name), 2, 6, WORDS, train=True)
    model = sca.build(spec_of(name))
    weights = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    optimiser = 2 * 4 * planned.trainable
    pixels, prompts = asked(model, 2, 6)
    used = weights + optimiser + pixels.numel() * 4 + most_allocated(lambda: lesson(model, pixels, prompts))
    assert planned.peak == pytest.approx(used, rel=0.15)


def test_the_most_regions_that_fit_do_fit_and_more_do_not():
    small = plan(spec_of("middle"), regions=8, words=WORDS, gpu=0.15, train=True)
    assert small.fits
    assert small.most_regions > 8
    assert plan(spec_of("middle"), regions=small.most_regions, words=WORDS, gpu=0.15, train=True).fits
    assert not plan(spec_of("middle"), regions=small.most_regions + 2, words=WORDS, gpu=0.15, train=True).fits
    none = plan(spec_of("middle"), words=WORDS, gpu=0.01)
    assert (none.fits, none.most_regions) == (False, 0)


def test_weights_that_lie_elsewhere_are_no_part_of_a_checkpoint(sam_folder, lm_folder, tmp_path):
    table = {
        "encoder": {"name": "sam", "weights": str(sam_folder)},
        "mixer": {"name": "query", "depth": 1, "mlp": 64, "heads": 4},
        "language_model": {"name": "hf", "weights": str(lm_folder("gpt2"))},
    }
    spec = ModelSpec.from_dict(table)
    planned = plan(spec, regions=2, words=3)
    written = sca.save(sca.build(spec), tmp_path / "model") / "weights.safetensors"
    assert planned.checkpoint == sum(tensor.nbytes for tensor in load_file(written).values())
    assert planned.disk > planned.checkpoint


def test_half_precision_takes_half_the_memory():
    whole, half = (plan(spec_of("middle"), regions=4, dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    assert half.memory["encode"] == pytest.approx(whole.memory["encode"] / 2, rel=0.05)
    assert half.disk == whole.disk  # as it is fetched


def test_the_command_line_tells_what_fits_and_reaches_for_nothing(capsys, monkeypatch):
    import json

    from sca import cli

    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert cli.run(["plan", "sam-vit-b+query+gpt2", "lora=4", "--gpu", "a100-80", "--regions", "4", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["parameters"]["mixer"] == 19_088_512
    assert told["fits"] is True
    assert told["most_regions"] > 4
    assert cli.run(["plan", "sca-tiny", "--gpu", "24"]) == 0
    assert "this fits; up to" in capsys.readouterr().out
    for wrong, told in (
        (["plan", "sca-tny"], "Did you mean 'sca-tiny'"),
        (["plan", "sca-tiny", "--gpu", "h20"], "Did you mean 'h200'"),
        (["plan", "sca-tiny", "--gpu", "-3"], "more than 0"),
        (["plan", "sca-tiny", "--dtype", "int8"], "no dtype 'int8'"),
        (["plan", "tiny-vit+qury+gpt2"], "Did you mean 'query'"),
        (["plan", "sca-gpt2-large-vg"], "plan its parts"),
    ):
        assert cli.run(wrong) == 2
        assert told in capsys.readouterr().err
