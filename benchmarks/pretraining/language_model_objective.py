"""Next tokens of caption text alone, as GPT-2 (Radford et al. 2019): trains the language model without images."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from sca_registry.contracts import Region, Sample, Tokenizer
from torch import Tensor
from torch.nn import functional as F

from pretraining_data import PretrainingData
from pretraining_loop import Objective
from sca.language_models.tiny_gpt2 import TinyGpt2

SHUFFLING_PROBABILITY = 0.5  # of a phrase that follows its own words in random order


class LanguageModelObjective(Objective):
    """Cross-entropy of the next token in blocks of packed texts, so that texts occur at all positions.

    The texts are the class names and phrases of scenes and photographs. Those of a region follow each other, and half
    of the phrases follow their own words in random order. Thus a caption depends on what precedes it, as in the text of
    a large language model, and a prefix can determine it.

    Args:
        language_model: Language model to train.
        data: Samples.
    """

    kind = "language_model"
    default_steps = 2400
    batch_size = 16
    learning_rate = 2e-3
    source = "GPT-2, Radford et al. 2019"

    def __init__(self, language_model: TinyGpt2, data: PretrainingData):
        super().__init__()
        self.language_model = language_model
        self.data = data

    def draw_batch(self, step: int, rng: np.random.Generator) -> Tensor:
        tokenizer, length = self.language_model.tokenizer, self.language_model.max_positions
        blocks = [
            draw_block(lambda: self.data.draw_sample(rng), tokenizer, length, rng) for _ in range(self.batch_size)
        ]
        return torch.tensor(blocks)  # (B, L)

    def compute_losses(self, batch: Tensor) -> dict[str, Tensor]:
        return {"token": compute_token_loss(self.language_model, batch)}


def compute_token_loss(language_model: TinyGpt2, input_ids: Tensor) -> Tensor:
    """Return the mean cross-entropy per token in nats, given the tokens before it, of blocks (B, L)."""
    states = language_model.hidden_states(language_model.embed_tokens(input_ids), torch.ones_like(input_ids))
    logits = language_model.lm_head(states[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), input_ids[:, 1:].flatten())


def draw_block(
    draw_sample: Callable[[], Sample], tokenizer: Tokenizer, length: int, rng: np.random.Generator
) -> list[int]:
    """Draw a block of packed texts that starts anywhere in a text.

    Args:
        draw_sample: Draws an annotated image.
        tokenizer: Tokenizer.
        length: Tokens of the block.
        rng: Generator of the order of regions, texts and words, and of the start of the block.

    Returns:
        Token ids.
    """
    ids: list[int] = []
    while len(ids) < length:
        regions = draw_sample().regions
        for index in rng.permutation(len(regions)):
            for text in draw_texts(regions[index], rng):
                ids += tokenizer.encode(text)
    start = rng.integers(len(ids) - length + 1)
    return ids[start : start + length]


def draw_texts(region: Region, rng: np.random.Generator) -> list[str]:
    """Return the class name and the phrases of a region in random order, some after their words in random order."""
    texts: list[str] = []
    phrases = [text for text in (region.name, *region.phrases) if text]
    for index in rng.permutation(len(phrases)):
        parts = phrases[index].split()
        if len(parts) > 1 and rng.random() < SHUFFLING_PROBABILITY:
            texts.append(" ".join(rng.permutation(parts)))
        texts.append(phrases[index])
    return texts
