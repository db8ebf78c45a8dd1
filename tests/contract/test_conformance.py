"""Conformance of all registered components, and of mutants, each of which fails one check."""

import json
import os
import random
import subprocess
import sys
from dataclasses import replace

import catalogue
import numpy as np
import pytest
import sca_registry
import torch
from PIL import Image
from sca_registry import REGISTRIES, RegistryError
from sca_registry.contracts import (
    COMPONENT_KINDS,
    Caption,
    ImageFormat,
    MetricOutput,
    Prompt,
    Proposals,
    Region,
    Sample,
)
from tiny import LANGUAGE_MODEL_FAMILIES, SCALED_LOGITS_FAMILIES, make_tiny_config
from torch import nn

from sca.data.scenes import Scenes
from sca.encoders.tiny_vit import TinyVit
from sca.language_models.hf import HfLanguageModel
from sca.language_models.tiny_gpt2 import TinyGpt2
from sca.mixers.query import QueryMixer
from sca.mixers.resampler import ResamplerMixer
from sca.segmenters.box import BoxSegmenter
from sca.segmenters.sam import SamSegmenter
from sca.testing.conformance import CHECKS, check_component
from sca.testing.tiny import get_tiny_options

CHECKED_KINDS = (
    "encoders",
    "segmenters",
    "mixers",
    "language_models",
    "datasets",
    "metrics",
    "proposers",
    "captioners",
)


VARIANT_OPTIONS = {  # options to test in addition to those that make a component tiny
    "segmenters": {"sam": [{"hidden_size": 48}], "box": [{"hidden_size": 48}]},
    "mixers": {"query": [{"mask_pooling": True}]},
    "language_models": {
        "hf": [{"config": make_tiny_config(family)} for family in (*LANGUAGE_MODEL_FAMILIES, *SCALED_LOGITS_FAMILIES)]
    },
    "datasets": {"scenes": [{"split": "train"}, {"split": "test"}]},
    "captioners": {
        "crop-captioner": [{"encoder": "sca-tiny"}],
        "blip2-opt-2.7b": [{"vcot": True}],
        "vlm": [{"region_format": "box", "encoder": "sca-tiny"}],
    },
}
DATASETS_FROM_FILES = (
    *("coco", "coco-json", "coco-panoptic", "coco-captions", "objects365", "v3det", "sa1b"),
    *("visual-genome", "visual-genome-grit", "refcoco", "refcoco-plus", "refcocog", "jsonl", "annotations", "pam-json"),
    *("dam-json", "osprey-json", "swift-json"),
    *("dlc-bench-regions", "gar-bench-questions", "osprey-names", "ref-l4", "glamm-regions"),
    "lmms-eval-regions",
)
METRICS_FROM_FILES = (
    *("clip-score", "judge", "judged-answers", "name-similarity", "noun-recall", "semantic", "spice", "verb-recall"),
)
COMPONENTS_FROM_FILES = (
    *DATASETS_FROM_FILES,
    *METRICS_FROM_FILES,
    "boxes-from-coco",
    "gguf",
    "openai",
)  # see below, tests/data, tests/evaluation and tests/captioners


def iter_checked_components():
    """Every registered name at its tiny size, and variants; one of those that are the same but for size always, the
    others in `make test-all`.
    """
    seen_signatures = set()
    for kind in CHECKED_KINDS:
        for name in sorted(set(REGISTRIES[kind].list_names()) - set(COMPONENTS_FROM_FILES)):
            card, tiny_sizes = REGISTRIES[kind].get_card(name), get_tiny_options(kind, name)
            signature = f"{kind} {card.factory} {tiny_sizes or name}"
            marks = [pytest.mark.all] if signature in seen_signatures else []
            if card.extra and REGISTRIES[kind].load_entry(name).state != "ok":
                marks.append(pytest.mark.skip(reason=f"the extra {card.extra} is not installed"))
            seen_signatures.add(signature)
            for index, options in enumerate([{}, *VARIANT_OPTIONS.get(kind, {}).get(name, [])]):
                yield pytest.param(kind, name, {**tiny_sizes, **options}, id=f"{name}-{index}", marks=marks)


def get_failures(findings):
    return {finding.name: finding.details for finding in findings if not finding.passed}


