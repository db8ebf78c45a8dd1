"""Masks and captions of regions of images, without state: encode images, then segment and caption their regions."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from PIL import Image
from sca_registry.contracts import TASKS, Caption, Prompt, PromptBatch, SegmenterOutput, TokenUsage
from sca_registry.spec import EverythingOptions
from torch import Tensor

from sca.inference.processor import InputFrame, Processor
from sca.inference.prompt_arguments import check_task
from sca.io.masks import encode_rle, mask_to_box
from sca.language_models.usage import count_tokens
from sca.model import NON_FINITE_HINT, SegmentCaptioner
from sca.nn.masks import select_best_masks

if TYPE_CHECKING:
    from sca.model import SegmentationModel

REGION_BATCH_SIZE = 64  # go through segmenter and mixer at a time


class EncodedImages(NamedTuple):
    """B images and their features, computed once for any number of requests."""

    images: Sequence[Image.Image]
    features: Tensor | None  # (B, C, h, w); None without an encoder
    frames: Sequence[InputFrame]


class PredictedMask(NamedTuple):
    """A candidate for a region's mask, image pixels."""

    rle: dict[str, Any]  # COCO RLE
    predicted_iou: float  # predicted


class MaskEngine(ABC):
    """Encode images and segment their regions; subclasses add captions with `caption_batch` and `caption_masks`.

    Args:
        model: An encoder and a segmenter; None where a prompt is its region already.
        regions: Regions that go through the segmenter at a time: limits memory, changes no result.
    """

    def __init__(self, model: SegmentationModel | None, regions: int = REGION_BATCH_SIZE):
        self.model = None if model is None else model.eval()
        self.processor = Processor.from_encoder(model.encoder) if model is not None else None
        self.region_batch_size = regions

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def everything(self) -> EverythingOptions:
        """The search settings of everything mode: SAM's, or the model's own."""
        return EverythingOptions()

    def check_has_segmenter(self) -> None:
        """Raise ValueError if there is no encoder and no segmenter."""
        if self.model is None:
            raise ValueError("the captioner has no segmenter; use encoder+captioner, such as sam-vit-b+blip-base")

    @torch.inference_mode()
    def encode(self, images: Sequence[Image.Image]) -> EncodedImages:
        """Encode images as one batch."""
        if self.model is None:
            return EncodedImages(images, None, ())
        pixel_values = self.processor.preprocess_images(images).to(self.device, next(self.model.parameters()).dtype)
        frames = [self.processor.compute_frame(*image.size) for image in images]
        features = self.model.encode(pixel_values)
        if not features.isfinite().all():
            raise ValueError(f"the encoder returned NaN or infinite features; {NON_FINITE_HINT}")
        return EncodedImages(images, features, frames)

    @torch.inference_mode()
    def segment(
        self, encoded: EncodedImages, requests: Sequence[Sequence[Prompt]], multimask_output: bool = True
    ) -> list[list[PredictedMask]]:
        """Predict the candidate masks of each prompt.

        Args:
            encoded: What `encode` returned for B images.
            requests: For each of the B images its prompts, which fit it.
            multimask_output: Return all candidates of the segmenter (SAM has three); otherwise its single mask.

        Returns:
            For each prompt of all images in one list its masks, by predicted IoU, best first.

        Raises:
            ValueError: There is no segmenter, or it has no masks.
        """
        self.check_has_segmenter()
        masks_by_prompt: list[list[PredictedMask]] = [[] for _ in range(sum(map(len, requests)))]
        for indices, prompts, segmenter_output in self._iter_segmented_chunks(encoded, requests, multimask_output):
            if segmenter_output.masks is None:
                raise ValueError("the segmenter predicts no masks; build the model with segmenter=sam")
            order = segmenter_output.iou_scores.argsort(dim=1, descending=True, stable=True)  # (N, M)
            logits = segmenter_output.masks.take_along_dim(order[..., None, None], dim=1).flatten(0, 1)
            ious = clamp_ious(segmenter_output.iou_scores.take_along_dim(order, dim=1))
            rles = self._iter_rles(logits, prompts.image_index.repeat_interleave(order.shape[1]), encoded.frames)
            for index, prompt_ious in zip(indices, ious, strict=True):
                masks_by_prompt[index] = [PredictedMask(next(rles), iou) for iou in prompt_ious]
        return masks_by_prompt

    @torch.inference_mode()
    def predict_best_masks(
        self, encoded: EncodedImages, requests: Sequence[Sequence[Prompt]]
    ) -> list[PredictedMask | None]:
        """Predict the best mask of each prompt.

        Args:
            encoded: What `encode` returned for B images.
            requests: For each of the B images its prompts.

        Returns:
            For each prompt of all images in one list its mask with the highest predicted IoU, or None from a segmenter
            without masks.
        """
        best_predictions: list[PredictedMask | None] = [None] * sum(map(len, requests))
        for indices, prompts, segmenter_output in self._iter_segmented_chunks(encoded, requests):
            if segmenter_output.masks is not None:
                mask_logits = select_best_masks(segmenter_output.masks, segmenter_output.iou_scores)
                ious = clamp_ious(segmenter_output.iou_scores.amax(1))
                rles = self._iter_rles(mask_logits, prompts.image_index, encoded.frames)
                for index, rle, iou in zip(indices, rles, ious, strict=True):
                    best_predictions[index] = PredictedMask(rle, iou)
        return best_predictions

    def caption(
        self, image: Image.Image, prompts: Sequence[Prompt], task: str = "caption", **generation: Any
    ) -> list[Caption]:
        """Caption regions of an image whose prompts are known to fit: they are not checked."""
        return self.caption_batch(self.encode([image]), [prompts], task, **generation)[0]

    @abstractmethod
    def caption_batch(
        self,
        encoded: EncodedImages,
        requests: Sequence[Sequence[Prompt]],
        task: str = "caption",
        *,
        return_masks: bool = True,
        **generation: Any,
    ) -> list[list[Caption]]:
        """Caption any number of regions of encoded images.

        Args:
            encoded: What `encode` returned for B images.
            requests: For each of the B images its prompts, which fit it.
            task: "caption" or "recognition".
            return_masks: Compute full-size masks. Without them a caption of a point or a mask may have no box either.
            **generation: As returned by `sca.inference.generation_options.resolve_generation_options`.

        Returns:
            For each image its captions, in the order of its prompts.
        """

    @abstractmethod
    def caption_masks(
        self,
        encoded: EncodedImages,
        masks: Sequence[PredictedMask],
        prompts: Sequence[Prompt],
        task: str = "caption",
        **generation: Any,
    ) -> list[Caption]:
        """Caption regions whose masks are known.

        Args:
            encoded: What `encode` returned for one image.
            masks: The masks, which the captions get.
            prompts: For each mask the prompt that its caption is generated from.
            task: "caption" or "recognition".
            **generation: As for `caption_batch`.
        """

    def _iter_segmented_chunks(
        self, encoded: EncodedImages, requests: Sequence[Sequence[Prompt]], multimask_output: bool = True
    ) -> Iterator[tuple[list[int], PromptBatch, SegmenterOutput]]:
        """Yield a chunk of regions at a time, with their indices in the flattened requests."""
        for indices, prompt_batch in self.processor.group_prompts(requests, encoded.frames):
            for chunk_index, chunk in enumerate(prompt_batch.to(self.device).iter_chunks(self.region_batch_size)):
                chunk_indices = indices[
                    chunk_index * self.region_batch_size : chunk_index * self.region_batch_size + len(chunk)
                ]
                yield chunk_indices, chunk, self.model.segment(encoded.features, chunk, multimask_output)

    def _iter_rles(self, logits: Tensor, image_index: Tensor, frames: Sequence[InputFrame]) -> Iterator[dict[str, Any]]:
        """(N, 4h, 4w) logits -> RLE in image pixels, one at a time: full-size masks of many regions are large."""
        return map(
            encode_rle, self.processor.iter_binary_masks(logits, [frames[image] for image in image_index.tolist()])
        )


