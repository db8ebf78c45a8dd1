"""Every registered part keeps the promises of its kind, and a part that breaks one is told which."""

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
from tiny import FAMILIES, OTHERS, tiny
from torch import nn

from sca.data.scenes import Scenes
from sca.encoders.tiny_vit import TinyVit
from sca.language_models.tiny_gpt2 import TinyGpt2
from sca.mixers.query import QueryMixer
from sca.mixers.resampler import ResamplerMixer
from sca.segmenters.box import BoxSegmenter
from sca.segmenters.sam import SamSegmenter
from sca.testing.conformance import CHECKS, check_component
from sca.testing.tiny import get_tiny_options

ON_TRIAL = ("encoders", "segmenters", "mixers", "language_models", "datasets", "metrics", "proposers", "captioners")


VARIANTS = {  # options worth trying besides those that make a component tiny
    "segmenters": {"sam": [{"hidden_size": 48}], "box": [{"hidden_size": 48}]},
    "mixers": {"query": [{"mask_pooling": True}]},
    "language_models": {"hf": [{"config": tiny(family)} for family in (*FAMILIES, *OTHERS)]},
    "datasets": {"scenes": [{"split": "train"}, {"split": "test"}]},
    "captioners": {
        "crop-captioner": [{"encoder": "sca-tiny"}],
        "blip2-opt-2.7b": [{"vcot": True}],
        "vlm": [{"region_format": "box", "encoder": "sca-tiny"}],
    },
}
READERS = (
    *("coco", "coco-json", "coco-panoptic", "coco-captions", "objects365", "v3det", "sa1b"),
    *("visual-genome", "visual-genome-grit", "refcoco", "refcoco-plus", "refcocog", "jsonl", "annotations"),
)
JUDGES = ("clip-score", "noun-recall", "semantic", "spice", "verb-recall")
FROM_FILES = (*READERS, *JUDGES, "boxes-from-coco", "gguf")  # see below, tests/data and tests/evaluation


def on_trial():
    """Every registered name at its tiny size, and variants; one of those that are the same but for size always, the
    others in `make test-all`.
    """
    seen = set()
    for kind in ON_TRIAL:
        for name in sorted(set(REGISTRIES[kind].list_names()) - set(FROM_FILES)):
            card, sizes = REGISTRIES[kind].get_card(name), get_tiny_options(kind, name)
            same = f"{kind} {card.factory} {sizes or name}"
            marks = [pytest.mark.all] if same in seen else []
            if card.extra and REGISTRIES[kind].load_entry(name).state != "ok":
                marks.append(pytest.mark.skip(reason=f"the extra {card.extra} is not installed"))
            seen.add(same)
            for number, options in enumerate([{}, *VARIANTS.get(kind, {}).get(name, [])]):
                yield pytest.param(kind, name, {**sizes, **options}, id=f"{name}-{number}", marks=marks)


def broken(findings):
    return {finding.name: finding.details for finding in findings if not finding.passed}


@pytest.mark.parametrize(("kind", "name", "options"), list(on_trial()))
@pytest.mark.slow
def test_every_registered_part_keeps_its_promises(kind, name, options):
    findings = check_component(kind, name, **options)
    assert len(findings) == sum(kind in each.kinds for each in CHECKS)
    assert broken(findings) == {}


def test_a_folder_in_the_layout_of_coco_keeps_the_promises_of_a_dataset(tmp_path):
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
    assert broken(check_component("dataset", "coco", split="val", root=str(tmp_path))) == {}


def test_boxes_from_a_file_keep_their_promises(tmp_path):
    content = {
        "images": [{"id": 1, "file_name": "image.png", "width": 48, "height": 32}],
        "annotations": [
            {"id": 1, "image_id": 1, "bbox": [3, 4, 20, 10]},
            {"id": 2, "image_id": 1, "bbox": [0, 0, 9, 9]},
        ],
    }
    (tmp_path / "boxes.json").write_text(json.dumps(content))
    assert broken(check_component("proposer", "boxes-from-coco", annotations=str(tmp_path / "boxes.json"))) == {}