@pytest.mark.parametrize(("kind", "name", "options"), list(iter_checked_components()))
@pytest.mark.slow
def test_registered_components_pass_all_conformance_checks(kind, name, options):
    findings = check_component(kind, name, **options)
    assert len(findings) == sum(kind in each.kinds for each in CHECKS)
    assert get_failures(findings) == {}


def test_coco_dataset_passes_all_conformance_checks(tmp_path):
    (tmp_path / "val").mkdir()
    for number in (1, 2):
        Image.fromarray(np.full((30, 40, 3), number, np.uint8)).save(tmp_path / "val" / f"{number}.png")
    content = {
        "images": [{"id": n, "file_name": f"{n}.png", "width": 40, "height": 30} for n in (1, 2)],
        "categories": [{"id": 1, "name": "car"}],
        "annotations": [
            {
                "id": n,
                "image_id": n,
                "category_id": 1,
                "bbox": [3, 4, 20, 10],
                "segmentation": [[3, 4, 23, 4, 23, 14, 3, 14]],
            }
            for n in (1, 2)
        ],
    }
    (tmp_path / "val.json").write_text(json.dumps(content))
    assert get_failures(check_component("dataset", "coco", split="val", root=str(tmp_path))) == {}


def test_boxes_from_coco_proposer_passes_all_conformance_checks(tmp_path):
    content = {
        "images": [{"id": 1, "file_name": "image.png", "width": 48, "height": 32}],
        "annotations": [
            {"id": 1, "image_id": 1, "bbox": [3, 4, 20, 10]},
            {"id": 2, "image_id": 1, "bbox": [0, 0, 9, 9]},
        ],
    }
    (tmp_path / "boxes.json").write_text(json.dumps(content))
    assert get_failures(check_component("proposer", "boxes-from-coco", annotations=str(tmp_path / "boxes.json"))) == {}


@pytest.mark.slow
def test_sam_segmenter_with_box_masks_passes_all_conformance_checks():
    assert get_failures(check_component("segmenter", "sam", depth=1, mlp_dim=64, box_masks=True)) == {}


def test_conformance_checks_cover_every_kind_and_name_their_source():
    assert {kind for each in CHECKS for kind in each.kinds} == set(COMPONENT_KINDS)
    for finding in check_component("mixer", "query", depth=1, mlp_dim=32):
        assert finding.expected.endswith("."), finding
        assert finding.source.startswith(("sca_registry.", "sca.", "docs/plugins.md"))


# --- mutants: components with one error -----------------------------------------------------------------------------


class ValidEncoder(nn.Module):
    image_format = ImageFormat(size=32)
    channels, stride, default_segmenter, checkpoint = 8, 8, "box", None

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(3, 8, 8, 8)

    def forward(self, pixels):
        return self.layer(pixels)


class EncoderWithoutDefaultSegmenter(ValidEncoder):
    default_segmenter = property()


class EncoderWithSizeNotDivisibleByStride(ValidEncoder):
    image_format = ImageFormat(size=36)


class EncoderWithWrongOutputShape(ValidEncoder):
    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(3, 8, 8, 8, padding=4)


class BatchDependentEncoder(ValidEncoder):
    def forward(self, pixels):
        return self.layer(pixels) + pixels.mean()


class OrderDependentEncoder(ValidEncoder):
    def forward(self, pixels):
        return self.layer(pixels) * (1 + torch.arange(len(pixels)).to(pixels).view(-1, 1, 1, 1))


class NondeterministicEncoder(ValidEncoder):
    def forward(self, pixels):
        return nn.functional.dropout(self.layer(pixels), 0.1)


class BufferChangingEncoder(ValidEncoder):
    def __init__(self):
        super().__init__()
        self.register_buffer("num_calls", torch.zeros(()))

    def forward(self, pixels):
        self.num_calls += 1
        return self.layer(pixels)


class InputChangingEncoder(ValidEncoder):
    def forward(self, pixels):
        return self.layer(pixels.mul_(1.0001))


class Float32OutputEncoder(ValidEncoder):
    def forward(self, pixels):
        return self.layer(pixels).float()


class EncoderWithUnusedLayer(ValidEncoder):
    def __init__(self):
        super().__init__()
        self.spare = nn.Linear(2, 2)


class EncoderWithUnsavedTensor(ValidEncoder):
    def __init__(self):
        super().__init__()
        self.offset = torch.randn(8, 1, 1)

    def forward(self, pixels):
        return self.layer(pixels) + self.offset.to(pixels)


