"""SAM 2, EdgeTAM and the tracker of SAM 3: outputs equal those of transformers."""

import pytest
import torch
from tiny_segmenters import (
    PROMPT_KINDS,
    SAM2_CONFIGS,
    build_tiny_model,
    make_prompts,
    predict_with_original,
    relative_difference,
)

from sca.encoders.sam2 import Sam2Encoder
from sca.segmenters.sam2 import Sam2Segmenter

TOLERANCE = 1e-12  # relative, in float64


@pytest.fixture(scope="module", params=sorted(SAM2_CONFIGS))
def models(request, tmp_path_factory):
    """The model of transformers and ours with its weights, in float64."""
    original = build_tiny_model(request.param, SAM2_CONFIGS[request.param])
    folder = tmp_path_factory.mktemp(request.param)
    original.save_pretrained(folder)
    encoder = Sam2Encoder(str(folder)).eval()
    return original.double(), encoder.double(), Sam2Segmenter(encoder).eval().double()


@pytest.fixture(scope="module")
def pixel_values(models):
    side = models[1].image_format.size
    return torch.randn(2, 3, side, side, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def image_embeddings(models, pixel_values):
    """Return the image embeddings of transformers' model."""
    return [{"image_embeddings": models[0].get_image_embeddings(image[None])} for image in pixel_values]


@torch.no_grad()
@pytest.mark.parametrize("multimask_output", [True, False], ids=["three masks", "one mask"])
@pytest.mark.parametrize("kind", PROMPT_KINDS)
def test_sam2_segmenter_matches_transformers(models, pixel_values, image_embeddings, kind, multimask_output):
    original, encoder, segmenter = models
    prompts = make_prompts(kind, encoder.image_format.size)
    expected_masks, expected_scores = predict_with_original(original, image_embeddings, prompts, multimask_output)
    output = segmenter(encoder(pixel_values), prompts, multimask_output)
    assert relative_difference(output.masks, expected_masks) < TOLERANCE
    assert relative_difference(output.iou_scores, expected_scores) < TOLERANCE


@torch.no_grad()
def test_sam2_encoder_ignores_the_fourth_feature_level_of_sam3():
    config = SAM2_CONFIGS["sam3_tracker"]
    four_levels = {**config, "vision_config": {**config["vision_config"], "scale_factors": [4.0, 2.0, 1.0, 0.5]}}
    encoder = Sam2Encoder(model_type="sam3_tracker", config=four_levels, pretrained=False)
    assert encoder(torch.zeros(1, 3, 112, 112)).shape == (1, encoder.channels, 8, 8)


@torch.no_grad()
def test_sam2_encoder_without_high_res_features_returns_the_image_features_only(models, pixel_values):
    encoder = models[1]
    folder = encoder.checkpoint
    small_encoder = Sam2Encoder(folder, high_res_features=False).eval().double()
    features = small_encoder(pixel_values)
    torch.testing.assert_close(features, encoder(pixel_values)[:, : small_encoder.channels])
    output = Sam2Segmenter(small_encoder).eval().double()(features, make_prompts("box", encoder.image_format.size))
    assert output.masks.shape == (4, 3, 32, 32)
