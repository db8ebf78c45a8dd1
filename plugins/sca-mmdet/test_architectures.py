"""Tiny detectors of several architectures: their boxes, scores and names reach the captions in every output."""

import numpy as np
import pytest
import torch
from PIL import Image
from sca_mmdet.detectors import build_detector, load_mmdet_config
from sca_mmdet.proposer import MmdetProposer
from transformers import BertConfig, BertModel, BertTokenizer

from sca.cli import run_command
from sca.output.reader import read_captions

CLASS_NAMES = ("disc", "box", "bar")
RESNET = "backbone=dict(depth=18, base_channels=8)"
ROI_HEAD = "in_channels=16, fc_out_channels=16, num_classes=3"
ATTENTION = "embed_dims=32, num_heads=4"
FFN = "ffn_cfg=dict(embed_dims=32, feedforward_channels=32)"
LAYER = f"self_attn_cfg=dict({ATTENTION}), {FFN}"
DECODER_LAYER = f"self_attn_cfg=dict({ATTENTION}), cross_attn_cfg=dict({ATTENTION}), {FFN}"
SMALL_FFN = "ffn_cfg=dict(feedforward_channels=32)"
CONFIGS = {  # published config, and the fields of its model that make it tiny, with three classes
    "faster-rcnn": (
        "faster_rcnn/faster-rcnn_r50_fpn_1x_coco",
        f"{RESNET}, neck=dict(in_channels=[8, 16, 32, 64], out_channels=16),"
        "rpn_head=dict(in_channels=16, feat_channels=16),"
        f"roi_head=dict(bbox_roi_extractor=dict(out_channels=16), bbox_head=dict({ROI_HEAD}))",
    ),
    "retinanet": (
        "retinanet/retinanet_r50_fpn_1x_coco",
        f"{RESNET}, neck=dict(in_channels=[8, 16, 32, 64], out_channels=16),"
        "bbox_head=dict(in_channels=16, feat_channels=16, stacked_convs=1, num_classes=3)",
    ),
    "fcos": (
        "fcos/fcos_r50-caffe_fpn_gn-head_1x_coco",
        f"{RESNET}, neck=dict(in_channels=[8, 16, 32, 64], out_channels=32),"
        "bbox_head=dict(in_channels=32, feat_channels=32, stacked_convs=1, num_classes=3)",
    ),
    "rtmdet": (
        "rtmdet/rtmdet_tiny_8xb32-300e_coco",
        "backbone=dict(widen_factor=0.125), neck=dict(in_channels=[32, 64, 128], out_channels=16),"
        "bbox_head=dict(in_channels=16, feat_channels=16, num_classes=3)",
    ),
    "yolox": (
        "yolox/yolox_tiny_8xb8-300e_coco",
        "backbone=dict(widen_factor=0.125), neck=dict(in_channels=[32, 64, 128], out_channels=16),"
        "bbox_head=dict(in_channels=16, feat_channels=16, num_classes=3)",
    ),
    "detr": (
        "detr/detr_r50_8xb2-150e_coco",
        f"{RESNET}, neck=dict(in_channels=[64], out_channels=32), num_queries=10, test_cfg=dict(max_per_img=10),"
        f"encoder=dict(num_layers=1, layer_cfg=dict({LAYER})),"
        f"decoder=dict(num_layers=1, layer_cfg=dict({DECODER_LAYER})),"
        "positional_encoding=dict(num_feats=16), bbox_head=dict(num_classes=3, embed_dims=32)",
    ),
    "dino": (
        "dino/dino-4scale_r50_8xb2-12e_coco",
        f"{RESNET}, neck=dict(in_channels=[16, 32, 64]), num_queries=10, test_cfg=dict(max_per_img=10),"
        f"encoder=dict(num_layers=1, layer_cfg=dict({SMALL_FFN})),"
        f"decoder=dict(num_layers=1, layer_cfg=dict({SMALL_FFN})), bbox_head=dict(num_classes=3)",
    ),
    "grounding-dino": (
        "grounding_dino/grounding_dino_swin-t_pretrain_obj365_goldg_cap4m",
        "num_queries=20, test_cfg=dict(max_per_img=20), language_model=dict(name={bert!r}),"
        "backbone=dict(embed_dims=12, depths=[1, 1, 1, 1], num_heads=[1, 1, 1, 1]),"
        "neck=dict(in_channels=[24, 48, 96]),"
        f"encoder=dict(num_layers=1, layer_cfg=dict({SMALL_FFN}), text_layer_cfg=dict({SMALL_FFN}),"
        "fusion_layer_cfg=dict(embed_dim=32)),"
        f"decoder=dict(num_layers=1, layer_cfg=dict({SMALL_FFN}))",
    ),
}
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", "?", "red", "car", "disc"]
DATASET = f"test_dataloader = dict(dataset=dict(metainfo=dict(classes={CLASS_NAMES})))"
FORMATS = "jsonl,coco,parquet,geojson,label-studio,labelme,html"
OUTPUTS = ("captions.jsonl", "coco.json", "captions.parquet", "captions.geojson", "label-studio.json", "labelme")