class CpuAllocatingEncoder(ValidEncoder):
    def __init__(self):
        super().__init__()
        self.layer.bias = nn.Parameter(torch.zeros(8, device="cpu"))


class EnvironmentChangingEncoder(ValidEncoder):
    def forward(self, pixels):
        os.environ["SCA_TEST_LOUD"] = str(random.random())
        return super().forward(pixels)


class CudnnChangingEncoder(ValidEncoder):
    """Sets the same value each time, so that the second step changes nothing."""

    def __init__(self):
        super().__init__()
        torch.backends.cudnn.benchmark = True


class BatchNormMixer(QueryMixer):
    def __init__(self, segmenter):
        super().__init__(segmenter, depth=1, mlp_dim=32)
        self.norm = nn.BatchNorm1d(self.hidden_size)

    def forward(self, regions):
        queries = super().forward(regions)
        return self.norm(queries.flatten(0, 1)).view_as(queries)


class MetricWithStringNeeds:
    required_fields = "caption"

    def __call__(self, records):
        return MetricOutput({"a": 1.0})


class MetricReturningDict:
    required_fields = ("caption",)

    def __call__(self, records):
        return {"a": 1.0}


class MetricWithMisspelledNeeds(MetricReturningDict):
    required_fields = ("captoin",)


class ProposerOutsideImage:
    def __call__(self, image, image_id):
        return Proposals((Prompt(box=(0.0, 0.0, 9e9, 9.0)),), (1.0,), (None,))


class ValidCaptioner:
    """Captions a region with its width."""

    def caption(self, image, prompts, task="caption", num_beams=1):
        if task not in ("caption", "recognition"):
            raise ValueError(f"no task {task!r}")
        return [self.caption_region(image, prompt, region_id) for region_id, prompt in enumerate(prompts)]

    def caption_region(self, image, prompt, region_id):
        return Caption(f"{prompt.box[2] - prompt.box[0]:.0f} wide", 0.5, prompt.box, None, None, prompt, region_id)


class OrderReversingCaptioner(ValidCaptioner):
    def caption(self, image, prompts, *args, **kwargs):
        return super().caption(image, prompts[::-1], *args, **kwargs)


class BoxChangingCaptioner(ValidCaptioner):
    def caption_region(self, image, prompt, region_id):
        x1, y1, x2, y2 = prompt.box
        return replace(super().caption_region(image, prompt, region_id), box=(x1, y1, x2 + 1, y2))


class CaptionerWithTransposedMask(ValidCaptioner):
    def caption_region(self, image, prompt, region_id):
        return replace(super().caption_region(image, prompt, region_id), mask={"size": [*image.size], "counts": ""})


class BatchDependentCaptioner(ValidCaptioner):
    def caption(self, image, prompts, *args, **kwargs):
        return [replace(each, text=f"{len(prompts)}") for each in super().caption(image, prompts, *args, **kwargs)]


class OptionIgnoringCaptioner(ValidCaptioner):
    def caption(self, image, prompts, task="caption", **generation):
        return super().caption(image, prompts)


class ImageChangingCaptioner(ValidCaptioner):
    def caption_region(self, image, prompt, region_id):
        image.paste("red", tuple(map(int, prompt.box)))
        return super().caption_region(image, prompt, region_id)


class OptionIgnoringEncoder(ValidEncoder):
    def __init__(self, hidden_size=32):
        super().__init__()


class ConstantEncoder(ValidEncoder):
    def forward(self, pixels):
        return self.layer(torch.zeros_like(pixels))


class BatchDependentSegmenter(BoxSegmenter):
    """Pads the regions of an image to the maximum of the batch, and averages over the padding."""

    def forward(self, features, prompts, multimask_output=True):
        output = super().forward(features, prompts, multimask_output)
        output.tokens = output.tokens + output.tokens.mean(0)
        return output


class SmallSam(SamSegmenter):
    def __init__(self, encoder):
        super().__init__(encoder, depth=1, mlp_dim=32)


class BoxChangingSegmenter(SmallSam):
    def forward(self, features, prompts, multimask_output=True):
        output = super().forward(features, prompts, multimask_output)
        output.boxes = output.boxes + 1
        return output


class SegmenterWithoutDeclaredMasks(BoxSegmenter):
    provides = ("masks", "boxes")


class MultimaskIgnoringSegmenter(SmallSam):
    def forward(self, features, prompts, multimask_output=True):
        return super().forward(features, prompts)


