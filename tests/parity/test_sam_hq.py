"""HQ-SAM: outputs equal those of transformers with one corrected line in its decoder."""

import inspect
import textwrap

import pytest
import torch
from tiny_segmenters import (
    PROMPT_KINDS,
    SAM_HQ_CONFIG,
    build_tiny_model,
    make_prompts,
    predict_with_original,
    relative_difference,
)
from transformers.models.sam_hq import modeling_sam_hq

from sca.encoders.sam_hq import SamHqEncoder
from sca.segmenters.sam_hq import SamHqSegmenter

TOLERANCE = 1e-12  # relative, in float64
# transformers 5.23 discards the grid that its two-way transformer returns.
WRONG_LINE = "point_embedding, iou_token_out = self.transformer("
CORRECTED_LINE = "point_embedding, image_embeddings = self.transformer("


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The model of transformers and ours with its weights, in float64."""
    original = build_tiny_model("sam_hq", SAM_HQ_CONFIG)
    folder = tmp_path_factory.mktemp("sam-hq")
    original.save_pretrained(folder)
    encoder = SamHqEncoder(str(folder)).eval()
    return original.double(), encoder.double(), SamHqSegmenter(encoder).eval().double()


@pytest.fixture(scope="module")
def pixel_values():
    return torch.randn(2, 3, 128, 128, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def corrected_decoder(monkeypatch):
    source = textwrap.dedent(inspect.getsource(modeling_sam_hq.SamHQMaskDecoder.forward))
    assert WRONG_LINE in source
    namespace = dict(vars(modeling_sam_hq))
    exec(source.replace(WRONG_LINE, CORRECTED_LINE), namespace)
    monkeypatch.setattr(modeling_sam_hq.SamHQMaskDecoder, "forward", namespace["forward"])


@torch.no_grad()
@pytest.mark.parametrize("multimask_output", [True, False], ids=["three masks", "one mask"])
@pytest.mark.parametrize("kind", PROMPT_KINDS)
def test_sam_hq_segmenter_matches_corrected_transformers(
    models, pixel_values, corrected_decoder, kind, multimask_output
):
    original, encoder, segmenter = models
    prompts = make_prompts(kind, 128)
    names = ("image_embeddings", "intermediate_embeddings")
    embeddings = [dict(zip(names, original.get_image_embeddings(image[None]), strict=True)) for image in pixel_values]
    expected_masks, expected_scores = predict_with_original(original, embeddings, prompts, multimask_output)
    output = segmenter(encoder(pixel_values), prompts, multimask_output)
    # transformers sorts the three masks by their predicted IoU
    order = output.iou_scores.argsort(dim=1, descending=True)
    masks = output.masks.gather(1, order[..., None, None].expand_as(output.masks))
    assert relative_difference(masks, expected_masks) < TOLERANCE
    assert relative_difference(output.iou_scores.gather(1, order), expected_scores) < TOLERANCE
