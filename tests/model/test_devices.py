"""Operations that a GPU rejects or that synchronize it with the host; the device is simulated by `simulated_cuda`."""

from collections import Counter
from dataclasses import replace
from itertools import count
from types import SimpleNamespace

import numpy as np
import pytest
import sca_registry
import torch
from PIL import Image
from sca_registry.contracts import Batch, MaskTargets, Prompt, PromptBatch, SegmenterOutput
from sca_registry.spec import ModelSpec
from simulated_cuda import simulated_cuda
from tiny import LANGUAGE_MODEL_FAMILIES, make_tiny_config
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

TRAINABLE_GROUPS = ["neck", "mixer", "projection", "task_tokens", "lora", "segmenter"]
MIXER_OPTIONS = {
    "query": {"num_queries": 2, "depth": 1, "num_heads": 4, "mlp_dim": 48, "mask_pooling": True},
    "split": {"num_queries": 2, "depth": 1, "num_heads": 4, "mlp_dim": 48},
    "mask-tokens": {"depth": 1, "num_heads": 4, "mlp_dim": 48},
    "semantic-perceiver": {"num_queries": 2, "depth": 1, "num_heads": 4, "mlp_dim": 48},
    "resampler": {"num_queries": 2, "depth": 1, "num_heads": 4, "mlp_dim": 48},
    "roi-query": {"num_queries": 2, "depth": 1, "num_heads": 4, "mlp_dim": 48, "output_size": 3},
    "roi-pool": {"output_size": 2},
    "masked-pool": {"num_queries": 2, "mlp_dim": 48},
}
MIXERS_WITH_MASKS = ("mask-tokens", "semantic-perceiver", "masked-pool")
ENCODERS = ("tiny-vit", "sam", "open-clip", "timm", "clip-rn50", "convnext-b")
PRECISIONS = {"bfloat16": torch.bfloat16, "autocast": torch.float32, "float16": torch.float16, "float32": torch.float32}
IMAGE_INDEX = torch.tensor([0, 0, 1, 1, 1])


def make_model_table(encoder="tiny-vit", segmenter="sam", mixer="query", family="gpt2", **fields):
    options = {"depth": 1, "num_heads": 4, "mlp_dim": 48} if segmenter == "sam" else {}
    mixer_options = {"mask_pooling": False} if mixer == "query" and segmenter == "box" else {}
    table = {
        "encoder": {"name": encoder, **get_tiny_options("encoder", encoder)},
        "segmenter": {"name": segmenter, "hidden_size": 32, **options},
        "mixer": {"name": mixer, **MIXER_OPTIONS[mixer], **mixer_options},
        "language_model": {"name": "hf", "pretrained": False, "config": make_tiny_config(family)},
        "task_tokens": 2,
        "lora": {"rank": 2, "dropout": 0.1},
        "trainable": [name for name in TRAINABLE_GROUPS if segmenter == "sam" or name != "segmenter"],
        "generation": {"max_new_tokens": 4},
    }
    return {**table, **fields}


def build_model(**fields):
    torch.manual_seed(0)
    return build(ModelSpec.from_dict(make_model_table(**fields)))


def make_prompts(image_size, prompt_kind="box"):
    generator = torch.Generator().manual_seed(1)
    corners = torch.rand(len(IMAGE_INDEX), 2, generator=generator) * image_size / 2
    boxes = torch.cat((corners, corners + image_size / 4), dim=1)
    points, labels = corners[:, None].expand(-1, 2, -1).contiguous(), torch.tensor([[1, 0]]).expand(len(IMAGE_INDEX), 2)
    return PromptBatch(
        IMAGE_INDEX,
        boxes=boxes if "box" in prompt_kind else None,
        points=points if "point" in prompt_kind else None,
        labels=labels if "point" in prompt_kind else None,
    )