class PromptIgnoringSegmenter(BoxSegmenter):
    def encode_coordinates(self, coordinates):
        return super().encode_coordinates(torch.zeros_like(coordinates))


class PaddingCountingSegmenter(SmallSam):
    def compute_losses(self, regions, targets):
        targets.valid_pixels = torch.ones_like(targets.valid_pixels)
        return super().compute_losses(regions, targets)


class GradientStoppingSegmenter(SmallSam):
    def forward(self, features, prompts, multimask_output=True):
        return super().forward(features.detach(), prompts, multimask_output)


class MixerWithUndeclaredNeeds(QueryMixer):
    required_fields = ()

    def __init__(self, segmenter, **options):
        super().__init__(segmenter, mask_pooling=True, depth=1, mlp_dim=32)


class MixerWithUndeclaredGrid(QueryMixer):
    uses_grid = False

    def __init__(self, segmenter):
        super().__init__(segmenter, depth=1, mlp_dim=32)


class RegionIgnoringMixer(QueryMixer):
    def __init__(self, segmenter):
        super().__init__(segmenter, depth=1, mlp_dim=32)

    def forward(self, regions):
        return self.tokens.weight.expand(len(regions), -1, -1)


class MixerWithWrongQueryCount(QueryMixer):
    def __init__(self, segmenter):
        super().__init__(segmenter, depth=1, mlp_dim=32)

    def forward(self, regions):
        return super().forward(regions)[:, 1:]


class ValidLanguageModel(TinyGpt2):
    def __init__(self):
        super().__init__(hidden_size=32, depth=1)


class NonCausalLanguageModel(ValidLanguageModel):
    def hidden_states(self, embeddings, attention_mask):
        return super().hidden_states(embeddings, attention_mask) + embeddings.roll(-1, 1)


class PaddingAttendingLanguageModel(ValidLanguageModel):
    def hidden_states(self, embeddings, attention_mask):
        return super().hidden_states(embeddings, attention_mask) + 0.1 * embeddings.mean(1, keepdim=True)


class LanguageModelWithScaledEmbeddings(HfLanguageModel):
    def __init__(self):
        super().__init__(pretrained=False, config=make_tiny_config("gpt2"))

    def embed_tokens(self, input_ids):
        return super().embed_tokens(input_ids) * 2


class PrefixCountingLanguageModel(ValidLanguageModel):
    def generate(self, prefix, max_new_tokens, **generation):
        return super().generate(prefix, max_new_tokens + prefix.shape[1], **generation)


class LanguageModelWithWrongScores(ValidLanguageModel):
    def generate(self, prefix, max_new_tokens, **generation):
        output = super().generate(prefix, max_new_tokens, **generation)
        return output._replace(scores=output.scores * 2)


class LoraFreezingLanguageModel(ValidLanguageModel):
    def add_lora(self, **kwargs):
        super().add_lora(**kwargs)
        self.model.transformer.wte.requires_grad_(False)


class LanguageModelWithoutEos(ValidLanguageModel):
    def __init__(self):
        super().__init__()
        encode = self.tokenizer.encode
        self.tokenizer.encode = lambda text, max_length=None: (
            encode(text, max_length)[:-1] or [self.tokenizer.eos_token_id]
        )


class LanguageModelWithBos(ValidLanguageModel):
    def __init__(self):
        super().__init__()
        encode = self.tokenizer.encode
        self.tokenizer.encode = lambda text, max_length=None: [7, *encode(text, max_length)]


class LanguageModelDecodingPastEos(ValidLanguageModel):
    def __init__(self):
        super().__init__()
        decode, eos_token_id = self.tokenizer.decode, self.tokenizer.eos_token_id
        self.tokenizer.decode = lambda ids: decode([token_id for token_id in ids if token_id != eos_token_id])


class ValidDataset:
    def __init__(self, split):
        self.scenes = Scenes(split, num_images=4, image_size=64)

    def __len__(self):
        return len(self.scenes)

    def __getitem__(self, index):
        return self.change_sample(self.scenes[index])

    def change_sample(self, sample):
        return sample


def make_region_changing_dataset(change_region):
    """A dataset whose every region is `change_region(region)`."""

    class RegionChangingDataset(ValidDataset):
        def change_sample(self, sample):
            return sample._replace(regions=tuple(change_region(region) for region in sample.regions))

    return RegionChangingDataset


