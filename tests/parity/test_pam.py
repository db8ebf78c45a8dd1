"""Checkpoints of Perceive Anything (PAM): outputs equal those recorded from its own implementation.

`tests/data/golden/README.md` describes the checkpoint and the recorded tensors.
"""

import numpy as np
import pytest
import torch
from pam_tiny import GOLDEN_FOLDER
from PIL import Image
from safetensors.torch import load_file
from sca_registry.contracts import DecoderMasks, Prompt, PromptBatch

import sca
from sca.inference.processor import Processor
from sca.language_models.questions import EncodedQuestion
from sca.mixers.semantic_perceiver import merge_cells, select_mask_tokens
from sca.nn.feature_packing import unpack_feature_maps

TOLERANCE = 1e-5  # relative to the largest value
IMAGE_INDEX = torch.tensor([0, 0, 1])
IMAGE_MARKER = -200  # id in `input_ids` that the visual prefix replaces
KINDS = ["box", "point", "click"]
pytestmark = pytest.mark.filterwarnings("ignore:.* has no tokenizer")


@pytest.fixture(scope="module")
def recorded():
    return load_file(GOLDEN_FOLDER / "golden.safetensors")


@pytest.fixture(scope="module")
def model():
    return sca.load(GOLDEN_FOLDER)


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def assert_close(actual, expected):
    assert actual.shape == expected.shape
    assert float((actual - expected).abs().max()) <= TOLERANCE * float(expected.abs().max())


def make_prompts(recorded, kind):
    frame = recorded[f"{kind}.frame"]
    if kind == "box":
        return PromptBatch(IMAGE_INDEX, boxes=frame)
    return PromptBatch(IMAGE_INDEX, points=frame, labels=recorded[f"{kind}.labels"])


def open_images(recorded):
    return [Image.fromarray(recorded[f"image.{index}"].numpy()) for index in range(2)]


def make_question(recorded):
    """The ids around the image."""
    ids = recorded["input_ids"][0].tolist()
    position = ids.index(IMAGE_MARKER)
    return EncodedQuestion(ids[:position], ids[position + 1 :])


def segment(model, recorded, kind):
    return model.segment(model.encode(recorded["pixel_values"]), make_prompts(recorded, kind))


def select_golden_tokens(tokens, kind):
    """Reorder our output tokens as PAM's: the object token is the first instead of the last of six."""
    return tokens[:, [5, 0, 1, 2, 3, 4, *range(6, tokens.shape[1])]]


def test_preprocessing_is_bit_equal(model, recorded):
    processor = Processor.from_encoder(model.encoder)
    assert torch.equal(processor.preprocess_images(open_images(recorded)), recorded["pixel_values"])


def test_encoder_rejects_an_unknown_interpolation():
    with pytest.raises(ValueError, match=r"resample is 'lanczos'.*Choose from: bilinear, bicubic"):
        sca.compose({"name": "sam2.1-hiera-tiny", "resample": "lanczos"}, "query", "gpt2", device="meta")


def test_prompts_in_the_frame_are_bit_equal(model, recorded, kind):
    processor = Processor.from_encoder(model.encoder)
    images = open_images(recorded)
    frames = [processor.compute_frame(*image.size) for image in images]
    requests = [[], []]
    for row, index in enumerate(IMAGE_INDEX.tolist()):
        values = recorded[f"{kind}.input"][row].tolist()
        if kind == "box":
            prompt = Prompt(box=tuple(values))
        else:
            labels = recorded[f"{kind}.labels"][row].tolist()
            prompt = Prompt(points=tuple((x, y, label) for (x, y), label in zip(values, labels, strict=True)))
        requests[index].append(prompt)
    ((indices, batch),) = processor.group_prompts(requests, frames)
    assert indices == [0, 1, 2]
    assert torch.equal(batch.boxes if kind == "box" else batch.points, recorded[f"{kind}.frame"])


@torch.no_grad()
def test_encode_matches_the_golden_features(model, recorded):
    image_embeddings, (middle, high) = unpack_feature_maps(
        model.encode(recorded["pixel_values"]), model.encoder.high_res_shapes
    )
    assert_close(image_embeddings, recorded["image_embedding"])
    assert_close(middle, recorded["features.stride8"])
    assert_close(high, recorded["features.stride4"])


