"""The losses that only training has: what they look at, and what they do not count."""

import math

import pytest
import torch
from sca_registry import RegistryError
from sca_registry.contracts import Batch, MaskTargets, PromptBatch
from torch.nn import functional as F

from sca.data.scenes import Scenes
from sca.training.auxiliary_losses import UNKNOWN_LABEL, AttributeHead, AttributeValues, pool_ground_truth_features
from sca.training.module import TrainingModule

OWN = {"color": ("red", "blue"), "shape": ("circle", "square", "star")}
ATTRIBUTES = AttributeValues(OWN, {"relation": ("above", "below")})


def labels(colors, forms):
    return {"color": torch.tensor(colors), "shape": torch.tensor(forms)}


def test_each_attribute_adds_its_cross_entropy_and_an_unknown_one_adds_nothing():
    torch.manual_seed(0)
    head, vectors = AttributeHead(4, 2, OWN), torch.randn(3, 2, 4)
    known = labels([0, 1, UNKNOWN_LABEL], [2, UNKNOWN_LABEL, UNKNOWN_LABEL])
    colors, forms = (head.heads[name](vectors.flatten(1)) for name in OWN)
    by_hand = F.cross_entropy(colors[:1], known["color"][:1]) + F.cross_entropy(colors[1:2], known["color"][1:2])
    by_hand += F.cross_entropy(forms[:1], known["shape"][:1])
    assert head(vectors, known).item() == pytest.approx(by_hand.item() / 3, rel=1e-5)


@pytest.fixture
def batch():
    """Two regions of one image, a left half and a right half."""
    masks = torch.zeros(2, 32, 32)
    masks[0, :, :16] = masks[1, :, 16:] = 1
    return Batch(
        pixel_values=torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)),
        prompts=PromptBatch(torch.tensor([0, 0]), boxes=torch.tensor([[0.0, 0, 32, 64], [32, 0, 64, 64]])),
        task_ids=torch.tensor([1, 1]),
        input_ids=torch.tensor([[5, 6], [7, 8]]),
        attention_mask=torch.ones(2, 2, dtype=torch.long),
        targets=MaskTargets(masks, torch.ones(2, 32, 32, dtype=torch.bool), torch.tensor([True, True])),
        auxiliary_targets=labels([0, 1], [2, 0]),
    )


def test_features_are_averaged_where_the_region_truly_is(small, batch):
    model = small()
    with torch.no_grad():
        regions = model.segment(model.encode(batch.pixel_values), batch.prompts)
        found = pool_ground_truth_features(regions, batch.targets)
    image = regions.image_embeddings[0]  # (D, 8, 8)
    halves = torch.stack((image[:, :, :4].mean((1, 2)), image[:, :, 4:].mean((1, 2))))
    assert torch.allclose(found[:, 0], halves, atol=1e-3)


def test_auxiliary_losses_are_weighted_into_the_loss_and_reach_what_they_shape(small, batch):
    model = small(trainable=["encoder", "segmenter", "mixer", "projection", "task_tokens", "language_model"])
    training_module = TrainingModule(model, {"caption": 0.0, "mask": 0.0, "iou": 0.0, "features": 0.5}, ATTRIBUTES)
    training_module(batch).backward()
    touched = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert touched == {"encoder"}  # the features themselves, and no way round them
    (features,) = training_module.recent_losses["features"]
    assert training_module(batch).item() == pytest.approx(0.5 * features.item(), rel=1e-5)


def test_a_region_is_not_asked_to_show_what_is_about_another_one(small):
    attributes = AttributeValues.from_datasets([Scenes("val"), Scenes("val")])
    training_module = TrainingModule(small(), {"features": 1.0, "attributes": 1.0}, attributes)
    assert training_module.heads["features"].heads.keys() == {"color", "shape", "size", "texture"}
    assert training_module.heads["attributes"].heads.keys() == Scenes.attribute_values.keys()


def test_attributes_that_the_data_does_not_have_cannot_be_named(small):
    for loss in ("attributes", "features"):
        with pytest.raises(RegistryError, match=f"set loss.{loss}=0"):
            TrainingModule(small(), {loss: 1.0}, AttributeValues({}, {}))
    TrainingModule(small(), {"attributes": 1.0}, AttributeValues({}, {"relation": ("above", "below")}))


def test_a_region_without_a_true_mask_teaches_no_features(small, batch):
    training_module = TrainingModule(small(), {"features": 1.0}, ATTRIBUTES)
    training_module(batch)
    batch.targets.has_mask[1] = False
    training_module(batch)
    both, one = training_module.recent_losses["features"]
    assert 0 < one < both
    batch.targets.has_mask[0] = False
    assert math.isfinite(training_module(batch).item())
    assert training_module.recent_losses["features"][-1] == 0