def convert_box_to_xywh(region):
    x1, y1, x2, y2 = region.box
    return Region(region.id, (x1, y1, x2 - x1, y2 - y1), region.mask, region.name)


class Gray(ValidDataset):
    def change_sample(self, sample):
        return sample._replace(image=sample.image.convert("L"))


class EndlessDataset(ValidDataset):
    def __getitem__(self, index):
        return self.scenes[index % 4]


class ShufflingDataset(ValidDataset):
    def __getitem__(self, index):
        sample = self.scenes[index]
        return Sample(sample.image, sample.image_id, tuple(sample.regions[i] for i in torch.randperm(2).tolist()))


class UnbuildableEncoder:
    def __init__(self):
        raise OSError("no weights here")


class CrashingEncoder(ValidEncoder):
    def forward(self, pixels):
        raise RuntimeError("out of chalk")


class RandomProposer:
    def __call__(self, image, image_id):
        box = (0.0, 0.0, 1.0 + random.random(), 9.0)
        return Proposals((Prompt(box=box),), (1.0,), (None,))


class SegmenterWithWrongScoreShape(SmallSam):
    def forward(self, features, prompts, multimask_output=True):
        output = super().forward(features, prompts, multimask_output)
        output.iou_scores = output.iou_scores[:, :1].expand(-1, output.masks.shape[1] + 1)
        return output


class SegmenterWithAllMasksConfident(SmallSam):
    def predict_confident_masks(self, features, prompts, min_iou):
        return super().predict_confident_masks(features, prompts, -torch.inf)


class SegmenterWithLossPerRegion(SmallSam):
    def compute_losses(self, regions, targets):
        return {name: value.expand(3) for name, value in super().compute_losses(regions, targets).items()}


class LanguageModelWithWrongLogitsShape(ValidLanguageModel):
    def lm_head(self, hidden_states):
        return super().lm_head(hidden_states if hidden_states.dim() > 1 else hidden_states[None])


class MixerWithDifferentPreparedOutput(ResamplerMixer):
    def __init__(self, segmenter):
        super().__init__(segmenter, depth=1)

    def forward(self, regions, prepared=None):
        return super().forward(regions, prepared) + (0.0 if prepared is None else 1.0)


class EncoderWithUnknownSegmenter(ValidEncoder):
    default_segmenter = "nothing"


