"""Masks of prompted regions, as SAM (arXiv 2304.02643): trains the encoder together with the segmenter `sam`.

SAM's encoder starts from a masked autoencoder, whose features describe appearance. Here, features also predict pixels.
"""

from __future__ import annotations

import numpy as np
from sca_registry.contracts import Batch, Dataset
from torch import Tensor, nn
from torch.nn import functional as F

from pretraining_data import STREET_FRACTION, PretrainingData
from pretraining_loop import Objective
from sca.encoders.tiny_vit import TinyVit
from sca.inference.processor import Processor
from sca.language_models.tiny_gpt2 import TinyGpt2
from sca.model import SegmentationModel
from sca.segmenters.sam import SamSegmenter
from sca.training.augmentation import Augmentation
from sca.training.examples import ExampleMixture, ExampleStream, collate_examples
from sca.training.recipe import SamplingOptions

PROMPT_WEIGHTS = {"box": 0.4, "point": 0.4, "box-and-point": 0.1, "mask": 0.1}
MAX_REGIONS = 6  # per image
PIXELS_PER_CELL = 2  # per side, predicted from the features of a cell
PIXEL_LOSS_WEIGHT = 0.2  # with 1, features describe shapes less well
STREET_AUGMENTATION = Augmentation(min_crop_fraction=0.4, color_jitter=0.3)


class MaskObjective(Objective):
    """Losses of the segmenter `sam`, and the error of pixels predicted from features.

    Class names and captions are not used.

    Args:
        encoder: Encoder to train.
        data: Samples.
    """

    default_steps = 900
    batch_size = 8
    source = "Segment Anything, arXiv 2304.02643"

    def __init__(self, encoder: TinyVit, data: PretrainingData):
        super().__init__()
        self.segmenter = SamSegmenter(encoder, depth=2, num_heads=4, mlp_dim=192, box_masks=True)
        self.model = SegmentationModel(encoder, self.segmenter)
        self.pixel_head = nn.Conv2d(encoder.channels, 3 * PIXELS_PER_CELL**2, 1)
        self.data = data
        self.examples: ExampleMixture | None = None

    @property
    def encoder(self) -> TinyVit:
        return self.model.encoder

    def prepare(self, steps: int, seed: int) -> None:
        processor, tokenizer = Processor.from_encoder(self.encoder), TinyGpt2().tokenizer  # texts are not used
        options = SamplingOptions(max_regions=MAX_REGIONS, box_jitter=0.03)
        length = steps * self.batch_size

        def build_stream(dataset: Dataset, augment: Augmentation | None = None) -> ExampleStream:
            return ExampleStream(dataset, processor, tokenizer, options, length, seed, augment=augment)

        streams, weights = [build_stream(self.data.scenes)], [1.0]
        if self.data.street:
            streams.append(build_stream(self.data.street, STREET_AUGMENTATION))
            weights = [1 - STREET_FRACTION, STREET_FRACTION]
        self.examples = ExampleMixture(streams, weights, length, seed, PROMPT_WEIGHTS, self.batch_size)

    def draw_batch(self, step: int, rng: np.random.Generator) -> Batch:
        first = step * self.batch_size
        return collate_examples([self.examples[index] for index in range(first, first + self.batch_size)], 0)

    def compute_losses(self, batch: Batch) -> dict[str, Tensor]:
        features = self.model.encode(batch.pixel_values)
        regions = self.model.segment(features, batch.prompts)
        pixels = F.pixel_shuffle(self.pixel_head(features), PIXELS_PER_CELL)
        targets = F.adaptive_avg_pool2d(batch.pixel_values, pixels.shape[-2:])
        pixel_loss = PIXEL_LOSS_WEIGHT * F.l1_loss(pixels, targets)
        return {**self.segmenter.compute_losses(regions, batch.targets), "pixels": pixel_loss}
