"""Checkpoints of the published system: outputs equal those recorded from its own implementation.

`tests/data/golden/README.md` describes the checkpoints and the recorded tensors.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from sca_registry.contracts import TASKS, Batch, PromptBatch

import sca

GOLDEN_FOLDER = Path(__file__).resolve().parents[1] / "data" / "golden"
CHECKPOINT_NAMES = ["sca-tiny-query-gpt2", "sca-tiny-query-llama", "sca-tiny-split-gpt2"]
TOLERANCE = 1e-4


class GoldenModel:
    """A model and its recorded outputs."""

    def __init__(self, folder):
        self.model = sca.load(folder)
        self.recorded = load_file(folder / "golden.safetensors")

    def flatten_rows(self, name):
        """(B, N, ...) -> (B N, ...)."""
        return self.recorded[name].flatten(0, 1)

    def make_prompts(self, kind):
        num_images, regions_per_image = self.recorded["input_boxes"].shape[:2]
        image_index = torch.arange(num_images).repeat_interleave(regions_per_image)
        if kind == "box":
            return PromptBatch(image_index, boxes=self.flatten_rows("input_boxes"))
        return PromptBatch(
            image_index, points=self.flatten_rows("input_points"), labels=self.flatten_rows("input_point_labels")
        )

    def make_task_ids(self, name):
        return torch.full((len(self.flatten_rows("input_ids")),), TASKS.index(name))


@pytest.fixture(scope="module", params=CHECKPOINT_NAMES)
def golden(request):
    return GoldenModel(GOLDEN_FOLDER / request.param)


@pytest.fixture(params=["box", "point"])
def kind(request):
    return request.param


@pytest.fixture(params=TASKS)
def task(request):
    return request.param


def assert_close(actual, recorded):
    assert actual.shape == recorded.shape
    assert float((actual - recorded).abs().max()) <= TOLERANCE


@torch.no_grad()
def test_encode_matches_the_golden_image_embeddings(golden):
    assert_close(golden.model.encode(golden.recorded["pixel_values"]), golden.recorded["image_embeddings"])


@torch.no_grad()
def test_forward_matches_the_golden_regions_queries_prefix_logits_and_loss(golden, kind, task):
    ids, mask = golden.flatten_rows("input_ids"), golden.flatten_rows("attention_mask")
    pixels, task_ids = golden.recorded["pixel_values"], golden.make_task_ids(task)
    output = golden.model(Batch(golden.make_prompts(kind), task_ids, pixels, input_ids=ids, attention_mask=mask))
    recorded = {name: golden.recorded[f"{kind}.{task}.{name}"] for name in ("query_outputs", "logits", "loss")}
    assert_close(output.regions.iou_scores, golden.flatten_rows(f"{kind}.{task}.iou_scores"))
    assert_close(output.regions.masks, golden.flatten_rows(f"{kind}.{task}.pred_masks"))
    assert_close(output.queries, recorded["query_outputs"])
    assert_close(
        golden.model.build_prefix(output.queries, task_ids), golden.recorded[f"{kind}.{task}.language_model_inputs"]
    )
    is_token = mask.bool()  # the last recorded position is that after the last word, which predicts nothing
    assert_close(output.logits, recorded["logits"][:, :-1][is_token])
    assert_close(output.loss, recorded["loss"])


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.slow
def test_generate_matches_the_golden_token_ids(golden, kind, task, num_beams):
    features = golden.model.encode(golden.recorded["pixel_values"])
    generated = golden.model.generate(
        features, golden.make_prompts(kind), golden.make_task_ids(task), num_beams=num_beams, max_new_tokens=8
    )
    recorded = golden.recorded[f"{kind}.{task}.generated.beams{num_beams}"].flatten(0, 2)[
        :, 1:
    ]  # without the placeholder
    eos_token_id = golden.model.language_model.model.config.eos_token_id
    assert [truncate_after_eos(row, eos_token_id) for row in generated.sequences[:, 0].tolist()] == [
        truncate_after_eos(row, eos_token_id) for row in recorded.tolist()
    ]


def truncate_after_eos(ids, eos_token_id):
    """Return the ids up to and including the first end-of-text id, or all ids if there is none."""
    return ids[: ids.index(eos_token_id) + 1] if eos_token_id in ids else ids