def make_batch(model, num_regions=None):
    """Return two images, five regions or `num_regions` of the second image, and seven texts or one per region."""
    image_size, generator = model.encoder.image_format.size, torch.Generator().manual_seed(2)
    prompts = make_prompts(image_size)
    region_index = torch.tensor([0, 0, 1, 2, 3, 4, 4])
    if num_regions is not None:
        prompts, region_index = prompts[torch.full((num_regions,), 4)], torch.arange(num_regions)
    mask_size = 4 * image_size // model.encoder.stride
    ids = torch.randint(3, 90, (len(region_index), 3), generator=generator)
    mask = torch.ones_like(ids)
    mask[1::2, 2] = 0
    targets = MaskTargets(
        torch.rand(len(prompts), mask_size, mask_size, generator=generator),
        torch.ones(len(prompts), mask_size, mask_size, dtype=torch.bool),
        torch.arange(len(prompts)) != 1,
    )
    pixels = torch.randn(2, 3, image_size, image_size, generator=generator)
    return Batch(
        prompts,
        region_index % 2,
        pixels,
        input_ids=ids,
        attention_mask=mask,
        region_index=region_index,
        targets=targets,
    )


def iter_combinations():
    """Yield every mixer in every precision with alternating encoders, segmenters and language models."""
    counter = count()
    for precision in PRECISIONS:
        for mixer in MIXER_OPTIONS:
            index = next(counter)
            encoder = ENCODERS[(index + index // len(ENCODERS)) % len(ENCODERS)]
            segmenter = "box" if index % 2 and mixer not in MIXERS_WITH_MASKS else "sam"
            family = list(LANGUAGE_MODEL_FAMILIES)[index % len(LANGUAGE_MODEL_FAMILIES)]
            marks = [pytest.mark.all] if precision in ("float16", "float32") else []
            parts = {"encoder": encoder, "segmenter": segmenter, "mixer": mixer, "family": family}
            test_id = "-".join([*parts.values(), precision])
            yield pytest.param(parts, precision, 2 * (index % 2), id=test_id, marks=marks)


def build_model_or_skip(**parts):
    card = sca_registry.encoders.get_card(parts["encoder"])
    if card.extra and sca_registry.encoders.load_entry(parts["encoder"]).state != "ok":
        pytest.skip(f"the extra {card.extra} is not installed")
    return build_model(**parts)


def test_mixer_options_cover_every_registered_mixer():
    assert set(sca_registry.mixers.list_names()) == set(MIXER_OPTIONS)


@pytest.mark.parametrize(("parts", "precision", "chunk_size"), list(iter_combinations()))
@pytest.mark.slow
def test_model_trains_and_generates_on_an_accelerator(parts, precision, chunk_size):
    model, dtype = build_model_or_skip(**parts), PRECISIONS[precision]
    batch = make_batch(model)
    with simulated_cuda():
        model.to("cuda", dtype).train()
        batch = batch.to("cuda")
        batch.pixel_values = batch.pixel_values.to(dtype)
        with torch.autocast("cuda", torch.bfloat16, enabled=precision == "autocast"):
            output = model(batch, chunk_size=chunk_size)
        output.loss.backward()
        assert output.loss.isfinite()
        for group, parameters in model.group_parameters().items():
            gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
            assert gradients or not any(parameter.requires_grad for parameter in parameters), group
            assert all(gradient.device.type == "cuda" for gradient in gradients), group
            assert all(gradient.isfinite().all() for gradient in gradients), group
        with torch.inference_mode():
            generated = model.eval().generate(model.encode(batch.pixel_values), batch.prompts, IMAGE_INDEX.to("cuda"))
        assert generated.sequences.device.type == generated.scores.device.type == "cuda"
        assert generated.scores.isfinite().all()


@pytest.mark.parametrize(
    "generation_options", [{"num_beams": 2, "num_captions": 2}, {"do_sample": True, "num_captions": 2, "top_p": 0.9}]
)
def test_beam_search_and_sampling_run_on_an_accelerator(generation_options):
    model = build_model()
    with simulated_cuda(), torch.inference_mode():
        language_model = model.to("cuda", torch.bfloat16).language_model
        prefix = torch.randn(3, 4, language_model.hidden_size, device="cuda", dtype=torch.bfloat16)
        generated = language_model.generate(prefix, 3, **generation_options)
        assert generated.sequences.device.type == "cuda"
        assert generated.scores.shape == (3, 2)


@pytest.mark.parametrize("precision", ["bfloat16", "autocast"])
@pytest.mark.parametrize("segmenter", ["sam", "sam-box-masks", "box"])
@pytest.mark.slow
def test_segmenter_accepts_every_prompt_kind_on_an_accelerator(segmenter, precision):
    segmenter_table = {"name": "box", "hidden_size": 24}
    if segmenter != "box":
        segmenter_table = {"name": "sam", "hidden_size": 48, "depth": 1, "num_heads": 4, "mlp_dim": 48}
        segmenter_table["box_masks"] = segmenter == "sam-box-masks"
    model, dtype = build_model(mixer="split", **{"segmenter": "box"}), PRECISIONS[precision]
    model.segmenter = sca_registry.segmenters.build(segmenter_table.pop("name"), model.encoder, **segmenter_table)
    image_size, mask_size = model.encoder.image_format.size, 4 * model.segmenter.grid_size
    prompt_batches = [make_prompts(image_size, kind) for kind in ("box", "point", "box and point")]
    if segmenter != "box":
        prompt_batches += [
            replace(each, masks=torch.randn(len(IMAGE_INDEX), 1, mask_size, mask_size)) for each in prompt_batches[:1]
        ]
        prompt_batches += [PromptBatch(IMAGE_INDEX, masks=torch.randn(len(IMAGE_INDEX), 1, mask_size, mask_size))]
    with simulated_cuda(), torch.inference_mode():
        model.to("cuda", dtype)
        features = model.encode(torch.randn(2, 3, image_size, image_size).to("cuda", dtype))
        for prompts in prompt_batches:
            for multimask in (True, False):
                with torch.autocast("cuda", torch.bfloat16, enabled=precision == "autocast"):
                    regions = model.segment(features, prompts.to("cuda"), multimask)
                assert regions.tokens.device.type == "cuda"
                assert regions.tokens.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("segmenter", "mixer", "family"),
    [(s, m, "gpt2") for s in ("sam", "box") for m in MIXER_OPTIONS if s == "sam" or m not in MIXERS_WITH_MASKS]
    + [("sam", "query", family) for family in LANGUAGE_MODEL_FAMILIES if family != "gpt2"],
)
@pytest.mark.slow
def test_model_in_half_precision_is_close_to_float32(segmenter, mixer, family, dtype):
    """Run on the real CPU, where most kernels reject mixed dtypes too."""
    model = build_model(segmenter=segmenter, mixer=mixer, family=family).eval()
    batch = make_batch(model)
    batch.targets = None
    with torch.inference_mode():
        expected = model(batch)
        model.to(dtype)
        batch.pixel_values = batch.pixel_values.to(dtype)
        output = model(batch)
        assert output.queries.dtype == dtype
        assert output.logits.isfinite().all()
        similarity = torch.cosine_similarity(output.queries.float().flatten(1), expected.queries.flatten(1))
        assert similarity.min() > 0.99
        assert float(output.loss) == pytest.approx(float(expected.loss), rel=0.01)
        scores = model.generate(model.encode(batch.pixel_values), batch.prompts, batch.prompts.image_index).scores
        assert scores.isfinite().all()


# --- what the host waits for ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def image():
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 255, (70, 90, 3), dtype=np.uint8))


