"""Florence-2 as a proposer."""

import pytest
import torch
from sca_registry import RegistryError, proposers
from transformers import AutoProcessor

from sca.proposers.florence2 import TASK_TOKENS

ANSWERS = {  # generated text by task
    "region-proposal": "</s><s><loc_100><loc_50><loc_500><loc_900><loc_0><loc_0><loc_999><loc_999></s>",
    "dense-region-caption": "</s><s>a car<loc_100><loc_50><loc_500><loc_900>dog<loc_0><loc_0><loc_200><loc_400></s>",
    "object-detection": "</s><s>car<loc_100><loc_50><loc_500><loc_900><loc_10><loc_20><loc_300><loc_400></s>",
    "open-vocabulary-detection": "</s><s>red car<loc_100><loc_50><loc_500><loc_900></s>",
}


@pytest.fixture
def build_answering(build_tiny, monkeypatch):
    """Function that builds a Florence-2 whose model generates given texts, and the list of its prompts."""

    def build(answers, **options):
        proposer = build_tiny("florence-2", **options)
        prompts, texts = [], iter(answers)
        processor_class = type(proposer.processor)
        call = processor_class.__call__

        def call_and_record(processor, text=None, **inputs):
            prompts.append(text)
            return call(processor, text=text, **inputs)

        monkeypatch.setattr(processor_class, "__call__", call_and_record)
        monkeypatch.setattr(proposer.model, "generate", lambda **inputs: torch.zeros(1, 3, dtype=torch.long))
        monkeypatch.setattr(proposer.processor, "batch_decode", lambda *_, **__: [next(texts)])
        return proposer, prompts

    return build


@pytest.mark.parametrize("task", TASK_TOKENS)
def test_proposals_equal_the_post_processing_of_transformers(
    task, build_answering, save_tiny_proposer, colored_image, check_proposals
):
    text = ["red car"] if task == "open-vocabulary-detection" else []
    proposer, prompts = build_answering([ANSWERS[task]], task=task, text=text)
    proposals = proposer(colored_image, "a")
    processor = AutoProcessor.from_pretrained(save_tiny_proposer("florence-2"))
    token = TASK_TOKENS[task]
    expected = processor.post_process_generation(ANSWERS[task], task=token, image_size=colored_image.size)[token]
    labels = expected.get("bboxes_labels", expected.get("labels"))
    assert len(labels) >= 1
    check_proposals(
        proposals, colored_image, expected["bboxes"], [1.0] * len(labels), [name or None for name in labels]
    )
    assert prompts == [token + "".join(text)]


def test_each_phrase_is_located_by_its_own_prompt(build_answering, colored_image):
    answers = ["</s><s>car<loc_0><loc_0><loc_500><loc_500></s>", "</s><s>dog<loc_100><loc_100><loc_900><loc_900></s>"]
    proposer, prompts = build_answering(answers, text=["car", "dog"])
    proposals = proposer(colored_image, "a")
    assert proposals.names == ("car", "dog")
    assert proposals.scores == (1.0, 1.0)
    assert prompts == ["<OPEN_VOCABULARY_DETECTION>car", "<OPEN_VOCABULARY_DETECTION>dog"]


def test_polygons_become_their_bounding_boxes(build_answering, colored_image):
    polygon = "</s><s>car<poly><loc_100><loc_200><loc_500><loc_100><loc_300><loc_900></poly></s>"
    proposer, _ = build_answering([polygon], text="car")
    (prompt,) = proposer(colored_image, "a").prompts
    width, height = colored_image.size
    assert prompt.box == pytest.approx((0.1 * width, 0.1 * height, 0.5 * width, 0.9 * height), abs=1)


def test_max_regions_keeps_the_first_generated_boxes(build_answering, colored_image):
    proposer, _ = build_answering([ANSWERS["region-proposal"]], max_regions=1)
    (prompt,) = proposer(colored_image, "a").prompts
    assert prompt.box[:2] == pytest.approx((0.1 * colored_image.width, 0.05 * colored_image.height), abs=1)


def test_saved_weights_generate_the_same_text(build_tiny, save_tiny_proposer, colored_image):
    folder = save_tiny_proposer("florence-2")
    loaded = proposers.build("florence-2", weights=folder, max_new_tokens=20)
    assert loaded(colored_image, "a") == build_tiny("florence-2")(colored_image, "a")
    for name, value in build_tiny("florence-2").model.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "region-proposals"}, "task is 'region-proposals'. Did you mean 'region-proposal'?"),
        ({"task": "dense-region-caption", "text": ["car"]}, "task=dense-region-caption takes no text; omit it, or use"),
        ({"task": "open-vocabulary-detection"}, "no text to find; pass --text PHRASE"),
        ({"text": [" "]}, "text contains ' ', which is not a phrase"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0; expected an integer of at least 1"),
    ],
)
def test_invalid_options_are_rejected_in_one_line(options, message, build_tiny):
    with pytest.raises(RegistryError) as raised:
        build_tiny("florence-2", **options)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_weights_of_another_model_type_are_rejected(save_tiny_proposer):
    with pytest.raises(RegistryError, match="has the model type 'detr'; this component requires 'florence2'"):
        proposers.build("florence-2", weights=save_tiny_proposer("detr"))
