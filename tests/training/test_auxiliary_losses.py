"""Auxiliary training losses: their inputs and the regions they ignore."""

import math

import pytest
import torch
from sca_registry import RegistryError
from sca_registry.contracts import Batch, MaskTargets, PromptBatch
from torch.nn import functional as F

from sca.data.scenes import Scenes
from sca.training.auxiliary_losses import UNKNOWN_LABEL, AttributeHead, AttributeValues, pool_ground_truth_features
from sca.training.module import TrainingModule

REGION_ATTRIBUTES = {"color": ("red", "blue"), "shape": ("circle", "square", "star")}
ATTRIBUTES = AttributeValues(REGION_ATTRIBUTES, {"relation": ("above", "below")})


def make_labels(colors, forms):
    return {"color": torch.tensor(colors), "shape": torch.tensor(forms)}


def test_attribute_head_sums_cross_entropies_and_ignores_unknown_labels():
    torch.manual_seed(0)
    head, vectors = AttributeHead(4, 2, REGION_ATTRIBUTES), torch.randn(3, 2, 4)
    target_labels = make_labels([0, 1, UNKNOWN_LABEL], [2, UNKNOWN_LABEL, UNKNOWN_LABEL])
    color_logits, form_logits = (head.heads[name](vectors.flatten(1)) for name in REGION_ATTRIBUTES)
    expected_sum = F.cross_entropy(color_logits[:1], target_labels["color"][:1]) + F.cross_entropy(
        color_logits[1:2], target_labels["color"][1:2]
    )
    expected_sum += F.cross_entropy(form_logits[:1], target_labels["shape"][:1])
    assert head(vectors, target_labels).item() == pytest.approx(expected_sum.item() / 3, rel=1e-5)


@pytest.fixture
def batch():
    """Build a batch of one image with two regions: its left half and its right half."""
    masks = torch.zeros(2, 32, 32)
    masks[0, :, :16] = masks[1, :, 16:] = 1
    return Batch(
        pixel_values=torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)),
        prompts=PromptBatch(torch.tensor([0, 0]), boxes=torch.tensor([[0.0, 0, 32, 64], [32, 0, 64, 64]])),
        task_ids=torch.tensor([1, 1]),
        input_ids=torch.tensor([[5, 6], [7, 8]]),
        attention_mask=torch.ones(2, 2, dtype=torch.long),
        targets=MaskTargets(masks, torch.ones(2, 32, 32, dtype=torch.bool), torch.tensor([True, True])),
        auxiliary_targets=make_labels([0, 1], [2, 0]),
    )


def test_pool_ground_truth_features_averages_over_true_mask(build_small_model, batch):
    model = build_small_model()
    with torch.no_grad():
        regions = model.segment(model.encode(batch.pixel_values), batch.prompts)
        pooled = pool_ground_truth_features(regions, batch.targets)
    embeddings = regions.image_embeddings[0]  # (D, 8, 8)
    expected = torch.stack((embeddings[:, :, :4].mean((1, 2)), embeddings[:, :, 4:].mean((1, 2))))
    assert torch.allclose(pooled[:, 0], expected, atol=1e-3)


def test_feature_loss_is_weighted_and_its_gradient_reaches_only_the_encoder(build_small_model, batch):
    model = build_small_model(
        trainable=["encoder", "segmenter", "mixer", "projection", "task_tokens", "language_model"]
    )
    training_module = TrainingModule(
        model, {"caption": 0.0, "mask": 0.0, "iou": 0.0, "feature_attributes": 0.5}, ATTRIBUTES
    )
    training_module(batch).backward()
    parts_with_gradient = {
        name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None and p.grad.any()
    }
    assert parts_with_gradient == {"encoder"}  # the features themselves, without a detour
    (feature_loss,) = training_module.recent_losses["feature_attributes"]
    assert training_module(batch).item() == pytest.approx(0.5 * feature_loss.item(), rel=1e-5)


def test_feature_loss_excludes_attributes_about_other_regions(build_small_model):
    attributes = AttributeValues.from_datasets([Scenes("val"), Scenes("val")])
    training_module = TrainingModule(build_small_model(), {"feature_attributes": 1.0, "attributes": 1.0}, attributes)
    assert training_module.heads["feature_attributes"].heads.keys() == {"color", "shape", "size", "texture"}
    assert training_module.heads["attributes"].heads.keys() == Scenes.attribute_values.keys()


def test_training_module_rejects_auxiliary_losses_without_attributes_in_data(build_small_model):
    for loss in ("attributes", "feature_attributes"):
        with pytest.raises(RegistryError, match=f"set loss.{loss}=0"):
            TrainingModule(build_small_model(), {loss: 1.0}, AttributeValues({}, {}))
    TrainingModule(build_small_model(), {"attributes": 1.0}, AttributeValues({}, {"relation": ("above", "below")}))


def test_feature_loss_skips_regions_without_ground_truth_mask(build_small_model, batch):
    training_module = TrainingModule(build_small_model(), {"feature_attributes": 1.0}, ATTRIBUTES)
    training_module(batch)
    batch.targets.has_mask[1] = False
    training_module(batch)
    loss_of_two_regions, loss_of_one_region = training_module.recent_losses["feature_attributes"]
    assert 0 < loss_of_one_region < loss_of_two_regions
    batch.targets.has_mask[0] = False
    assert math.isfinite(training_module(batch).item())
    assert training_module.recent_losses["feature_attributes"][-1] == 0
