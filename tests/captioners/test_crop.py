"""What a crop captioner cuts out, and what it asks."""

import numpy as np
import pytest
from sca_registry.contracts import Prompt
from sca_registry.spec import EverythingOptions

import sca
from sca.captioners.crop import DESCRIPTION_QUESTION, NAME_QUESTION, CropCaptioner
from sca.captioners.region_captioner import box_to_pixels
from sca.inference.automatic import caption_everything
from sca.io.masks import decode_rle, encode_rle, mask_to_box

POINTS = [Prompt(points=((20.0, 20.0, 1),)), Prompt(points=((60.0, 45.0, 1), (5.0, 5.0, 0)))]


@pytest.fixture
def sam(sam_folder):
    return {"name": "sam", "weights": str(sam_folder)}


def same(one, other):
    return one.size == other.size and one.tobytes() == other.tobytes()


def test_what_reaches_the_captioner_is_the_tight_box_of_the_best_mask(weights, sam, image, prompts, asked):
    captioner = CropCaptioner(sam, weights("blip"))
    request = [*prompts, *POINTS]
    found = captioner.caption(image, request)
    (questions,) = asked
    best = [masks[0] for masks in captioner.segment(captioner.encode([image]), [request])]
    assert len(best) == len(request)
    for question, caption, (mask, iou) in zip(questions, found, best, strict=True):
        x1, y1, x2, y2 = map(int, mask_to_box(mask))
        assert same(question.image, image.crop((x1, y1, max(x2, x1 + 2), max(y2, y1 + 2))))
        assert question.text is None
        assert caption.mask == mask
        assert caption.predicted_iou == iou
        assert caption.box == (caption.prompt.box or mask_to_box(mask))


def test_without_an_encoder_the_box_is_cut_out_as_it_is(weights, image, prompts, asked):
    found = CropCaptioner(weights=weights("blip")).caption(image, prompts)
    windows = [(10, 9, 40, 30), (50, 35, 70, 55), (0, 0, 80, 60), (15, 12, 33, 28)]
    assert all(same(question.image, image.crop(window)) for question, window in zip(asked[0], windows, strict=True))
    assert [caption.box for caption in found[:3]] == [prompt.box for prompt in prompts[:3]]
    assert [caption.mask for caption in found] == [None, None, None, encode_rle(prompts[3].mask)]
    assert found[3].box == (15, 12, 33, 28)
    assert {caption.predicted_iou for caption in found} == {None}


def test_of_a_box_and_a_mask_the_box_is_cut_out(weights, image, prompts, asked):
    CropCaptioner(weights=weights("blip")).caption(image, [Prompt(prompts[1].box, mask=prompts[3].mask)])
    assert same(asked[0][0].image, image.crop((50, 35, 70, 55)))


@pytest.mark.parametrize(
    ("box", "window"),
    [
        ((5.2, 6.0, 5.4, 9.0), (5, 6, 7, 9)),
        ((0.0, 0.0, 0.0, 0.0), (0, 0, 2, 2)),
        ((79.5, 59.5, 80.0, 60.0), (78, 58, 80, 60)),
        ((-3.0, -3.0, 90.0, 90.0), (0, 0, 80, 60)),
    ],
)
def test_a_crop_has_two_pixels_a_side_or_more_and_lies_in_the_image(box, window):
    assert box_to_pixels(box, (80, 60)) == window


def test_an_empty_mask_is_two_pixels_and_not_an_error(weights, image, asked):
    (caption,) = CropCaptioner(weights=weights("blip")).caption(image, [Prompt(mask=np.zeros((60, 80), bool))])
    assert asked[0][0].image.size == (2, 2)
    assert caption.box is None


def test_region_captioner_loses_no_region_to_missing_texts(weights, image, prompts, monkeypatch):
    captioner = CropCaptioner(weights=weights("blip"))
    caption_regions = captioner.caption_regions
    monkeypatch.setattr(captioner, "caption_regions", lambda *args, **kwargs: caption_regions(*args, **kwargs)[:-1])
    with pytest.raises(ValueError, match="shorter"):
        captioner.caption(image, prompts)


def test_a_point_without_an_encoder_is_refused_with_the_way_out(weights, image):
    with pytest.raises(ValueError, match=r"sam-vit-b\+NAME"):
        CropCaptioner(weights=weights("blip")).caption(image, POINTS)


def test_an_encoder_without_masks_is_refused_with_the_way_out(weights):
    pytest.importorskip("timm")
    encoder = {"name": "timm", "model": "resnet18", "pretrained": False, "image_size": 64}
    with pytest.raises(ValueError, match=r"encoder 'timm' predicts no masks.*sam-vit-b"):
        CropCaptioner(encoder, weights("blip"))


def test_a_chain_of_thought_asks_what_it_is_and_then_for_a_description_of_it(weights, image, prompts, asked):
    captioner = CropCaptioner(weights=weights("blip-2"), vcot=True)
    captioner.caption(image, prompts[3:])
    ((first,), (second,)) = asked
    assert first.text == NAME_QUESTION
    inside = prompts[3].mask[12:28, 15:33]
    pixels = np.asarray(image.crop((15, 12, 33, 28)))
    assert np.array_equal(np.asarray(first.image), np.where(inside[..., None], pixels, 255))
    assert same(second.image, image.crop((15, 12, 33, 28)))
    ((answer, *_),) = captioner.image_text_model.generate_texts([first], num_beams=1, max_new_tokens=20)
    assert answer
    assert second.text == DESCRIPTION_QUESTION.format(answer=answer)


def test_a_chain_of_thought_without_an_answer_speaks_of_the_region(weights, image, prompts, asked, monkeypatch):
    captioner = CropCaptioner(weights=weights("blip-2"), vcot=True)
    monkeypatch.setattr(captioner.image_text_model.tokenizer, "decode", lambda ids, **how: "")
    captioner.caption(image, prompts)
    assert {question.text for question in asked[1]} == {DESCRIPTION_QUESTION.format(answer="the region")}


def test_a_chain_of_thought_needs_a_model_that_answers_questions(weights):
    with pytest.raises(ValueError, match="takes questions, which 'blip' does not; use blip2-opt"):
        CropCaptioner(weights=weights("blip"), vcot=True)


def test_everything_is_found_by_the_encoder_and_its_own_masks_are_cut_out(weights, image, asked):
    captioner = CropCaptioner("sca-tiny", weights("blip"))
    predictor = sca.Predictor(captioner)
    predictor.set_image(image)
    options = EverythingOptions(points_per_side=4, pred_iou_thresh=0.0, stability_score_thresh=0.0)
    found = caption_everything(predictor, options=options, num_beams=2)
    assert found
    for question, caption in zip(asked[0], found, strict=True):
        assert same(question.image, image.crop(box_to_pixels(mask_to_box(caption.mask), image.size)))
        assert decode_rle(caption.mask).shape == (60, 80)
