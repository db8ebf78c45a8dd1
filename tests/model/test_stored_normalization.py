"""Encoders of segmenters normalize images as the image processor that is stored with their weights does."""

import json

import numpy as np
import pytest
import sca_registry
import torch
from PIL import Image
from sca_registry import RegistryError
from tiny_segmenters import SAM2_CONFIGS, SAM_CONFIG, SAM_HQ_CONFIG, build_tiny_model
from transformers import SamProcessor
from transformers.models.sam.image_processing_pil_sam import SamImageProcessorPil

import sca
from sca.checkpoints.portable import write_portable_checkpoint
from sca.inference.processor import Processor

MEAN, STD = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
CONFIGS = {"sam": SAM_CONFIG, "sam2": SAM2_CONFIGS["sam2"], "sam-hq": SAM_HQ_CONFIG}


def write_json(path, content):
    path.write_text(json.dumps(content))


@pytest.fixture(params=CONFIGS)
def encoder(request, tmp_path):
    """Name of an encoder and folder with its weights."""
    build_tiny_model(request.param.replace("-", "_"), CONFIGS[request.param]).save_pretrained(tmp_path / "weights")
    return request.param, tmp_path / "weights"


@pytest.mark.parametrize("file", ["preprocessor_config.json", "processor_config.json"])
def test_encoder_applies_the_stored_normalization(encoder, file):
    name, folder = encoder
    values = {"image_mean": MEAN, "image_std": STD}
    write_json(folder / file, {"image_processor": values} if file == "processor_config.json" else values)
    image_format = sca_registry.encoders.build(name, weights=str(folder)).image_format
    assert (image_format.mean, image_format.std) == (MEAN, STD)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"image_mean": 0.5}, r"image_mean in .*preprocessor_config\.json is 0\.5; expected three numbers"),
        ({"image_mean": [0.5, 0.5]}, "image_mean .* expected three numbers"),
        ({"image_std": [0.5, 0.5, 0]}, "image_std .* expected three positive numbers"),
    ],
)
def test_encoder_rejects_an_invalid_stored_normalization(tmp_path, values, message):
    build_tiny_model("sam", SAM_CONFIG).save_pretrained(tmp_path)
    write_json(tmp_path / "preprocessor_config.json", values)
    with pytest.raises(RegistryError, match=message):
        sca_registry.encoders.build("sam", weights=str(tmp_path))


@pytest.mark.slow
def test_portable_checkpoint_keeps_the_normalization_of_transformers_processor(tmp_path):
    build_tiny_model("sam", SAM_CONFIG).save_pretrained(tmp_path / "weights")
    size, pad = {"longest_edge": 128}, {"height": 128, "width": 128}
    reference = SamProcessor(SamImageProcessorPil(image_mean=MEAN, image_std=STD, size=size, pad_size=pad))
    reference.save_pretrained(tmp_path / "weights")
    encoder = {"name": "sam", "weights": str(tmp_path / "weights")}
    model = sca.compose(encoder, "masked-pool", {"name": "tiny-gpt2", "depth": 1})
    write_portable_checkpoint(model, tmp_path / "model")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 128, 3), dtype=np.uint8))
    expected = reference(image, return_tensors="pt")["pixel_values"]
    for each in (model, sca.load(tmp_path / "model")):
        assert torch.allclose(Processor.from_encoder(each.encoder).preprocess_images([image]), expected, atol=1e-5)
