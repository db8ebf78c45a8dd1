"""Image-to-text models say what transformers says, whatever goes together."""

import json
import shutil

import pytest
import torch
from sca_registry.contracts import TokenUsage

import sca
from sca.captioners.crop import CropCaptioner
from sca.captioners.image_text import ImageTextInput, ImageTextModel
from sca.io.errors import InputError
from sca.testing.tiny import get_tiny_options

KINDS = ("blip", "git", "blip-2")


def texts(captions):
    return [caption.text for caption in captions]


@pytest.mark.parametrize("kind", KINDS)
def test_crops_are_told_apart_and_answers_come_in_order(weights, kind, image, prompts):
    captioner = CropCaptioner(weights=weights(kind))
    found = captioner.caption(image, prompts)
    assert len({caption.text for caption in found}) > 1
    assert [caption.region_id for caption in found] == [0, 1, 2, 3]
    assert all(caption.prompt is prompt for caption, prompt in zip(found, prompts, strict=True))
    assert all(0 < caption.score <= 1 for caption in found)
    assert texts(captioner.caption(image, prompts[::-1])) == texts(found)[::-1]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.slow
def test_how_many_go_at_a_time_makes_no_difference(weights, kind, beams, image, prompts):
    together = CropCaptioner(weights=weights(kind)).caption(image, prompts, num_beams=beams)
    alone = CropCaptioner(weights=weights(kind), batch_size=1).caption(image, prompts, num_beams=beams)
    assert texts(together) == texts(alone)
    assert [each.score for each in together] == pytest.approx([each.score for each in alone], rel=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_several_images_answer_as_each_alone(weights, kind, image, prompts):
    captioner = CropCaptioner(weights=weights(kind))
    images = [image, image.rotate(180), image]
    requests = [prompts[:2], [], prompts]
    together = captioner.caption_batch(captioner.encode(images), requests)
    expected = [captioner.caption(*each) for each in zip(images, requests, strict=True)]
    assert [texts(each) for each in together] == [texts(each) for each in expected]


def test_the_words_and_their_score_are_those_of_the_model(weights, image):
    model = ImageTextModel(weights("blip"), None, True, None, "cpu", None, 8)
    ((text, score, usage),) = model.generate_texts([ImageTextInput(image)], num_beams=1, max_new_tokens=6)
    pixels = model.processor(images=image, return_tensors="pt")["pixel_values"]
    ids = model.model.generate(pixels, max_new_tokens=6, do_sample=False)
    assert model.tokenizer.decode(ids[0], skip_special_tokens=True).strip() == text
    with torch.no_grad():
        logits = model.model(pixel_values=pixels, input_ids=ids).logits.log_softmax(-1)
    steps = logits[0, :-1].gather(1, ids[0, 1:, None])
    assert score == pytest.approx(steps.mean().exp().item(), rel=1e-4)
    assert usage == TokenUsage(0, (len(steps),), (ids[0, -1].item() not in model.eos_token_ids,))


@pytest.mark.parametrize("kind", ["git", "blip-2"])
def test_image_text_model_ignores_the_settings_of_its_files(weights, kind, image, prompts, tmp_path):
    expected = CropCaptioner(weights=weights(kind)).caption(image, prompts)
    folder = shutil.copytree(weights(kind), tmp_path / kind)
    file = folder / "generation_config.json"
    settings = {"num_return_sequences": 3, "max_time": 1e-4, "repetition_penalty": 1.8, "stop_strings": ["a"]}
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    assert texts(CropCaptioner(weights=str(folder)).caption(image, prompts)) == texts(expected)


def test_no_more_words_come_than_are_asked_for(weights, image, prompts, monkeypatch):
    captioner = CropCaptioner(weights=weights("git"))
    rows = []
    monkeypatch.setattr(captioner.image_text_model.tokenizer, "decode", lambda ids, **how: rows.append(ids) or "")
    captioner.caption(image, prompts, max_new_tokens=2)
    assert {len(row) for row in rows} == {2}


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"num_beam": 2}, "no generation option 'num_beam'. Did you mean 'num_beams'"),
        ({"num_captions": 2}, "no generation option 'num_captions'."),
        ({"num_beams": 0}, "num_beams is 0"),
        ({"task": "translation"}, "unknown task 'translation'"),
    ],
)
def test_what_is_unknown_is_refused_by_name(weights, image, prompts, how, message):
    with pytest.raises(ValueError, match=message):
        CropCaptioner(weights=weights("git")).caption(image, prompts, **how)


def test_a_folder_without_weights_or_processor_is_named(weights, tmp_path):
    with pytest.raises(InputError, match="has incomplete weights"):
        CropCaptioner(weights=str(tmp_path))
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(f"{weights('git')}/{name}")
    with pytest.raises(InputError, match=r"the processor in .* cannot be read"):
        CropCaptioner(weights=str(tmp_path))


def test_a_processor_that_needs_torchvision_says_how_to_get_it(weights, monkeypatch):
    from transformers import AutoProcessor

    def fails(folder):
        raise ImportError("Qwen2VLVideoProcessor requires the Torchvision library but it was not found")

    monkeypatch.setattr(AutoProcessor, "from_pretrained", fails)
    with pytest.raises(InputError, match=r"pip install 'segment-caption-anything\[baselines\]'"):
        CropCaptioner(weights=weights("git"))


def test_random_weights_need_a_configuration_and_are_the_same_each_time(image, prompts):
    with pytest.raises(ValueError, match="neither weights nor config"):
        CropCaptioner()
    with pytest.raises(ValueError, match="not supported for 'qwen2_vl'"):
        CropCaptioner(pretrained=False, config={"model_type": "qwen2_vl", "vision_config": {"depth": 1}})
    small = {"name": "blip-base", **get_tiny_options("captioner", "blip-base")}
    one, other = (sca.load_captioner(small).caption(image, prompts) for _ in range(2))
    assert one == other
