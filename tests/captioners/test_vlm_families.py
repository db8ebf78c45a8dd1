"""Families of vision-language models: loading, prompts with coordinates, and batches, at tiny sizes."""

import numpy as np
import pytest
import tiny_vlms
from PIL import Image
from sca_registry.contracts import Prompt

from sca.captioners.region_captioner import RegionView
from sca.captioners.region_formats import COORDINATE_FORMATS, MODEL_QUESTIONS, QUESTIONS, remove_coordinates
from sca.captioners.vlm import REGION_FORMATS, VisionLanguageModel

FAMILIES = sorted(tiny_vlms.BUILDERS)
COORDINATE_FAMILIES = [family for family in FAMILIES if family in COORDINATE_FORMATS]
DEFAULT_QUESTION = "Describe what is in the region {} in one short phrase."
PROMPTS = {  # for the box 10.2, 9.7, 39.5, 30.0 in an image of 80 x 60 pixels
    "internvl": DEFAULT_QUESTION.format("<box>[[128, 162, 494, 500]]</box>"),
    "molmo2": 'Describe what is at <points coords="1 1 311 331">region</points> in one short phrase.',
    "paligemma": "caption <loc0165><loc0130><loc0512><loc0505>",
    "qwen2_vl": DEFAULT_QUESTION.format("<|box_start|>(127,161),(493,500)<|box_end|>"),
    "qwen2_5_vl": DEFAULT_QUESTION.format("[10, 10, 40, 32]"),  # pixels of 80 x 64
    "qwen3_vl": DEFAULT_QUESTION.format("[128, 162, 494, 500]"),
    "qwen3_vl_moe": DEFAULT_QUESTION.format("[128, 162, 494, 500]"),
}

TEXTS_WITH_COORDINATES = [  # as decoded without special tokens; the caption is "a red car"
    ("florence2", "a red<loc_12> car<loc_3><loc_4>"),
    ("internvl", "<box>[[1, 2, 3, 4]]</box> a red car"),
    ("internvl", "<ref>a red car</ref> [[1, 2, 3, 4], [5, 6, 7, 8]]"),
    ("kosmos-2", "a red car<object><patch_index_0003><patch_index_0099></object> "),
    ("molmo2", '<points coords="1 1 311 331">region</points> a red car'),
    ("molmo2", 'a <points coords="1 1 311 331">red car</points>'),
    ("paligemma", "<loc0165><loc0130><loc0512><loc0505> a red car"),
    ("qwen2_vl", "a red car(127,161),(493,500)"),
    ("qwen2_5_vl", "[10, 10, 40, 32] a red\ncar"),
    ("qwen3_vl", "a red car [128,162,494,500]"),
    ("qwen3_vl_moe", "a red car [128, 162, 494, 500]"),
]


@pytest.fixture(scope="module")
def captioner(weights_folder):
    """`captioner("gemma3", "crop")` is a captioner with the weights of a tiny model."""
    captioners = {}

    def load(family, region_format="crop", **options):
        key = (family, region_format, *options.items())
        if key not in captioners:
            captioners[key] = VisionLanguageModel(
                weights=weights_folder(family), region_format=region_format, **options
            )
        return captioners[key]

    return load


def get_results(captions):
    return [(caption.text, pytest.approx(caption.score, rel=1e-3)) for caption in captions]


def decode_prompt(captioner, image, prompt):
    """Return the prompt of a caption as the model receives it, with all special tokens."""
    model = captioner.image_text_model
    text_input = captioner._build_input(RegionView(0, image, prompt, None, None), captioner.task_questions[1])
    return model.tokenizer.decode(model._process_input(text_input)["input_ids"][0])


@pytest.mark.parametrize("family", FAMILIES)
def test_vlm_family_captions_regions_of_several_images_as_one_at_a_time(captioner, family, image, prompts):
    formats = [each for each in REGION_FORMATS if each != "coordinates" or family in COORDINATE_FORMATS]
    images, requests = [image, image.rotate(180), image.crop((0, 0, 60, 60))], [prompts[:2], prompts[:1], prompts[:1]]
    for region_format in formats:
        model = captioner(family, region_format)
        batches = model.caption_batch(model.encode(images), requests, max_new_tokens=4)
        singles = [
            [model.caption(each, [prompt], max_new_tokens=4)[0] for prompt in request]
            for each, request in zip(images, requests, strict=True)
        ]
        assert [get_results(each) for each in singles] == [get_results(each) for each in batches], region_format
        assert all(0 < caption.score <= 1 for batch in batches for caption in batch)
        scores = {round(caption.score, 6) for batch in batches for caption in batch}
        assert len(scores) > 1, region_format


@pytest.mark.parametrize("family", FAMILIES)
def test_vlm_family_scores_the_first_token_equally_with_beams(captioner, family, image, prompts):
    """Beams of a model with several image tiles receive the features of their own image."""
    greedy_captions, beam_captions = (
        captioner(family).caption(image, prompts[:2], max_new_tokens=1, num_beams=num_beams) for num_beams in (1, 3)
    )
    assert get_results(beam_captions) == get_results(greedy_captions)