def make_box_prompts(num_boxes):
    return [Prompt(box=(x, 3.0, x + 20.0, 40.0)) for x in range(num_boxes)]


@pytest.fixture
def make_predictor(build_small_model, image):
    """Function that returns a predictor for a model on the device with an image set."""

    def make(**options):
        predictor = Predictor(build_small_model().to("cuda"), **options)
        predictor.set_image(image)
        return predictor

    return make


def test_predictor_on_an_accelerator_matches_the_cpu(build_small_model, make_predictor, image):
    cpu_predictor = Predictor(build_small_model())
    cpu_predictor.set_image(image)
    expected_captions, expected_masks = (
        cpu_predictor.predict(make_box_prompts(5)),
        cpu_predictor.segment(make_box_prompts(5)),
    )
    with simulated_cuda():
        accelerator_predictor = make_predictor()
        captions = accelerator_predictor.predict(make_box_prompts(5))
        assert [caption.text for caption in captions] == [caption.text for caption in expected_captions]
        assert [caption.mask for caption in captions] == [caption.mask for caption in expected_captions]
        assert [[mask.rle for mask in each] for each in accelerator_predictor.segment(make_box_prompts(5))] == [
            [mask.rle for mask in each] for each in expected_masks
        ]


@pytest.mark.parametrize("method", ["predict", "segment"])
def test_predictor_synchronizations_do_not_grow_with_regions(make_predictor, method):
    with simulated_cuda() as device:
        predictor = make_predictor()
        syncs_per_run = []
        for num_regions in (2, 3, 12):  # the first also prepares what is kept of an image's size
            with device.count_synchronizations() as syncs:
                getattr(predictor, method)(make_box_prompts(num_regions))
            syncs_per_run.append(syncs)
    assert syncs_per_run[1] == syncs_per_run[2]


