"""Weights of SAM 2's family and its relatives: video checkpoints load, and those of another model are rejected."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import sca_registry
import torch
from safetensors.torch import load_file, save_file
from tiny_segmenters import SAM2_CONFIGS, SAM_CONFIG, build_tiny_model, make_prompts
from transformers import (
    EdgeTamModel,
    EdgeTamVideoConfig,
    EdgeTamVideoModel,
    Sam2Model,
    Sam2VideoConfig,
    Sam2VideoModel,
    Sam3TrackerModel,
    Sam3TrackerVideoConfig,
    Sam3TrackerVideoModel,
    Sam3VideoConfig,
    Sam3VideoModel,
)

from sca.encoders.sam2 import SAM3_MEAN, Sam2Encoder
from sca.segmenters.sam2 import Sam2Segmenter

SCENE = Path(__file__).parents[2] / "examples" / "scene.png"
MEMORY_CONFIG = {
    "memory_attention_hidden_size": 32,
    "memory_attention_num_layers": 1,
    "memory_attention_feed_forward_hidden_size": 32,
    "memory_encoder_hidden_size": 32,
    "memory_encoder_output_channels": 8,
    "mask_downsampler_embed_dim": 32,
    "memory_fuser_num_layers": 1,
    "memory_fuser_embed_dim": 32,
    "memory_fuser_intermediate_dim": 32,
}
VIDEO_CLASSES = {
    "sam2": (Sam2VideoConfig, Sam2VideoModel, Sam2Model),
    "edgetam": (EdgeTamVideoConfig, EdgeTamVideoModel, EdgeTamModel),
    "sam3_tracker": (Sam3TrackerVideoConfig, Sam3TrackerVideoModel, Sam3TrackerModel),
}
LAYER = {"hidden_size": 32, "num_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
TEXT_CONFIG = {
    "vocab_size": 50000,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "projection_dim": 8,
}


def save_video_model(model_type, folder):
    config_class, model_class, _ = VIDEO_CLASSES[model_type]
    torch.manual_seed(0)
    model_class(config_class(**copy.deepcopy(SAM2_CONFIGS[model_type]), **MEMORY_CONFIG)).save_pretrained(folder)


def save_sam3_video_model(folder):
    """Save a detector and a tracker with one image encoder, of four feature levels as published."""
    tracker = copy.deepcopy(SAM2_CONFIGS["sam3_tracker"])
    vision_config = tracker["vision_config"] | {"scale_factors": [4.0, 2.0, 1.0, 0.5]}
    detector = {
        "vision_config": vision_config,
        "text_config": TEXT_CONFIG,
        "geometry_encoder_config": LAYER,
        "detr_encoder_config": LAYER,
        "detr_decoder_config": LAYER | {"num_queries": 5},
        "mask_decoder_config": {"hidden_size": 32, "num_attention_heads": 4},
    }
    torch.manual_seed(0)
    config = Sam3VideoConfig(
        detector_config=detector, tracker_config=tracker | {"vision_config": vision_config} | MEMORY_CONFIG
    )
    model = Sam3VideoModel(config)
    model.save_pretrained(folder)
    return model


@torch.no_grad()
@pytest.mark.parametrize("model_type", sorted(VIDEO_CLASSES))
def test_sam2_loads_the_image_model_of_a_video_checkpoint(model_type, tmp_path):
    save_video_model(model_type, tmp_path)
    original = VIDEO_CLASSES[model_type][2].from_pretrained(tmp_path).eval()
    encoder = Sam2Encoder(str(tmp_path), model_type=model_type).eval()
    segmenter = Sam2Segmenter(encoder).eval()
    side = encoder.image_format.size
    pixel_values = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0))
    prompts = make_prompts("box", side)[:3].to(torch.float32)
    expected = original(pixel_values=pixel_values, input_boxes=prompts.boxes[None], multimask_output=True)
    torch.testing.assert_close(segmenter(encoder(pixel_values), prompts).masks, expected.pred_masks[0])
    assert (encoder.image_format.mean == SAM3_MEAN) == (model_type == "sam3_tracker")


@pytest.mark.parametrize("prefix", ["tracker_model.", "tracker_model.tracker_model."], ids=["published", "saved"])
def test_sam2_loads_the_tracker_of_a_sam3_video_checkpoint(prefix, tmp_path):
    model = save_sam3_video_model(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    assert any(name.startswith("tracker_model.tracker_model.") for name in weights)
    renamed = {name.replace("tracker_model.tracker_model.", prefix): value for name, value in weights.items()}
    save_file(renamed, file, metadata={"format": "pt"})
    encoder = Sam2Encoder(str(tmp_path))
    segmenter = Sam2Segmenter(encoder)
    tracker = model.tracker_model
    torch.testing.assert_close(segmenter.decoder.mask_tokens.weight, tracker.mask_decoder.mask_tokens.weight)
    torch.testing.assert_close(encoder.high_res_projections[1].weight, tracker.mask_decoder.conv_s0.weight)
    torch.testing.assert_close(
        encoder.vision.neck.fpn_layers[0].proj1.weight, model.tracker_neck.fpn_layers[0].proj1.weight
    )
    assert len(encoder.vision.neck.fpn_layers) == 3
    assert encoder.image_format.mean == SAM3_MEAN


@pytest.fixture(scope="module")
def folder_by_model_type(tmp_path_factory):
    folders = {}
    for model_type, config in {"sam2": SAM2_CONFIGS["sam2"], "sam": SAM_CONFIG}.items():
        folders[model_type] = tmp_path_factory.mktemp(model_type)
        build_tiny_model(model_type, config).save_pretrained(folders[model_type])
    return folders


@pytest.mark.parametrize(
    ("name", "model_type", "message"),
    [
        ("edgetam", "sam2", "has the model type 'sam2'; this component requires 'edgetam'$"),
        ("sam3-tracker", "sam2", "has the model type 'sam2'; this component requires 'sam3_tracker'$"),
        ("sam2.1-hiera-tiny", "sam", "has the model type 'sam'; this component requires 'sam2'$"),
        ("sam2", "sam", "has the model type 'sam'; this component requires 'sam2' or 'edgetam' or 'sam3_tracker'$"),
        ("sam-hq-vit-b", "sam", "has the model type 'sam'; this component requires 'sam_hq'$"),
        ("sam-vit-b", "sam2", "has the model type 'sam2'; this component requires 'sam' or 'sam_vision_model'$"),
    ],
)
def test_encoder_rejects_weights_of_another_family_under_its_name(folder_by_model_type, name, model_type, message):
    with pytest.raises(ValueError, match=message):
        sca_registry.encoders.build(name, weights=str(folder_by_model_type[model_type]))


def test_sam2_encoder_rejects_unknown_model_types():
    with pytest.raises(ValueError, match="model_type is 'sam4'; choose from sam2, edgetam, sam3_tracker"):
        Sam2Encoder(model_type="sam4", config={}, pretrained=False)


def change_config(folder, **vision_fields):
    file = folder / "config.json"
    config = json.loads(file.read_text())
    config["vision_config"] |= vision_fields
    file.write_text(json.dumps(config))


def test_sam2_encoder_rejects_a_fourth_feature_level(tmp_path):
    build_tiny_model("sam2", SAM2_CONFIGS["sam2"]).save_pretrained(tmp_path)
    change_config(tmp_path, num_feature_levels=4)
    with pytest.raises(ValueError, match="has 4 feature levels; the mask decoder of SAM 2 takes 3"):
        Sam2Encoder(str(tmp_path))


def test_sam2_encoder_rejects_weights_without_a_part_of_the_decoder(tmp_path):
    build_tiny_model("sam2", SAM2_CONFIGS["sam2"]).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = {name: value for name, value in load_file(file).items() if "iou_prediction_head" not in name}
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"does not fit a Sam2Model: it lacks mask_decoder\.iou"):
        Sam2Encoder(str(tmp_path))


@pytest.mark.slow
def test_caption_with_edgetam_names_the_missing_package_timm(tmp_path):
    build_tiny_model("edgetam", SAM2_CONFIGS["edgetam"]).save_pretrained(tmp_path)
    program = (
        "import sys; sys.modules['timm'] = None\n"
        "from sca.cli import run_command\n"
        "print(run_command(['caption', sys.argv[1], '--box', '1,1,40,40', '--model', sys.argv[2]]))"
    )
    completed = subprocess.run(
        [sys.executable, "-c", program, str(SCENE), str(tmp_path)], capture_output=True, text=True
    )
    assert completed.stdout == "2\n"
    assert "pip install timm" in completed.stderr
    assert len(completed.stderr.splitlines()) == 1