@pytest.mark.parametrize("family", COORDINATE_FAMILIES)
def test_vlm_family_receives_coordinates_in_its_own_notation(captioner, family, image, prompts, question_calls):
    model = captioner(family, "coordinates")
    model.caption(image, prompts[:1], max_new_tokens=1)
    assert question_calls[0][0].text == PROMPTS[family]
    text = decode_prompt(model, image, prompts[0])
    assert PROMPTS[family].replace(" ", "") in text.replace(" ", "")


@pytest.mark.parametrize(("family", "text"), TEXTS_WITH_COORDINATES)
def test_vlm_family_removes_coordinates_in_its_notation_from_captions(family, text):
    assert remove_coordinates(text, family) == "a red car"


def test_every_family_with_coordinates_is_tested():
    assert {*FAMILIES, "florence2", "kosmos-2"} >= set(COORDINATE_FORMATS)  # these two have tests in test_vlm.py


def test_every_notation_of_coordinates_is_removed_from_captions():
    assert {family for family, _ in TEXTS_WITH_COORDINATES} == set(COORDINATE_FORMATS)


@pytest.mark.parametrize("text", ["2 of [3, 4] cars", "size (1,2)", "(a,b),(c,d)", "x < 3 and y > 2"])
def test_texts_without_coordinates_are_unchanged(text):
    assert {remove_coordinates(text, family) for family in COORDINATE_FORMATS} == {text}


def test_vlm_removes_coordinates_from_captions(captioner, image, prompts, monkeypatch):
    model = captioner("qwen3_vl")
    monkeypatch.setattr(model.image_text_model.tokenizer, "decode", lambda ids, **how: "a red car [1, 2, 3, 4]")
    assert model.caption(image, prompts[:1], max_new_tokens=1)[0].text == "a red car"


def test_qwen2_5_vl_receives_the_image_at_the_size_of_its_coordinates(captioner, image, prompts):
    model = captioner("qwen2_5_vl", "coordinates")
    view = RegionView(0, image, Prompt(box=(0.0, 0.0, 80.0, 60.0)), None, None)
    image_input = model._build_input(view, "{region}")
    assert image_input.image.size == (80, 64)  # multiples of 16, the side of two patches
    assert image_input.text == "[0, 0, 80, 64]"
    processed = model.image_text_model._process_input(image_input)
    assert len(processed["pixel_values"]) == (64 // 8) * (80 // 8)  # patches
    large = RegionView(0, image.resize((320, 240)), Prompt(box=(80.0, 60.0, 160.0, 120.0)), None, None)
    assert model._build_input(large, "{region}").image.size == (96, 64)  # at most 8,192 pixels
    assert model._build_input(large, "{region}").text == "[24, 16, 48, 32]"


def test_vlm_inserts_coordinates_into_the_question_or_appends_them(captioner, image, prompts, question_calls):
    model = captioner("qwen3_vl", "coordinates")
    for question in ("is {region} red?", "what color is it?"):
        model.check_question(question)
        model.caption(image, prompts[:1], question=question, max_new_tokens=1)
    box = "[128, 162, 494, 500]"
    assert [call[0].text for call in question_calls] == [f"is {box} red?", f"what color is it? {box}"]


def test_vlm_prompts_paligemma_with_its_task_prefixes(captioner, image, prompts, question_calls):
    captioner("paligemma").caption(image, prompts[:1], max_new_tokens=1)
    captioner("paligemma").caption(image, prompts[:1], "recognition", max_new_tokens=1)
    captioner("qwen3_vl").caption(image, prompts[:1], "recognition", max_new_tokens=1)
    assert [call[0].text for call in question_calls] == [
        "caption en",
        MODEL_QUESTIONS["paligemma", "crop"][0],
        QUESTIONS["crop"][0],
    ]
    text = decode_prompt(captioner("paligemma"), image, prompts[0])
    assert text == "<image>" * 16 + "<|end|> caption en\n"


def test_vlm_crops_the_box_with_context(captioner, image, question_calls):
    box = Prompt(box=(20.0, 20.0, 40.0, 30.0))
    for context in (1.0, 2.0):
        captioner("qwen3_vl", context=context).caption(image, [box], max_new_tokens=1)
    crops = [np.asarray(call[0].image) for call in question_calls]
    pixels = np.asarray(image)
    assert np.array_equal(crops[0], pixels[20:30, 20:40])
    assert np.array_equal(crops[1], pixels[15:35, 10:50])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", [(450, 6), (6, 450)])
def test_vlm_family_captions_crops_of_thin_regions(captioner, family, size):
    thin_image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (*size[::-1], 3), np.uint8))
    x2, y2 = (side if side > 6 else 2 for side in size)
    (caption,) = captioner(family, context=1.0).caption(thin_image, [Prompt(box=(0, 0, x2, y2))], max_new_tokens=1)
    assert caption.score > 0


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
@pytest.mark.parametrize("region_format", ["crop", "outline", "coordinates"])
def test_vlm_rejects_images_above_the_aspect_ratio_of_the_model(captioner, family, region_format):
    with pytest.raises(ValueError, match=r"^an image of 402 x 2 pixels exceeds the aspect ratio of 200:1 .*; crop"):
        captioner(family, region_format).caption(Image.new("RGB", (402, 2)), [Prompt(box=(0, 0, 402, 2))])