def test_predictor_adds_at_most_4_synchronizations_per_chunk(make_predictor):
    with simulated_cuda() as device:
        predictor, total_syncs = make_predictor(), []
        for regions_per_chunk in (6, 6, 3, 2):  # the first also prepares what is kept of an image's size
            predictor.engine.regions = regions_per_chunk
            with device.count_synchronizations() as syncs:
                predictor.predict(make_box_prompts(6))
            total_syncs.append(syncs.total())
    assert (
        total_syncs[2] - total_syncs[1] == total_syncs[3] - total_syncs[2] <= 4
    )  # owners, which cells are hit, masks, predicted IoU


@pytest.mark.slow
def test_everything_mode_synchronizations_do_not_grow_with_masks(make_predictor):
    with simulated_cuda() as device:
        predictor = make_predictor()
        thresholds = {"pred_iou_thresh": -9.0, "stability_score_thresh": 0.0, "min_area": 0.0, "max_area": 1.0}
        options = replace(predictor.engine.everything, points_per_side=3, **thresholds)
        captions_and_syncs = []
        for box_nms_thresh in (1.0, 1.0, 0.0):
            with device.count_synchronizations() as syncs:
                captions = caption_everything(predictor, options=replace(options, box_nms_thresh=box_nms_thresh))
            captions_and_syncs.append((len(captions), syncs.total()))
    assert captions_and_syncs[1][0] > captions_and_syncs[2][0] > 0
    assert captions_and_syncs[1][1] == captions_and_syncs[2][1]


def test_greedy_search_synchronizes_once_per_token(make_predictor):
    with simulated_cuda() as device:
        language_model = make_predictor().model.language_model
        language_model._resolve_special_tokens = lambda: (0, [1])
        prefix = torch.randn(6, 3, language_model.hidden_size, device="cuda")
        total_syncs = []
        for num_tokens in (4, 5, 9):
            with device.count_synchronizations() as syncs:
                assert language_model.generate(prefix, num_tokens).sequences.shape[2] == num_tokens
            total_syncs.append(syncs.total())
    assert total_syncs[1] - total_syncs[0] == 1
    assert total_syncs[2] - total_syncs[1] == 4


def test_greedy_search_adds_no_synchronizations_when_captions_end(make_predictor):
    with simulated_cuda() as device:
        language_model = make_predictor().model.language_model
        prefix = torch.randn(40, 3, language_model.hidden_size, device="cuda")
        total_syncs, num_ended = [], []
        for eos_token_ids in ([1], list(range(0, 720, 4))):
            language_model._resolve_special_tokens = lambda eos_token_ids=eos_token_ids: (0, eos_token_ids)
            with device.count_synchronizations() as syncs:
                ids = language_model.generate(prefix, 6).sequences[:, 0]
            total_syncs.append(syncs.total())
            num_ended.append(torch.isin(ids.cpu(), torch.tensor(eos_token_ids)).any(1).sum())
    assert num_ended[1] > num_ended[0]
    assert total_syncs[0] >= total_syncs[1]


