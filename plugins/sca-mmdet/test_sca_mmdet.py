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
    ("kind", "part", "options"),
    [
        ("encoder", MmdetEncoder, {"config": TINY, "pretrained": False, "image_size": 64}),
        ("encoder", MmdetEncoder, {"config": "faster-rcnn_r50_fpn_1x_coco", "pretrained": False, "image_size": 64}),
        ("proposer", MmdetProposer, {"config": TINY, "pretrained": False, "score_thr": 0.0, "max_per_img": 5}),
    ],
)
def test_the_parts_keep_the_promises_of_their_kind(kind, part, options, conformance):
    conformance(kind, part, **options)


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
def test_the_level_nearest_to_sams_stride_is_taken(config, order, channels):
    with torch.device("meta"):
        part = MmdetEncoder(config, pretrained=False)
    assert (part.image_format.channel_order, part.channels, part.stride) == (order, channels, 16)


@torch.no_grad()
def test_features_are_the_detectors_own(checkpoint):
    file, detector = checkpoint
    pixels = torch.randn(1, 3, 64, 64)
    levels = detector.extract_feat(pixels)
    for level in (0, 1, -1):
        part = MmdetEncoder(TINY, weights=str(file), image_size=64, feature_level=level).eval()
        assert torch.equal(part(pixels), levels[level])
    with pytest.raises(ValueError, match=r"no level 3: .* has 3"):
        MmdetEncoder(TINY, weights=str(file), feature_level=3)


def test_what_mmdet_does_to_a_picture_is_what_the_encoder_asks_for(checkpoint):
    from mmdet.apis import inference_detector

    from sca.inference.processor import Processor

    file, _ = checkpoint
    proposer = MmdetProposer(TINY, weights=str(file))
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (640, 640, 3), dtype=np.uint8))
    seen = []
    handle = proposer.detector.backbone.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    inference_detector(proposer.detector, np.asarray(picture)[..., ::-1].copy())
    handle.remove()
    mine = Processor.from_encoder(MmdetEncoder(TINY, weights=str(file))).preprocess_images([picture])
    torch.testing.assert_close(mine, seen[0], rtol=1e-4, atol=1e-4)


def test_boxes_have_scores_and_the_names_that_the_weights_say(checkpoint):
    picture = Image.new("RGB", (640, 480))
    proposals = MmdetProposer(TINY, weights=str(checkpoint[0]), score_thr=0.0, max_per_img=7)(picture, "a")
    assert len(proposals.prompts) == 7
    assert list(proposals.scores) == sorted(proposals.scores, reverse=True)
    assert all(name.startswith("thing ") for name in proposals.names)
    proposer = MmdetProposer("faster-rcnn_r50_fpn_1x_coco", pretrained=False, score_thr=0.0, max_per_img=3)
    assert "person" in proposer.class_names
    assert {*proposer(picture, "a").names} <= {*proposer.class_names}
    assert len(proposer(picture, "a").prompts) == 3
    assert not MmdetProposer("faster-rcnn_r50_fpn_1x_coco", pretrained=False, score_thr=0.9)(picture, "a").prompts


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
@pytest.mark.parametrize("part", [MmdetEncoder, MmdetProposer])
def test_what_needs_compiled_operators_is_refused_before_it_is_built(part, config, operator, monkeypatch):
    if part is MmdetEncoder and config.startswith("vfnet"):  # only its head needs them, and the encoder has none
        assert load_mmdet_config(config, ("backbone", "neck"))
        return
    install_operators()
    from mmdet.registry import MODELS

    monkeypatch.setattr(MODELS, "build", None)
    with pytest.raises(ValueError, match=rf"needs mmcv's compiled {operator} .*pip install mmcv==2\.1\.0"):
        part(config, pretrained=False)


class Code:
    def __reduce__(self):
        return print, ("this must not run",)


def test_weights_that_do_not_fit_are_told_and_code_is_not_run(checkpoint, tmp_path, capsys):
    (tmp_path / "code.pth").write_bytes(pickle.dumps({"state_dict": Code()}))
    (tmp_path / "short.pth").write_bytes(checkpoint[0].read_bytes()[:1000])
    torch.save({"state_dict": {"one": torch.zeros(1)}}, tmp_path / "other.pth")
    for name, told in (("code", "code.pth"), ("short", "short.pth"), ("other", "does not fit"), ("absent", "absent")):
        with pytest.raises(ValueError, match=told) as caught:
            MmdetEncoder(TINY, weights=str(tmp_path / f"{name}.pth"))
        assert "\n" not in str(caught.value)
    assert "this must not run" not in capsys.readouterr().out
    with pytest.raises(ValueError, match="Did you mean 'rtmdet_tiny"):
        MmdetEncoder("rtmdet_tiny_8xb32-300e_cocoa", pretrained=False)
    with pytest.raises(ValueError, match="there are no weights"):
        MmdetEncoder(TINY)


def test_suppression_keeps_the_best_and_lowers_what_overlaps():
    boxes = torch.tensor([[0.0, 0, 10, 10], [1, 1, 10, 10], [20, 20, 30, 30]])
    scores = torch.tensor([0.9, 0.8, 0.7])
    assert nms(boxes, scores, 0.5).tolist() == [0, 2]
    for method, expected in ((0, [0, 2]), (1, [0, 2, 1]), (2, [0, 2, 1])):
        kept = torch.zeros(3, 5)
        assert softnms(boxes, scores, kept, 0.5, 0.5, 1e-3, method, 0).tolist() == expected
    iou = 81 / 100
    assert kept[2, 4] == pytest.approx(0.8 * np.exp(-(iou**2) / 0.5), rel=1e-5)


def test_gradients_pass_through_aligned_regions():
    features = torch.randn(1, 2, 8, 8, requires_grad=True)
    rois = torch.tensor([[0.0, 0, 0, 6, 6]])
    from torchvision.ops import roi_align

    given = torch.randn(1, 2, 3, 3)
    (expected,) = torch.autograd.grad(roi_align(features, rois, (3, 3), 1.0, 2, True), features, given)
    found = torch.zeros_like(features)
    roi_align_backward(given, rois, None, None, found, 3, 3, 1.0, 2, 1, True)
    torch.testing.assert_close(found, expected)


def test_a_checkpoint_may_name_a_config_of_mmdet_and_no_file(tmp_path):
    from sca_registry.spec import ModelSpec

    from sca.checkpoints.trust import NO_TRUST, Trust, TrustError, confine_spec

    def spec(**options):
        encoder = {"name": "mmdet", "pretrained": False, **options}
        return ModelSpec.from_dict({"encoder": encoder, "mixer": "query", "language_model": "tiny-gpt2"})

    (tmp_path / "config.py").write_text("model = {}")
    assert confine_spec(spec(config=TINY), tmp_path, NO_TRUST).encoder.options["config"] == TINY
    for config in ("./config.py", str(tmp_path / "config.py"), "https://example.org/config.py"):
        with pytest.raises(TrustError, match="which runs code"):
            confine_spec(spec(config=config), tmp_path, Trust(external=True))
    with pytest.raises(TrustError, match="--allow-external"):
        confine_spec(spec(config=TINY, weights="http://example.org/a.pth"), tmp_path, NO_TRUST)
