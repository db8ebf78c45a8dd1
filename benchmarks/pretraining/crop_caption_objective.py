"""Captions of crops, as GIT (arXiv 2205.14100): trains a tiny image captioner for the baseline `crop-captioner`."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPImageProcessor, GitConfig, GitForCausalLM, GitProcessor

from pretraining_data import PretrainingData
from pretraining_loop import Objective
from sca.language_models.tiny_gpt2 import TinyGpt2

MAX_TOKENS = 32  # per caption, with the start token
MIN_CROP_SIDE = 2  # pixels, as in `crop-captioner`


class TinyGit(torch.nn.Module):
    """Model of GIT's architecture with the tokenizer of `tiny-gpt2`.

    Args:
        image_size: Input side in pixels.
        patch_size: Side of a patch.
        hidden_size: Width of both transformers.
        depth: Layers of each.
        num_heads: Attention heads.
    """

    def __init__(
        self, image_size: int = 64, patch_size: int = 8, hidden_size: int = 96, depth: int = 3, num_heads: int = 4
    ):
        super().__init__()
        tokenizer = TinyGpt2().tokenizer.to_transformers()
        tokenizer.bos_token = tokenizer.eos_token
        token_ids = {
            "bos_token_id": tokenizer.eos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        }
        sizes = {
            "hidden_size": hidden_size,
            "intermediate_size": 4 * hidden_size,
            "num_hidden_layers": depth,
            "num_attention_heads": num_heads,
        }
        config = GitConfig(
            vision_config={**sizes, "image_size": image_size, "patch_size": patch_size},
            vocab_size=len(tokenizer),
            max_position_embeddings=MAX_TOKENS,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            **sizes,
            **token_ids,
        )
        self.model = GitForCausalLM(config)
        side = {"height": image_size, "width": image_size}
        self.processor = GitProcessor(CLIPImageProcessor(size=side, do_center_crop=False), tokenizer)


class CropBatch(NamedTuple):
    """Crops and their captions."""

    pixel_values: Tensor  # (B, 3, s, s)
    input_ids: Tensor  # (B, L), from the start token to the end token, padded with the end token
    num_tokens: Tensor  # (B,)


class CropCaptionObjective(Objective):
    """Cross-entropy of the caption of a region, given the crop of its box.

    Args:
        captioner: Captioner to train.
        data: Samples.
    """

    kind = "captioner"
    default_steps = 1500
    batch_size = 32
    source = "GIT, arXiv 2205.14100"

    def __init__(self, captioner: TinyGit, data: PretrainingData):
        super().__init__()
        self.captioner = captioner
        self.data = data

    def draw_batch(self, step: int, rng: np.random.Generator) -> CropBatch:
        crops = [self.draw_crop(rng) for _ in range(self.batch_size)]
        processor: Any = self.captioner.processor
        pixel_values = processor.image_processor([image for image, _ in crops], return_tensors="pt").pixel_values
        start_id = processor.tokenizer.bos_token_id
        rows = [[start_id, *self.encode_text(text)] for _, text in crops]
        input_ids = torch.full((len(rows), max(map(len, rows))), processor.tokenizer.eos_token_id)
        for row, ids in zip(input_ids, rows, strict=True):
            row[: len(ids)] = torch.tensor(ids)
        return CropBatch(pixel_values, input_ids, torch.tensor([len(row) for row in rows]))

    def draw_crop(self, rng: np.random.Generator) -> tuple[Image.Image, str]:
        """Draw the crop of a region that has captions, and one of them."""
        while True:
            sample = self.data.draw_sample(rng)
            regions = [region for region in sample.regions if region.phrases]
            if regions:
                region = regions[rng.integers(len(regions))]
                left, top, right, bottom = map(int, region.box)
                box = (left, top, max(right, left + MIN_CROP_SIDE), max(bottom, top + MIN_CROP_SIDE))
                return sample.image.convert("RGB").crop(box), region.phrases[rng.integers(len(region.phrases))]

    def encode_text(self, text: str) -> list[int]:
        """Return the token ids of a text and the end token."""
        tokenizer: Any = self.captioner.processor.tokenizer
        return [*tokenizer.encode(text)[: MAX_TOKENS - 2], tokenizer.eos_token_id]

    def compute_losses(self, batch: CropBatch) -> dict[str, Tensor]:
        logits = self.captioner.model(input_ids=batch.input_ids, pixel_values=batch.pixel_values).logits
        logits = logits[:, -batch.input_ids.shape[1] : -1]  # those of the image come first
        targets = batch.input_ids[:, 1:]
        is_text = torch.arange(targets.shape[1]) < batch.num_tokens[:, None] - 1
        return {"token": F.cross_entropy(logits[is_text], targets[is_text])}