@pytest.mark.parametrize(
    "mixer",
    [pytest.param(mixer, marks=[pytest.mark.all] * (mixer in ("split", "mask-tokens"))) for mixer in MIXER_OPTIONS],
)
@pytest.mark.slow
def test_training_step_synchronizations_do_not_grow_with_regions(mixer):
    model = build_model(mixer=mixer).train()
    with simulated_cuda() as device:
        model.to("cuda")
        syncs_per_step = []
        for num_regions in (3, 7):
            batch = make_batch(model, num_regions).to("cuda")
            with device.count_synchronizations() as syncs:
                model(batch).loss.backward()
            syncs_per_step.append(syncs)
    assert syncs_per_step[0] == syncs_per_step[1]
    assert syncs_per_step[0].total() <= 12


@pytest.mark.parametrize("operation", ["pool_under_masks", "roi_align", "resampler"])
def test_pooling_synchronizations_do_not_grow_with_images(operation):
    mixer = ResamplerMixer(SimpleNamespace(channels=8), num_queries=2, depth=1, num_heads=2, mlp_dim=8)
    with simulated_cuda() as device:
        mixer.to("cuda")
        total_syncs = []
        for num_images in (2, 4):
            features, image_index = (
                torch.randn(num_images, 8, 4, 4, device="cuda"),
                torch.arange(num_images, device="cuda"),
            )
            masks = torch.rand(num_images, 4, 4, device="cuda")
            tokens, position = torch.randn(num_images, 3, 8, device="cuda"), torch.randn(8, 4, 4, device="cuda")
            regions = SegmenterOutput(image_index, features, 64, position[:, :1, :1], position, tokens, tokens)
            with device.count_synchronizations() as syncs:
                if operation == "pool_under_masks":
                    pool_under_masks(features, image_index, masks)
                elif operation == "roi_align":
                    roi_align(features, image_index, masks[:, 0], 2)
                else:
                    mixer(regions)
            total_syncs.append(syncs.total())
    assert total_syncs[0] == total_syncs[1] <= 3  # ROIAlign also reads the number of samples per axis


# --- what else runs there ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_chunked_backward_recomputes_with_the_same_random_numbers():
    model = build_model(lora={"rank": 2, "dropout": 0.5}).train()
    with simulated_cuda() as device:
        model.to("cuda")
        batch = make_batch(model).to("cuda")
        device.random_tensor_sums.clear()
        output = model(batch, chunk_size=2)
        num_draws = len(device.random_tensor_sums)
        assert num_draws
        output.loss.backward()
    assert len(device.random_tensor_sums) == 2 * num_draws
    assert set(Counter(device.random_tensor_sums).values()) <= {2, 4, 6}


def test_adamw_step_does_not_synchronize_with_the_host(build_small_model):
    model = build_small_model(trainable=["mixer", "projection"])
    with simulated_cuda() as device:
        model.to("cuda")
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
        batch = make_batch(model).to("cuda")
        model(batch).loss.backward()
        weight_before = model.projection[0].weight.detach().clone()
        with device.count_synchronizations() as syncs:
            optimizer.step()
        assert not torch.equal(weight_before, model.projection[0].weight)
    assert not syncs


def test_auxiliary_losses_run_on_an_accelerator(build_small_model):
    attributes = AttributeValues({"color": ("red", "blue")}, {"side": ("left", "right")})
    model = build_small_model()
    training_module = TrainingModule(model, {"attributes": 1.0, "feature_attributes": 1.0}, attributes)
    batch = make_batch(model)
    batch.auxiliary_targets = {name: torch.tensor([0, 1, -100, 0, 1]) for name in ("color", "side")}
    with simulated_cuda(), torch.autocast("cuda", torch.bfloat16):
        training_module.to("cuda")
        loss = training_module(batch.to("cuda"), {"regions": 1.0})
        loss.backward()
        assert loss.isfinite()


def test_feature_cache_filled_on_an_accelerator_matches_the_cpu(build_small_model, image, tmp_path):
    model = build_small_model()
    cpu_cache = FeatureCache(tmp_path / "here", model)
    cpu_cache.encode_missing(model, [image], lambda: None)
    with simulated_cuda():
        model.to("cuda")
        accelerator_cache = FeatureCache(tmp_path / "there", model)
        accelerator_cache.encode_missing(model, [image], lambda: None)
    assert torch.allclose(cpu_cache[image], accelerator_cache[image], atol=1e-2)