MUTANTS = [
    ("encoder", UnbuildableEncoder, "factory-returns-component"),
    ("encoder", EncoderWithoutDefaultSegmenter, "attributes-match-protocol"),
    ("encoder", EncoderWithSizeNotDivisibleByStride, "image-format-is-valid"),
    ("encoder", EncoderWithWrongOutputShape, "output-shape"),
    ("encoder", BatchDependentEncoder, "batch-invariance"),
    ("encoder", OrderDependentEncoder, "permutation-equivariance"),
    ("encoder", NondeterministicEncoder, "eval-is-deterministic"),
    ("encoder", BufferChangingEncoder, "forward-has-no-side-effects"),
    ("encoder", InputChangingEncoder, "forward-has-no-side-effects"),
    ("encoder", Float32OutputEncoder, "outputs-keep-dtype"),
    ("encoder", EncoderWithUnusedLayer, "trainable-parameters-receive-gradients"),
    ("encoder", EncoderWithUnsavedTensor, "state-dict-round-trip"),
    ("encoder", CpuAllocatingEncoder, "supports-meta-device"),
    ("encoder", ConstantEncoder, "features-depend-on-image"),
    ("segmenter", BatchDependentSegmenter, "batch-invariance"),
    ("segmenter", BoxChangingSegmenter, "box-prompts-are-kept"),
    ("segmenter", SegmenterWithoutDeclaredMasks, "provides-declared-outputs"),
    ("segmenter", MultimaskIgnoringSegmenter, "single-mask-output"),
    ("encoder", EnvironmentChangingEncoder, "process-state-is-unchanged"),
    ("encoder", OptionIgnoringEncoder, "options-take-effect"),
    ("encoder", CudnnChangingEncoder, "process-state-is-unchanged"),
    ("mixer", BatchNormMixer, "batch-invariance-in-training"),
    ("metric", MetricWithStringNeeds, "required-fields-are-valid"),
    ("metric", MetricWithMisspelledNeeds, "required-fields-are-valid"),
    ("metric", MetricReturningDict, "returns-declared-scores"),
    ("proposer", ProposerOutsideImage, "proposals-are-inside-image"),
    ("captioner", OrderReversingCaptioner, "captions-match-prompts"),
    ("captioner", BoxChangingCaptioner, "box-prompts-are-kept"),
    ("captioner", CaptionerWithTransposedMask, "box-prompts-are-kept"),
    ("captioner", BatchDependentCaptioner, "batch-invariance"),
    ("captioner", OptionIgnoringCaptioner, "rejects-unknown-arguments"),
    ("captioner", ImageChangingCaptioner, "image-is-unchanged"),
    ("segmenter", PromptIgnoringSegmenter, "outputs-depend-on-prompt"),
    ("segmenter", PaddingCountingSegmenter, "losses-ignore-padding-and-missing-masks"),
    ("segmenter", GradientStoppingSegmenter, "gradients-flow-to-inputs"),
    ("mixer", MixerWithUndeclaredNeeds, "requires-only-declared-outputs"),
    ("mixer", MixerWithUndeclaredGrid, "uses-grid-is-accurate"),
    ("mixer", RegionIgnoringMixer, "queries-depend-on-region"),
    ("mixer", MixerWithWrongQueryCount, "output-shape"),
    ("language model", NonCausalLanguageModel, "hidden-states-are-causal"),
    ("language model", PaddingAttendingLanguageModel, "batch-invariance"),
    ("language model", LanguageModelWithScaledEmbeddings, "logits-match-transformers"),
    ("language model", PrefixCountingLanguageModel, "generates-new-tokens-only"),
    ("language model", LanguageModelWithWrongScores, "default-generation-is-greedy"),
    ("language model", LoraFreezingLanguageModel, "lora-preserves-outputs"),
    ("language model", LanguageModelWithoutEos, "tokenizer-adds-only-eos"),
    ("language model", LanguageModelWithBos, "tokenizer-adds-only-eos"),
    ("language model", LanguageModelDecodingPastEos, "tokenizer-round-trip"),
    ("dataset", Gray, "samples-have-valid-types"),
    ("dataset", ShufflingDataset, "samples-are-deterministic"),
    ("dataset", EndlessDataset, "raises-index-error-past-end"),
    ("dataset", make_region_changing_dataset(convert_box_to_xywh), "boxes-are-inside-image"),
    (
        "dataset",
        make_region_changing_dataset(lambda r: Region(r.id, (0, 0, 2, 2), r.mask, r.name)),
        "boxes-contain-masks",
    ),
    ("dataset", make_region_changing_dataset(lambda r: Region(r.id, r.box, r.mask)), "regions-have-text"),
    ("encoder", CrashingEncoder, "forward-succeeds"),
    ("proposer", RandomProposer, "proposals-are-deterministic"),
    ("segmenter", SegmenterWithWrongScoreShape, "output-shapes"),
    ("segmenter", SegmenterWithAllMasksConfident, "confident-masks-match"),
    ("segmenter", SegmenterWithLossPerRegion, "losses-are-differentiable"),
    ("language model", LanguageModelWithWrongLogitsShape, "output-shapes"),
    ("mixer", MixerWithDifferentPreparedOutput, "prepare-images-preserves-queries"),
]
CHECKS_OF_REGISTERED_COMPONENTS = (
    "default-segmenter-is-registered",
    "import-has-no-side-effects",
)  # promises of what has a name, with a test each


def test_every_conformance_check_has_a_mutant_that_fails_it():
    assert {name for _, _, name in MUTANTS} | {*CHECKS_OF_REGISTERED_COMPONENTS} == {each.name for each in CHECKS}


@pytest.mark.slow
def test_encoder_with_an_unknown_default_segmenter_fails_its_check(monkeypatch):
    monkeypatch.setattr(catalogue, "REGISTRY", dict(catalogue.REGISTRY))  # so that the name is gone after the test
    sca_registry.encoders.register("nowhere", func=EncoderWithUnknownSegmenter)
    assert (
        "no segmenter 'nothing'; choose from"
        in get_failures(check_component("encoder", "nowhere"))["default-segmenter-is-registered"]
    )


