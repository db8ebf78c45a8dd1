"""Template phrases are true of the augmented training image."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from sca_registry.contracts import CAPTION_TASK_ID, ImageFormat, Region, Sample

from sca.inference.processor import Processor
from sca.language_models.tiny_gpt2 import TinyGpt2
from sca.training.augmentation import Augmentation
from sca.training.examples import ExampleStream
from sca.training.recipe import SamplingOptions
from sca.training.template_phrases import add_template_phrases, make_template_phrases


def make_sample(*regions):
    return Sample(Image.new("RGB", (100, 100)), 1, regions)


def test_add_template_phrases_fills_only_named_regions_without_phrases():
    owl_box, cat_box, unnamed_box = (0, 0, 10, 10), (40, 40, 60, 60), (0, 0, 9, 9)
    original = make_sample(
        Region(1, cat_box, None, "cat", ("a tabby",)), Region(2, owl_box, None, "old owl"), Region(3, unnamed_box)
    )
    completed = add_template_phrases(original, original)
    assert [region.phrases for region in completed.regions] == [
        ("a tabby",),
        ("the small old owl", "the old owl at the top left", "the small old owl at the top left"),
        (),
    ]


def test_template_phrase_is_indefinite_if_the_class_also_occurs_outside_the_crop():
    owls = [Region(number, (x, 0, x + 40, 40), None, "owl") for number, x in enumerate((0, 60))]
    assert add_template_phrases(make_sample(owls[0]), make_sample(*owls)).regions[0].phrases[0] == "a large owl"


def test_template_phrases_describe_the_region_within_a_larger_image():
    crop = make_sample(Region(1, (0, 0, 10, 10), None, "owl"))
    phrases = add_template_phrases(crop, crop, whole_image=(-190, -190, 10, 10)).regions[0].phrases
    assert phrases == ("the small owl", "the owl at the bottom right", "the small owl at the bottom right")


def test_template_phrases_describe_the_region_within_the_crop():
    """A small object at the left of the image can be a large one in the middle of a crop."""
    language_model = TinyGpt2(hidden_size=8, depth=1, num_heads=1)
    processor, sampling = Processor(ImageFormat(size=32), 4), SamplingOptions(max_tokens=40)
    uncropped = make_sample(Region(1, (20, 20, 44, 44), None, "owl"))
    augment = Augmentation(flip_prob=0.0, min_crop_fraction=0.3)
    stream = ExampleStream(
        [uncropped], processor, language_model.tokenizer, sampling, 60, augment=augment, phrase_mode="template"
    )
    texts = set()
    for index in range(60):
        rng = np.random.default_rng([0, 1, index])  # the dataset of the example stream
        augmented = augment(uncropped, rng)
        owl = (augmented if augmented.regions else uncropped).regions[0]
        size = augmented.image.size if augmented.regions else uncropped.image.size
        example = stream[index]
        assert example.task_ids.tolist() == [CAPTION_TASK_ID]
        text = language_model.tokenizer.decode(example.input_ids[0])
        assert text in make_template_phrases("owl", owl.box, size, is_unique=True)
        texts.add(text)
    assert {"the owl at the top left", "the large owl"} <= texts


@pytest.mark.parametrize(
    ("box", "phrases"),
    [
        ((0, 40, 20, 60), ("a car", "a car on the left")),
        ((60, 0, 100, 40), ("a large car", "a car at the top right", "a large car at the top right")),
        ((48, 48, 52, 52), ("a small car", "a car in the middle", "a small car in the middle")),
        ((0, 60, 100, 100), ("a large car", "a car at the bottom", "a large car at the bottom")),
    ],
)
def test_template_phrases_state_size_and_position(box, phrases):
    assert make_template_phrases("car", box, (100, 100), is_unique=False) == phrases


@given(*[st.integers(0, 99)] * 2, *[st.integers(1, 100)] * 2)
def test_template_phrases_of_mirrored_box_swap_only_left_and_right(x, y, width, height):
    x2, y2 = min(x + width, 100), min(y + height, 100)
    original = " ".join(make_template_phrases("cat", (x, y, x2, y2), (100, 100), is_unique=True))
    mirrored = " ".join(make_template_phrases("cat", (100 - x2, y, 100 - x, y2), (100, 100), is_unique=True))
    swap = {"left": "right", "right": "left"}
    assert mirrored.split() == [swap.get(word, word) for word in original.split()]
