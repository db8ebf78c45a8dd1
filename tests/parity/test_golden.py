"""Checkpoints of the published system give what its own implementation gave for them.

`tests/data/golden/README.md` describes the checkpoints and the recorded tensors.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from sca_registry.contracts import TASKS, Batch, PromptBatch

import sca

ROOT = Path(__file__).resolve().parents[1] / "data" / "golden"
NAMES = ["sca-tiny-query-gpt2", "sca-tiny-query-llama", "sca-tiny-split-gpt2"]
CLOSE = 1e-4


class Golden:
    """A model, and what was recorded of it."""

    def __init__(self, folder):
        self.model = sca.load(folder)
        self.recorded = load_file(folder / "golden.safetensors")

    def rows(self, name):
        """(B, N, ...) -> (B N, ...)."""
        return self.recorded[name].flatten(0, 1)

    def prompts(self, kind):
        images, each = self.recorded["input_boxes"].shape[:2]
        owner = torch.arange(images).repeat_interleave(each)
        if kind == "box":
            return PromptBatch(owner, boxes=self.rows("input_boxes"))
        return PromptBatch(owner, points=self.rows("input_points"), labels=self.rows("input_point_labels"))

    def task(self, name):
        return torch.full((len(self.rows("input_ids")),), TASKS.index(name))


@pytest.fixture(scope="module", params=NAMES)
def golden(request):
    return Golden(ROOT / request.param)


@pytest.fixture(params=["box", "point"])
def kind(request):
    return request.param


@pytest.fixture(params=TASKS)
def task(request):
    return request.param


def close(ours, recorded):
    assert ours.shape == recorded.shape
    assert float((ours - recorded).abs().max()) <= CLOSE


@torch.no_grad()
def test_images_are_encoded_alike(golden):
    close(golden.model.encode(golden.recorded["pixel_values"]), golden.recorded["image_embeddings"])


@torch.no_grad()
def test_regions_queries_prefix_logits_and_loss_are_alike(golden, kind, task):
    ids, mask = golden.rows("input_ids"), golden.rows("attention_mask")
    pixels, asked = golden.recorded["pixel_values"], golden.task(task)
    output = golden.model(Batch(golden.prompts(kind), asked, pixels, input_ids=ids, attention_mask=mask))
    recorded = {name: golden.recorded[f"{kind}.{task}.{name}"] for name in ("query_outputs", "logits", "loss")}
    close(output.regions.iou_scores, golden.rows(f"{kind}.{task}.iou_scores"))
    close(output.regions.masks, golden.rows(f"{kind}.{task}.pred_masks"))
    close(output.queries, recorded["query_outputs"])
    close(golden.model.build_prefix(output.queries, asked), golden.recorded[f"{kind}.{task}.language_model_inputs"])
    words = mask.bool()  # the last recorded position is that after the last word, which predicts nothing
    close(output.logits, recorded["logits"][:, :-1][words])
    close(output.loss, recorded["loss"])


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.slow
def test_the_same_words_are_generated(golden, kind, task, beams):
    features = golden.model.encode(golden.recorded["pixel_values"])
    found = golden.model.generate(features, golden.prompts(kind), golden.task(task), num_beams=beams, max_new_tokens=8)
    recorded = golden.recorded[f"{kind}.{task}.generated.beams{beams}"].flatten(0, 2)[:, 1:]  # without the placeholder
    end = golden.model.language_model.model.config.eos_token_id
    assert [words(row, end) for row in found.sequences[:, 0].tolist()] == [words(row, end) for row in recorded.tolist()]


def words(ids, end):
    """Up to the end, and that there is one; after it there is only filler."""
    return ids[: ids.index(end) + 1] if end in ids else ids