@pytest.mark.slow
def test_a_segmenter_that_draws_its_prompts_keeps_them_too():
    assert broken(check_component("segmenter", "sam", depth=1, mlp_dim=64, box_masks=True)) == {}


def test_every_kind_is_tried_for_something_and_every_promise_says_where_it_is_written():
    assert {kind for each in CHECKS for kind in each.kinds} == set(COMPONENT_KINDS)
    for finding in check_component("mixer", "query", depth=1, mlp_dim=32):
        assert finding.expected.endswith("."), finding
        assert finding.source.startswith(("sca_registry.", "sca.", "plugins/"))


# --- parts that are wrong on purpose --------------------------------------------------------------------------------


class Encoder(nn.Module):
    image_format = ImageFormat(size=32)
    channels, stride, default_segmenter, checkpoint = 8, 8, "box", None

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(3, 8, 8, 8)

    def forward(self, pixels):
        return self.layer(pixels)


class NamelessEncoder(Encoder):
    default_segmenter = property()


class OddSize(Encoder):
    image_format = ImageFormat(size=36)


class Padded(Encoder):
    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(3, 8, 8, 8, padding=4)


class Neighborly(Encoder):
    def forward(self, pixels):
        return self.layer(pixels) + pixels.mean()


class Ordered(Encoder):
    def forward(self, pixels):
        return self.layer(pixels) * (1 + torch.arange(len(pixels)).to(pixels).view(-1, 1, 1, 1))


class Restless(Encoder):
    def forward(self, pixels):
        return nn.functional.dropout(self.layer(pixels), 0.1)


class Learning(Encoder):
    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, pixels):
        self.seen += 1
        return self.layer(pixels)


class Scribbling(Encoder):
    def forward(self, pixels):
        return self.layer(pixels.mul_(1.0001))


class Single(Encoder):
    def forward(self, pixels):
        return self.layer(pixels).float()


class Idle(Encoder):
    def __init__(self):
        super().__init__()
        self.spare = nn.Linear(2, 2)


class Forgetful(Encoder):
    def __init__(self):
        super().__init__()
        self.offset = torch.randn(8, 1, 1)

    def forward(self, pixels):
        return self.layer(pixels) + self.offset.to(pixels)


class Allocating(Encoder):
    def __init__(self):
        super().__init__()
        self.layer.bias = nn.Parameter(torch.zeros(8, device="cpu"))


class Loud(Encoder):
    def forward(self, pixels):
        os.environ["SCA_TEST_LOUD"] = str(random.random())
        return super().forward(pixels)


class Settled(Encoder):
    """Sets the same value each time, so that nothing changes the second time."""

    def __init__(self):
        super().__init__()
        torch.backends.cudnn.benchmark = True


class Batched(QueryMixer):
    def __init__(self, segmenter):
        super().__init__(segmenter, depth=1, mlp_dim=32)
        self.norm = nn.BatchNorm1d(self.hidden_size)

    def forward(self, regions):
        queries = super().forward(regions)
        return self.norm(queries.flatten(0, 1)).view_as(queries)


class Unnamed:
    required_fields = "caption"

    def __call__(self, records):
        return MetricOutput({"a": 1.0})


class Tabular:
    required_fields = ("caption",)

    def __call__(self, records):
        return {"a": 1.0}


class Hopeful(Tabular):
    required_fields = ("captoin",)


class Outside:
    def __call__(self, image, image_id):
        return Proposals((Prompt(box=(0.0, 0.0, 9e9, 9.0)),), (1.0,), (None,))


class Teller:
    """Says of a region how wide it is."""

    def caption(self, image, prompts, task="caption", num_beams=1):
        if task not in ("caption", "recognition"):
            raise ValueError(f"no task {task!r}")
        return [self.say(image, prompt, place) for place, prompt in enumerate(prompts)]

    def say(self, image, prompt, place):
        return Caption(f"{prompt.box[2] - prompt.box[0]:.0f} wide", 0.5, prompt.box, None, None, prompt, place)


