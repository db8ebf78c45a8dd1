"""Floors say what training says."""

from collections import Counter

import pytest
from sca_registry.contracts import Prompt

import sca
from sca.captioners.baselines import MostFrequent, NearestNeighbor
from sca.data.scenes import Scenes

COUNT = 12
SCENES = {"dataset": "scenes", "dataset_options": {"num_images": COUNT, "image_size": 64}}
TINY = {
    "name": "tiny-vit",
    "image_size": 64,
    "hidden_size": 32,
    "depth": 1,
    "output_channels": 32,
    "stem_channels": [8, 16],
}


@pytest.fixture(scope="module")
def training():
    scenes = Scenes("train", num_images=COUNT, image_size=64)
    return [scenes[place] for place in range(COUNT)]


def boxes(sample):
    return [Prompt(box=region.box) for region in sample.regions]


def test_the_most_frequent_name_and_phrase_are_said_with_their_share(training):
    captioner = MostFrequent(**SCENES)
    regions = [region for sample in training for region in sample.regions]
    names = Counter(region.name for region in regions)
    phrases = Counter(phrase for region in regions for phrase in region.phrases)
    for task, words in (("recognition", names), ("caption", phrases)):
        (text, count) = words.most_common(1)[0]
        for caption in captioner.caption(training[0].image, [Prompt(points=((3, 3, 1),)), *boxes(training[1])], task):
            assert (caption.text, caption.score) == (text, count / words.total())


def test_only_the_first_images_are_read(training):
    captioner = MostFrequent(**SCENES, max_images=2)
    names = Counter(region.name for sample in training[:2] for region in sample.regions)
    (caption,) = captioner.caption(training[0].image, boxes(training[0])[:1], "recognition", num_beams=3)
    assert caption.text == names.most_common(1)[0][0]
    assert len(list(MostFrequent(**SCENES, max_images=0).training_regions.iter_samples())) == COUNT


def test_a_region_of_training_is_its_own_nearest_neighbor(training):
    captioner = NearestNeighbor(TINY, **SCENES)
    for sample in training[:3]:
        for region, caption in zip(sample.regions, captioner.caption(sample.image, boxes(sample)), strict=True):
            assert caption.text == region.phrases[-1]
            assert caption.score == pytest.approx(1, abs=1e-5)
            assert caption.box == region.box
        names = [caption.text for caption in captioner.caption(sample.image, boxes(sample), "recognition")]
        assert names == [region.name for region in sample.regions]


def test_neighbors_are_the_same_each_time_and_images_together_are_as_alone(training):
    test = Scenes("test", num_images=4, image_size=64)
    samples = [test[place] for place in range(4)]
    requests = [boxes(sample) for sample in samples]
    one, other = NearestNeighbor(TINY, **SCENES), NearestNeighbor(TINY, **SCENES)
    together = one.caption_batch(one.encode([sample.image for sample in samples]), requests)
    alone = [other.caption(sample.image, request) for sample, request in zip(samples, requests, strict=True)]
    assert [[each.text for each in captions] for captions in together] == [
        [each.text for each in captions] for captions in alone
    ]
    assert all(-1 <= caption.score < 1 for captions in together for caption in captions)


def test_points_have_neighbors_where_the_encoder_finds_masks(training):
    captioner = sca.load_captioner("sca-tiny+nearest-neighbor", **SCENES)
    sample = training[0]
    points = [Prompt(points=((*region.attributes["center"], 1),)) for region in sample.regions]
    found = captioner.caption(sample.image, points, "recognition")
    assert [caption.text for caption in found] == [region.name for region in sample.regions]
    assert all(caption.mask for caption in found)


def test_an_encoder_without_masks_takes_boxes(training):
    pytest.importorskip("timm")
    captioner = NearestNeighbor({"name": "timm", "model": "resnet18", "pretrained": False, "image_size": 64}, **SCENES)
    sample = training[0]
    assert [each.text for each in captioner.caption(sample.image, boxes(sample))] == [
        region.phrases[-1] for region in sample.regions
    ]
    with pytest.raises(ValueError, match="point prompts require an encoder"):
        captioner.caption(sample.image, [Prompt(points=((3, 3, 1),))])


@pytest.mark.parametrize("floor", [MostFrequent, lambda **how: NearestNeighbor(TINY, **how)])
def test_a_dataset_without_words_for_a_task_is_named(floor, training, monkeypatch):
    from dataclasses import replace

    nameless = lambda self, place: training[place]._replace(  # noqa: E731
        regions=tuple(replace(region, name=None) for region in training[place].regions)
    )
    monkeypatch.setattr(Scenes, "__getitem__", nameless)
    captioner = floor(**SCENES)
    assert captioner.caption(training[0].image, boxes(training[0]))
    with pytest.raises(ValueError, match="no region read from scenes train has a name"):
        captioner.caption(training[0].image, boxes(training[0]), "recognition")
