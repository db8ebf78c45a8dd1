"""What a GPU refuses, and what makes the host wait for it, fails here: see `accelerator` for the simulated device."""

from collections import Counter
from dataclasses import replace
from itertools import count
from types import SimpleNamespace

import numpy as np
import pytest
import sca_registry
import torch
from accelerator import simulated_cuda
from PIL import Image
from sca_registry.contracts import Batch, MaskTargets, Prompt, PromptBatch, SegmenterOutput
from sca_registry.spec import ModelSpec
from tiny import FAMILIES, tiny
from torch import nn

from sca.builder import build
from sca.data.scenes import Scenes
from sca.inference.automatic import caption_everything
from sca.inference.factory import load_captioner
from sca.inference.predictor import Predictor
from sca.mixers.resampler import ResamplerMixer
from sca.nn.masks import pool_under_masks
from sca.nn.roi_align import roi_align
from sca.testing.tiny import get_tiny_options
from sca.training.auxiliary_losses import AttributeValues
from sca.training.feature_cache import FeatureCache
from sca.training.module import TrainingModule

TRAINABLE = ["neck", "mixer", "projection", "task_tokens", "lora", "segmenter"]
MIXERS = {
    "query": {"num_queries": 2, "depth": 1, "num_heads": 4, "mlp_dim": 48, "mask_pooling": True},
    "split": {"num_queries": 2, "depth": 1, "num_heads": 4, "mlp_dim": 48},
    "mask-tokens": {"depth": 1, "num_heads": 4, "mlp_dim": 48},
    "resampler": {"num_queries": 2, "depth": 1, "num_heads": 4, "mlp_dim": 48},
    "roi-pool": {"output_size": 2},
    "masked-pool": {"num_queries": 2, "mlp_dim": 48},
}
NEED_MASKS = ("mask-tokens", "masked-pool")
ENCODERS = ("tiny-vit", "sam", "open-clip", "timm", "clip-rn50", "convnext-b")
PRECISIONS = {"bfloat16": torch.bfloat16, "autocast": torch.float32, "float16": torch.float16, "float32": torch.float32}
OWNER = torch.tensor([0, 0, 1, 1, 1])


def spec_of(encoder="tiny-vit", segmenter="sam", mixer="query", family="gpt2", **fields):
    options = {"depth": 1, "num_heads": 4, "mlp_dim": 48} if segmenter == "sam" else {}
    mixed = {"mask_pooling": False} if mixer == "query" and segmenter == "box" else {}
    table = {
        "encoder": {"name": encoder, **get_tiny_options("encoder", encoder)},
        "segmenter": {"name": segmenter, "hidden_size": 32, **options},
        "mixer": {"name": mixer, **MIXERS[mixer], **mixed},
        "language_model": {"name": "hf", "pretrained": False, "config": tiny(family)},
        "task_tokens": 2,
        "lora": {"rank": 2, "dropout": 0.1},
        "trainable": [name for name in TRAINABLE if segmenter == "sam" or name != "segmenter"],
        "generation": {"max_new_tokens": 4},
    }
    return {**table, **fields}


def built(**fields):
    torch.manual_seed(0)
    return build(ModelSpec.from_dict(spec_of(**fields)))


def prompts_of(size, kind="box"):
    draw = torch.Generator().manual_seed(1)
    corner = torch.rand(len(OWNER), 2, generator=draw) * size / 2
    boxes = torch.cat((corner, corner + size / 4), dim=1)
    points, labels = corner[:, None].expand(-1, 2, -1).contiguous(), torch.tensor([[1, 0]]).expand(len(OWNER), 2)
    return PromptBatch(
        OWNER,
        boxes=boxes if "box" in kind else None,
        points=points if "point" in kind else None,
        labels=labels if "point" in kind else None,
    )


def batch_of(model, regions=None):
    """Two images, five regions or `regions` of the second image, seven texts or one for each of those regions."""
    size, draw = model.encoder.image_format.size, torch.Generator().manual_seed(2)
    prompts = prompts_of(size)
    region = torch.tensor([0, 0, 1, 2, 3, 4, 4])
    if regions is not None:
        prompts, region = prompts[torch.full((regions,), 4)], torch.arange(regions)
    side = 4 * size // model.encoder.stride
    ids = torch.randint(3, 90, (len(region), 3), generator=draw)
    mask = torch.ones_like(ids)
    mask[1::2, 2] = 0
    targets = MaskTargets(
        torch.rand(len(prompts), side, side, generator=draw),
        torch.ones(len(prompts), side, side, dtype=torch.bool),
        torch.arange(len(prompts)) != 1,
    )
    pixels = torch.randn(2, 3, size, size, generator=draw)
    return Batch(prompts, region % 2, pixels, input_ids=ids, attention_mask=mask, region_index=region, targets=targets)


