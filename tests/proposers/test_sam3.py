"""SAM 3 as a proposer of masks."""

import sys

import httpx
import numpy as np
import pytest
import torch
from huggingface_hub.errors import GatedRepoError
from sca_registry import RegistryError, proposers
from sca_registry.contracts import Prompt

from sca.io.errors import InputError
from sca.testing.tiny import get_tiny_options

pytest.importorskip("torchvision", reason="SAM 3 requires torchvision")


@pytest.fixture(scope="module")
def reference(save_tiny_proposer):
    """Model and processor of transformers."""
    from transformers import Sam3Model, Sam3Processor

    folder = save_tiny_proposer("sam3")
    return Sam3Model.from_pretrained(folder).eval(), Sam3Processor.from_pretrained(folder)


@torch.inference_mode()
def segment(reference, image, **prompts):
    """Return the result of transformers, best first."""
    model, processor = reference
    inputs = processor(images=image, return_tensors="pt", **prompts)
    sizes = inputs.pop("original_sizes").tolist()
    (result,) = processor.post_process_instance_segmentation(model(**inputs), threshold=0.2, target_sizes=sizes)
    order = result["scores"].argsort(descending=True, stable=True)
    return {key: result[key][order] for key in ("scores", "masks")}


def check_masks(proposals, expected, name):
    assert len(proposals.prompts) == len(expected["scores"]) > 1
    assert np.allclose(proposals.scores, expected["scores"])
    assert {*proposals.names} == {name}
    for prompt, mask in zip(proposals.prompts, expected["masks"], strict=True):
        assert prompt == Prompt(mask=prompt.mask)
        differences = prompt.mask != mask.bool().numpy()
        assert differences.mean() < 0.002  # the probabilities of random weights are close to the threshold


def test_masks_of_a_phrase_equal_those_of_transformers(reference, save_tiny_proposer, colored_image):
    proposer = proposers.build("sam3", weights=save_tiny_proposer("sam3"), text="red car", score_thresh=0.2)
    expected = segment(reference, colored_image, text="red car")
    check_masks(proposer(colored_image, "a"), expected, "red car")


@pytest.mark.parametrize("text", [None, "red car"])
def test_masks_of_example_boxes_equal_those_of_transformers(text, reference, save_tiny_proposer, colored_image):
    boxes, labels = [[3, 4, 30, 20], [40, 10, 70, 38]], [1, 0]
    options = {"boxes": boxes, "box_labels": labels, "score_thresh": 0.2, **({"text": text} if text else {})}
    proposer = proposers.build("sam3", weights=save_tiny_proposer("sam3"), **options)
    expected = segment(reference, colored_image, text=text, input_boxes=[boxes], input_boxes_labels=[labels])
    check_masks(proposer(colored_image, "a"), expected, text)


def test_phrases_share_the_encoded_image(build_tiny, colored_image, monkeypatch):
    proposer = build_tiny("sam3", max_regions=100)
    calls = []
    encode = proposer.model.get_vision_features
    monkeypatch.setattr(proposer.model, "get_vision_features", lambda pixels: calls.append(1) or encode(pixels))
    proposals = proposer(colored_image, "a")
    assert len(calls) == 1
    for phrase in ("red car", "dog"):
        alone = build_tiny("sam3", text=phrase)(colored_image, "a")
        rows = [row for row, name in enumerate(proposals.names) if name == phrase][:5]
        assert np.allclose([proposals.scores[row] for row in rows], alone.scores)


def test_no_match_returns_no_proposals(build_tiny, colored_image):
    assert build_tiny("sam3", score_thresh=1.0)(colored_image, "a").prompts == ()


def test_weights_of_the_video_model_are_accepted(build_tiny, colored_image, tmp_path):
    from transformers import Sam3VideoConfig, Sam3VideoModel

    from sca.io.hub import initialize_model

    tracker = get_tiny_options("encoders", "sam3-tracker")["config"]
    detector = get_tiny_options("proposers", "sam3")["config"]
    config = Sam3VideoConfig(detector_config=detector, tracker_config={"model_type": "sam3_tracker_video", **tracker})
    model = initialize_model(Sam3VideoModel, config)
    model.save_pretrained(tmp_path)
    tiny = build_tiny("sam3")
    tiny.processor.save_pretrained(tmp_path)
    loaded = proposers.build("sam3", weights=str(tmp_path), text=["red car", "dog"], score_thresh=0, max_regions=5)
    expected = model.detector_model.state_dict()
    assert {name: value.shape for name, value in loaded.model.state_dict().items()} == {
        name: value.shape for name, value in expected.items()
    }
    assert all(torch.equal(value, expected[name]) for name, value in loaded.model.state_dict().items())
    assert len(loaded(colored_image, "a").prompts) == 5


def test_example_box_outside_the_image_is_reported_for_that_image(build_tiny, colored_image):
    proposer = build_tiny("sam3", text=(), boxes=[[100, 4, 130, 20]])
    with pytest.raises(InputError, match="100,4,130,20"):
        proposer(colored_image, "a")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"text": ()}, "no text to find; pass --text PHRASE"),
        ({"text": ["x " * 40]}, "tokens, and the model reads 32; shorten it"),
        ({"boxes": [[1, 2, 3]]}, "boxes contains [1, 2, 3]; write boxes as [[x1, y1, x2, y2]] in pixels"),
        ({"boxes": [[5, 2, 3, 9]]}, "boxes contains [5, 2, 3, 9]; write boxes as"),
        ({"boxes": [[1, 2, 3, 4]], "box_labels": [2]}, "box_labels is [2]; set 1 or 0 for each of the 1 boxes"),
        ({"box_labels": [1]}, "box_labels is [1]; set 1 or 0 for each of the 0 boxes"),
    ],
)
def test_invalid_options_are_rejected_in_one_line(options, message, build_tiny):
    with pytest.raises(RegistryError) as raised:
        build_tiny("sam3", **options)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_gated_repository_is_reported_in_one_line(monkeypatch):
    def raise_gated_error(*_, **__):
        response = httpx.Response(403, request=httpx.Request("GET", "https://huggingface.co/facebook/sam3"))
        raise GatedRepoError("gated", response=response)

    monkeypatch.setattr("sca.io.hub.model_info", raise_gated_error)
    with pytest.raises((RegistryError, InputError), match="is gated: accept its terms") as raised:
        proposers.build("sam3", text="car")
    assert "\n" not in str(raised.value)


def test_missing_torchvision_names_the_extra(build_tiny, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    monkeypatch.setattr("sca_registry.component_states.is_extra_installed", lambda *_: False)
    with pytest.raises(RegistryError, match="needs the extra 'baselines'; install it with: pip install"):
        build_tiny("sam3")
