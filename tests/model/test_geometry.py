"""Geometry in the prefix: the language model receives the box of a region in its whole image, also from crops."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from sca_registry import RegistryError
from sca_registry.contracts import Prompt, PromptBatch
from sca_registry.spec import ModelSpec, ZoomOptions
from torch import nn

import sca
from sca.checkpoints.export import write_published_checkpoint
from sca.inference.engine import Engine
from sca.inference.text_search import index_regions
from sca.inference.zoom import caption_regions
from sca.io.errors import InputError
from sca.nn.geometry import compute_geometry
from sca.plan import plan_model

MODES = ["token", "add"]
WIDE_IMAGE = Image.new("RGB", (200, 100), (90, 120, 60))
PROMPT = Prompt(box=(20, 10, 60, 90))
PROMPT_GEOMETRY = [0.1, 0.1, 0.3, 0.9, 2.0]


def record_geometry(model, monkeypatch):
    """Return the list of all inputs of the geometry embedding."""
    inputs, forward = [], model.geometry.forward

    def record_and_embed(geometry):
        inputs.extend(geometry.tolist())
        return forward(geometry)

    monkeypatch.setattr(model.geometry, "forward", record_and_embed)
    return inputs


@pytest.mark.parametrize("mode", MODES)
def test_geometry_changes_the_prefix_and_no_other_tensor(build_small_model, mode):
    plain, model = build_small_model(), build_small_model(geometry=mode)
    state = model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in plain.state_dict().items())
    queries, task_ids = torch.randn(3, 2, 32), torch.tensor([0, 1, 1])
    geometry = torch.tensor([PROMPT_GEOMETRY, [0.5, 0.5, 1, 1, 1], [0, 0, 0, 0, 1]])
    prefix, plain_prefix = model.build_prefix(queries, task_ids, geometry), plain.build_prefix(queries, task_ids)
    assert plain.prefix_length == plain_prefix.shape[1] == 4
    assert model.prefix_length == prefix.shape[1] == (5 if mode == "token" else 4)
    assert torch.equal(prefix[:, :2], plain_prefix[:, :2])
    if mode == "token":
        assert torch.equal(prefix[:, 3:], plain_prefix[:, 2:])
    else:
        added = prefix[:, 2:] - plain_prefix[:, 2:]
        torch.testing.assert_close(added[:, 0], added[:, 1])
    assert not torch.equal(prefix[0], model.build_prefix(queries, task_ids, geometry.flip(0))[0])


def test_geometry_is_required_by_models_that_use_it(build_small_model):
    model = build_small_model(geometry="token")
    with pytest.raises(ValueError, match="pass the output of compute_geometry"):
        model.build_prefix(torch.randn(1, 2, 32), torch.tensor([0]))
    features = torch.zeros(1, 32, 8, 8)
    prompts = PromptBatch(torch.tensor([0]), boxes=torch.tensor([[1.0, 1, 9, 9]]))
    with pytest.raises(ValueError, match=r"create the prompts with Processor\.group_prompts"):
        model.generate(features, prompts, torch.tensor([1]))
    assert build_small_model().compute_geometry(None, prompts) is None


@pytest.mark.parametrize("resize_mode", ["pad", "stretch"])
def test_geometry_is_a_fraction_of_the_image_for_both_resize_modes(
    build_small_model, small_model_table, monkeypatch, resize_mode
):
    encoder = {**small_model_table["encoder"], "resize_mode": resize_mode}
    model = build_small_model(encoder=encoder, geometry="token")
    inputs = record_geometry(model, monkeypatch)
    Engine(model).caption(WIDE_IMAGE, [PROMPT, Prompt(box=(0, 0, 200, 100))])
    assert inputs == [pytest.approx(PROMPT_GEOMETRY), [0, 0, 1, 1, 2]]


def test_geometry_of_points_without_masks_is_the_box_of_the_foreground_points():
    class Regions:
        boxes = torch.tensor([[8.0, 16, 24, 32], [16, 32, 48, 64]])
        image_size = 64

    points = torch.tensor([[[10.0, 20], [60, 60]], [[16, 32], [48, 8]]])
    prompts = PromptBatch(
        torch.tensor([0, 0]),
        points=points,
        labels=torch.tensor([[1, 0], [0, 0]]),
        image_boxes=torch.tensor([[0.0, 0, 64, 64]]).repeat(2, 1),
        aspect_ratios=torch.ones(2),
    )
    assert compute_geometry(Regions, prompts).tolist() == [[1 / 8, 1 / 4, 3 / 8, 1 / 2, 1], [1 / 4, 1 / 2, 3 / 4, 1, 1]]
    Regions.boxes = None
    expected = [[10 / 64, 20 / 64, 10 / 64, 20 / 64, 1], [1 / 4, 1 / 8, 3 / 4, 1 / 2, 1]]
    assert compute_geometry(Regions, prompts).tolist() == expected


def test_box_of_a_region_with_an_empty_mask_is_that_of_its_prompt(build_small_model, monkeypatch):
    model = build_small_model()
    segment = model.segmenter.forward

    def segment_nothing(*arguments):
        regions = segment(*arguments)
        return replace(regions, masks=regions.masks.clamp(max=-1), boxes=torch.zeros_like(regions.boxes))

    monkeypatch.setattr(model.segmenter, "forward", segment_nothing)
    mask = np.zeros((100, 200), dtype=bool)
    mask[25:50, 50:100] = True
    point = (50, 50, 1)  # (16, 16) in the model input, whose grid has cells of 8 pixels
    prompts = [Prompt(points=(point,)), Prompt(points=(point, (0, 0, 0))), Prompt(mask=mask), Prompt(box=(0, 0, 9, 9))]
    engine = Engine(model)
    chunks = engine.iter_segmented_chunks(engine.encode([WIDE_IMAGE]), [[*prompts, Prompt(mask=mask, points=(point,))]])
    boxes = {index: regions.boxes[row].tolist() for rows, _, regions in chunks for row, index in enumerate(rows)}
    assert boxes[0] == boxes[1] == [12, 12, 20, 20]
    assert boxes[2] == boxes[4] == [16, 8, 32, 16]
    assert boxes[3] == [0, 0, 0, 0]  # the boxes of box prompts are never replaced


def test_geometry_of_a_zoomed_region_refers_to_the_whole_image(build_small_model, monkeypatch):
    model = build_small_model(geometry="token")
    engine = Engine(model)
    image = Image.new("RGB", (640, 320), (90, 120, 60))
    encoded = engine.encode([image])
    prompt = Prompt(box=(560, 40, 580, 60))
    geometry = [560 / 640, 40 / 320, 580 / 640, 60 / 320, 2]
    for zoom in (None, ZoomOptions(max_cells=4.0)):
        inputs = record_geometry(model, monkeypatch)
        caption_regions(engine, encoded, [[prompt]], zoom=zoom)
        assert inputs == [pytest.approx(geometry, abs=1e-5)]
        monkeypatch.undo()


def test_geometry_reaches_training_generation_and_search(build_small_model, monkeypatch):
    model = build_small_model(geometry="add")
    assert sum(p.numel() for p in model.group_parameters()["projection"]) > sum(
        p.numel() for p in model.projection.parameters()
    )
    engine = Engine(model)
    inputs = record_geometry(model, monkeypatch)
    index = index_regions(engine, engine.encode([WIDE_IMAGE]), [[PROMPT]])
    assert index.score_texts(["a circle"]).shape == (1, 1)
    assert inputs == [pytest.approx(PROMPT_GEOMETRY), [0, 0, 1, 1, 1]]


@pytest.mark.parametrize("mode", MODES)
def test_checkpoint_restores_geometry(build_small_model, tmp_path, mode):
    model = build_small_model(geometry=mode)
    nn.init.normal_(model.geometry.layers[2].bias)
    sca.save(model, tmp_path / "model")
    assert json.loads((tmp_path / "model" / "spec.json").read_text())["geometry"] == mode
    expected = Engine(model).caption(WIDE_IMAGE, [PROMPT])
    assert Engine(sca.load(tmp_path / "model")).caption(WIDE_IMAGE, [PROMPT]) == expected


def test_plan_counts_geometry(build_small_model):
    plain, spec = build_small_model().spec, build_small_model(geometry="token").spec
    model = sca.build(spec)
    plan, plain_plan = plan_model(spec, regions_per_image=2), plan_model(plain, regions_per_image=2)
    assert plan.parameters["projection"] == sum(p.numel() for p in model.group_parameters()["projection"])
    assert plan.flops["prefill"] > plain_plan.flops["prefill"]
    assert plan_model(spec, regions_per_image=2, training=True).parameters == plan.parameters


def test_spec_rejects_unknown_geometry_and_omits_none(build_small_model):
    table = build_small_model().spec.to_dict()
    assert "geometry" not in table
    assert ModelSpec.from_dict({**table, "geometry": "add"}).to_dict()["geometry"] == "add"
    with pytest.raises(RegistryError, match=r"geometry is 'tokens'.*'token'"):
        ModelSpec.from_dict({**table, "geometry": "tokens"})
    with pytest.raises(RegistryError, match="geometry is True"):
        ModelSpec.from_dict({**table, "geometry": True})


def test_published_layout_rejects_geometry(tmp_path):
    model = sca.compose("sam-vit-b", "query", "gpt2", geometry="token", device="meta")
    with pytest.raises(InputError, match="does not support geometry"):
        write_published_checkpoint(model, tmp_path / "out")
