"""Vision-language models: how the prompt specifies the region."""

import numpy as np
import pytest
from sca_registry.contracts import Prompt

import sca
from sca.captioners.region_captioner import RegionView
from sca.captioners.region_formats import QUESTIONS, draw_box
from sca.captioners.vlm import VisionLanguageModel
from sca.data.scenes import Scenes
from sca.evaluation.predictions import PromptingOptions
from sca.inference.generation_options import resolve_generation_options


def get_texts(captions):
    return [caption.text for caption in captions]


def test_florence_prompt_contains_the_task_token_and_box_tokens_in_thousandths(
    weights_folder, image, prompts, question_calls
):
    captioner = VisionLanguageModel(weights=weights_folder("florence2"), region_format="coordinates")
    captioner.caption(image, prompts[1:])
    captioner.caption(image, prompts[2:3], "recognition")
    assert [question.text for question in question_calls[0]] == [
        "<REGION_TO_DESCRIPTION><loc_625><loc_583><loc_875><loc_916>",
        "<REGION_TO_DESCRIPTION><loc_0><loc_0><loc_999><loc_999>",
        "<REGION_TO_DESCRIPTION><loc_187><loc_200><loc_412><loc_466>",
    ]
    assert question_calls[1][0].text == "<REGION_TO_CATEGORY><loc_0><loc_0><loc_999><loc_999>"
    assert all(question.image is image for call in question_calls for question in call)
    input_ids = captioner.image_text_model.processor(images=image, text=question_calls[0][0].text, return_tensors="pt")[
        "input_ids"
    ][0]
    assert "<loc_625>" in captioner.image_text_model.tokenizer.convert_ids_to_tokens(input_ids)


def test_kosmos_prompt_contains_the_patch_tokens_of_the_box_corners(weights_folder, image, prompts, question_calls):
    VisionLanguageModel(weights=weights_folder("kosmos-2"), region_format="coordinates").caption(image, prompts[1:3])
    tokens = [question.text.split("<object>")[1].split("</object>")[0] for question in question_calls[0]]
    first_patch, last_patch = 18 * 32 + 20, 29 * 32 + 27  # floor of the first corner, ceiling of the last
    assert tokens == [
        f"<patch_index_{first_patch:04d}><patch_index_{last_patch:04d}>",
        "<patch_index_0000><patch_index_1023>",
    ]


def test_evaluate_with_a_vlm_answers_questions_about_one_region(weights_folder):
    captioner = VisionLanguageModel(weights=weights_folder("qwen2_vl"))
    scenes, lines = Scenes("test", num_images=2, image_size=64, questions=True), []
    report = sca.evaluate(
        captioner,
        scenes,
        prompting=PromptingOptions(tasks=("question",), generation={"max_new_tokens": 3}),
        metrics=["questions"],
        report=lines.append,
    )
    questions = [question for sample in scenes for question in sample.questions]
    about_one = [question for question in questions if "<region" not in question.text]
    assert 0 < len(about_one) < len(questions)
    assert report.scores["questions/questions"] == len(about_one)
    assert "questions with region references are skipped" in "\n".join(lines)
    sample = scenes[0]
    for record in [each for each in report.records if each["index"] == 0]:
        prompt = Prompt(box=next(region.box for region in sample.regions if region.id == record["region_id"]))
        texts = [question["text"] for question in record["truth"]["questions"]]
        expected = [
            captioner.caption(sample.image, [prompt], question=text, max_new_tokens=3)[0].text for text in texts
        ]
        assert [answer["text"] for answer in record["answers"]] == expected


@pytest.mark.parametrize("kind", ["florence2", "kosmos-2"])
def test_vlm_with_location_tokens_distinguishes_regions_independent_of_batching(weights_folder, kind, image, prompts):
    captioner = VisionLanguageModel(weights=weights_folder(kind), region_format="coordinates")
    batched_captions = captioner.caption(image, prompts, num_beams=2)
    assert len(set(get_texts(batched_captions))) > 1
    assert [captioner.caption(image, [prompt], num_beams=2)[0].text for prompt in prompts] == get_texts(
        batched_captions
    )