@pytest.mark.parametrize("name", ["crop-captioner", "vlm", "nearest-neighbor"])
@pytest.mark.slow
def test_baseline_captioners_run_on_an_accelerator(name):
    sample = Scenes("test", num_images=1, image_size=64)[0]
    prompts = [Prompt(box=region.box) for region in sample.regions]
    with simulated_cuda():
        captions = load_captioner({"name": name, **get_tiny_options("captioner", name)}, "cuda").caption(
            sample.image, prompts
        )
    assert len(captions) == len(prompts)


# --- the check itself -------------------------------------------------------------------------------------------------


class FaultyModule(nn.Module):
    """A component with one fault that goes unnoticed on a CPU in float32."""

    def __init__(self, fault):
        super().__init__()
        self.fault = fault
        self.linear, self.norm = nn.Linear(4, 4), nn.LayerNorm(4)

    def forward(self, values):
        if self.fault == "arange without device":
            values = values + torch.arange(4)
        if self.fault == "cat with a CPU tensor":
            values = torch.cat((values, torch.zeros(1, 4)))
        if self.fault == "float32 buffer":
            values = values + torch.linspace(0, 1, 4, device=values.device)
        if self.fault == "float32 input to a norm":
            return self.norm(values.float())
        if self.fault == "numpy of a GPU tensor":
            values.detach().numpy()
        if self.fault == "CPU generator":
            values = values + torch.randn(4, device=values.device, generator=torch.Generator())
        if self.fault == "matmul of integers":
            values = values * (values.long() @ values.long().T).sum()
        return self.linear(values)


@pytest.mark.parametrize(
    ("fault", "message"),
    {
        "arange without device": "same device",
        "cat with a CPU tensor": "same device",
        "float32 buffer": "dtype|scalar type",
        "float32 input to a norm": "scalar type",
        "numpy of a GPU tensor": "can't convert cuda:0",
        "CPU generator": "generator",
        "matmul of integers": "not implemented",
    }.items(),
)
def test_simulated_device_rejects_operations_that_a_gpu_rejects(fault, message):
    FaultyModule(fault)(torch.randn(3, 4))  # works on a CPU
    with simulated_cuda():
        model = FaultyModule(fault).to("cuda", torch.bfloat16)
        with pytest.raises((RuntimeError, TypeError), match=message):
            model(torch.randn(3, 4, device="cuda", dtype=torch.bfloat16))
        assert FaultyModule(None).to("cuda")(torch.randn(3, 4, device="cuda")).device.type == "cuda"


def test_simulated_device_counts_host_synchronizations():
    with simulated_cuda() as device:
        values = torch.tensor([1.0, 2.0, 3.0], device="cuda")
        for num_syncs, operation in (
            (3, lambda: [float(value) for value in values]),
            (1, lambda: values.tolist()),
            (1, lambda: values[values > 1]),
            (1, lambda: values.cpu()),
            (1, lambda: torch.tensor([1, 2], device="cuda")),
            (1, lambda: bool((values > 1).all())),
            (0, lambda: values[values.argsort()] + 1),
            (0, lambda: values.masked_fill(values > 1, 0.0).sum()),
        ):
            with device.count_synchronizations() as syncs:
                operation()
            assert syncs.total() == num_syncs
    assert not torch.cuda.is_initialized()


def test_simulated_device_autocast_matches_cuda():
    with simulated_cuda(), torch.autocast("cuda", torch.bfloat16):
        linear, values = nn.Linear(4, 4).to("cuda"), torch.randn(3, 4, device="cuda")
        bfloat16_output = linear(values)
        assert bfloat16_output.dtype == torch.bfloat16
        assert (bfloat16_output + values).dtype == torch.float32
        assert nn.functional.layer_norm(bfloat16_output, (4,)).dtype == torch.float32
        assert bfloat16_output.softmax(1).dtype == torch.float32
        assert torch.cat((bfloat16_output, values)).dtype == torch.float32
        bfloat16_output.sum().backward()
        assert linear.weight.grad.dtype == torch.float32