class Engine(MaskEngine):
    """Masks and captions of a composed model.

    Args:
        model: The model, which is set to eval mode.
        regions: Regions that are segmented and mixed at a time: limits memory, changes no result.

    Raises:
        ValueError: The model is something else, such as a name.
    """

    model: SegmentCaptioner

    def __init__(self, model: SegmentCaptioner, regions: int = REGION_BATCH_SIZE):
        if isinstance(model, str | Path):
            raise ValueError(f"Predictor takes a model and not its name; use sca.load({str(model)!r})")
        if not isinstance(model, SegmentCaptioner):
            raise ValueError(f"model is of type {type(model).__name__}; give a model, such as sca.load returns")
        super().__init__(model, regions)

    @property
    def generation(self) -> Mapping[str, Any]:
        """The model's own settings of generation."""
        return self.model.spec.generation

    @property
    def everything(self) -> EverythingOptions:
        return self.model.spec.everything_options

    @torch.inference_mode()
    def caption_batch(
        self,
        encoded: EncodedImages,
        requests: Sequence[Sequence[Prompt]],
        task: str = "caption",
        *,
        return_masks: bool = True,
        **generation: Any,
    ) -> list[list[Caption]]:
        check_task(task)
        flat_requests = [
            (image_index, prompt, region_index)
            for image_index, r in enumerate(requests)
            for region_index, prompt in enumerate(r)
        ]
        flat_captions: list[Caption | None] = [None] * len(flat_requests)
        for indices, prompts in self.processor.group_prompts(requests, encoded.frames):
            scored_texts, usages, rles, predicted_ious = self._caption_prompt_batch(
                encoded, prompts, TASKS.index(task), return_masks, generation
            )
            for row, index in enumerate(indices):
                _, prompt, region_index = flat_requests[index]
                box = prompt.box or (rles[row] and mask_to_box(rles[row]))
                (text, score), *alternatives = scored_texts[row]
                flat_captions[index] = Caption(
                    text,
                    score,
                    box,
                    rles[row],
                    predicted_ious[row],
                    prompt,
                    region_index,
                    tuple(alternatives),
                    usages[row],
                )
        captions: list[list[Caption]] = [[] for _ in requests]
        for (image_index, _, _), caption in zip(flat_requests, flat_captions, strict=True):
            captions[image_index].append(caption)
        return captions

    def caption_masks(
        self,
        encoded: EncodedImages,
        masks: Sequence[PredictedMask],
        prompts: Sequence[Prompt],
        task: str = "caption",
        **generation: Any,
    ) -> list[Caption]:
        (captions,) = self.caption_batch(encoded, [prompts], task, return_masks=False, **generation)
        captions_with_masks = zip(captions, masks, strict=True)
        return [
            replace(caption, mask=rle, box=mask_to_box(rle), predicted_iou=predicted_iou)
            for caption, (rle, predicted_iou) in captions_with_masks
        ]

    def _caption_prompt_batch(
        self,
        encoded: EncodedImages,
        prompts: PromptBatch,
        task_id: int,
        return_masks: bool,
        generation: Mapping[str, Any],
    ) -> tuple[list[list[tuple[str, float]]], list[TokenUsage], list[Any], list[Any]]:
        """Texts with their scores, tokens, mask (RLE) and predicted IoU of each row of homogeneous prompts; the last
        two may be None.
        """
        prefixes, rles, predicted_ious = [], [], []
        prepared = None
        for chunk in prompts.to(self.device).iter_chunks(self.region_batch_size):
            segmenter_output = self.model.segment(encoded.features, chunk)
            prepared = self.model.prepare_mixer(segmenter_output) if prepared is None else prepared
            task_ids = torch.full((len(chunk),), task_id, device=self.device)
            prefixes.append(self.model.build_prefix(self.model.mix(segmenter_output, prepared), task_ids))
            if segmenter_output.masks is not None and return_masks:
                best_logits = select_best_masks(segmenter_output.masks, segmenter_output.iou_scores)
                rles += self._iter_rles(best_logits, chunk.image_index, encoded.frames)
            if segmenter_output.iou_scores is not None:
                predicted_ious += clamp_ious(segmenter_output.iou_scores.amax(1))
            del segmenter_output  # its grids are large, and generation needs the memory
        prefix = torch.cat(prefixes)  # (N, K, E)
        generated = self.model.generate_from_prefix(prefix, **generation)
        no_values = [None] * len(prompts)
        scores = generated.scores.exp().tolist()
        sequences = generated.sequences.tolist()
        scored_texts = [
            list(zip(self._decode_texts(rows), each, strict=True)) for rows, each in zip(sequences, scores, strict=True)
        ]
        tokenizer = self.model.language_model.tokenizer
        usages = [count_tokens(prefix.shape[1], rows, [tokenizer.eos_token_id]) for rows in sequences]
        return scored_texts, usages, rles or no_values, predicted_ious or no_values

    def _decode_texts(self, sequences: Sequence[Sequence[int]]) -> list[str]:
        tokenizer = self.model.language_model.tokenizer
        if tokenizer is None:
            raise ValueError(
                "the language model has no tokenizer, so it generates token IDs and no text; add one with "
                "`sca import MODEL OUT --tokenizer FOLDER`, or use SegmentCaptioner.generate"
            )
        return [tokenizer.decode(token_ids) for token_ids in sequences]


def clamp_ious(scores: Tensor) -> list[Any]:
    """Read predicted IoUs of any shape, from 0 to 1. Raise ValueError if one is NaN, which says nothing of any mask."""
    ious = scores.float().clamp(0, 1).cpu()  # the one thing that the host waits for
    if ious.isnan().any():
        raise ValueError(f"the segmenter returned NaN as predicted IoU; {NON_FINITE_HINT}")
    return ious.tolist()