class Backwards(Teller):
    def caption(self, image, prompts, *how, **more):
        return super().caption(image, prompts[::-1], *how, **more)


class Widening(Teller):
    def say(self, image, prompt, place):
        x1, y1, x2, y2 = prompt.box
        return replace(super().say(image, prompt, place), box=(x1, y1, x2 + 1, y2))


class Sideways(Teller):
    def say(self, image, prompt, place):
        return replace(super().say(image, prompt, place), mask={"size": [*image.size], "counts": ""})


class Sociable(Teller):
    def caption(self, image, prompts, *how, **more):
        return [replace(each, text=f"{len(prompts)}") for each in super().caption(image, prompts, *how, **more)]


class Agreeable(Teller):
    def caption(self, image, prompts, task="caption", **generation):
        return super().caption(image, prompts)


class Drawing(Teller):
    def say(self, image, prompt, place):
        image.paste("red", tuple(map(int, prompt.box)))
        return super().say(image, prompt, place)


class Stubborn(Encoder):
    def __init__(self, hidden_size=32):
        super().__init__()


class Constant(Encoder):
    def forward(self, pixels):
        return self.layer(torch.zeros_like(pixels))


class Padding(BoxSegmenter):
    """Fills the regions of an image up to the most of any image, and averages over them."""

    def forward(self, features, prompts, multimask_output=True):
        found = super().forward(features, prompts, multimask_output)
        found.tokens = found.tokens + found.tokens.mean(0)
        return found


class SmallSam(SamSegmenter):
    def __init__(self, encoder):
        super().__init__(encoder, depth=1, mlp_dim=32)


class OtherBoxes(SmallSam):
    def forward(self, features, prompts, multimask_output=True):
        found = super().forward(features, prompts, multimask_output)
        found.boxes = found.boxes + 1
        return found


class Boastful(BoxSegmenter):
    provides = ("masks", "boxes")


class ManyMasks(SmallSam):
    def forward(self, features, prompts, multimask_output=True):
        return super().forward(features, prompts)


class Deaf(BoxSegmenter):
    def encode_coordinates(self, coordinates):
        return super().encode_coordinates(torch.zeros_like(coordinates))


class CountsPadding(SmallSam):
    def compute_losses(self, regions, targets):
        targets.valid_pixels = torch.ones_like(targets.valid_pixels)
        return super().compute_losses(regions, targets)


class Cut(SmallSam):
    def forward(self, features, prompts, multimask_output=True):
        return super().forward(features.detach(), prompts, multimask_output)


class Greedy(QueryMixer):
    required_fields = ()

    def __init__(self, segmenter, **options):
        super().__init__(segmenter, mask_pooling=True, depth=1, mlp_dim=32)


class Gridless(QueryMixer):
    uses_grid = False

    def __init__(self, segmenter):
        super().__init__(segmenter, depth=1, mlp_dim=32)


class Blind(QueryMixer):
    def __init__(self, segmenter):
        super().__init__(segmenter, depth=1, mlp_dim=32)

    def forward(self, regions):
        return self.tokens.weight.expand(len(regions), -1, -1)


class TooMany(QueryMixer):
    def __init__(self, segmenter):
        super().__init__(segmenter, depth=1, mlp_dim=32)

    def forward(self, regions):
        return super().forward(regions)[:, 1:]


class Small(TinyGpt2):
    def __init__(self):
        super().__init__(hidden_size=32, depth=1)


class Clairvoyant(Small):
    def hidden_states(self, embeddings, attention_mask):
        return super().hidden_states(embeddings, attention_mask) + embeddings.roll(-1, 1)


class SeesPadding(Small):
    def hidden_states(self, embeddings, attention_mask):
        return super().hidden_states(embeddings, attention_mask) + 0.1 * embeddings.mean(1, keepdim=True)


class Scaled(Small):
    def embed_tokens(self, input_ids):
        return super().embed_tokens(input_ids) * 2


class CountsPrefix(Small):
    def generate(self, prefix, max_new_tokens, **generation):
        return super().generate(prefix, max_new_tokens + prefix.shape[1], **generation)


