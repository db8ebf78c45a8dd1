"""Proposers that find phrases: OWLv2 and Grounding DINO."""

import sys

import numpy as np
import pytest
import torch
from PIL import Image
from sca_registry import RegistryError, proposers
from transformers import AutoImageProcessor, AutoProcessor, GroundingDinoForObjectDetection, Owlv2ForObjectDetection

from sca.proposers.phrases import join_phrases

NAMES = ("owlv2", "grounding-dino")


def load_reference(model_class, folder):
    """Return a model and its processor of transformers, with the image processor that uses Pillow."""
    processor = AutoProcessor.from_pretrained(folder)
    processor.image_processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    return model_class.from_pretrained(folder).eval(), processor


@torch.inference_mode()
def test_owlv2_proposals_equal_the_detections_of_transformers(save_tiny_proposer, colored_image, check_proposals):
    folder, text = save_tiny_proposer("owlv2"), ["red car", "dog"]
    proposals = proposers.build("owlv2", weights=folder, text=text, score_thresh=0.0)(colored_image, "a.png")
    model, processor = load_reference(Owlv2ForObjectDetection, folder)
    outputs = model(**processor(text=[text], images=colored_image, return_tensors="pt"))
    (expected,) = processor.post_process_grounded_object_detection(
        outputs, threshold=0.0, target_sizes=[(colored_image.height, colored_image.width)], text_labels=[text]
    )
    is_inside = expected["boxes"][:, 1] < colored_image.height - 1  # others are in the padding
    assert 1 < is_inside.sum() < len(is_inside)
    names = [name for name, keep in zip(expected["text_labels"], is_inside, strict=True) if keep]
    check_proposals(proposals, colored_image, expected["boxes"][is_inside], expected["scores"][is_inside], names)


@pytest.mark.parametrize("size", [(96, 48), (48, 96)])
def test_owlv2_boxes_refer_to_the_padded_square(size, build_tiny, monkeypatch):
    """The centers of predicted boxes are the cells of a grid over a square as long as the longer side."""
    proposer = build_tiny("owlv2", max_regions=100)
    outputs = []
    forward = proposer.model.forward
    monkeypatch.setattr(proposer.model, "forward", lambda **inputs: outputs.append(forward(**inputs)) or outputs[0])
    boxes = proposer.detect_regions(Image.new("RGB", size, "red")).boxes
    centers = (boxes[:, :2] + boxes[:, 2:]) / 2
    assert torch.allclose(centers, outputs[0].pred_boxes[0, :, :2] * 96, atol=1e-3)
    assert all(prompt.box[3] <= size[1] for prompt in proposer(Image.new("RGB", size), "a").prompts)


@torch.inference_mode()
def test_grounding_dino_proposals_equal_the_detections_of_transformers(
    save_tiny_proposer, colored_image, check_proposals
):
    folder, text = save_tiny_proposer("grounding-dino"), ["Red car", "dog."]
    options = {"text": text, "score_thresh": 0.3, "text_thresh": 0.4}
    proposals = proposers.build("grounding-dino", weights=folder, **options)(colored_image, "a.png")
    model, processor = load_reference(GroundingDinoForObjectDetection, folder)
    inputs = processor(text="red car. dog.", images=colored_image, return_tensors="pt")
    (expected,) = processor.post_process_grounded_object_detection(
        model(**inputs),
        inputs["input_ids"],
        threshold=0.3,
        text_threshold=0.4,
        target_sizes=[(colored_image.height, colored_image.width)],
    )
    assert len(proposals.prompts) == len(expected["boxes"]) > 1
    names = [name or None for name in expected["text_labels"]]
    check_proposals(proposals, colored_image, expected["boxes"], expected["scores"], names)


def test_grounding_dino_text_is_lower_case_with_a_period_after_each_phrase():
    assert join_phrases(["Red car", "dog. ", "a cat. a Bird"]) == "red car. dog. a cat. a bird."


@pytest.mark.parametrize("phrases", [["."], ["dog", " . "]])
def test_grounding_dino_rejects_a_phrase_of_periods(phrases):
    with pytest.raises(ValueError, match=r"text contains ' ?\. ?', which is not a phrase; pass words"):
        join_phrases(phrases)


def test_grounding_dino_reads_weights_of_mm_grounding_dino(build_tiny, colored_image, tmp_path):
    from sca.testing.tiny import get_tiny_options

    config = get_tiny_options("proposers", "grounding-dino")["config"] | {"model_type": "mm-grounding-dino"}
    proposer = build_tiny("grounding-dino", config=config)
    proposer.model.save_pretrained(tmp_path)
    proposer.processor.save_pretrained(tmp_path)
    loaded = proposers.build("grounding-dino", weights=str(tmp_path), text="red car", score_thresh=0, max_regions=5)
    assert loaded(colored_image, "a") == build_tiny("grounding-dino", config=config, text="red car")(colored_image, "a")


@pytest.mark.parametrize("name", NAMES)
def test_text_is_one_phrase_or_several(name, build_tiny, colored_image):
    one, several = (build_tiny(name, text=text)(colored_image, "a") for text in ("dog", ["dog"]))
    assert one == several


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ([], "no text to find; pass --text PHRASE, or set text="),
        ("", "text contains '', which is not a phrase; pass words"),
        (["car", " "], "text contains ' ', which is not a phrase"),
        (["car", 3], "text contains 3, which is not a phrase"),
        ("\ud800", "text contains '.ud800', half of a surrogate pair, which is not text; remove it"),
        ("x " * 300 + "x", "tokens, and the model reads"),
    ],
)
def test_invalid_text_is_rejected_in_one_line(name, text, message, build_tiny, capfd):
    with pytest.raises(RegistryError, match=message) as raised:
        build_tiny(name, text=text)
    assert "\n" not in str(raised.value)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("name", NAMES)
def test_missing_text_is_reported_before_weights_are_downloaded(name):
    with pytest.raises(RegistryError, match="no text to find; pass --text PHRASE"):
        proposers.build(name, weights="owner/absent")
    with pytest.raises((RegistryError, ValueError), match="no text to find; pass --text PHRASE"):
        proposers.build(f"{name}-base")


@pytest.mark.parametrize(("name", "other"), [NAMES, NAMES[::-1]])
def test_weights_of_another_model_type_are_rejected(name, other, save_tiny_proposer):
    with pytest.raises(RegistryError, match=rf"has the model type '{other}'; this component requires '{name}'"):
        proposers.build(name, weights=save_tiny_proposer(other), text="car")


def test_owlv2_without_scipy_names_the_extra(build_tiny, monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy", None)
    monkeypatch.setattr("sca_registry.component_states.is_extra_installed", lambda *_: False)
    with pytest.raises(RegistryError, match="needs the extra 'baselines'; install it with: pip install") as raised:
        build_tiny("owlv2")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", NAMES)
def test_grayscale_image_equals_its_rgb_version(name, build_tiny):
    image = Image.fromarray(np.random.default_rng(1).integers(0, 255, (40, 72), dtype=np.uint8))
    proposer = build_tiny(name)
    assert proposer(image, "a") == proposer(image.convert("RGB"), "a")