def combinations():
    """Every mixer in every precision, with encoders, segmenters and families in turn; some by `make test`."""
    turn = count()
    for precision in PRECISIONS:
        for mixer in MIXERS:
            number = next(turn)
            encoder = ENCODERS[(number + number // len(ENCODERS)) % len(ENCODERS)]
            segmenter = "box" if number % 2 and mixer not in NEED_MASKS else "sam"
            family = list(FAMILIES)[number % len(FAMILIES)]
            marks = [pytest.mark.all] if precision in ("float16", "float32") else []
            parts = {"encoder": encoder, "segmenter": segmenter, "mixer": mixer, "family": family}
            name = "-".join([*parts.values(), precision])
            yield pytest.param(parts, precision, 2 * (number % 2), id=name, marks=marks)


def built_here(**parts):
    card = sca_registry.encoders.get_card(parts["encoder"])
    if card.extra and sca_registry.encoders.load_entry(parts["encoder"]).state != "ok":
        pytest.skip(f"the extra {card.extra} is not installed")
    return built(**parts)


def test_every_mixer_is_tried_here():
    assert set(sca_registry.mixers.list_names()) == set(MIXERS)


@pytest.mark.parametrize(("parts", "precision", "chunk"), list(combinations()))
@pytest.mark.slow
def test_model_trains_and_generates_on_an_accelerator(parts, precision, chunk):
    model, dtype = built_here(**parts), PRECISIONS[precision]
    batch = batch_of(model)
    with simulated_cuda():
        model.to("cuda", dtype).train()
        batch = batch.to("cuda")
        batch.pixel_values = batch.pixel_values.to(dtype)
        with torch.autocast("cuda", torch.bfloat16, enabled=precision == "autocast"):
            output = model(batch, chunk_size=chunk)
        output.loss.backward()
        assert output.loss.isfinite()
        for group, parameters in model.group_parameters().items():
            gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
            assert gradients or not any(parameter.requires_grad for parameter in parameters), group
            assert all(gradient.device.type == "cuda" for gradient in gradients), group
            assert all(gradient.isfinite().all() for gradient in gradients), group
        with torch.inference_mode():
            found = model.eval().generate(model.encode(batch.pixel_values), batch.prompts, OWNER.to("cuda"))
        assert found.sequences.device.type == found.scores.device.type == "cuda"
        assert found.scores.isfinite().all()


@pytest.mark.parametrize(
    "search", [{"num_beams": 2, "num_captions": 2}, {"do_sample": True, "num_captions": 2, "top_p": 0.9}]
)
def test_search_runs_on_an_accelerator(search):
    model = built()
    with simulated_cuda(), torch.inference_mode():
        language_model = model.to("cuda", torch.bfloat16).language_model
        prefix = torch.randn(3, 4, language_model.hidden_size, device="cuda", dtype=torch.bfloat16)
        found = language_model.generate(prefix, 3, **search)
        assert found.sequences.device.type == "cuda"
        assert found.scores.shape == (3, 2)


@pytest.mark.parametrize("precision", ["bfloat16", "autocast"])
@pytest.mark.parametrize("segmenter", ["sam", "box masks", "box"])
@pytest.mark.slow
def test_segmenter_takes_every_prompt_on_an_accelerator(segmenter, precision):
    part = {"name": "box", "hidden_size": 24}
    if segmenter != "box":
        part = {"name": "sam", "hidden_size": 48, "depth": 1, "num_heads": 4, "mlp_dim": 48}
        part["box_masks"] = segmenter == "box masks"
    model, dtype = built(mixer="split", **{"segmenter": "box"}), PRECISIONS[precision]
    model.segmenter = sca_registry.segmenters.build(part.pop("name"), model.encoder, **part)
    size, side = model.encoder.image_format.size, 4 * model.segmenter.grid_size
    asked = [prompts_of(size, kind) for kind in ("box", "point", "box and point")]
    if segmenter != "box":
        asked += [replace(each, masks=torch.randn(len(OWNER), 1, side, side)) for each in asked[:1]]
        asked += [PromptBatch(OWNER, masks=torch.randn(len(OWNER), 1, side, side))]
    with simulated_cuda(), torch.inference_mode():
        model.to("cuda", dtype)
        features = model.encode(torch.randn(2, 3, size, size).to("cuda", dtype))
        for prompts in asked:
            for multimask in (True, False):
                with torch.autocast("cuda", torch.bfloat16, enabled=precision == "autocast"):
                    regions = model.segment(features, prompts.to("cuda"), multimask)
                assert regions.tokens.device.type == "cuda"
                assert regions.tokens.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("segmenter", "mixer", "family"),
    [(s, m, "gpt2") for s in ("sam", "box") for m in MIXERS if s == "sam" or m not in NEED_MASKS]
    + [("sam", "query", family) for family in FAMILIES if family != "gpt2"],
)
@pytest.mark.slow
def test_model_in_half_precision_is_close_to_float32(segmenter, mixer, family, dtype):
    """On the CPU for real, where most kernels refuse mixed types as well."""
    model = built(segmenter=segmenter, mixer=mixer, family=family).eval()
    batch = batch_of(model)
    batch.targets = None
    with torch.inference_mode():
        exact = model(batch)
        model.to(dtype)
        batch.pixel_values = batch.pixel_values.to(dtype)
        found = model(batch)
        assert found.queries.dtype == dtype
        assert found.logits.isfinite().all()
        likeness = torch.cosine_similarity(found.queries.float().flatten(1), exact.queries.flatten(1))
        assert likeness.min() > 0.99
        assert float(found.loss) == pytest.approx(float(exact.loss), rel=0.01)
        scores = model.generate(model.encode(batch.pixel_values), batch.prompts, batch.prompts.image_index).scores
        assert scores.isfinite().all()


# --- what the host waits for ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def picture():
    draw = np.random.default_rng(0)
    return Image.fromarray(draw.integers(0, 255, (70, 90, 3), dtype=np.uint8))


def boxes(number):
    return [Prompt(box=(x, 3.0, x + 20.0, 40.0)) for x in range(number)]


@pytest.fixture
def pointed(small, picture):
    """Makes a predictor for a model on the device, an image set."""

    def make(**options):
        predictor = Predictor(small().to("cuda"), **options)
        predictor.set_image(picture)
        return predictor

    return make


def test_captions_on_an_accelerator_are_those_of_the_cpu(small, pointed, picture):
    here = Predictor(small())
    here.set_image(picture)
    told, masks = here.predict(boxes(5)), here.segment(boxes(5))
    with simulated_cuda():
        there = pointed()
        found = there.predict(boxes(5))
        assert [caption.text for caption in found] == [caption.text for caption in told]
        assert [caption.mask for caption in found] == [caption.mask for caption in told]
        assert [[mask.rle for mask in each] for each in there.segment(boxes(5))] == [
            [mask.rle for mask in each] for each in masks
        ]


@pytest.mark.parametrize("ask", ["predict", "segment"])
def test_waits_do_not_grow_with_regions(pointed, ask):
    with simulated_cuda() as device:
        predictor = pointed()
        waits = []
        for number in (2, 3, 12):  # the first also prepares what is kept of an image's size
            with device.counted() as found:
                getattr(predictor, ask)(boxes(number))
            waits.append(found)
    assert waits[1] == waits[2]


def test_waits_grow_with_chunks_by_a_few_each(pointed):
    with simulated_cuda() as device:
        predictor, totals = pointed(), []
        for regions in (6, 6, 3, 2):  # the first also prepares what is kept of an image's size
            predictor.engine.regions = regions
            with device.counted() as found:
                predictor.predict(boxes(6))
            totals.append(found.total())
    assert totals[2] - totals[1] == totals[3] - totals[2] <= 4  # owners, which cells are hit, masks, predicted IoU


@pytest.mark.slow
def test_waits_do_not_grow_with_the_masks_of_everything(pointed):
    with simulated_cuda() as device:
        predictor = pointed()
        thresholds = {"pred_iou_thresh": -9.0, "stability_score_thresh": 0.0, "min_area": 0.0, "max_area": 1.0}
        options = replace(predictor.engine.everything, points_per_side=3, **thresholds)
        waits = []
        for nms in (1.0, 1.0, 0.0):
            with device.counted() as found:
                captions = caption_everything(predictor, options=replace(options, box_nms_thresh=nms))
            waits.append((len(captions), found.total()))
    assert waits[1][0] > waits[2][0] > 0
    assert waits[1][1] == waits[2][1]


def test_greedy_search_waits_once_for_a_token(pointed):
    with simulated_cuda() as device:
        language_model = pointed().model.language_model
        language_model._resolve_special_tokens = lambda: (0, [1])
        prefix = torch.randn(6, 3, language_model.hidden_size, device="cuda")
        totals = []
        for tokens in (4, 5, 9):
            with device.counted() as found:
                assert language_model.generate(prefix, tokens).sequences.shape[2] == tokens
            totals.append(found.total())
    assert totals[1] - totals[0] == 1
    assert totals[2] - totals[1] == 4


def test_greedy_search_waits_no_longer_where_captions_end(pointed):
    with simulated_cuda() as device:
        language_model = pointed().model.language_model
        prefix = torch.randn(40, 3, language_model.hidden_size, device="cuda")
        totals, lengths = [], []
        for ends in ([1], list(range(0, 720, 4))):
            language_model._resolve_special_tokens = lambda ends=ends: (0, ends)
            with device.counted() as found:
                ids = language_model.generate(prefix, 6).sequences[:, 0]
            totals.append(found.total())
            lengths.append(torch.isin(ids.cpu(), torch.tensor(ends)).any(1).sum())
    assert lengths[1] > lengths[0]
    assert totals[0] >= totals[1]


@pytest.mark.parametrize(
    "mixer", [pytest.param(mixer, marks=[pytest.mark.all] * (mixer in ("split", "mask-tokens"))) for mixer in MIXERS]
)
@pytest.mark.slow
def test_waits_of_a_training_step_do_not_grow_with_regions(mixer):
    model = built(mixer=mixer).train()
    with simulated_cuda() as device:
        model.to("cuda")
        waits = []
        for regions in (3, 7):
            batch = batch_of(model, regions).to("cuda")
            with device.counted() as found:
                model(batch).loss.backward()
            waits.append(found)
    assert waits[0] == waits[1]
    assert waits[0].total() <= 12


@pytest.mark.parametrize("pool", ["pool_under_masks", "roi_align", "resampler"])
def test_waits_do_not_grow_with_images(pool):
    mixer = ResamplerMixer(SimpleNamespace(channels=8), num_queries=2, depth=1, num_heads=2, mlp_dim=8)
    with simulated_cuda() as device:
        mixer.to("cuda")
        waits = []
        for images in (1, 4):
            image, owner = torch.randn(images, 8, 4, 4, device="cuda"), torch.arange(images, device="cuda")
            rows = torch.rand(images, 4, 4, device="cuda")
            tokens, position = torch.randn(images, 3, 8, device="cuda"), torch.randn(8, 4, 4, device="cuda")
            regions = SegmenterOutput(owner, image, 64, position[:, :1, :1], position, tokens, tokens)
            with device.counted() as found:
                if pool == "pool_under_masks":
                    pool_under_masks(image, owner, rows)
                elif pool == "roi_align":
                    roi_align(image, owner, rows[:, 0], 2)
                else:
                    mixer(regions)
            waits.append(found.total())
    assert waits[0] == waits[1] <= 3  # ROIAlign also asks how many samples each axis needs


# --- what else runs there ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_chunks_are_computed_anew_with_the_same_random_numbers():
    model = built(lora={"rank": 2, "dropout": 0.5}).train()
    with simulated_cuda() as device:
        model.to("cuda")
        batch = batch_of(model).to("cuda")
        device.draws.clear()
        output = model(batch, chunk_size=2)
        drawn = len(device.draws)
        assert drawn
        output.loss.backward()
    assert len(device.draws) == 2 * drawn
    assert set(Counter(device.draws).values()) <= {2, 4, 6}


def test_a_step_of_adamw_needs_nothing_from_the_host(small):
    model = small(trainable=["mixer", "projection"])
    with simulated_cuda() as device:
        model.to("cuda")
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
        batch = batch_of(model).to("cuda")
        model(batch).loss.backward()
        before = model.projection[0].weight.detach().clone()
        with device.counted() as found:
            optimizer.step()
        assert not torch.equal(before, model.projection[0].weight)
    assert not found


def test_auxiliary_losses_run_on_an_accelerator(small):
    attributes = AttributeValues({"color": ("red", "blue")}, {"side": ("left", "right")})
    model = small()
    lesson = TrainingModule(model, {"attributes": 1.0, "features": 1.0}, attributes)
    batch = batch_of(model)
    batch.auxiliary_targets = {name: torch.tensor([0, 1, -100, 0, 1]) for name in ("color", "side")}
    with simulated_cuda(), torch.autocast("cuda", torch.bfloat16):
        lesson.to("cuda")
        loss = lesson(batch.to("cuda"), {"regions": 1.0})
        loss.backward()
        assert loss.isfinite()


def test_features_are_kept_from_an_accelerator(small, picture, tmp_path):
    model = small()
    here = FeatureCache(tmp_path / "here", model)
    here.encode_missing(model, [picture], lambda: None)
    with simulated_cuda():
        model.to("cuda")
        there = FeatureCache(tmp_path / "there", model)
        there.encode_missing(model, [picture], lambda: None)
    assert torch.allclose(here[picture], there[picture], atol=1e-2)


@pytest.mark.parametrize("name", ["crop-captioner", "vlm", "nearest-neighbor"])
@pytest.mark.slow
def test_baseline_captions_on_an_accelerator(name):
    sample = Scenes("test", num_images=1, image_size=64)[0]
    prompts = [Prompt(box=region.box) for region in sample.regions]
    with simulated_cuda():
        captions = load_captioner({"name": name, **get_tiny_options("captioner", name)}, "cuda").caption(
            sample.image, prompts
        )
    assert len(captions) == len(prompts)


# --- the check itself -------------------------------------------------------------------------------------------------


class Wrong(nn.Module):
    """A part as one might write it, with one fault that a CPU in float32 does not mind."""

    def __init__(self, fault):
        super().__init__()
        self.fault = fault
        self.linear, self.norm = nn.Linear(4, 4), nn.LayerNorm(4)

    def forward(self, values):
        if self.fault == "arange without device":
            values = values + torch.arange(4)
        if self.fault == "cat with a tensor of the CPU":
            values = torch.cat((values, torch.zeros(1, 4)))
        if self.fault == "float32 table":
            values = values + torch.linspace(0, 1, 4, device=values.device)
        if self.fault == "float32 into a norm":
            return self.norm(values.float())
        if self.fault == "numpy":
            values.detach().numpy()
        if self.fault == "generator of the CPU":
            values = values + torch.randn(4, device=values.device, generator=torch.Generator())
        if self.fault == "whole numbers in a product":
            values = values * (values.long() @ values.long().T).sum()
        return self.linear(values)


@pytest.mark.parametrize(
    ("fault", "says"),
    {
        "arange without device": "same device",
        "cat with a tensor of the CPU": "same device",
        "float32 table": "dtype|scalar type",
        "float32 into a norm": "scalar type",
        "numpy": "can't convert cuda:0",
        "generator of the CPU": "generator",
        "whole numbers in a product": "not implemented",
    }.items(),
)
def test_simulated_device_refuses_what_a_gpu_refuses(fault, says):
    Wrong(fault)(torch.randn(3, 4))  # works on a CPU
    with simulated_cuda():
        model = Wrong(fault).to("cuda", torch.bfloat16)
        with pytest.raises((RuntimeError, TypeError), match=says):
            model(torch.randn(3, 4, device="cuda", dtype=torch.bfloat16))
        assert Wrong(None).to("cuda")(torch.randn(3, 4, device="cuda")).device.type == "cuda"


def test_simulated_device_counts_what_the_host_waits_for():
    with simulated_cuda() as device:
        values = torch.tensor([1.0, 2.0, 3.0], device="cuda")
        for waits, work in (
            (3, lambda: [float(value) for value in values]),
            (1, lambda: values.tolist()),
            (1, lambda: values[values > 1]),
            (1, lambda: values.cpu()),
            (1, lambda: torch.tensor([1, 2], device="cuda")),
            (1, lambda: bool((values > 1).all())),
            (0, lambda: values[values.argsort()] + 1),
            (0, lambda: values.masked_fill(values > 1, 0.0).sum()),
        ):
            with device.counted() as found:
                work()
            assert found.total() == waits
    assert not torch.cuda.is_initialized()


def test_autocast_of_the_simulated_device_is_cuda_s():
    with simulated_cuda(), torch.autocast("cuda", torch.bfloat16):
        linear, values = nn.Linear(4, 4).to("cuda"), torch.randn(3, 4, device="cuda")
        low = linear(values)
        assert low.dtype == torch.bfloat16
        assert (low + values).dtype == torch.float32
        assert nn.functional.layer_norm(low, (4,)).dtype == torch.float32
        assert low.softmax(1).dtype == torch.float32
        assert torch.cat((low, values)).dtype == torch.float32
        low.sum().backward()
        assert linear.weight.grad.dtype == torch.float32
