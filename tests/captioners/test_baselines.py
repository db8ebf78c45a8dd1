"""Baselines: captions of the most frequent and the nearest training regions."""

from collections import Counter

import pytest
from sca_registry.contracts import Prompt

import sca
from sca.captioners.baselines import MostFrequent, NearestNeighbor
from sca.data.scenes import Scenes

NUM_SCENES = 12
DATASET_OPTIONS = {"dataset": "scenes", "dataset_options": {"num_images": NUM_SCENES, "image_size": 64}}
TINY_ENCODER = {
    "name": "tiny-vit",
    "image_size": 64,
    "hidden_size": 32,
    "depth": 1,
    "output_channels": 32,
    "stem_channels": [8, 16],
}


@pytest.fixture(scope="module")
def training_samples():
    scenes = Scenes("train", num_images=NUM_SCENES, image_size=64)
    return [scenes[index] for index in range(NUM_SCENES)]


def make_box_prompts(sample):
    return [Prompt(box=region.box) for region in sample.regions]


def test_most_frequent_returns_the_commonest_text_with_its_share(training_samples):
    captioner = MostFrequent(**DATASET_OPTIONS)
    regions = [region for sample in training_samples for region in sample.regions]
    names = Counter(region.name for region in regions)
    phrases = Counter(phrase for region in regions for phrase in region.phrases)
    for task, text_counts in (("recognition", names), ("caption", phrases)):
        (text, count) = text_counts.most_common(1)[0]
        for caption in captioner.caption(
            training_samples[0].image, [Prompt(points=((3, 3, 1),)), *make_box_prompts(training_samples[1])], task
        ):
            assert (caption.text, caption.score) == (text, count / text_counts.total())


def test_most_frequent_reads_at_most_limit_images(training_samples):
    captioner = MostFrequent(**DATASET_OPTIONS, max_images=2)
    names = Counter(region.name for sample in training_samples[:2] for region in sample.regions)
    (caption,) = captioner.caption(
        training_samples[0].image, make_box_prompts(training_samples[0])[:1], "recognition", num_beams=3
    )
    assert caption.text == names.most_common(1)[0][0]
    assert len(list(MostFrequent(**DATASET_OPTIONS, max_images=0).training_regions.iter_samples())) == NUM_SCENES


def test_nearest_neighbor_of_a_training_region_is_the_region_itself(training_samples):
    captioner = NearestNeighbor(TINY_ENCODER, **DATASET_OPTIONS)
    for sample in training_samples[:3]:
        for region, caption in zip(
            sample.regions, captioner.caption(sample.image, make_box_prompts(sample)), strict=True
        ):
            assert caption.text == region.phrases[-1]
            assert caption.score == pytest.approx(1, abs=1e-5)
            assert caption.box == region.box
        names = [caption.text for caption in captioner.caption(sample.image, make_box_prompts(sample), "recognition")]
        assert names == [region.name for region in sample.regions]


def test_nearest_neighbor_is_reproducible_and_independent_of_batching(training_samples):
    test_scenes = Scenes("test", num_images=4, image_size=64)
    samples = [test_scenes[index] for index in range(4)]
    requests = [make_box_prompts(sample) for sample in samples]
    first_captioner, second_captioner = (
        NearestNeighbor(TINY_ENCODER, **DATASET_OPTIONS),
        NearestNeighbor(TINY_ENCODER, **DATASET_OPTIONS),
    )
    batched_captions = first_captioner.caption_batch(
        first_captioner.encode([sample.image for sample in samples]), requests
    )
    single_captions = [
        second_captioner.caption(sample.image, request) for sample, request in zip(samples, requests, strict=True)
    ]
    assert [[each.text for each in captions] for captions in batched_captions] == [
        [each.text for each in captions] for captions in single_captions
    ]
    assert all(-1 <= caption.score < 1 for captions in batched_captions for caption in captions)


def test_nearest_neighbor_accepts_points_if_the_encoder_predicts_masks(training_samples):
    captioner = sca.load_captioner("sca-tiny+nearest-neighbor", **DATASET_OPTIONS)
    sample = training_samples[0]
    points = [Prompt(points=((*region.attributes["center"], 1),)) for region in sample.regions]
    captions = captioner.caption(sample.image, points, "recognition")
    assert [caption.text for caption in captions] == [region.name for region in sample.regions]
    assert all(caption.mask for caption in captions)


def test_nearest_neighbor_without_masks_accepts_boxes_and_rejects_points(training_samples):
    pytest.importorskip("timm")
    captioner = NearestNeighbor(
        {"name": "timm", "model": "resnet18", "pretrained": False, "image_size": 64}, **DATASET_OPTIONS
    )
    sample = training_samples[0]
    assert [each.text for each in captioner.caption(sample.image, make_box_prompts(sample))] == [
        region.phrases[-1] for region in sample.regions
    ]
    with pytest.raises(ValueError, match="point prompts require an encoder"):
        captioner.caption(sample.image, [Prompt(points=((3, 3, 1),))])


@pytest.mark.parametrize("build_baseline", [MostFrequent, lambda **how: NearestNeighbor(TINY_ENCODER, **how)])
def test_baseline_names_a_dataset_without_texts_for_the_task(build_baseline, training_samples, monkeypatch):
    from dataclasses import replace

    get_sample_without_names = lambda self, place: training_samples[place]._replace(  # noqa: E731
        regions=tuple(replace(region, name=None) for region in training_samples[place].regions)
    )
    monkeypatch.setattr(Scenes, "__getitem__", get_sample_without_names)
    captioner = build_baseline(**DATASET_OPTIONS)
    assert captioner.caption(training_samples[0].image, make_box_prompts(training_samples[0]))
    with pytest.raises(ValueError, match="no region read from scenes train has a name"):
        captioner.caption(training_samples[0].image, make_box_prompts(training_samples[0]), "recognition")
