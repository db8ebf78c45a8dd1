"""Object detectors of transformers as proposers."""

import shutil

import numpy as np
import pytest
import torch
from sca_registry import RegistryError, proposers
from sca_registry.contracts import Prompt
from transformers import AutoImageProcessor, AutoModelForObjectDetection

from sca.proposers.detector import Detections, select_proposals

DETECTORS = ("detr", "rt-detr", "d-fine")


@pytest.mark.parametrize("name", DETECTORS)
def test_proposals_equal_the_detections_of_transformers(name, save_tiny_proposer, colored_image, check_proposals):
    folder = save_tiny_proposer(name)
    proposals = proposers.build(name, weights=folder, score_thresh=0.2)(colored_image, "a.png")
    model = AutoModelForObjectDetection.from_pretrained(folder).eval()
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    with torch.inference_mode():
        outputs = model(**processor(colored_image, return_tensors="pt"))
    size = (colored_image.height, colored_image.width)
    (expected,) = processor.post_process_object_detection(outputs, threshold=0.2, target_sizes=[size])
    names = [model.config.id2label[label] for label in expected["labels"].tolist()]
    assert len(proposals.prompts) > 1
    check_proposals(proposals, colored_image, expected["boxes"], expected["scores"], names)


def test_detector_reads_any_weights_of_an_object_detector(save_tiny_proposer, colored_image, build_tiny):
    proposer = proposers.build("detector", weights=save_tiny_proposer("rt-detr"), score_thresh=0, max_regions=5)
    assert proposer(colored_image, "a") == build_tiny("rt-detr")(colored_image, "a")


def test_detector_rejects_weights_without_an_image_processor(save_tiny_proposer, tmp_path):
    folder = shutil.copytree(save_tiny_proposer("rt-detr"), tmp_path / "model")
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(RegistryError, match=r"has no preprocessor_config\.json; save the image processor"):
        proposers.build("detector", weights=str(folder))


def test_random_weights_are_reproducible(build_tiny, colored_image):
    assert build_tiny("d-fine")(colored_image, "a") == build_tiny("d-fine")(colored_image, "a")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "no weights; set weights to a folder or a Hub id, or pretrained=false"),
        ({"pretrained": False}, "neither weights nor config is set"),
        ({"score_thresh": 2.0}, "score_thresh is 2.0; expected a number from 0 to 1"),
        ({"max_regions": 0}, "max_regions is 0; expected an integer of at least 1"),
        ({"weights": "./absent"}, "'./absent' is neither a folder nor a model on the Hub"),
    ],
)
def test_detector_rejects_invalid_options(options, message):
    with pytest.raises((RegistryError, ValueError), match=message) as raised:
        proposers.build("detector", **options)
    assert "\n" not in str(raised.value)


def test_detector_rejects_weights_of_another_model_type(tmp_path):
    from transformers import CLIPConfig

    CLIPConfig().save_pretrained(tmp_path)
    message = "has the model type 'clip'; this component requires 'detr' or 'rt_detr' or 'rt_detr_v2' or 'd_fine'"
    with pytest.raises(RegistryError, match=message):
        proposers.build("detector", weights=str(tmp_path))


def test_select_proposals_returns_the_best_boxes_inside_the_image():
    boxes = torch.tensor([[-5.0, 2, 4, 9], [1, 1, 1.5, 9], [2, 2, 90, 50], [0, 0, 3, 3], [1, 1, 5, 5]])
    scores = torch.tensor([0.5, 0.9, 0.8, 0.1, 0.6])
    proposals = select_proposals(Detections(boxes, scores, ["a", "b", "", "d", None]), (20, 10), 0.3, 2)
    assert [prompt.box for prompt in proposals.prompts] == [(2, 2, 20, 10), (1, 1, 5, 5)]
    assert proposals.scores == pytest.approx((0.8, 0.6))
    assert proposals.names == (None, None)


def test_select_proposals_returns_masks_as_prompts_and_drops_empty_ones():
    masks = torch.zeros(2, 10, 20, dtype=torch.bool)
    masks[1, 2:4, 3:9] = True
    proposals = select_proposals(Detections(torch.zeros(2, 4), torch.ones(2), ["a", "b"], masks), (20, 10), 0.5, 9)
    (prompt,) = proposals.prompts
    assert prompt == Prompt(mask=prompt.mask)
    assert np.array_equal(prompt.mask, masks[1].numpy())
    assert proposals.names == ("b",)
