"""The whole path learns: sixteen scenes by heart in two hundred steps, and each caption by its own region."""

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
WORD_LOSS = 0.2  # nats a word, without smoothing: the likeliest word is right nearly always
MASK_IOU = 0.85
TABLE = {
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


class Fixed:
    """Samples kept in memory."""

    def __init__(self, samples):
        self.samples = tuple(samples)

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        return self.samples[index]


def permuted(sample):
    """Every region has the phrases of the next, the last those of the first."""
    phrases = [region.phrases for region in sample.regions]
    turned = zip(sample.regions, phrases[1:] + phrases[:1], strict=True)
    regions = tuple(type(region)(region.id, region.box, region.mask, region.name, words) for region, words in turned)
    return Sample(sample.image, sample.image_id, regions)


@pytest.fixture
def learned(tmp_path, monkeypatch):
    """Trains on samples, and judges on others: nats a word, nats a caption, and the mean IoU of the best masks."""

    def run(samples, judged):
        monkeypatch.setattr(catalogue, "REGISTRY", dict(catalogue.REGISTRY))
        monkeypatch.setenv("SCA_CACHE", str(tmp_path / "cache"))
        sca_registry.datasets("fixed")(fixed := lambda split: Fixed(samples))
        assert len(fixed("train")) == 16
        model = train(Recipe.from_dict("by-heart", TABLE), tmp_path / "run", quiet=True)
        return [judge(model, each) for each in judged]

    return run


@torch.no_grad()
def judge(model, samples):
    tokenizer = model.language_model.tokenizer
    stream = ExampleStream(
        Fixed(samples), Processor.from_encoder(model.encoder), tokenizer, SamplingOptions(longest_caption_prob=1.0), 16
    )
    batch = collate_examples([stream[place] for place in range(16)], tokenizer.pad_token_id)
    output = model(batch)
    words = batch.attention_mask.bool()
    logs = torch.zeros(words.shape)
    logs[words] = output.logits.log_softmax(-1).gather(1, batch.input_ids[words][:, None])[:, 0]
    best = output.regions.masks[torch.arange(len(logs)), output.regions.iou_scores.argmax(1)] > 0
    true = batch.targets.masks > 0.5
    iou = (best & true).sum((1, 2)) / (best | true).sum((1, 2))
    return float(-logs.sum() / batch.attention_mask.sum()), float(-logs.sum(1).mean()), float(iou.mean())


def guess(samples):
    """The least nats a caption, on average, of whoever knows every scene by heart but not which region is asked for.

    Of a scene with R regions the best is a share of 1/R for each of its captions: log R.
    """
    counts = [len(sample.regions) for sample in samples]
    return sum(count * math.log(count) for count in counts) / sum(counts)


def test_sixteen_scenes_are_learned_by_heart_in_two_hundred_steps(learned):
    ((a_word, a_caption, iou),) = learned(list(SCENES), [list(SCENES)])
    assert a_word < WORD_LOSS
    assert a_caption < guess(SCENES) * 1.5
    assert iou > MASK_IOU


@pytest.mark.all
def test_captions_permuted_among_the_regions_are_not_told_truly(learned):
    """Words reach a region only through its own prompt.

    A model that was taught each region its neighbor's caption learns those; the true captions must then cost it more
    than they would cost one that cannot tell regions apart (`guess`), and more than what it was taught by far. A lower
    loss would mean that words leak in from elsewhere: from the words that are to be predicted, from the other rows of
    the batch, or from an order of rows that is not the order of the words.
    """
    taught = [permuted(sample) for sample in SCENES]
    learned_words, true_words = learned(taught, [taught, list(SCENES)])
    assert learned_words[0] < WORD_LOSS
    assert true_words[1] > 2 * guess(SCENES)
    assert true_words[0] > 5 * learned_words[0]
    assert true_words[2] > MASK_IOU  # masks were taught truly
