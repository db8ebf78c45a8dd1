"""Tests of MobileSAM's components and of the conversion of its weights."""

import re

import pytest
import torch
from sca_mobilesam import MobileSamEncoder, MobileSamSegmenter
from sca_registry.contracts import PromptBatch

pytest_plugins = ["sca.testing.pytest"]  # provides the fixture `conformance`

TO_ORIGINAL = (  # written by hand from the original code
    (r"^vit\.patch_embed\.conv1\.", "patch_embed.seq.0."),
    (r"^vit\.patch_embed\.conv2\.", "patch_embed.seq.2."),
    (r"^vit\.stages\.(\d)\.blocks\.", r"layers.\1.blocks."),
    (r"^vit\.stages\.(\d)\.downsample\.", lambda match: f"layers.{int(match[1]) - 1}.downsample."),
    (r"\.conv\.", ".c."),
)
SEGMENTER_NAMES = {
    "decoder.iou_prediction_head.proj_in.weight": "mask_decoder.iou_prediction_head.layers.0.weight",
    "decoder.iou_prediction_head.layers.0.bias": "mask_decoder.iou_prediction_head.layers.1.bias",
    "decoder.output_hypernetworks_mlps.3.proj_out.bias": "mask_decoder.output_hypernetworks_mlps.3.layers.2.bias",
    "decoder.transformer.layers.1.layer_norm4.weight": "mask_decoder.transformer.layers.1.norm4.weight",
    "decoder.transformer.layer_norm_final_attn.bias": "mask_decoder.transformer.norm_final_attn.bias",
    "decoder.upscale_layer_norm.weight": "mask_decoder.output_upscaling.1.weight",
    "prompt_encoder.shared_embedding.positional_embedding": (
        "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"
    ),
    "prompt_encoder.point_embed.2.weight": "prompt_encoder.point_embeddings.2.weight",
    "prompt_encoder.mask_embed.conv3.weight": "prompt_encoder.mask_downscaling.6.weight",
}


def convert_to_original_name(name: str) -> str:
    """Return the name of a segmenter tensor in the original code."""
    name = name.replace("decoder.", "mask_decoder.", 1) if name.startswith("decoder.") else name
    if re.search(r"iou_prediction_head|hypernetworks", name):
        name = re.sub(r"layers\.0\.", "layers.1.", name)
    for here, there in (
        ("proj_in.", "layers.0."),
        ("proj_out.", "layers.2."),
        ("upscale_conv1", "output_upscaling.0"),
        ("upscale_layer_norm", "output_upscaling.1"),
        ("upscale_conv2", "output_upscaling.3"),
        ("mask_embed.conv1", "mask_downscaling.0"),
        ("mask_embed.layer_norm1", "mask_downscaling.1"),
        ("mask_embed.conv2", "mask_downscaling.3"),
        ("mask_embed.layer_norm2", "mask_downscaling.4"),
        ("mask_embed.conv3", "mask_downscaling.6"),
        ("point_embed", "point_embeddings"),
        ("shared_embedding.positional_embedding", "pe_layer.positional_encoding_gaussian_matrix"),
        (".layer_norm", ".norm"),
    ):
        name = name.replace(here, there)
    return name


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """Write random weights in the layout of mobile_sam.pt, with its classifier and index tables."""
    torch.manual_seed(0)
    encoder = MobileSamEncoder(pretrained=False, image_size=64)
    segmenter = MobileSamSegmenter(encoder)
    content = {}
    for name, tensor in encoder.state_dict().items():
        for pattern, there in TO_ORIGINAL:
            name = re.sub(pattern, there, name)
        content[f"image_encoder.{name}"] = tensor
    content |= {convert_to_original_name(name): tensor for name, tensor in segmenter.state_dict().items()}
    content |= {
        "image_encoder.head.weight": torch.zeros(1000, 320),
        "image_encoder.norm_head.bias": torch.zeros(320),
        "image_encoder.layers.1.blocks.0.attn.attention_bias_idxs": torch.zeros(49, 49, dtype=torch.long),
    }
    path = tmp_path_factory.mktemp("weights") / "mobile_sam.pt"
    torch.save(content, path)
    return path, encoder.eval(), segmenter.eval(), content


def test_components_pass_conformance(conformance):
    conformance("encoder", MobileSamEncoder, pretrained=False, image_size=64)
    conformance("segmenter", MobileSamSegmenter, pretrained=False)


@torch.no_grad()
def test_checkpoint_in_the_original_layout_has_the_same_outputs(file):
    path, encoder, segmenter, content = file
    for name, original_name in SEGMENTER_NAMES.items():
        assert torch.equal(segmenter.state_dict()[name], content[original_name])
    loaded_encoder = MobileSamEncoder(str(path), image_size=64).eval()
    pixels = torch.randn(1, 3, 64, 64)
    assert torch.equal(loaded_encoder(pixels), encoder(pixels))
    assert loaded_encoder(pixels).shape == (1, 256, 4, 4)
    loaded_segmenter = MobileSamSegmenter(loaded_encoder)
    assert all(
        torch.equal(value, segmenter.state_dict()[name]) for name, value in loaded_segmenter.state_dict().items()
    )
    assert loaded_encoder.checkpoint == loaded_segmenter.checkpoint == str(path)


@torch.no_grad()
def test_masks_and_scores_equal_the_original_code(tmp_path):
    mobile_sam = pytest.importorskip("mobile_sam", reason="mobilesam-mirror is not installed")
    torch.manual_seed(0)
    original = mobile_sam.sam_model_registry["vit_t"]()
    for name, parameter in original.image_encoder.named_parameters():
        if name.endswith("attention_biases"):  # initialized with zeros
            torch.nn.init.normal_(parameter)
    original.eval()  # caches the biases
    torch.save(original.state_dict(), tmp_path / "mobile_sam.pt")
    encoder = MobileSamEncoder(str(tmp_path / "mobile_sam.pt")).eval()
    segmenter = MobileSamSegmenter(encoder).eval()
    pixels = torch.randn(1, 3, 1024, 1024)
    features = encoder(pixels)
    assert torch.allclose(features, original.image_encoder(pixels), atol=1e-4)
    boxes = torch.tensor([[100.0, 200, 500, 900], [0, 0, 1023, 400]])
    output = segmenter(features, PromptBatch(torch.zeros(2, dtype=torch.long), boxes=boxes))
    sparse, dense = original.prompt_encoder(None, boxes, None)
    expected, scores = original.mask_decoder(
        features, original.prompt_encoder.get_dense_pe(), sparse, dense, multimask_output=True
    )
    assert torch.allclose(output.masks, expected, atol=1e-4)
    assert torch.allclose(output.iou_scores, scores, atol=1e-4)


def test_encoder_has_six_million_parameters():
    with torch.device("meta"):
        encoder = MobileSamEncoder(pretrained=False)
    assert 5.5e6 < sum(parameter.numel() for parameter in encoder.parameters()) < 6.5e6


def test_other_checkpoints_are_rejected(file, tmp_path):
    torch.save({name: tensor for name, tensor in file[3].items() if "neck.0" not in name}, tmp_path / "less.pt")
    with pytest.raises(ValueError, match=r"less\.pt is not a MobileSAM checkpoint: missing neck\.0\.weight"):
        MobileSamEncoder(str(tmp_path / "less.pt"))
    with pytest.raises(ValueError, match=r"absent\.pt"):
        MobileSamEncoder("absent.pt")
    with pytest.raises(ValueError, match=r"no weights; set weights=mobile_sam\.pt"):
        MobileSamEncoder()
