"""Image-to-text models: captions equal those of transformers at every batch size."""

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

MODEL_KINDS = ("blip", "git", "blip-2")


def get_texts(captions):
    return [caption.text for caption in captions]


@pytest.mark.parametrize("kind", MODEL_KINDS)
def test_crop_captioner_returns_different_captions_in_prompt_order(weights_folder, kind, image, prompts):
    captioner = CropCaptioner(weights=weights_folder(kind))
    result = captioner.caption(image, prompts)
    assert len({caption.text for caption in result}) > 1
    assert [caption.region_id for caption in result] == [0, 1, 2, 3]
    assert all(caption.prompt is prompt for caption, prompt in zip(result, prompts, strict=True))
    assert all(0 < caption.score <= 1 for caption in result)
    assert get_texts(captioner.caption(image, prompts[::-1])) == get_texts(result)[::-1]


@pytest.mark.parametrize("kind", MODEL_KINDS)
@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.slow
def test_crop_captioner_output_is_independent_of_batch_size(weights_folder, kind, num_beams, image, prompts):
    batched_captions = CropCaptioner(weights=weights_folder(kind)).caption(image, prompts, num_beams=num_beams)
    single_captions = CropCaptioner(weights=weights_folder(kind), batch_size=1).caption(
        image, prompts, num_beams=num_beams
    )
    assert get_texts(batched_captions) == get_texts(single_captions)
    assert [each.score for each in batched_captions] == pytest.approx(
        [each.score for each in single_captions], rel=1e-3
    )


@pytest.mark.parametrize("kind", MODEL_KINDS)
def test_caption_batch_matches_single_images(weights_folder, kind, image, prompts):
    captioner = CropCaptioner(weights=weights_folder(kind))
    images = [image, image.rotate(180), image]
    requests = [prompts[:2], [], prompts]
    batched_captions = captioner.caption_batch(captioner.encode(images), requests)
    expected = [captioner.caption(*each) for each in zip(images, requests, strict=True)]
    assert [get_texts(each) for each in batched_captions] == [get_texts(each) for each in expected]


def test_image_text_model_matches_text_and_score_of_transformers(weights_folder, image):
    model = ImageTextModel(weights_folder("blip"), None, True, None, "cpu", None, 8)
    ((text, score, usage),) = model.generate_texts([ImageTextInput(image)], num_beams=1, max_new_tokens=6)
    pixels = model.processor(images=image, return_tensors="pt")["pixel_values"]
    ids = model.model.generate(pixels, max_new_tokens=6, do_sample=False)
    assert model.tokenizer.decode(ids[0], skip_special_tokens=True).strip() == text
    with torch.no_grad():
        logits = model.model(pixel_values=pixels, input_ids=ids).logits.log_softmax(-1)
    token_log_probs = logits[0, :-1].gather(1, ids[0, 1:, None])
    assert score == pytest.approx(token_log_probs.mean().exp().item(), rel=1e-4)
    assert usage == TokenUsage(0, (len(token_log_probs),), (ids[0, -1].item() not in model.eos_token_ids,))


@pytest.mark.parametrize("kind", ["git", "blip-2"])
def test_image_text_model_ignores_its_generation_config_file(weights_folder, kind, image, prompts, tmp_path):
    expected = CropCaptioner(weights=weights_folder(kind)).caption(image, prompts)
    folder = shutil.copytree(weights_folder(kind), tmp_path / kind)
    file = folder / "generation_config.json"
    settings = {"num_return_sequences": 3, "max_time": 1e-4, "repetition_penalty": 1.8, "stop_strings": ["a"]}
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    assert get_texts(CropCaptioner(weights=str(folder)).caption(image, prompts)) == get_texts(expected)


def test_image_text_model_generates_at_most_max_new_tokens(weights_folder, image, prompts, monkeypatch):
    captioner = CropCaptioner(weights=weights_folder("git"))
    sequences = []
    monkeypatch.setattr(captioner.image_text_model.tokenizer, "decode", lambda ids, **how: sequences.append(ids) or "")
    captioner.caption(image, prompts, max_new_tokens=2)
    assert {len(row) for row in sequences} == {2}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beam": 2}, "no generation option 'num_beam'. Did you mean 'num_beams'"),
        ({"num_captions": 2}, "no generation option 'num_captions'."),
        ({"num_beams": 0}, "num_beams is 0"),
        ({"task": "translation"}, "unknown task 'translation'"),
    ],
)
def test_crop_captioner_rejects_unknown_options_and_tasks_by_name(weights_folder, image, prompts, options, message):
    with pytest.raises(ValueError, match=message):
        CropCaptioner(weights=weights_folder("git")).caption(image, prompts, **options)


def test_crop_captioner_rejects_folders_without_weights_or_processor(weights_folder, tmp_path):
    with pytest.raises(InputError, match="has incomplete weights"):
        CropCaptioner(weights=str(tmp_path))
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(f"{weights_folder('git')}/{name}")
    with pytest.raises(InputError, match=r"has no preprocessor_config\.json; save the image processor"):
        CropCaptioner(weights=str(tmp_path))


@pytest.mark.parametrize(
    "reason",
    [
        "Qwen2VLVideoProcessor requires the Torchvision library but it was not found",
        "Package `num2words` is required to run SmolVLM processor",
    ],
)
def test_processor_without_a_package_suggests_the_baselines_extra(weights_folder, monkeypatch, reason):
    from transformers import AutoProcessor

    def raise_import_error(folder, **options):
        raise ImportError(reason)

    monkeypatch.setattr(AutoProcessor, "from_pretrained", raise_import_error)
    with pytest.raises(InputError, match=r"pip install 'segment-caption-anything\[baselines\]'"):
        CropCaptioner(weights=weights_folder("git"))


def test_random_weights_need_a_config_and_are_reproducible(image, prompts):
    with pytest.raises(ValueError, match="neither weights nor config"):
        CropCaptioner()
    with pytest.raises(ValueError, match="not supported for 'qwen2_vl'"):
        CropCaptioner(pretrained=False, config={"model_type": "qwen2_vl", "vision_config": {"depth": 1}})
    captioner_table = {"name": "blip-base", **get_tiny_options("captioner", "blip-base")}
    first_captions, second_captions = (sca.load_captioner(captioner_table).caption(image, prompts) for _ in range(2))
    assert first_captions == second_captions
