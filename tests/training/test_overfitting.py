"""A model overfits sixteen scenes in two hundred steps and uses the region of each caption."""

import math

import catalogue
import pytest
import sca_registry
import torch
from sca_registry.contracts import Sample

from sca.data.scenes import Scenes
from sca.inference.processor import Processor
from sca.training.examples import ExampleStream, collate_examples
from sca.training.recipe import Recipe, SamplingOptions
from sca.training.train import train

pytestmark = pytest.mark.slow

SCENES = Scenes("train", num_images=16, image_size=64, seed=3)
MAX_TOKEN_LOSS = 0.2  # nats per token, without label smoothing: the most probable token is almost always correct
MIN_MASK_IOU = 0.85
RECIPE_TABLE = {
    "model": {
        "encoder": {
            "name": "tiny-vit",
            "image_size": 64,
            "hidden_size": 64,
            "depth": 1,
            "num_heads": 4,
            "output_channels": 64,
            "stem_channels": [16, 32],
        },
        "segmenter": {"name": "sam", "depth": 1, "num_heads": 4, "mlp_dim": 128, "box_masks": True},
        "mixer": {"name": "query", "num_queries": 2, "depth": 1, "num_heads": 4, "mlp_dim": 128, "mask_pooling": True},
        "language_model": {"name": "tiny-gpt2", "hidden_size": 64, "depth": 1, "num_heads": 4, "max_positions": 32},
        "task_tokens": 1,
        "trainable": ["encoder", "segmenter", "mixer", "projection", "task_tokens", "language_model"],
    },
    "data": {"fixed": {"name": "fixed"}},
    "train": {
        "steps": 200,
        "batch_size": 16,
        "learning_rate": 5e-3,
        "adam_beta2": 0.98,
        "warmup_steps": 10,
        "longest_caption_prob": 1.0,
        "save_steps": 1000,
    },
}


class InMemoryDataset:
    """A dataset of samples in memory."""

    def __init__(self, samples):
        self.samples = tuple(samples)

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        return self.samples[index]


def permute_captions(sample):
    """Give each region the phrases of the next region, and the last region those of the first."""
    phrases = [region.phrases for region in sample.regions]
    regions_and_phrases = zip(sample.regions, phrases[1:] + phrases[:1], strict=True)
    regions = tuple(
        type(region)(region.id, region.box, region.mask, region.name, new_phrases)
        for region, new_phrases in regions_and_phrases
    )
    return Sample(sample.image, sample.image_id, regions)


@pytest.fixture
def train_and_evaluate(tmp_path, monkeypatch):
    """Train on samples and evaluate on others: nats per token, nats per caption and mean IoU of the best masks."""

    def run(samples, evaluation_sets):
        monkeypatch.setattr(catalogue, "REGISTRY", dict(catalogue.REGISTRY))
        monkeypatch.setenv("SCA_CACHE", str(tmp_path / "cache"))
        sca_registry.datasets("fixed")(build_dataset := lambda split: InMemoryDataset(samples))
        assert len(build_dataset("train")) == 16
        model = train(Recipe.from_dict("by-heart", RECIPE_TABLE), tmp_path / "run", quiet=True)
        return [compute_losses_and_iou(model, evaluation_set) for evaluation_set in evaluation_sets]

    return run


@torch.no_grad()
def compute_losses_and_iou(model, samples):
    tokenizer = model.language_model.tokenizer
    stream = ExampleStream(
        InMemoryDataset(samples),
        Processor.from_encoder(model.encoder),
        tokenizer,
        SamplingOptions(longest_caption_prob=1.0),
        16,
    )
    batch = collate_examples([stream[index] for index in range(16)], tokenizer.pad_token_id)
    output = model(batch)
    is_token = batch.attention_mask.bool()
    log_probs = torch.zeros(is_token.shape)
    log_probs[is_token] = output.logits.log_softmax(-1).gather(1, batch.input_ids[is_token][:, None])[:, 0]
    predicted_masks = output.regions.masks[torch.arange(len(log_probs)), output.regions.iou_scores.argmax(1)] > 0
    true_masks = batch.targets.masks > 0.5
    iou = (predicted_masks & true_masks).sum((1, 2)) / (predicted_masks | true_masks).sum((1, 2))
    return float(-log_probs.sum() / batch.attention_mask.sum()), float(-log_probs.sum(1).mean()), float(iou.mean())


def compute_prompt_blind_loss(samples):
    """Return the lowest mean nats per caption of a model that memorized every scene but ignores the prompted region.

    For a scene with R regions the optimum is a probability of 1/R for each of its captions: log R.
    """
    counts = [len(sample.regions) for sample in samples]
    return sum(count * math.log(count) for count in counts) / sum(counts)


def test_training_overfits_sixteen_scenes_in_200_steps(train_and_evaluate):
    ((token_loss, caption_loss, iou),) = train_and_evaluate(list(SCENES), [list(SCENES)])
    assert token_loss < MAX_TOKEN_LOSS
    assert caption_loss < compute_prompt_blind_loss(SCENES) * 1.5
    assert iou > MIN_MASK_IOU


@pytest.mark.all
def test_training_on_permuted_captions_gives_high_loss_on_true_captions(train_and_evaluate):
    """A caption depends only on the prompt of its own region.

    A model trained on the captions of neighboring regions learns these captions. The loss of the true captions must
    then exceed that of a model without region prompts (`compute_prompt_blind_loss`), and exceed the training loss by
    far. A lower loss means that captions leak: from the tokens to predict, from other rows of the batch, or from a row
    order that differs between prompts and captions.
    """
    permuted_samples = [permute_captions(sample) for sample in SCENES]
    permuted_results, true_results = train_and_evaluate(permuted_samples, [permuted_samples, list(SCENES)])
    assert permuted_results[0] < MAX_TOKEN_LOSS
    assert true_results[1] > 2 * compute_prompt_blind_loss(SCENES)
    assert true_results[0] > 5 * permuted_results[0]
    assert true_results[2] > MIN_MASK_IOU  # the mask labels were correct
