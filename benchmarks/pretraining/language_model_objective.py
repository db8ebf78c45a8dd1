"""Next tokens of caption text alone, as GPT-2 (Radford et al. 2019): trains the language model without images."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from sca_registry.contracts import Sample, Tokenizer
from torch import Tensor
from torch.nn import functional as F

from pretraining_data import PretrainingData
from pretraining_loop import Objective
from sca.language_models.tiny_gpt2 import TinyGpt2


class LanguageModelObjective(Objective):
    """Cross-entropy of the next token in blocks of packed texts, so that texts occur at all positions.

    The texts are the class names and all phrases of scenes and photographs.

    Args:
        language_model: Language model to train.
        data: Samples.
    """

    default_steps = 600
    batch_size = 16
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
        rng: Generator for the order of the texts and the start of the block.

    Returns:
        Token ids.
    """
    ids: list[int] = []
    while len(ids) < length:
        texts = list_texts(draw_sample())
        for index in rng.permutation(len(texts)):
            ids += tokenizer.encode(texts[index])
    start = rng.integers(len(ids) - length + 1)
    return ids[start : start + length]


def list_texts(sample: Sample) -> list[str]:
    """Return the class name and the phrases of each region."""
    return [text for region in sample.regions for text in (region.name, *region.phrases) if text]