class Unlikely(Small):
    def generate(self, prefix, max_new_tokens, **generation):
        found = super().generate(prefix, max_new_tokens, **generation)
        return found._replace(scores=found.scores * 2)


class Freezing(Small):
    def add_lora(self, **how):
        super().add_lora(**how)
        self.model.transformer.wte.requires_grad_(False)


class Endless(Small):
    def __init__(self):
        super().__init__()
        ends = self.tokenizer.encode
        self.tokenizer.encode = lambda text, max_length=None: (
            ends(text, max_length)[:-1] or [self.tokenizer.eos_token_id]
        )


class Beginning(Small):
    def __init__(self):
        super().__init__()
        plain = self.tokenizer.encode
        self.tokenizer.encode = lambda text, max_length=None: [7, *plain(text, max_length)]


class Chatty(Small):
    def __init__(self):
        super().__init__()
        decode, end = self.tokenizer.decode, self.tokenizer.eos_token_id
        self.tokenizer.decode = lambda ids: decode([word for word in ids if word != end])


class Drawn:
    def __init__(self, split):
        self.scenes = Scenes(split, num_images=4, image_size=64)

    def __len__(self):
        return len(self.scenes)

    def __getitem__(self, index):
        return self.change(self.scenes[index])

    def change(self, sample):
        return sample


def each_region(change):
    """A dataset whose every region is `change(region)`."""

    class Changed(Drawn):
        def change(self, sample):
            return sample._replace(regions=tuple(change(region) for region in sample.regions))

    return Changed


def by_width(region):
    x1, y1, x2, y2 = region.box
    return Region(region.id, (x1, y1, x2 - x1, y2 - y1), region.mask, region.name)


class Gray(Drawn):
    def change(self, sample):
        return sample._replace(image=sample.image.convert("L"))


class Unending(Drawn):
    def __getitem__(self, index):
        return self.scenes[index % 4]


class Shuffled(Drawn):
    def __getitem__(self, index):
        sample = self.scenes[index]
        return Sample(sample.image, sample.image_id, tuple(sample.regions[i] for i in torch.randperm(2).tolist()))


class Refuses:
    def __init__(self):
        raise OSError("no weights here")


class Crashing(Encoder):
    def forward(self, pixels):
        raise RuntimeError("out of chalk")


class Wandering:
    def __call__(self, image, image_id):
        box = (0.0, 0.0, 1.0 + random.random(), 9.0)
        return Proposals((Prompt(box=box),), (1.0,), (None,))


class OneScore(SmallSam):
    def forward(self, features, prompts, multimask_output=True):
        found = super().forward(features, prompts, multimask_output)
        found.iou_scores = found.iou_scores[:, :1].expand(-1, found.masks.shape[1] + 1)
        return found


class LossOfEachRegion(SmallSam):
    def compute_losses(self, regions, targets):
        return {name: value.expand(3) for name, value in super().compute_losses(regions, targets).items()}


class Flat(Small):
    def lm_head(self, hidden_states):
        return super().lm_head(hidden_states if hidden_states.dim() > 1 else hidden_states[None])


class Rushed(ResamplerMixer):
    def __init__(self, segmenter):
        super().__init__(segmenter, depth=1)

    def forward(self, regions, prepared=None):
        return super().forward(regions, prepared) + (0.0 if prepared is None else 1.0)


class Nowhere(Encoder):
    default_segmenter = "nothing"