@pytest.mark.slow
def test_plugin_that_prints_on_import_fails_its_check(tmp_path, monkeypatch):
    dist_info = tmp_path / "loud-1.0.dist-info"
    dist_info.mkdir()
    (dist_info / "METADATA").write_text("Metadata-Version: 2.1\nName: loud\nVersion: 1.0\n")
    (dist_info / "entry_points.txt").write_text("[sca_metrics]\nloud = loud_metric:Loud\n")
    (tmp_path / "loud_metric.py").write_text(
        "print('hello')\nfrom sca.evaluation.metrics.class_accuracy import ClassAccuracy as Loud\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    sca_registry.refresh_plugins()
    try:
        assert (
            "the import prints 'hello'" in get_failures(check_component("metric", "loud"))["import-has-no-side-effects"]
        )
    finally:
        monkeypatch.undo()
        sca_registry.refresh_plugins()


@pytest.mark.parametrize(
    ("kind", "factory", "check_name"), MUTANTS, ids=lambda value: getattr(value, "__name__", value)
)
@pytest.mark.slow
def test_check_part_names_the_check_that_a_mutant_fails(kind, factory, check_name, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    failures = get_failures(check_component(kind.replace(" ", "_"), factory))
    assert check_name in failures, failures


@pytest.mark.parametrize(
    ("kind", "factory"),
    [
        ("encoder", ValidEncoder),
        ("language_model", ValidLanguageModel),
        ("dataset", ValidDataset),
        ("captioner", ValidCaptioner),
    ],
)
def test_base_classes_of_the_mutants_pass_all_checks(kind, factory):
    assert get_failures(check_component(kind, factory)) == {}


# --- the kit itself -------------------------------------------------------------------------------------------------


def test_check_part_reports_one_finding_if_the_component_cannot_be_built():
    (finding,) = check_component("encoders", UnbuildableEncoder)
    assert "no weights here" in finding.details
    assert "no weights here" in str(finding)


def test_check_part_reports_a_crash_once_with_its_location():
    class FailingEncoder(TinyVit):
        def forward(self, pixels):
            raise RuntimeError("out of chalk")

    *passed_findings, last = check_component("encoder", FailingEncoder, image_size=64)
    assert last.name == "forward-succeeds"
    assert not last.passed
    assert "out of chalk" in last.details
    assert "(test_conformance.py:" in last.details
    assert passed_findings
    assert all(finding.passed for finding in passed_findings)


@pytest.mark.slow
def test_check_part_continues_after_a_check_raises():
    class EncoderFailingOnSingleImages(TinyVit):
        def forward(self, pixels):
            if len(pixels) == 1:
                raise RuntimeError("out of chalk")
            return super().forward(pixels)

    findings = {
        finding.name: finding for finding in check_component("encoder", EncoderFailingOnSingleImages, image_size=64)
    }
    assert "out of chalk" in findings["batch-invariance"].details
    assert findings["output-shape"].passed


def test_check_part_rejects_unknown_kinds_and_reports_unknown_names():
    with pytest.raises(RegistryError, match="unknown kind of component 'encodr'"):
        check_component("encodr", "tiny-vit")
    (finding,) = check_component("encoder", "tiny-vitt")
    assert "Did you mean 'tiny-vit'" in finding.details


def test_check_part_leaves_the_random_state_unchanged():
    random_state = torch.random.get_rng_state()
    check_component("mixer", "query", depth=1, mlp_dim=32)
    assert torch.equal(random_state, torch.random.get_rng_state())


def test_check_part_runs_common_checks_for_metrics():
    check_names = [finding.name for finding in check_component("metric", sca_registry.metrics.get("class"))]
    assert check_names == [
        *("factory-returns-component", "attributes-match-protocol"),
        *("import-has-no-side-effects", "process-state-is-unchanged"),
        *("required-fields-are-valid", "returns-declared-scores"),
    ]


@pytest.mark.slow
def test_builtin_components_import_no_optional_package_before_they_are_built():
    script = """
import sys
from sca_registry import REGISTRIES
from sca.testing.conformance.common import OPTIONAL_PACKAGES
import sca.language_models.hf
known = {*sys.modules}
for parts in REGISTRIES.values():
    for name in parts.list_names():
        if parts.load_entry(name).state == "ok":
            parts.get(name)
print(*{name.partition(".")[0] for name in {*sys.modules} - known} & {*OPTIONAL_PACKAGES})
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.split() == []


def test_conformance_fixture_fails_with_the_expectation(conformance):
    assert all(finding.passed for finding in conformance("mixer", "query", depth=1, mlp_dim=32))
    with pytest.raises(pytest.fail.Exception, match=r"FAILED  output-shape: .* Expected: "):
        conformance("mixer", MixerWithWrongQueryCount)
