"""Masks without captions: segmenters in transformers' format, encoders by name, and models of the zoo."""

import catalogue
import numpy as np
import pytest
import sca_registry
import torch
from sca_registry.contracts import Prompt
from tiny_segmenters import SAM2_CONFIGS, SAM_CONFIG, SAM_HQ_CONFIG, build_tiny_model, correct_sam_hq_decoder
from torch.nn import functional as F
from transformers.models.sam.image_processing_pil_sam import SamImageProcessorPil

import sca
from sca.captioners.mask_only import MaskOnly
from sca.cli import run_command
from sca.encoders.tiny_vit import TinyVit

CONFIGS = {**SAM2_CONFIGS, "sam": SAM_CONFIG, "sam_hq": SAM_HQ_CONFIG}
SEEDS = {"sam2": 4, "edgetam": 1, "sam3_tracker": 2, "sam": 6, "sam_hq": 1}  # masks that are neither empty nor full
BOX = (12.0, 10.0, 50.0, 40.0)


@pytest.fixture(scope="module", params=sorted(CONFIGS))
def model_and_folder(request, tmp_path_factory):
    """A tiny segmenter of transformers, and the folder that it saved."""
    model = build_tiny_model(request.param, CONFIGS[request.param], SEEDS[request.param])
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    return model, folder


@torch.no_grad()
def predict_full_size_mask(model, captioner, image):
    """Return the logits of the best mask that transformers predicts for BOX, in pixels of the image."""
    frame = captioner.processor.compute_frame(*image.size)
    pixel_values = captioner.processor.preprocess_images([image])
    box = torch.tensor([BOX]) * torch.tensor([*frame.scale, *frame.scale])
    output = model(pixel_values=pixel_values, input_boxes=box[None], multimask_output=True)
    masks = output.pred_masks[0, :, output.iou_scores[0, 0].argmax()][None]
    if captioner.processor.image_format.resize_mode == "stretch":  # as in Sam2ImageProcessor.post_process_masks
        return F.interpolate(masks, image.size[::-1], mode="bilinear", align_corners=False)[0, 0]
    side = captioner.processor.image_format.size
    (full_size,) = SamImageProcessorPil().post_process_masks(
        [masks],
        [image.size[::-1]],
        [frame.content_size[::-1]],
        binarize=False,
        pad_size={"height": side, "width": side},
    )
    return full_size[0, 0]


def test_load_captioner_predicts_masks_of_a_segmenter_saved_by_transformers(model_and_folder, image, monkeypatch):
    model, folder = model_and_folder
    if model.config.model_type == "sam_hq":
        correct_sam_hq_decoder(monkeypatch)
    captioner = sca.load_captioner(folder)
    (caption,) = captioner.caption(image, [Prompt(box=BOX)])
    logits = predict_full_size_mask(model, captioner, image)
    differs = torch.from_numpy(caption.array) != (logits > 0)
    assert not (differs & (logits.abs() > 1e-4 * logits.abs().max())).any()
    assert 0 < caption.array.mean() < 1
    assert caption.text == ""
    assert caption.score == caption.predicted_iou
    assert caption.box == BOX


def test_mask_only_accepts_every_prompt_and_everything_mode(model_and_folder, image):
    _, folder = model_and_folder
    predictor = sca.Predictor(sca.load_captioner(str(folder)))
    predictor.set_image(image)
    mask = np.zeros((60, 80), bool)
    mask[10:40, 12:50] = True
    prompts = [Prompt(box=BOX, points=((20, 20, 1), (70, 50, 0)), mask=mask)]
    captions = predictor.predict(prompts, boxes=[BOX], points=[(20, 20)], masks=[mask])
    assert [caption.array.shape for caption in captions] == [(60, 80)] * 4
    assert len(predictor.segment(points=[(20, 20)])[0]) == 3
    captions = list(sca.caption_everything(predictor, points_per_side=2, pred_iou_thresh=0, stability_score_thresh=0))
    assert captions
    assert {caption.text for caption in captions} == {""}


def test_load_captioner_takes_encoders_with_masks_and_models_with_none(image):
    for source in ("sca-tiny+none", "tiny-vit image_size=64", {"name": "none", "encoder": "tiny-vit"}):
        captioner = sca.load_captioner(source)
        assert isinstance(captioner, MaskOnly)
        (caption,) = captioner.caption(image, [Prompt(points=((20, 20, 1),))])
        assert caption.mask["size"] == [60, 80]
    half = sca.load_captioner("sca-tiny+none", precision="bfloat16", region_batch_size=2)
    assert {parameter.dtype for parameter in half.model.parameters()} == {torch.bfloat16}
    assert len(half.caption(image, [Prompt(box=BOX)] * 3)) == 3


def test_mask_only_uses_the_segmenter_that_an_instance_of_an_encoder_names(image, monkeypatch):
    monkeypatch.setattr(catalogue, "REGISTRY", dict(catalogue.REGISTRY))

    class UndeclaredEncoder(TinyVit):
        default_segmenter = property(lambda self: "sam")

    sca_registry.encoders.register("undeclared", func=UndeclaredEncoder)
    captioner = sca.load_captioner({"name": "none", "encoder": {"name": "undeclared", "image_size": 64}})
    assert captioner.caption(image, [Prompt(box=BOX)])[0].mask["size"] == [60, 80]


def test_mask_only_warns_about_random_weights(caplog):
    sca.load_captioner("tiny-vit image_size=64")
    assert "random weights" in caplog.text
    caplog.clear()
    sca.load_captioner("sca-tiny+none")
    assert not caplog.text


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("none", "masks require an encoder; pass its name, such as sam-vit-b"),
        ("clip-vit-b-32", "the segmenter of the encoder 'clip-vit-b-32' predicts no masks"),
        ("tiny-vit hiden_size=3", "no option 'hiden_size'. Did you mean 'hidden_size'"),
        ("sam-vit-bb", "no model, captioner or folder named 'sam-vit-bb'.* an encoder with masks, such as sam-vit-b"),
    ],
)
def test_load_captioner_rejects_encoders_without_masks_before_any_download(source, message):
    with pytest.raises(ValueError, match=message):
        sca.load_captioner(source)


def test_load_points_to_load_captioner_for_a_segmenter(model_and_folder):
    with pytest.raises(ValueError, match=r"without a language model; use sca\.load_captioner"):
        sca.load(model_and_folder[1])


def test_caption_command_writes_masks_of_a_segmenter(model_and_folder, image, tmp_path, capsys):
    image.save(tmp_path / "photo.png")
    arguments = ["caption", str(tmp_path / "photo.png"), "--box", "12,10,50,40", "--out", str(tmp_path / "out")]
    assert run_command([*arguments, "--model", str(model_and_folder[1]), "--format", "jsonl,coco,png,html"]) == 0
    assert '"caption": ""' in (tmp_path / "out" / "captions.jsonl").read_text()
