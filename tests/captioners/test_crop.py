"""Crop captioners: the crops and the questions."""

import numpy as np
import pytest
from sca_registry.contracts import Prompt
from sca_registry.spec import EverythingOptions

import sca
from sca.captioners.crop import DESCRIPTION_QUESTION, NAME_QUESTION, CropCaptioner
from sca.captioners.region_captioner import box_to_pixels
from sca.inference.automatic import caption_everything
from sca.io.masks import decode_rle, encode_rle, mask_to_box

POINT_PROMPTS = [Prompt(points=((20.0, 20.0, 1),)), Prompt(points=((60.0, 45.0, 1), (5.0, 5.0, 0)))]


@pytest.fixture
def sam_encoder(sam_folder):
    return {"name": "sam", "weights": str(sam_folder)}


def are_equal_images(first, second):
    return first.size == second.size and first.tobytes() == second.tobytes()


def test_crop_captioner_crops_the_tight_box_of_the_best_mask(
    weights_folder, sam_encoder, image, prompts, question_calls
):
    captioner = CropCaptioner(sam_encoder, weights_folder("blip"))
    request = [*prompts, *POINT_PROMPTS]
    captions = captioner.caption(image, request)
    (questions,) = question_calls
    best_masks = [masks[0] for masks in captioner.segment(captioner.encode([image]), [request])]
    assert len(best_masks) == len(request)
    for question, caption, (mask, iou) in zip(questions, captions, best_masks, strict=True):
        x1, y1, x2, y2 = map(int, mask_to_box(mask))
        assert are_equal_images(question.image, image.crop((x1, y1, max(x2, x1 + 2), max(y2, y1 + 2))))
        assert question.text is None
        assert caption.mask == mask
        assert caption.predicted_iou == iou
        assert caption.box == (caption.prompt.box or mask_to_box(mask))


def test_crop_captioner_without_encoder_crops_the_prompt_box(weights_folder, image, prompts, question_calls):
    captions = CropCaptioner(weights=weights_folder("blip")).caption(image, prompts)
    windows = [(10, 9, 40, 30), (50, 35, 70, 55), (0, 0, 80, 60), (15, 12, 33, 28)]
    assert all(
        are_equal_images(question.image, image.crop(window))
        for question, window in zip(question_calls[0], windows, strict=True)
    )
    assert [caption.box for caption in captions[:3]] == [prompt.box for prompt in prompts[:3]]
    assert [caption.mask for caption in captions] == [None, None, None, encode_rle(prompts[3].mask)]
    assert captions[3].box == (15, 12, 33, 28)
    assert {caption.predicted_iou for caption in captions} == {None}


def test_crop_captioner_crops_the_box_of_a_prompt_with_box_and_mask(weights_folder, image, prompts, question_calls):
    CropCaptioner(weights=weights_folder("blip")).caption(image, [Prompt(prompts[1].box, mask=prompts[3].mask)])
    assert are_equal_images(question_calls[0][0].image, image.crop((50, 35, 70, 55)))


@pytest.mark.parametrize(
    ("box", "window"),
    [
        ((5.2, 6.0, 5.4, 9.0), (5, 6, 7, 9)),
        ((0.0, 0.0, 0.0, 0.0), (0, 0, 2, 2)),
        ((79.5, 59.5, 80.0, 60.0), (78, 58, 80, 60)),
        ((-3.0, -3.0, 90.0, 90.0), (0, 0, 80, 60)),
    ],
)
def test_box_to_pixels_is_inside_the_image_with_at_least_two_pixels_per_side(box, window):
    assert box_to_pixels(box, (80, 60)) == window


def test_crop_captioner_crops_two_pixels_for_an_empty_mask(weights_folder, image, question_calls):
    (caption,) = CropCaptioner(weights=weights_folder("blip")).caption(image, [Prompt(mask=np.zeros((60, 80), bool))])
    assert question_calls[0][0].image.size == (2, 2)
    assert caption.box is None


def test_region_captioner_raises_if_a_text_is_missing(weights_folder, image, prompts, monkeypatch):
    captioner = CropCaptioner(weights=weights_folder("blip"))
    caption_regions = captioner.caption_regions
    monkeypatch.setattr(captioner, "caption_regions", lambda *args, **kwargs: caption_regions(*args, **kwargs)[:-1])
    with pytest.raises(ValueError, match="shorter"):
        captioner.caption(image, prompts)


def test_crop_captioner_without_encoder_rejects_points_and_suggests_one(weights_folder, image):
    with pytest.raises(ValueError, match=r"sam-vit-b\+NAME"):
        CropCaptioner(weights=weights_folder("blip")).caption(image, POINT_PROMPTS)


def test_crop_captioner_rejects_encoders_without_masks_and_suggests_one(weights_folder):
    pytest.importorskip("timm")
    encoder = {"name": "timm", "model": "resnet18", "pretrained": False, "image_size": 64}
    with pytest.raises(ValueError, match=r"encoder 'timm' predicts no masks.*sam-vit-b"):
        CropCaptioner(encoder, weights_folder("blip"))


def test_crop_captioner_with_vcot_requests_a_name_and_then_a_description(
    weights_folder, image, prompts, question_calls
):
    captioner = CropCaptioner(weights=weights_folder("blip-2"), vcot=True)
    captioner.caption(image, prompts[3:])
    ((name_question,), (description_question,)) = question_calls
    assert name_question.text == NAME_QUESTION
    cropped_mask = prompts[3].mask[12:28, 15:33]
    pixels = np.asarray(image.crop((15, 12, 33, 28)))
    assert np.array_equal(np.asarray(name_question.image), np.where(cropped_mask[..., None], pixels, 255))
    assert are_equal_images(description_question.image, image.crop((15, 12, 33, 28)))
    ((answer, *_),) = captioner.image_text_model.generate_texts([name_question], num_beams=1, max_new_tokens=20)
    assert answer
    assert description_question.text == DESCRIPTION_QUESTION.format(answer=answer)


def test_crop_captioner_with_vcot_uses_the_region_if_the_name_is_empty(
    weights_folder, image, prompts, question_calls, monkeypatch
):
    captioner = CropCaptioner(weights=weights_folder("blip-2"), vcot=True)
    monkeypatch.setattr(captioner.image_text_model.tokenizer, "decode", lambda ids, **how: "")
    captioner.caption(image, prompts)
    assert {question.text for question in question_calls[1]} == {DESCRIPTION_QUESTION.format(answer="the region")}


def test_crop_captioner_with_vcot_rejects_models_without_questions(weights_folder):
    with pytest.raises(ValueError, match="takes questions, which 'blip' does not; use blip2-opt"):
        CropCaptioner(weights=weights_folder("blip"), vcot=True)


def test_everything_mode_crops_the_masks_of_the_encoder(weights_folder, image, question_calls):
    captioner = CropCaptioner("sca-tiny", weights_folder("blip"))
    predictor = sca.Predictor(captioner)
    predictor.set_image(image)
    options = EverythingOptions(points_per_side=4, pred_iou_thresh=0.0, stability_score_thresh=0.0)
    captions = caption_everything(predictor, options=options, num_beams=2)
    assert captions
    for question, caption in zip(question_calls[0], captions, strict=True):
        assert are_equal_images(question.image, image.crop(box_to_pixels(mask_to_box(caption.mask), image.size)))
        assert decode_rle(caption.mask).shape == (60, 80)
