"""Stateless inference engines: encode images, then segment and caption their regions.

`sca.Predictor` wraps an engine and holds the current image. The engines do not check prompts against their images; see
`sca.inference.prompt_arguments`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from sca_registry.contracts import TASKS, Caption, Prompt, PromptBatch, SegmenterOutput, Tokenizer, TokenUsage
from sca_registry.spec import EverythingOptions, ZoomOptions
from torch import Tensor

from sca.checkpoints.tensors import hash_weights
from sca.inference.processor import InputFrame, Processor
from sca.inference.prompt_arguments import check_task
from sca.io.masks import decode_rle, encode_rle, mask_to_box
from sca.language_models.token_usage import count_tokens
from sca.model import NON_FINITE_HINT, SegmentCaptioner
from sca.nn.masks import select_best_masks
from sca.uncertainty import pool_features

if TYPE_CHECKING:
    from sca.model import SegmentationModel

REGION_BATCH_SIZE = 64  # regions per batch of the segmenter and the mixer


class EncodedImages(NamedTuple):
    """B images and their features, computed once for any number of requests.

    Attributes:
        images: The images.
        features: (B, C, h, w) image features; None without an encoder.
        frames: Placement of each image in the model input; empty without an encoder.
    """

    images: Sequence[Image.Image]
    features: Tensor | None
    frames: Sequence[InputFrame]

    def require_features(self) -> Tensor:
        """Return the features.

        Returns:
            (B, C, h, w) features of the images.

        Raises:
            ValueError: The images were encoded without an encoder.
        """
        if self.features is None:
            raise ValueError("the images have no features; encode them with an engine that has an encoder")
        return self.features

    def select_image(self, index: int) -> EncodedImages:
        """Return one image and its features.

        Args:
            index: Index of the image.

        Returns:
            The image as a batch of one.
        """
        features = None if self.features is None else self.features[index : index + 1]
        return EncodedImages(self.images[index : index + 1], features, self.frames[index : index + 1])


class PredictedMask(NamedTuple):
    """Candidate mask of a region.

    Attributes:
        rle: COCO RLE {"size": [height, width], "counts": str} in image pixels.
        predicted_iou: IoU predicted by the segmenter, at most 1.
    """

    rle: dict[str, Any]
    predicted_iou: float

    @property
    def array(self) -> np.ndarray:
        """Mask as a (height, width) bool array in image pixels."""
        return decode_rle(self.rle)


class MaskEngine(ABC):
    """Base class of engines: encodes images and segments regions.

    Subclasses implement `caption_batch` and `caption_masks`.

    Args:
        model: Encoder and segmenter, which the engine sets to eval mode; None if the captioner needs no segmenter.
        region_batch_size: Regions per batch of the segmenter. Affects memory, not results.
    """

    def __init__(self, model: SegmentationModel | None, region_batch_size: int = REGION_BATCH_SIZE):
        self.model: SegmentationModel | None = None if model is None else model.eval()
        self.processor: Processor | None = Processor.from_encoder(model.encoder) if model is not None else None
        self.region_batch_size = region_batch_size

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        if self.model is None:
            raise AttributeError("a captioner without a segmenter has no device")
        return next(self.model.parameters()).device

    @property
    def everything(self) -> EverythingOptions:
        """Default options of everything mode: those of the model, else SAM's."""
        return EverythingOptions()

    @property
    def zoom(self) -> ZoomOptions:
        """Default options of zoom: those of the model, else without a measured maximum area."""
        return ZoomOptions()

    def check_has_segmenter(self) -> None:
        """Check that the engine has an encoder and a segmenter.

        Raises:
            ValueError: It has neither.
        """
        self.require_segmenter()

    def require_segmenter(self) -> tuple[SegmentationModel, Processor]:
        """Return the encoder and segmenter with their processor.

        Returns:
            The model and its processor.

        Raises:
            ValueError: The engine has neither.
        """
        if self.model is None or self.processor is None:
            raise ValueError("the captioner has no segmenter; use encoder+captioner, such as sam-vit-b+blip-base")
        return self.model, self.processor

    @torch.inference_mode()
    def encode(self, images: Sequence[Image.Image]) -> EncodedImages:
        """Encode images as one batch.

        Args:
            images: B images of any size, with the EXIF orientation applied.

        Returns:
            The images with their features.

        Raises:
            ValueError: The features contain NaN or infinite values.
        """
        if self.model is None or self.processor is None:
            return EncodedImages(images, None, ())
        pixel_values = self.processor.preprocess_images(images).to(self.device, next(self.model.parameters()).dtype)
        frames = [self.processor.compute_frame(*image.size) for image in images]
        features = self.model.encode(pixel_values)
        if not features.isfinite().all():
            raise ValueError(f"the encoder returned NaN or infinite features; {NON_FINITE_HINT}")
        return EncodedImages(images, features, frames)

    def compute_ood_scores(self, encoded: EncodedImages) -> list[float] | None:
        """Compute the OOD (out-of-distribution) scores of images.

        Args:
            encoded: Result of `encode` for B images.

        Returns:
            The distance of each image to the training images, in feature space; above 1, the image is unlike them. None
            if the training images of the model are unknown.
        """
        return None

    @torch.inference_mode()
    def segment(
        self, encoded: EncodedImages, requests: Sequence[Sequence[Prompt]], multimask_output: bool = True
    ) -> list[list[PredictedMask]]:
        """Predict the candidate masks of each prompt.

        Args:
            encoded: Result of `encode` for B images.
            requests: Prompts of each of the B images, checked against its size.
            multimask_output: Return all candidate masks of each region (three for SAM) instead of one.

        Returns:
            The masks of each prompt, highest predicted IoU first. The list is flat: prompts of all images in order.

        Raises:
            ValueError: The engine has no segmenter, or the segmenter predicts no masks or NaN as predicted IoU.
        """
        self.check_has_segmenter()
        masks_by_prompt: list[list[PredictedMask]] = [[] for _ in range(sum(map(len, requests)))]
        for indices, prompts, segmenter_output in self.iter_segmented_chunks(encoded, requests, multimask_output):
            if segmenter_output.masks is None:
                raise ValueError("the segmenter predicts no masks; build the model with segmenter=sam")
            assert segmenter_output.iou_scores is not None  # of the masks
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
            encoded: Result of `encode` for B images.
            requests: Prompts of each of the B images, checked against its size.

        Returns:
            The mask with the highest predicted IoU for each prompt; None if the segmenter predicts no masks. The list
            is flat: prompts of all images in order.

        Raises:
            ValueError: A predicted IoU is NaN.
        """
        best_predictions: list[PredictedMask | None] = [None] * sum(map(len, requests))
        for indices, prompts, segmenter_output in self.iter_segmented_chunks(encoded, requests):
            if segmenter_output.masks is not None:
                assert segmenter_output.iou_scores is not None  # of the masks
                mask_logits = select_best_masks(segmenter_output.masks, segmenter_output.iou_scores)
                ious = clamp_ious(segmenter_output.iou_scores.amax(1))
                rles = self._iter_rles(mask_logits, prompts.image_index, encoded.frames)
                for index, rle, iou in zip(indices, rles, ious, strict=True):
                    best_predictions[index] = PredictedMask(rle, iou)
        return best_predictions

    def caption(
        self, image: Image.Image, prompts: Sequence[Prompt], task: str = "caption", **generation: Any
    ) -> list[Caption]:
        """Caption regions of one image.

        Args:
            image: Image, with the EXIF orientation applied.
            prompts: Prompts in image pixels. They are not checked against the image.
            task: "caption" or "recognition".
            **generation: As for `caption_batch`.

        Returns:
            A caption for each prompt, in order.
        """
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
        """Caption regions of encoded images.

        Args:
            encoded: Result of `encode` for B images.
            requests: Prompts of each of the B images, checked against its size.
            task: "caption" or "recognition".
            return_masks: Compute full-size masks. Without them, the caption of a point or mask prompt may have no box.
            **generation: Options returned by `sca.inference.generation_options.resolve_generation_options`.

        Returns:
            The captions of each image, in the order of its prompts.
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
            encoded: Result of `encode` for one image.
            masks: Masks of the regions, copied to the captions.
            prompts: Prompt that the caption of each mask is generated from.
            task: "caption" or "recognition".
            **generation: As for `caption_batch`.

        Returns:
            A caption for each mask, in order.
        """

    def iter_segmented_chunks(
        self, encoded: EncodedImages, requests: Sequence[Sequence[Prompt]], multimask_output: bool = True
    ) -> Iterator[tuple[list[int], PromptBatch, SegmenterOutput]]:
        """Segment the regions of encoded images in chunks.

        Args:
            encoded: Result of `encode` for B images.
            requests: Prompts of each of the B images, checked against its size.
            multimask_output: Return all candidate masks of each region (three for SAM) instead of one.

        Yields:
            Indices in the flattened requests, prompts and segmenter output of a chunk.
        """
        model, processor = self.require_segmenter()
        features = encoded.require_features()
        for indices, prompt_batch in processor.group_prompts(requests, encoded.frames):
            for chunk_index, chunk in enumerate(prompt_batch.to(self.device).iter_chunks(self.region_batch_size)):
                chunk_indices = indices[
                    chunk_index * self.region_batch_size : chunk_index * self.region_batch_size + len(chunk)
                ]
                yield chunk_indices, chunk, model.segment(features, chunk, multimask_output)

    def _iter_rles(self, logits: Tensor, image_index: Tensor, frames: Sequence[InputFrame]) -> Iterator[dict[str, Any]]:
        """Convert (N, 4h, 4w) logits to RLEs in image pixels, one at a time because full-size masks are large."""
        _, processor = self.require_segmenter()
        return map(encode_rle, processor.iter_binary_masks(logits, [frames[image] for image in image_index.tolist()]))


class Engine(MaskEngine):
    """Engine of a `SegmentCaptioner`.

    Args:
        model: Model, which the engine sets to eval mode.
        region_batch_size: Regions per batch of the segmenter and the mixer. Affects memory, not results.

    Raises:
        ValueError: `model` is not a `SegmentCaptioner`, but a name, for example.
    """

    model: SegmentCaptioner
    processor: Processor

    def __init__(self, model: SegmentCaptioner, region_batch_size: int = REGION_BATCH_SIZE):
        if isinstance(model, str | Path):
            raise ValueError(f"model is the name {str(model)!r}; pass a model, such as sca.load({str(model)!r})")
        if not isinstance(model, SegmentCaptioner):
            raise ValueError(f"model is of type {type(model).__name__}; pass a model loaded with sca.load")
        super().__init__(model, region_batch_size)

    @property
    def weights_hash(self) -> str:
        """SHA-256 of the tensors that a checkpoint of the model stores."""
        return hash_weights(self.model)

    @property
    def generation(self) -> Mapping[str, Any]:
        """Default generation options of the model."""
        return self.model.spec.generation

    @property
    def everything(self) -> EverythingOptions:
        return self.model.spec.everything_options

    @property
    def zoom(self) -> ZoomOptions:
        return self.model.spec.zoom_options

    @torch.inference_mode()
    def compute_ood_scores(self, encoded: EncodedImages) -> list[float] | None:
        uncertainty = self.model.uncertainty
        if uncertainty is None or uncertainty.domain is None:
            return None
        return uncertainty.domain.compute_ood_scores(self.pool_features(encoded))

    @torch.inference_mode()
    def pool_features(self, encoded: EncodedImages) -> Tensor:
        """Compute the pooled features of images, see `sca.uncertainty.pool_features`.

        Args:
            encoded: Result of `encode` for B images.

        Returns:
            (B, 2 C) pooled features.
        """
        content_sizes = [frame.content_size for frame in encoded.frames]
        return pool_features(encoded.require_features(), content_sizes, self.processor.image_format.size)

    def add_confidence(
        self, captions: Sequence[Sequence[Caption]], encoded: EncodedImages, task: str, **generation: Any
    ) -> list[list[Caption]]:
        """Set `ood_score` and `confidence` of captions, as far as the model is calibrated.

        A caption has no confidence if its image is unlike the training images, or if it was sampled.

        Args:
            captions: Captions of each of the B images.
            encoded: Result of `encode` for the images.
            task: Task of the captions.
            **generation: Generation options of the captions.

        Returns:
            The captions of each image.
        """
        uncertainty = self.model.uncertainty
        if uncertainty is None:
            return [list(each) for each in captions]
        ood_scores: Sequence[float | None] = self.compute_ood_scores(encoded) or [None] * len(captions)
        is_sampled = {**self.generation, **generation}.get("do_sample", False)
        return [
            [
                replace(
                    caption,
                    ood_score=ood_score,
                    confidence=None
                    if is_sampled or (ood_score is not None and ood_score > 1)
                    else uncertainty.compute_confidence(task, caption.prompt, caption.score),
                )
                for caption in image_captions
            ]
            for image_captions, ood_score in zip(captions, ood_scores, strict=True)
        ]

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
        flat_captions: dict[int, Caption] = {}
        for indices, prompts in self.processor.group_prompts(requests, encoded.frames):
            scored_texts, usages, rles, predicted_ious = self._caption_prompt_batch(
                encoded, prompts, TASKS.index(task), return_masks, generation
            )
            for row, index in enumerate(indices):
                _, prompt, region_index = flat_requests[index]
                rle = rles[row]
                box = prompt.box or (mask_to_box(rle) if rle else None)
                (text, score), *alternatives = scored_texts[row]
                flat_captions[index] = Caption(
                    text,
                    score,
                    box,
                    rle,
                    predicted_ious[row],
                    prompt,
                    region_index,
                    tuple(alternatives),
                    usages[row],
                )
        captions: list[list[Caption]] = [[] for _ in requests]
        for index, (image_index, _, _) in enumerate(flat_requests):
            captions[image_index].append(flat_captions[index])
        return self.add_confidence(captions, encoded, task, **generation)

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
        """Return texts with scores, token usage, mask RLE and predicted IoU (None if unavailable) of each prompt."""
        prefixes: list[Tensor] = []
        rles: list[dict[str, Any]] = []
        predicted_ious: list[float] = []
        prepared = None
        features = encoded.require_features()
        for chunk in prompts.to(self.device).iter_chunks(self.region_batch_size):
            segmenter_output = self.model.segment(features, chunk)
            prepared = self.model.prepare_mixer(segmenter_output) if prepared is None else prepared
            task_ids = torch.full((len(chunk),), task_id, device=self.device)
            queries = self.model.mix(segmenter_output, prepared)
            geometry = self.model.compute_geometry(segmenter_output, chunk)
            prefixes.append(self.model.build_prefix(queries, task_ids, geometry))
            if segmenter_output.masks is not None and return_masks:
                assert segmenter_output.iou_scores is not None  # of the masks
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
        tokenizer = self.require_tokenizer()
        scored_texts = [
            list(zip(map(tokenizer.decode, rows), each, strict=True))
            for rows, each in zip(sequences, scores, strict=True)
        ]
        usages = [count_tokens(prefix.shape[1], rows, [tokenizer.eos_token_id]) for rows in sequences]
        return scored_texts, usages, rles or no_values, predicted_ious or no_values

    def require_tokenizer(self) -> Tokenizer:
        """Return the tokenizer of the language model.

        Returns:
            The tokenizer.

        Raises:
            ValueError: The language model has none.
        """
        tokenizer = self.model.language_model.tokenizer
        if tokenizer is None:
            raise ValueError(
                "the language model has no tokenizer, so it generates token ids without text; add one with "
                "`sca import MODEL OUT --tokenizer FOLDER`, or use SegmentCaptioner.generate"
            )
        return tokenizer


def clamp_ious(scores: Tensor) -> list[Any]:
    """Clamp predicted IoUs to 0..1 and return them as nested lists.

    Args:
        scores: Predicted IoUs of any shape and device.

    Returns:
        Floats in [0, 1], nested like the shape of `scores`.

    Raises:
        ValueError: A predicted IoU is NaN.
    """
    ious = scores.float().clamp(0, 1).cpu()  # the only synchronization with the device
    if ious.isnan().any():
        raise ValueError(f"the segmenter returned NaN as predicted IoU; {NON_FINITE_HINT}")
    return ious.tolist()
