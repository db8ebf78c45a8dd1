"""Tests of the encoder and the proposer of MMDetection without a compiled mmcv."""

import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from sca_mmdet.detectors import build_detector, load_mmdet_config
from sca_mmdet.encoder import MmdetEncoder
from sca_mmdet.operators import install_operators, nms, roi_align_backward, softnms
from sca_mmdet.proposer import MmdetProposer

pytest_plugins = ["sca.testing.pytest"]  # provides the fixture `conformance`

TINY = "rtmdet_tiny_8xb32-300e_coco"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Write random weights in the format of mmengine, with custom class names; return the file and the detector."""
    torch.manual_seed(0)
    config = load_mmdet_config(TINY)
    detector, _ = build_detector(config, TINY, None)
    for convolution in detector.bbox_head.rtm_reg:
        torch.nn.init.constant_(convolution.bias, 3.0)  # boxes larger than a pixel
    file = tmp_path_factory.mktemp("weights") / "rtmdet.pth"
    meta = {"dataset_meta": {"classes": tuple(f"thing {number}" for number in range(80))}}
    torch.save({"meta": meta, "state_dict": detector.state_dict(), "message_hub": {"epoch": np.float64(3)}}, file)
    return file, detector


@pytest.mark.parametrize(
    ("kind", "component", "options"),
    [
        ("encoder", MmdetEncoder, {"config": TINY, "pretrained": False, "image_size": 64}),
        ("encoder", MmdetEncoder, {"config": "faster-rcnn_r50_fpn_1x_coco", "pretrained": False, "image_size": 64}),
        ("proposer", MmdetProposer, {"config": TINY, "pretrained": False, "score_thresh": 0.0, "max_regions": 5}),
    ],
)
def test_components_pass_conformance(kind, component, options, conformance):
    conformance(kind, component, **options)


@pytest.mark.parametrize(
    ("config", "order", "channels"),
    [
        (TINY, "bgr", 96),
        ("dino-4scale_r50_8xb2-12e_coco", "rgb", 256),
        ("yolox_tiny_8xb8-300e_coco", "bgr", 96),
        ("mask-rcnn_r50-caffe-c4_1x_coco", "bgr", 1024),
        ("retinanet_r50_fpn_1x_coco", "rgb", 256),
        ("mask2former_r50_8xb2-lsj-50e_coco", "rgb", 1024),
    ],
)
def test_encoder_selects_the_level_nearest_to_stride_16(config, order, channels):
    with torch.device("meta"):
        encoder = MmdetEncoder(config, pretrained=False)
    assert (encoder.image_format.channel_order, encoder.channels, encoder.stride) == (order, channels, 16)


@torch.no_grad()
def test_encoder_returns_the_features_of_the_detector(checkpoint):
    file, detector = checkpoint
    pixels = torch.randn(1, 3, 64, 64)
    levels = detector.extract_feat(pixels)
    for level in (0, 1, -1):
        encoder = MmdetEncoder(TINY, weights=str(file), image_size=64, feature_level=level).eval()
        assert torch.equal(encoder(pixels), levels[level])
    with pytest.raises(ValueError, match=r"feature_level 3 is out of range; .* has 3 levels"):
        MmdetEncoder(TINY, weights=str(file), feature_level=3)


def test_image_format_matches_mmdet_preprocessing(checkpoint):
    from mmdet.apis import inference_detector

    from sca.inference.processor import Processor

    file, _ = checkpoint
    proposer = MmdetProposer(TINY, weights=str(file))
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (640, 640, 3), dtype=np.uint8))
    inputs = []
    handle = proposer.detector.backbone.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    inference_detector(proposer.detector, np.asarray(image)[..., ::-1].copy())
    handle.remove()
    pixels = Processor.from_encoder(MmdetEncoder(TINY, weights=str(file))).preprocess_images([image])
    torch.testing.assert_close(pixels, inputs[0], rtol=1e-4, atol=1e-4)


def test_proposer_returns_scores_and_class_names(checkpoint):
    image = Image.new("RGB", (640, 480))
    proposals = MmdetProposer(TINY, weights=str(checkpoint[0]), score_thresh=0.0, max_regions=7)(image, "a")
    assert len(proposals.prompts) == 7
    assert list(proposals.scores) == sorted(proposals.scores, reverse=True)
    assert all(name.startswith("thing ") for name in proposals.names)
    proposer = MmdetProposer("faster-rcnn_r50_fpn_1x_coco", pretrained=False, score_thresh=0.0, max_regions=3)
    assert "person" in proposer.class_names
    assert {*proposer(image, "a").names} <= {*proposer.class_names}
    assert len(proposer(image, "a").prompts) == 3
    assert not MmdetProposer("faster-rcnn_r50_fpn_1x_coco", pretrained=False, score_thresh=0.9)(image, "a").prompts


@pytest.mark.parametrize(
    ("config", "operator"),
    [
        ("faster-rcnn_r50-mdconv-c3-c5_fpn_1x_coco", "deform_conv"),
        ("faster-rcnn_r50_fpn-carafe_1x_coco", "carafe"),
        ("atss_r50_fpn_dyhead_1x_coco", "modulated_deform_conv"),
        ("detectors_cascade-rcnn_r50_1x_coco", "deform_conv"),
        ("vfnet_r50_fpn_1x_coco", "deform_conv"),
    ],
)
@pytest.mark.parametrize("factory", [MmdetEncoder, MmdetProposer])
def test_missing_compiled_operators_are_reported_before_building(factory, config, operator, monkeypatch):
    if factory is MmdetEncoder and config.startswith("vfnet"):  # only its head needs them, and the encoder has none
        assert load_mmdet_config(config, ("backbone", "neck"))
        return
    install_operators()
    from mmdet.registry import MODELS

    monkeypatch.setattr(MODELS, "build", None)
    with pytest.raises(ValueError, match=rf"needs mmcv's compiled {operator} .*pip install mmcv==2\.1\.0"):
        factory(config, pretrained=False)


class MaliciousObject:
    def __reduce__(self):
        return print, ("this must not run",)


def test_invalid_weights_are_rejected_without_running_code(checkpoint, tmp_path, capsys):
    (tmp_path / "code.pth").write_bytes(pickle.dumps({"state_dict": MaliciousObject()}))
    (tmp_path / "short.pth").write_bytes(checkpoint[0].read_bytes()[:1000])
    torch.save({"state_dict": {"one": torch.zeros(1)}}, tmp_path / "other.pth")
    for name, message in (
        ("code", "code.pth"),
        ("short", "short.pth"),
        ("other", "does not fit"),
        ("absent", "absent"),
    ):
        with pytest.raises(ValueError, match=message) as raised:
            MmdetEncoder(TINY, weights=str(tmp_path / f"{name}.pth"))
        assert "\n" not in str(raised.value)
    assert "this must not run" not in capsys.readouterr().out
    with pytest.raises(ValueError, match="Did you mean 'rtmdet_tiny"):
        MmdetEncoder("rtmdet_tiny_8xb32-300e_cocoa", pretrained=False)
    with pytest.raises(ValueError, match="no weights; set weights=FILE"):
        MmdetEncoder(TINY)


def test_nms_and_soft_nms_keep_the_best_boxes():
    boxes = torch.tensor([[0.0, 0, 10, 10], [1, 1, 10, 10], [20, 20, 30, 30]])
    scores = torch.tensor([0.9, 0.8, 0.7])
    assert nms(boxes, scores, 0.5).tolist() == [0, 2]
    for method, expected in ((0, [0, 2]), (1, [0, 2, 1]), (2, [0, 2, 1])):
        kept = torch.zeros(3, 5)
        assert softnms(boxes, scores, kept, 0.5, 0.5, 1e-3, method, 0).tolist() == expected
    iou = 81 / 100
    assert kept[2, 4] == pytest.approx(0.8 * np.exp(-(iou**2) / 0.5), rel=1e-5)


def test_roi_align_backward_matches_torchvision():
    features = torch.randn(1, 2, 8, 8, requires_grad=True)
    rois = torch.tensor([[0.0, 0, 0, 6, 6]])
    from torchvision.ops import roi_align

    output_gradient = torch.randn(1, 2, 3, 3)
    (expected,) = torch.autograd.grad(roi_align(features, rois, (3, 3), 1.0, 2, True), features, output_gradient)
    gradient = torch.zeros_like(features)
    roi_align_backward(output_gradient, rois, None, None, gradient, 3, 3, 1.0, 2, 1, True)
    torch.testing.assert_close(gradient, expected)


def test_checkpoint_may_name_a_bundled_config_but_no_file(tmp_path):
    from sca_registry.spec import ModelSpec

    from sca.checkpoints.trust import NO_TRUST, Trust, TrustError, confine_spec

    def make_spec(**options):
        encoder = {"name": "mmdet", "pretrained": False, **options}
        return ModelSpec.from_dict({"encoder": encoder, "mixer": "query", "language_model": "tiny-gpt2"})

    (tmp_path / "config.py").write_text("model = {}")
    assert confine_spec(make_spec(config=TINY), tmp_path, NO_TRUST).encoder.options["config"] == TINY
    for config in ("./config.py", str(tmp_path / "config.py"), "https://example.org/config.py"):
        with pytest.raises(TrustError, match="which runs code"):
            confine_spec(make_spec(config=config), tmp_path, Trust(external=True))
    with pytest.raises(TrustError, match="--allow-external"):
        confine_spec(make_spec(config=TINY, weights="http://example.org/a.pth"), tmp_path, NO_TRUST)