def test_vlm_draws_the_box_around_the_region_on_a_copy_of_the_image(weights_folder, image, prompts, question_calls):
    original_pixels = np.asarray(image).copy()
    captioner = VisionLanguageModel(weights=weights_folder("qwen2_vl"), region_format="box")
    captioner.caption(image, prompts[1:2], max_new_tokens=3)
    drawn_pixels = np.asarray(question_calls[0][0].image)
    assert question_calls[0][0].text == QUESTIONS["box"][1]
    assert np.array_equal(np.asarray(image), original_pixels)
    assert np.array_equal(drawn_pixels[35:55, 50:70], original_pixels[35:55, 50:70])
    assert (drawn_pixels[33:35, 48:72] == (255, 0, 0)).all()
    assert (drawn_pixels[33:57, 70:72] == (255, 0, 0)).all()
    is_changed = (drawn_pixels != original_pixels).any(-1)
    assert not is_changed[:33].any()
    assert not is_changed[:, 72:].any()
    assert draw_box(image, (0, 0, 80, 60)).tobytes() == image.tobytes()  # what is all of the image has no outside


def test_vlm_applies_the_chat_template_and_batches_images_of_different_sizes(weights_folder, image, prompts):
    captioner = VisionLanguageModel(weights=weights_folder("qwen2_vl"), question="Which thing is this?")
    batched_captions = captioner.caption(image, prompts, max_new_tokens=4, num_beams=2)
    single_texts = [captioner.caption(image, [prompt], max_new_tokens=4, num_beams=2)[0].text for prompt in prompts]
    assert get_texts(batched_captions) == single_texts
    assert len(set(single_texts)) > 1
    inputs = captioner.image_text_model._process_input(
        captioner._build_input(RegionView(0, image, prompts[0], None, None), captioner.task_questions[1])
    )
    prompt_text = captioner.image_text_model.tokenizer.decode(inputs["input_ids"][0])
    assert "Which thing is this?" in prompt_text
    assert prompt_text.count("<|vision_start|>") == 1


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (
            "gemma3",
            {"region_format": "coordinates"},
            "^a 'gemma3' model does not support region_format=coordinates; use crop, box or outline$",
        ),
        ("blip", {}, "'blip' model takes no questions; .* crop-captioner"),
        (
            "florence2",
            {"region_format": "circle"},
            "region_format is 'circle'. Choose from: crop, box, outline, coordinates",
        ),
        ("florence2", {"region_format": "coordinates", "question": "What?"}, "omit the option question"),
        ("florence2", {"question": "What?"}, "region_format=crop has a fixed prompt for a 'florence2' model"),
        (
            "qwen2_vl",
            {"question": "what is {region}?"},
            r"contains \{region\} although region_format is not coordinates; remove",
        ),
        ("qwen2_vl", {"question": "is <region 1> red?"}, "does not support region references"),
        ("qwen2_vl", {"context": 0.5}, "context is 0.5"),
        ("qwen2_vl", {"region_format": "box", "context": 1.5}, "^context requires region_format=crop; remove it"),
    ],
)
def test_vlm_rejects_unsupported_options_and_suggests_alternatives(weights_folder, kind, options, message):
    with pytest.raises(ValueError, match=message):
        VisionLanguageModel(weights=weights_folder(kind), **options)


@pytest.mark.parametrize("region_format", ["crop", "box"])
def test_vlm_answers_questions_about_one_region(weights_folder, image, prompts, question_calls, region_format):
    captioner = VisionLanguageModel(weights=weights_folder("qwen2_vl"), region_format=region_format)
    options = resolve_generation_options(captioner, question="what color is it?", max_new_tokens=3)
    captioner.caption(image, prompts, **options)
    assert {call.text for call in question_calls[-1]} == {"what color is it?"}
    captioner.caption(image, prompts, max_new_tokens=3)
    assert {call.text for call in question_calls[-1]} == {QUESTIONS[region_format][1]}
    with pytest.raises(ValueError, match="does not support region references"):
        resolve_generation_options(captioner, question="is <region 1> red?")
    with pytest.raises(ValueError, match="the question is empty"):
        resolve_generation_options(captioner, question=" ")


@pytest.mark.parametrize(("kind", "region_format"), [("florence2", "crop"), ("kosmos-2", "coordinates")])
def test_vlm_with_fixed_prompts_takes_no_questions(weights_folder, kind, region_format):
    captioner = VisionLanguageModel(weights=weights_folder(kind), region_format=region_format)
    with pytest.raises(ValueError, match="does not support questions"):
        resolve_generation_options(captioner, question="what color is it?")