@torch.no_grad()
def test_segment_matches_the_golden_tokens_masks_and_grid(model, recorded, kind):
    regions = segment(model, recorded, kind)
    assert_close(regions.positional_encoding[None], recorded["sam_position"])
    assert_close(regions.dense_embeddings[None], recorded["dense_prompt"])
    assert_close(regions.prompt_tokens, recorded[f"{kind}.prompt_tokens"])
    assert_close(select_golden_tokens(regions.tokens, kind), recorded[f"{kind}.sam_tokens"])
    assert_close(regions.decoder_masks.masks, recorded[f"{kind}.pred_masks"])
    assert_close(regions.decoder_masks.iou_scores, recorded[f"{kind}.iou_scores"])
    assert_close(model.segmenter.decoder.pred_obj_score_head(regions.tokens[:, 5]), recorded[f"{kind}.object_score"])
    assert_close(regions.grid, recorded[f"{kind}.grid"])
    assert_close(regions.masks, recorded[f"{kind}.mask"])


@torch.no_grad()
def test_mix_matches_the_golden_perceiver(model, recorded, kind):
    regions = segment(model, recorded, kind)
    assert_close(select_mask_tokens(regions), recorded[f"{kind}.mask_tokens"])
    queries, grid = model.mixer.update_regions(regions)
    assert_close(grid.flatten(2).mT, recorded[f"{kind}.perceiver_grid"])
    assert_close(queries, recorded[f"{kind}.queries"])
    assert_close(merge_cells(grid), recorded[f"{kind}.image_tokens"])
    assert_close(model.mixer.image_projector(merge_cells(grid)), recorded[f"{kind}.projected_image"])
    assert_close(model.mixer.query_projector(queries), recorded[f"{kind}.projected_queries"])


@torch.no_grad()
def test_prefix_and_logits_match_the_golden_sequence(model, recorded, kind):
    prefix = model.build_prefix(model.mix(segment(model, recorded, kind)), torch.zeros(3, dtype=torch.long))
    prefix = model.append_question(prefix, make_question(recorded))
    assert_close(prefix, recorded[f"{kind}.inputs_embeds"])
    states = model.language_model.hidden_states(prefix, torch.ones(prefix.shape[:2], dtype=torch.long))
    assert_close(model.language_model.lm_head(states), recorded[f"{kind}.logits"])


@torch.no_grad()
def test_generate_matches_the_golden_ids(model, recorded, kind):
    prefix = model.build_prefix(model.mix(segment(model, recorded, kind)), torch.zeros(3, dtype=torch.long))
    generated = model.generate_from_prefix(
        model.append_question(prefix, make_question(recorded)), max_new_tokens=recorded[f"{kind}.generated"].shape[1]
    )
    assert torch.equal(generated.sequences[:, 0], recorded[f"{kind}.generated"])


@torch.no_grad()
def test_masks_at_the_size_of_the_image_match_the_golden_ones(model, recorded):
    regions = segment(model, recorded, "box")
    processor = Processor.from_encoder(model.encoder)
    frames = [processor.compute_frame(*image.size) for image in open_images(recorded)]
    frames = [frames[index] for index in IMAGE_INDEX.tolist()]
    for row, mask in enumerate(processor.iter_binary_masks(regions.masks[:, 0], frames)):
        expected = (recorded[f"box.image_mask.{row}"][0] > 0).numpy()
        assert np.array_equal(mask, expected)


def test_mask_of_an_absent_object_is_empty_and_its_box_that_of_the_prompt(model, recorded):
    head = model.segmenter.decoder.pred_obj_score_head.proj_out
    bias = head.bias.clone()
    with torch.no_grad():
        head.bias -= 100.0
        regions = segment(model, recorded, "click")
        head.bias.copy_(bias)
    assert (regions.masks == -1024).all()
    assert (regions.boxes[:, :2] < regions.boxes[:, 2:]).all()
    assert (regions.decoder_masks.masks > -1024).all()
    assert isinstance(regions.decoder_masks, DecoderMasks)
