"""How a vision-language model learns which region is meant."""

import numpy as np
import pytest

from sca.captioners.region_captioner import RegionView
from sca.captioners.vlm import QUESTIONS, VisionLanguageModel, draw_box


def texts(captions):
    return [caption.text for caption in captions]


def test_florence_is_told_the_place_in_thousandths_and_the_task_by_its_own_word(weights, image, prompts, asked):
    captioner = VisionLanguageModel(weights=weights("florence2"), region_format="region-tokens")
    captioner.caption(image, prompts[1:])
    captioner.caption(image, prompts[2:3], "recognition")
    assert [question.text for question in asked[0]] == [
        "<REGION_TO_DESCRIPTION><loc_625><loc_583><loc_875><loc_916>",
        "<REGION_TO_DESCRIPTION><loc_0><loc_0><loc_999><loc_999>",
        "<REGION_TO_DESCRIPTION><loc_187><loc_200><loc_412><loc_466>",
    ]
    assert asked[1][0].text == "<REGION_TO_CATEGORY><loc_0><loc_0><loc_999><loc_999>"
    assert all(question.image is image for call in asked for question in call)
    places = captioner.image_text_model.processor(images=image, text=asked[0][0].text, return_tensors="pt")[
        "input_ids"
    ][0]
    assert "<loc_625>" in captioner.image_text_model.tokenizer.convert_ids_to_tokens(places)


def test_kosmos_is_told_the_cells_of_the_corners(weights, image, prompts, asked):
    VisionLanguageModel(weights=weights("kosmos-2"), region_format="region-tokens").caption(image, prompts[1:3])
    tokens = [question.text.split("<object>")[1].split("</object>")[0] for question in asked[0]]
    first, last = 18 * 32 + 20, 29 * 32 + 27  # floor of the first corner, ceiling of the last
    assert tokens == [f"<patch_index_{first:04d}><patch_index_{last:04d}>", "<patch_index_0000><patch_index_1023>"]


@pytest.mark.parametrize("kind", ["florence2", "kosmos-2"])
def test_regions_are_told_apart_by_tokens_alone_and_in_any_company(weights, kind, image, prompts):
    captioner = VisionLanguageModel(weights=weights(kind), region_format="region-tokens")
    together = captioner.caption(image, prompts, num_beams=2)
    assert len(set(texts(together))) > 1
    assert [captioner.caption(image, [prompt], num_beams=2)[0].text for prompt in prompts] == texts(together)


def test_what_an_answer_says_of_places_is_no_part_of_its_words(weights, image, prompts, monkeypatch):
    captioner = VisionLanguageModel(weights=weights("florence2"), region_format="region-tokens")
    answer = "a red<loc_12> car<object><patch_index_0003></object> "
    monkeypatch.setattr(captioner.image_text_model.tokenizer, "decode", lambda ids, **how: answer)
    assert texts(captioner.caption(image, prompts[:1])) == ["a red car"]


def test_a_drawn_box_lies_around_the_region_and_the_picture_is_left_alone(weights, image, prompts, asked):
    before = np.asarray(image).copy()
    captioner = VisionLanguageModel(weights=weights("qwen2_vl"), region_format="box")
    captioner.caption(image, prompts[1:2], max_new_tokens=3)
    drawn = np.asarray(asked[0][0].image)
    assert asked[0][0].text == QUESTIONS["box"][1]
    assert np.array_equal(np.asarray(image), before)
    assert np.array_equal(drawn[35:55, 50:70], before[35:55, 50:70])
    assert (drawn[33:35, 48:72] == (255, 0, 0)).all()
    assert (drawn[33:57, 70:72] == (255, 0, 0)).all()
    changed = (drawn != before).any(-1)
    assert not changed[:33].any()
    assert not changed[:, 72:].any()
    assert draw_box(image, (0, 0, 80, 60)).tobytes() == image.tobytes()  # what is all of the image has no outside


def test_a_question_goes_through_the_chat_template_and_pictures_of_other_sizes_do_not_mix(weights, image, prompts):
    captioner = VisionLanguageModel(weights=weights("qwen2_vl"), question="Which thing is this?")
    together = captioner.caption(image, prompts, max_new_tokens=4, num_beams=2)
    alone = [captioner.caption(image, [prompt], max_new_tokens=4, num_beams=2)[0].text for prompt in prompts]
    assert texts(together) == alone
    assert len(set(alone)) > 1
    inputs = captioner.image_text_model._process_input(
        captioner._build_input(RegionView(0, image, prompts[0], None, None), 1)
    )
    words = captioner.image_text_model.tokenizer.decode(inputs["input_ids"][0])
    assert "Which thing is this?" in words
    assert words.count("<|vision_start|>") == 1


@pytest.mark.parametrize(
    ("kind", "how", "message"),
    [
        (
            "qwen2_vl",
            {"region_format": "region-tokens"},
            "'qwen2_vl' model has no location tokens; 'florence2' and 'kosmos-2'",
        ),
        ("blip", {}, "'blip' model takes no questions; .* crop-captioner"),
        ("florence2", {"region_format": "circle"}, "region_format is 'circle'. Choose from: crop, box, region-tokens"),
        ("florence2", {"region_format": "region-tokens", "question": "What?"}, "omit question"),
    ],
)
def test_what_a_model_cannot_do_is_refused_with_the_way_out(weights, kind, how, message):
    with pytest.raises(ValueError, match=message):
        VisionLanguageModel(weights=weights(kind), **how)
