"""Tiny image-to-text models with random weights in the layout of transformers, and an image with prompts."""

import numpy as np
import pytest
import sca_registry
import tiny_vlms
import torch
from PIL import Image
from sca_registry.contracts import Prompt

from sca.testing.tiny import get_tiny_options

CARD_NAMES = {
    "blip": "blip-base",
    "git": "git-base",
    "blip-2": "blip2-opt-2.7b",
    "florence2": "vlm",
    "kosmos-2": "kosmos-2",
}


def randomize_weights(model):
    """Draw large random weights, so that captions differ between images."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.4)
    return model


@pytest.fixture(scope="session")
def weights_folder(tmp_path_factory):
    """`weights("blip")` is the folder of a model with its tokenizer and image processor."""
    folders = {}

    def save(kind):
        if kind not in folders:
            if kind in tiny_vlms.BUILDERS:
                model, processor = tiny_vlms.build_tiny_vlm(kind)
            else:
                options = get_tiny_options("captioner", CARD_NAMES[kind])
                image_text_model = sca_registry.captioners.build(CARD_NAMES[kind], **options).image_text_model
                model, processor = image_text_model.model, image_text_model.processor
            folders[kind] = tmp_path_factory.mktemp(kind)
            randomize_weights(model).save_pretrained(folders[kind])
            processor.save_pretrained(folders[kind])
        return str(folders[kind])

    return save


@pytest.fixture
def image():
    pixels = np.random.default_rng(3).integers(0, 255, (60, 80, 3), np.uint8)
    pixels[10:30, 10:40] = (200, 30, 30)
    pixels[35:55, 50:70] = (20, 30, 200)
    return Image.fromarray(pixels)


@pytest.fixture
def prompts():
    """Boxes and a mask: prompts that require no encoder."""
    mask = np.zeros((60, 80), bool)
    mask[12:28, 15:33] = True
    mask[12, 15] = False
    boxes = [(10.2, 9.7, 39.5, 30.0), (50.0, 35.0, 70.0, 55.0), (0.0, 0.0, 80.0, 60.0)]
    return [*(Prompt(box=box) for box in boxes), Prompt(mask=mask)]


@pytest.fixture
def question_calls(monkeypatch):
    """Questions passed to an image-to-text model, one list per call."""
    from sca.captioners.image_text import ImageTextModel

    calls = []
    generate_texts = ImageTextModel.generate_texts

    def record_and_generate(self, questions, **settings):
        calls.append(list(questions))
        return generate_texts(self, questions, **settings)

    monkeypatch.setattr(ImageTextModel, "generate_texts", record_and_generate)
    return calls
