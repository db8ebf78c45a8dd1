"""SAM 2, EdgeTAM, the tracker of SAM 3 and HQ-SAM: outputs equal those of transformers."""

import pytest
import torch
from tiny_segmenters import (
    SAM2_CONFIGS,
    SAM_HQ_CONFIG,
    build_tiny_model,
    correct_sam_hq_decoder,
    make_prompts,
)

from sca.encoders.sam2 import Sam2Encoder
from sca.segmenters.sam2 import Sam2Segmenter
from sca.testing.parity import check_parity

REFERENCES = {
    "sam2": ("sam2", "Sam2Model"),
    "edgetam": ("edgetam", "EdgeTamModel"),
    "sam3_tracker": ("sam3-tracker", "Sam3TrackerModel"),
}


@pytest.mark.parametrize("model_type", REFERENCES)
def test_sam2_segmenter_matches_transformers(model_type):
    name, model_class = REFERENCES[model_type]
    results = check_parity("segmenter", name, f"transformers:{model_class}", config=SAM2_CONFIGS[model_type])
    assert all(result.passed for result in results), results


def test_sam_hq_segmenter_matches_corrected_transformers(monkeypatch):
    correct_sam_hq_decoder(monkeypatch)
    results = check_parity("segmenter", "sam-hq", "transformers:SamHQModel", config=SAM_HQ_CONFIG)
    assert all(result.passed for result in results), results


@torch.no_grad()
@pytest.mark.parametrize("kind", ["box", "points", "box and mask"])
@pytest.mark.parametrize("model_type", sorted(SAM2_CONFIGS))
def test_sam2_segmenter_matches_transformers_in_float32(model_type, kind, tmp_path):
    original = build_tiny_model(model_type, SAM2_CONFIGS[model_type])
    original.save_pretrained(tmp_path)
    encoder = Sam2Encoder(str(tmp_path)).eval()
    side = encoder.image_format.size
    prompts = make_prompts(kind, side)[:1].to(torch.float32)
    pixel_values = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0))
    output = Sam2Segmenter(encoder).eval()(encoder(pixel_values), prompts)
    expected = original(
        pixel_values=pixel_values,
        input_boxes=None if prompts.boxes is None else prompts.boxes[None],
        input_points=None if prompts.points is None else prompts.points[None],
        input_labels=None if prompts.labels is None else prompts.labels[None],
        input_masks=prompts.masks,
    )
    for actual, reference in ((output.masks, expected.pred_masks[0]), (output.iou_scores, expected.iou_scores[0])):
        assert (actual - reference).abs().max() <= 1e-4 * reference.abs().max()


@torch.no_grad()
def test_sam2_encoder_ignores_the_fourth_feature_level_of_sam3():
    config = SAM2_CONFIGS["sam3_tracker"]
    four_levels = {**config, "vision_config": {**config["vision_config"], "scale_factors": [4.0, 2.0, 1.0, 0.5]}}
    encoder = Sam2Encoder(model_type="sam3_tracker", config=four_levels, pretrained=False)
    assert encoder(torch.zeros(1, 3, 112, 112)).shape == (1, encoder.channels, 8, 8)


@torch.no_grad()
@pytest.mark.parametrize("model_type", sorted(SAM2_CONFIGS))
def test_sam2_encoder_without_high_res_features_returns_the_image_features_only(model_type, tmp_path):
    build_tiny_model(model_type, SAM2_CONFIGS[model_type]).save_pretrained(tmp_path)
    encoder = Sam2Encoder(str(tmp_path)).eval().double()
    small_encoder = Sam2Encoder(str(tmp_path), high_res_features=False).eval().double()
    side = encoder.image_format.size
    pixel_values = torch.randn(2, 3, side, side, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    features = small_encoder(pixel_values)
    torch.testing.assert_close(features, encoder(pixel_values)[:, : small_encoder.channels])
    output = Sam2Segmenter(small_encoder).eval().double()(features, make_prompts("box", side))
    assert output.masks.shape == (4, 3, 32, 32)