MUTANTS = [
    ("encoder", Refuses, "factory-returns-component"),
    ("encoder", NamelessEncoder, "attributes-match-protocol"),
    ("encoder", OddSize, "image-format-is-valid"),
    ("encoder", Padded, "output-shape"),
    ("encoder", Neighborly, "batch-invariance"),
    ("encoder", Ordered, "permutation-equivariance"),
    ("encoder", Restless, "eval-is-deterministic"),
    ("encoder", Learning, "forward-has-no-side-effects"),
    ("encoder", Scribbling, "forward-has-no-side-effects"),
    ("encoder", Single, "outputs-keep-dtype"),
    ("encoder", Idle, "trainable-parameters-receive-gradients"),
    ("encoder", Forgetful, "state-dict-round-trip"),
    ("encoder", Allocating, "supports-meta-device"),
    ("encoder", Constant, "features-depend-on-image"),
    ("segmenter", Padding, "batch-invariance"),
    ("segmenter", OtherBoxes, "box-prompts-are-kept"),
    ("segmenter", Boastful, "provides-declared-outputs"),
    ("segmenter", ManyMasks, "single-mask-output"),
    ("encoder", Loud, "process-state-is-unchanged"),
    ("encoder", Stubborn, "options-take-effect"),
    ("encoder", Settled, "process-state-is-unchanged"),
    ("mixer", Batched, "batch-invariance-in-training"),
    ("metric", Unnamed, "required-fields-are-valid"),
    ("metric", Hopeful, "required-fields-are-valid"),
    ("metric", Tabular, "returns-declared-scores"),
    ("proposer", Outside, "proposals-are-inside-image"),
    ("captioner", Backwards, "captions-match-prompts"),
    ("captioner", Widening, "box-prompts-are-kept"),
    ("captioner", Sideways, "box-prompts-are-kept"),
    ("captioner", Sociable, "batch-invariance"),
    ("captioner", Agreeable, "rejects-unknown-arguments"),
    ("captioner", Drawing, "image-is-unchanged"),
    ("segmenter", Deaf, "outputs-depend-on-prompt"),
    ("segmenter", CountsPadding, "losses-ignore-padding-and-missing-masks"),
    ("segmenter", Cut, "gradients-flow-to-inputs"),
    ("mixer", Greedy, "requires-only-declared-outputs"),
    ("mixer", Gridless, "uses-grid-is-accurate"),
    ("mixer", Blind, "queries-depend-on-region"),
    ("mixer", TooMany, "output-shape"),
    ("language model", Clairvoyant, "hidden-states-are-causal"),
    ("language model", SeesPadding, "batch-invariance"),
    ("language model", Scaled, "logits-match-transformers"),
    ("language model", CountsPrefix, "generates-new-tokens-only"),
    ("language model", Unlikely, "default-generation-is-greedy"),
    ("language model", Freezing, "lora-preserves-outputs"),
    ("language model", Endless, "tokenizer-adds-only-eos"),
    ("language model", Beginning, "tokenizer-adds-only-eos"),
    ("language model", Chatty, "tokenizer-round-trip"),
    ("dataset", Gray, "samples-have-valid-types"),
    ("dataset", Shuffled, "samples-are-deterministic"),
    ("dataset", Unending, "raises-index-error-past-end"),
    ("dataset", each_region(by_width), "boxes-are-inside-image"),
    ("dataset", each_region(lambda r: Region(r.id, (0, 0, 2, 2), r.mask, r.name)), "boxes-contain-masks"),
    ("dataset", each_region(lambda r: Region(r.id, r.box, r.mask)), "regions-have-text"),
    ("encoder", Crashing, "forward-succeeds"),
    ("proposer", Wandering, "proposals-are-deterministic"),
    ("segmenter", OneScore, "output-shapes"),
    ("segmenter", LossOfEachRegion, "losses-are-differentiable"),
    ("language model", Flat, "output-shapes"),
    ("mixer", Rushed, "prepare-images-preserves-queries"),
]
NAMED = (
    "default-segmenter-is-registered",
    "import-has-no-side-effects",
)  # promises of what has a name, with a test each


def test_every_promise_has_a_mutant_that_breaks_it():
    assert {name for _, _, name in MUTANTS} | {*NAMED} == {each.name for each in CHECKS}


@pytest.mark.slow
def test_encoder_with_an_unknown_default_segmenter_breaks_its_promise(monkeypatch):
    monkeypatch.setattr(catalogue, "REGISTRY", dict(catalogue.REGISTRY))  # so that the name is gone after the test
    sca_registry.encoders.register("nowhere", func=Nowhere)
    assert (
        "no segmenter 'nothing'; choose from"
        in broken(check_component("encoder", "nowhere"))["default-segmenter-is-registered"]
    )


