"""Image-text pairs, as CLIP (arXiv 2103.00020): images and their texts have similar embeddings, others do not."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from sca_registry.contracts import Region, Sample
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from pretraining_data import PretrainingData, preprocess_images
from pretraining_loop import Objective, draw_corner, encode_small_images
from sca.encoders.tiny_vit import TinyVit
from sca.language_models.tiny_gpt2 import TinyGpt2

CLASS_NAME_PROBABILITY = 0.15  # of a class name instead of the first phrase, as the text of a crop
WHOLE_IMAGE_INTERVAL = 4  # every fourth step has whole images
MAX_TOKENS = 60
EMBEDDING_SIZE = 64
MAX_LOGIT_SCALE = math.log(100)


class ImageTextBatch(NamedTuple):
    """Images and the text of each."""

    pixel_values: Tensor  # (B, 3, s, s), s at most the side of the encoder's input
    corner: tuple[int, int]  # window of the grid whose position embeddings the images have
    texts: list[str]


class ImageTextObjective(Objective):
    """Symmetric contrastive loss of image and text embeddings; equal texts in a batch are all positive.

    A crop around one region has its class name or its first phrase as the text. A whole image has a phrase of each of
    its regions.

    Args:
        encoder: Encoder to train.
        data: Samples.
    """

    default_steps = 600
    batch_size = 64
    source = "CLIP, arXiv 2103.00020"

    def __init__(self, encoder: TinyVit, data: PretrainingData):
        super().__init__()
        self.encoder = encoder
        self.data = data
        self.crop_size = encoder.image_format.size // 2
        self.text_model = TinyGpt2(hidden_size=96, depth=2, num_heads=4, max_positions=MAX_TOKENS)
        self.pooling_query = nn.Linear(encoder.channels, 1)
        self.image_projection = nn.Linear(encoder.channels, EMBEDDING_SIZE, bias=False)
        self.text_projection = nn.Linear(self.text_model.hidden_size, EMBEDDING_SIZE, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def draw_batch(self, step: int, rng: np.random.Generator) -> ImageTextBatch:
        if (step + 1) % WHOLE_IMAGE_INTERVAL == 0:  # as many pixels as in a batch of crops
            samples = [self.data.draw_sample(rng) for _ in range(self.batch_size // 4)]
            pixel_values = preprocess_images(
                self.encoder, [sample.image for sample in samples], self.encoder.image_format.size
            )
            return ImageTextBatch(pixel_values, (0, 0), [describe_image(sample, rng) for sample in samples])
        crops = [self.data.draw_region_crop(rng) for _ in range(self.batch_size)]
        texts = [
            str(region.name if rng.random() < CLASS_NAME_PROBABILITY else region.phrases[0]) for _, region in crops
        ]
        pixel_values = preprocess_images(self.encoder, [image for image, _ in crops], self.crop_size)
        return ImageTextBatch(pixel_values, draw_corner(self.encoder, self.crop_size, rng), texts)

    def compute_losses(self, batch: ImageTextBatch) -> dict[str, Tensor]:
        logits = self.logit_scale.clamp(max=MAX_LOGIT_SCALE).exp() * (
            self.embed_images(batch.pixel_values, batch.corner) @ self.embed_texts(batch.texts).T
        )
        is_same_text = torch.tensor([[first == second for second in batch.texts] for first in batch.texts]).float()
        targets = is_same_text / is_same_text.sum(1, keepdim=True)
        return {"contrastive": (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2}

    def embed_images(self, pixel_values: Tensor, corner: tuple[int, int]) -> Tensor:
        """Embed images by attention pooling: (B, 3, s, s) -> (B, E) of unit length."""
        cells = encode_small_images(self.encoder, pixel_values, corner).flatten(2).transpose(1, 2)  # (B, h w, C)
        pooled = (self.pooling_query(cells).softmax(dim=1) * cells).sum(dim=1)
        return F.normalize(self.image_projection(pooled), dim=-1)

    def embed_texts(self, texts: list[str]) -> Tensor:
        """Embed texts by the state of the end token: (B, E) of unit length."""
        tokenizer = self.text_model.tokenizer
        ids = [torch.tensor(tokenizer.encode(text, MAX_TOKENS)) for text in texts]
        lengths = torch.tensor([len(each) for each in ids])
        input_ids = pad_sequence(ids, batch_first=True, padding_value=tokenizer.pad_token_id)
        attention_mask = (torch.arange(input_ids.shape[1]) < lengths[:, None]).long()
        states = self.text_model.hidden_states(self.text_model.embed_tokens(input_ids), attention_mask)
        return F.normalize(self.text_projection(states[torch.arange(len(texts)), lengths - 1]), dim=-1)


def describe_image(sample: Sample, rng: np.random.Generator) -> str:
    """Return a phrase of each region of a scene, or each class of a photograph, in random order."""

    def choose_text(region: Region) -> str:
        return region.phrases[0] if region.attributes else str(region.name)

    texts = list(dict.fromkeys(choose_text(region) for region in sample.regions if region.name))
    return ", ".join(texts[index] for index in rng.permutation(len(texts)))
