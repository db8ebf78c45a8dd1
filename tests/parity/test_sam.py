"""SAM: outputs equal those of transformers' SamModel for every type of prompt."""

import numpy as np
import pytest
import torch
from PIL import Image
from sca_registry.contracts import Prompt, PromptBatch
from tiny_segmenters import SAM_CONFIG
from transformers import SamModel

import sca
from sca.encoders.sam import SamEncoder
from sca.segmenters.sam import SamSegmenter
from sca.testing.parity import check_parity

IMAGE_INDEX = torch.tensor([0, 0, 1, 1])
BOXES = torch.tensor([[10.0, 20, 50, 60], [0, 0, 63, 40], [5, 5, 9, 9], [30.5, 1.25, 44, 60]])
POINTS = torch.tensor([[[10.0, 20], [30, 40]], [[5, 6], [7, 8]], [[1, 1], [60, 60]], [[31, 2], [20, 50]]])
LABELS = torch.tensor([[1, 0], [1, 1], [1, 0], [0, 1]])
PROMPTS = {
    "box": PromptBatch(IMAGE_INDEX, boxes=BOXES),
    "point": PromptBatch(IMAGE_INDEX, points=POINTS[:, :1], labels=LABELS[:, :1]),
    "points": PromptBatch(IMAGE_INDEX, points=POINTS, labels=LABELS),
    "box and points": PromptBatch(IMAGE_INDEX, boxes=BOXES, points=POINTS, labels=LABELS),
}


@pytest.fixture(scope="module")
def reference_model(sam_folder):
    return SamModel.from_pretrained(sam_folder).eval()


@pytest.fixture(scope="module")
def encoder_and_segmenter(sam_folder):
    encoder = SamEncoder(str(sam_folder))
    return encoder.eval(), SamSegmenter(encoder).eval()


@pytest.fixture
def pixels():
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def group_by_image(tensor):
    return None if tensor is None else tensor.unflatten(0, (2, 2))


@pytest.mark.parametrize("kind", PROMPTS)
@pytest.mark.parametrize("multimask", [True, False])
@torch.no_grad()
def test_sam_masks_and_scores_match_transformers(reference_model, encoder_and_segmenter, pixels, kind, multimask):
    encoder, segmenter = encoder_and_segmenter
    prompts = PROMPTS[kind]
    output = segmenter(encoder(pixels), prompts, multimask)
    expected = reference_model(
        pixel_values=pixels,
        input_boxes=group_by_image(prompts.boxes),
        input_points=group_by_image(prompts.points),
        input_labels=group_by_image(prompts.labels),
        multimask_output=multimask,
    )
    assert torch.allclose(output.masks, expected.pred_masks.flatten(0, 1), atol=1e-5)
    assert torch.allclose(output.iou_scores, expected.iou_scores.flatten(0, 1), atol=1e-5)


@torch.no_grad()
def test_sam_mask_prompts_match_transformers_for_each_region(reference_model, encoder_and_segmenter, pixels):
    encoder, segmenter = encoder_and_segmenter
    masks = torch.randn(4, 1, 16, 16, generator=torch.Generator().manual_seed(1)) * 5
    features = encoder(pixels)
    output = segmenter(features, PromptBatch(IMAGE_INDEX, boxes=BOXES, masks=masks))
    for row, image_index in enumerate(IMAGE_INDEX.tolist()):
        expected = reference_model(
            image_embeddings=features[image_index][None],
            input_boxes=BOXES[row][None, None],
            input_masks=masks[row][None],
        )
        assert torch.allclose(output.masks[row], expected.pred_masks[0, 0], atol=1e-5)


@pytest.mark.parametrize(
    ("table", "fields"),
    [
        ("mask_decoder_config", {"hidden_act": "gelu"}),
        ("mask_decoder_config", {"layer_norm_eps": 0.01}),
        ("mask_decoder_config", {"attention_downsample_rate": 1}),
        ("mask_decoder_config", {"num_multimask_outputs": 4}),
        ("prompt_encoder_config", {"hidden_act": "relu", "layer_norm_eps": 0.01, "num_point_embeddings": 5}),
    ],
)
def test_sam_applies_all_fields_of_the_configuration(table, fields):
    config = {**SAM_CONFIG, table: {**SAM_CONFIG[table], **fields}}
    results = check_parity("segmenter", "sam", "transformers:SamModel", config=config)
    assert all(result.passed for result in results), results


@torch.no_grad()
@pytest.mark.slow
def test_everything_mode_encodes_once_and_captions_only_kept_regions(sam_folder, save_language_model, monkeypatch):
    torch.manual_seed(0)
    model = sca.compose(
        {"name": "sam", "weights": str(sam_folder)},
        {"name": "query", "num_queries": 2, "depth": 1, "num_heads": 4, "mlp_dim": 48},
        {"name": "hf", "weights": str(save_language_model("gpt2"))},
    )
    monkeypatch.setattr(model.language_model, "tokenizer", IdTokenizer())
    calls = {"encode": 0, "generate": 0}
    encode, generate = model.encode, model.language_model.generate

    def counting_encode(images):
        calls["encode"] += len(images)
        return encode(images)

    def counting_generate(prefix, *arguments, **options):
        calls["generate"] += len(prefix)
        return generate(prefix, *arguments, **options)

    monkeypatch.setattr(model, "encode", counting_encode)
    monkeypatch.setattr(model.language_model, "generate", counting_generate)
    predictor = sca.Predictor(model)
    rng = np.random.default_rng(0)
    predictor.set_image(Image.fromarray(rng.integers(0, 255, (1024, 1024, 3), dtype=np.uint8)))
    options = sca.EverythingOptions(
        points_per_side=8, pred_iou_thresh=-9.0, stability_score_thresh=0.0, box_nms_thresh=0.7
    )
    captions = sca.caption_everything(predictor, options=options)
    assert calls == {"encode": 1, "generate": len(captions)}
    assert 0 < len(captions) < 64 * 3
    assert captions[0].prompt == Prompt(box=captions[0].box, points=captions[0].prompt.points)
    assert sca.caption_everything(predictor, options=options) == captions, "nothing is left to chance"


class IdTokenizer:
    """Tokenizer stub that returns ids unchanged."""

    pad_token_id, eos_token_id = 0, 2

    def encode(self, text, max_length=None):
        return [*map(int, text.split())][:max_length]

    def decode(self, ids):
        return " ".join(map(str, ids))