@pytest.mark.slow
def test_plugin_that_prints_when_it_is_imported_breaks_its_promise(tmp_path, monkeypatch):
    info = tmp_path / "loud-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: loud\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[sca_metrics]\nloud = loud_metric:Loud\n")
    (tmp_path / "loud_metric.py").write_text(
        "print('hello')\nfrom sca.evaluation.metrics.class_accuracy import Classes as Loud\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    sca_registry.refresh_plugins()
    try:
        assert "the import prints 'hello'" in broken(check_component("metric", "loud"))["import-has-no-side-effects"]
    finally:
        monkeypatch.undo()
        sca_registry.refresh_plugins()


@pytest.mark.parametrize(("kind", "factory", "name"), MUTANTS, ids=lambda value: getattr(value, "__name__", value))
@pytest.mark.slow
def test_a_part_that_breaks_a_promise_is_told_which(kind, factory, name, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    findings = broken(check_component(kind.replace(" ", "_"), factory))
    assert name in findings, findings


@pytest.mark.parametrize(
    ("kind", "sound"), [("encoder", Encoder), ("language_model", Small), ("dataset", Drawn), ("captioner", Teller)]
)
def test_what_the_mutants_are_made_of_is_sound(kind, sound):
    assert broken(check_component(kind, sound)) == {}


# --- the kit itself -------------------------------------------------------------------------------------------------


def test_a_part_that_cannot_be_built_has_one_finding_with_the_reason():
    (finding,) = check_component("encoders", Refuses)
    assert "no weights here" in finding.details
    assert "no weights here" in str(finding)


def test_a_part_that_does_not_run_is_told_so_once_and_where_it_was_raised():
    class Fails(TinyVit):
        def forward(self, pixels):
            raise RuntimeError("out of chalk")

    *kept, last = check_component("encoder", Fails, image_size=64)
    assert last.name == "forward-succeeds"
    assert not last.passed
    assert "out of chalk" in last.details
    assert "(test_conformance.py:" in last.details
    assert kept
    assert all(finding.passed for finding in kept)


@pytest.mark.slow
def test_whatever_a_part_raises_is_a_finding_and_the_other_checks_go_on():
    class FailsAlone(TinyVit):
        def forward(self, pixels):
            if len(pixels) == 1:
                raise RuntimeError("out of chalk")
            return super().forward(pixels)

    findings = {finding.name: finding for finding in check_component("encoder", FailsAlone, image_size=64)}
    assert "out of chalk" in findings["batch-invariance"].details
    assert findings["output-shape"].passed


def test_an_unknown_kind_is_refused_and_an_unknown_name_is_a_finding():
    with pytest.raises(RegistryError, match="unknown kind of component 'encodr'"):
        check_component("encodr", "tiny-vit")
    (finding,) = check_component("encoder", "tiny-vitt")
    assert "Did you mean 'tiny-vit'" in finding.details


def test_a_check_leaves_the_random_state_as_it_was():
    before = torch.random.get_rng_state()
    check_component("mixer", "query", depth=1, mlp_dim=32)
    assert torch.equal(before, torch.random.get_rng_state())


def test_a_promise_for_all_kinds_reaches_plugins_that_compute_nothing():
    kept = [finding.name for finding in check_component("metric", sca_registry.metrics.get("class"))]
    assert kept == [
        *("factory-returns-component", "attributes-match-protocol"),
        *("import-has-no-side-effects", "process-state-is-unchanged"),
        *("required-fields-are-valid", "returns-declared-scores"),
    ]


@pytest.mark.slow
def test_no_part_of_this_package_imports_a_large_optional_package_before_it_is_built():
    program = """
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
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_the_fixture_fails_with_what_was_expected(conformance):
    assert all(finding.passed for finding in conformance("mixer", "query", depth=1, mlp_dim=32))
    with pytest.raises(pytest.fail.Exception, match=r"FAILED  output-shape: .* Expected: "):
        conformance("mixer", TooMany)