@pytest.fixture(scope="module")
def save_detector(tmp_path_factory):
    """Function that saves a tiny detector in mmdet's format and returns the paths of its config and weights."""
    folder = tmp_path_factory.mktemp("detectors")

    def save(name, dataset="", meta=None):
        base, fields = CONFIGS[name]
        if "{bert!r}" in fields:
            fields = fields.format(bert=_save_bert(folder / "bert"))
        config, weights = folder / f"{name}.py", folder / f"{name}.pth"
        config.write_text(f'_base_ = "mmdet::{base}.py"\nmodel = dict({fields})\n{dataset}\n')
        torch.manual_seed(0)
        detector, _ = build_detector(load_mmdet_config(str(config)), name, None)
        box_layers = {"rtmdet": "rtm_reg", "fcos": "conv_reg"}  # whose biases make boxes larger than a pixel
        for module_name, module in detector.named_modules():
            if name in box_layers and box_layers[name] in module_name.split(".") and hasattr(module, "bias"):
                torch.nn.init.constant_(module.bias, 5.0)
        torch.save({"meta": meta or {}, "state_dict": detector.state_dict()}, weights)
        return str(config), str(weights)

    return save


def _save_bert(folder):
    config = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertModel(BertConfig(vocab_size=len(VOCABULARY), **config)).save_pretrained(folder)
    BertTokenizer(vocab={word: index for index, word in enumerate(VOCABULARY)}).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def colored_image():
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 80, 3), dtype=np.uint8))


@pytest.mark.parametrize("name", CONFIGS)
def test_boxes_scores_and_names_reach_every_output(name, save_detector, colored_image, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    colored_image.save("a.png")
    config, weights = save_detector(name, meta={"dataset_meta": {"classes": CLASS_NAMES}})
    text = ("Red car", "disc") if name == "grounding-dino" else ()
    options = {"config": config, "weights": weights, "score_thresh": 0, "max_regions": 5}
    expected = MmdetProposer(**options, text=text)(colored_image, "a.png")
    assert len(expected.prompts) == 5
    assert {*expected.names} <= ({"red car", "disc"} if text else {*CLASS_NAMES})
    proposer = " ".join(("mmdet", *(f"{key}={value}" for key, value in options.items())))
    text_arguments = [argument for phrase in text for argument in ("--text", phrase)]
    command = ["caption", "a.png", "--proposer", proposer, *text_arguments, "--out", "out", "--format", FORMATS]
    assert run_command(command) == 0
    for output in OUTPUTS:
        (image,) = read_captions(tmp_path / "out" / output)
        assert [caption.name for caption in image.captions] == [*expected.names], output
        if output == "captions.jsonl":  # other formats store the boxes of the masks
            boxes = [prompt.box for prompt in expected.prompts]
            assert np.allclose([caption.prompt.box for caption in image.captions], boxes, atol=0.01)
        if output != "label-studio.json":
            assert np.allclose([caption.proposal_score for caption in image.captions], expected.scores), output
    page = (tmp_path / "out/captions.html").read_text()
    assert all(page.count(f'"name": "{name}"') == expected.names.count(name) for name in {*expected.names})


def test_class_names_come_from_the_option_the_weights_or_the_config(save_detector, tmp_path):
    config, weights = save_detector("retinanet", DATASET, {"dataset_meta": {"classes": ("a", "b", "c")}})
    assert MmdetProposer(config, weights, class_names=["x", "y", "z"]).class_names == ("x", "y", "z")
    assert MmdetProposer(config, weights).class_names == ("a", "b", "c")
    assert MmdetProposer(config, pretrained=False).class_names == CLASS_NAMES
    with pytest.raises(ValueError, match=r"2 class names for the 3 classes of the detector .* one name per class"):
        MmdetProposer(config, weights, class_names=["x", "y"])


def test_names_of_another_dataset_are_not_used(save_detector, colored_image):
    config, _ = save_detector("retinanet")  # with the 80 classes of COCO in the config
    with pytest.warns(UserWarning, match=r"80 class names for the 3 classes of the detector .* regions have no names"):
        proposer = MmdetProposer(config, pretrained=False, score_thresh=0.0, max_regions=2)
    assert proposer(colored_image, "a").names == (None, None)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("retinanet", {"text": "car"}, "takes no text, because its classes are fixed; omit it, or use"),
        ("grounding-dino", {}, "no text to find; pass --text PHRASE"),
        ("grounding-dino", {"text": " "}, "text contains ' ', which is not a phrase"),
        ("grounding-dino", {"text": "x " * 300}, "302 tokens|303 tokens"),
        ("grounding-dino", {"text": "car", "class_names": ["car"]}, "takes text instead of class_names"),
        ("retinanet", {"score_thresh": 2.0}, "score_thresh is 2.0; expected a number from 0 to 1"),
        ("retinanet", {"max_regions": 0}, "max_regions is 0; expected an integer of at least 1"),
    ],
)
def test_invalid_options_are_rejected_in_one_line(name, options, message, save_detector):
    config, _ = save_detector(name, DATASET)
    with pytest.raises(ValueError, match=message) as raised:
        MmdetProposer(config, pretrained=False, **options)
    assert "\n" not in str(raised.value)


def test_config_without_a_test_dataloader_is_rejected(tmp_path):
    (tmp_path / "config.py").write_text("model = dict(type='RetinaNet', backbone=dict(type='ResNet'))")
    with pytest.raises(ValueError, match="has no test_dataloader, which prepares the images; add it to the config"):
        MmdetProposer(str(tmp_path / "config.py"), pretrained=False)


def test_text_of_grounding_dino_changes_the_boxes(save_detector, colored_image):
    config, weights = save_detector("grounding-dino")
    cars, discs = (
        MmdetProposer(config, weights, text=text, score_thresh=0.0, max_regions=3)(colored_image, "a")
        for text in ("red car", ["disc"])
    )
    assert cars.names == ("red car",) * 3
    assert discs.names == ("disc",) * 3
    assert cars.scores != discs.scores
