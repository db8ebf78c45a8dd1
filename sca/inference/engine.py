"""Stateless inference engines: encode images, then segment and caption their regions.

`sca.Predictor` wraps an engine and holds the current image. The engines do not check prompts against their images; see
`sca.inference.prompt_arguments`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from sca_registry.contracts import (
    REGION_PATTERN,
    TASKS,
    Caption,
    Prompt,
    PromptBatch,
    SegmenterOutput,
    Tokenizer,
    TokenUsage,
    list_region_references,
)
from sca_registry.spec import EverythingOptions, ZoomOptions
from torch import Tensor

from sca.checkpoints.tensors import hash_weights
from sca.inference.generation_options import GENERATION_OPTIONS
from sca.inference.processor import InputFrame, Processor
from sca.inference.prompt_arguments import check_question_task, check_task
from sca.io.masks import decode_rle, encode_rle, mask_to_box
from sca.io.text import format_count
from sca.language_models.questions import LENGTH_REQUESTS, EncodedQuestion, check_question_text
from sca.language_models.token_usage import count_tokens, get_eos_token_ids
from sca.model import NON_FINITE_HINT, SegmentCaptioner, count_rows_per_call
from sca.nn.masks import select_best_masks
from sca.precision import describe_precision
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


class RegionQuestion(NamedTuple):
    """Question about a region.

    Attributes:
        text: Question. "<region 1>" refers to the first prompt of the image, "<region 2>" to the second, and so on.
        region_index: Index of the prompt that the question is about.
    """

    text: str
    region_index: int


class EmbeddedRegion(NamedTuple):
    """Region before its caption is generated.

    Attributes:
        prompt: Prompt.
        region_id: Index of the prompt.
        prefix: (K, E) prefix of the language model.
        rle: Predicted mask, COCO RLE in image pixels; None if it is not needed or not available.
        predicted_iou: IoU predicted by the segmenter; None if not available.
    """

    prompt: Prompt
    region_id: int
    prefix: Tensor
    rle: dict[str, Any] | None
    predicted_iou: float | None


class GeneratedTexts(NamedTuple):
    """Captions of a region, or answers to a question about it.

    Attributes:
        scored_texts: Texts and their scores, best first.
        usage: Tokens of the prefix and of each text.
    """

    scored_texts: list[tuple[str, float]]
    usage: TokenUsage


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
    def precision(self) -> str | None:
        """Precision of the model, see `describe_precision`; None if the captioner needs no segmenter."""
        return None if self.model is None else describe_precision(self.model)

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks."""
        return TASKS

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
            task: One of `tasks`.
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
            task: One of `tasks`.
            return_masks: Compute full-size masks. Without them, the caption of a point or mask prompt may have no box.
            **generation: Options returned by `sca.inference.generation_options.resolve_generation_options`. With a
                `question` that refers to regions by number, each image has one caption.

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
            task: One of `tasks`.
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
    def generation_options(self) -> tuple[str, ...]:
        """Names of the generation options that the model supports."""
        spec = self.model.spec
        supported = {"question": spec.questions, "length": spec.lengths}
        return tuple(name for name in GENERATION_OPTIONS if supported.get(name, True))

    def check_question(self, question: str) -> None:
        """Check that the language model can read a question and generate an answer.

        Args:
            question: Question.

        Raises:
            ValueError: The question is empty, has a malformed reference, refers to region 0, contains a special token,
                or is too long.
        """
        check_question_text(self.require_tokenizer(), question)
        length = self.model.count_question_positions(self.model.encode_question(question))
        max_positions = getattr(self.model.language_model, "max_positions", None)
        if max_positions is not None and length >= max_positions:
            raise ValueError(
                f"the question and its regions have {length:,} tokens, but the language model reads at most "
                f"{max_positions - 1:,}; shorten the question"
            )

    @property
    def tasks(self) -> tuple[str, ...]:
        return self.model.spec.task_names

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
        self,
        captions: Sequence[Sequence[Caption]],
        encoded: EncodedImages,
        task: str,
        *,
        is_answer: bool = False,
        **generation: Any,
    ) -> list[list[Caption]]:
        """Set `ood_score` and `confidence` of captions, as far as the model is calibrated.

        A caption has no confidence if its image is unlike the training images, or if it was sampled. Answers to
        questions and captions of a requested length have none.

        Args:
            captions: Captions of each of the B images.
            encoded: Result of `encode` for the images.
            task: Task of the captions.
            is_answer: The captions are answers to questions.
            **generation: Generation options of the captions.

        Returns:
            The captions of each image.
        """
        uncertainty = self.model.uncertainty
        if uncertainty is None:
            return [list(each) for each in captions]
        ood_scores: Sequence[float | None] = self.compute_ood_scores(encoded) or [None] * len(captions)
        has_no_calibration = is_answer or {**self.generation, **generation}.get("do_sample", False)
        return [
            [
                replace(
                    caption,
                    ood_score=ood_score,
                    confidence=None
                    if has_no_calibration or (ood_score is not None and ood_score > 1)
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
        check_task(task, self.tasks)
        question, length = generation.pop("question", None), generation.pop("length", None)
        question = question if length is None else LENGTH_REQUESTS[length]
        if question is not None:
            if list_region_references(question):
                return self._answer_about_regions(encoded, requests, question, task, return_masks, generation)
            questions = [[RegionQuestion(question, index) for index in range(len(request))] for request in requests]
            return self.answer_batch(encoded, requests, questions, task, return_masks=return_masks, **generation)
        self.require_tokenizer()
        task_prompt = self.model.encode_task_prompt(task)
        captions: dict[int, Caption] = {}
        for group in _group_regions(self._iter_embedded_regions(encoded, requests, task, return_masks, task_prompt)):
            texts = self._generate_texts([region.prefix for _, region in group], generation)
            for (index, region), each in zip(group, texts, strict=True):
                captions[index] = self._make_caption(region, each)
        ordered = (captions[index] for index in range(sum(map(len, requests))))
        return self.add_confidence(
            [[next(ordered) for _ in request] for request in requests], encoded, task, **generation
        )

    def _answer_about_regions(
        self,
        encoded: EncodedImages,
        requests: Sequence[Sequence[Prompt]],
        question: str,
        task: str,
        return_masks: bool,
        generation: Mapping[str, Any],
    ) -> list[list[Caption]]:
        """Answer a question with region references once per image. Only the regions that it refers to are embedded."""
        self.check_question(question)
        references = list_region_references(question)
        for request in requests:
            if request and max(references) > len(request):
                raise ValueError(
                    f"the question refers to <region {max(references)}>, but the image has "
                    f"{format_count(len(request), 'region')}; change the number or add regions"
                )
        renumbered = REGION_PATTERN.sub(lambda match: f"<region {references.index(int(match[1])) + 1}>", question)
        selected = [[request[number - 1] for number in references] if request else [] for request in requests]
        questions = [[RegionQuestion(renumbered, 0)] if request else [] for request in requests]
        answers = self.answer_batch(encoded, selected, questions, task, return_masks=return_masks, **generation)
        return [
            [replace(answer, question=question, region_id=references[0] - 1) for answer in image_answers]
            for image_answers in answers
        ]

    @torch.inference_mode()
    def answer_batch(
        self,
        encoded: EncodedImages,
        requests: Sequence[Sequence[Prompt]],
        questions: Sequence[Sequence[RegionQuestion]],
        task: str = "caption",
        *,
        return_masks: bool = True,
        **generation: Any,
    ) -> list[list[Caption]]:
        """Answer any number of questions about regions of encoded images. Each region is embedded once.

        Args:
            encoded: Result of `encode` for B images.
            requests: Prompts of each of the B images, checked against its size.
            questions: Questions about the regions of each of the B images.
            task: Task whose learned tokens precede the region. The question replaces the prompt of a task without them.
            return_masks: As for `caption_batch`.
            **generation: As for `caption_batch`.

        Returns:
            The answers to the questions of each image, in order, with the region of each question.

        Raises:
            ValueError: A question is empty, or refers to a region that does not exist.
        """
        check_question_task(task)
        self.require_tokenizer()
        embedded = dict(self._iter_embedded_regions(encoded, requests, task, return_masks))
        regions = (embedded[index] for index in range(len(embedded)))
        answered_regions, prefixes = [], []
        encoded_questions: dict[str, EncodedQuestion] = {}
        for request, image_questions in zip(requests, questions, strict=True):
            image_regions = [next(regions) for _ in request]
            image_prefix = torch.stack([region.prefix for region in image_regions]) if image_regions else None
            for text, index in image_questions:
                question = encoded_questions.get(text)
                if question is None:
                    self.check_question(text)
                    question = encoded_questions[text] = self.model.encode_question(text)
                if image_prefix is None or not (question.regions or 0 <= index < len(request)):
                    raise ValueError(
                        f"the question {text!r:.60} is about region {index + 1}, but the image has "
                        f"{format_count(len(request), 'region')}"
                    )
                rows = slice(None) if question.regions else slice(index, index + 1)
                prefixes.append(self.model.append_question(image_prefix[rows], question)[0])
                answered_regions.append((image_regions[index], text))
        texts = self._generate_texts(prefixes, generation)
        answers = (
            replace(self._make_caption(region, each), question=text)
            for (region, text), each in zip(answered_regions, texts, strict=True)
        )
        answers_by_image = [[next(answers) for _ in image_questions] for image_questions in questions]
        return self.add_confidence(answers_by_image, encoded, task, is_answer=True, **generation)

    @staticmethod
    def _make_caption(region: EmbeddedRegion, texts: GeneratedTexts) -> Caption:
        (text, score), *alternatives = texts.scored_texts
        box = region.prompt.box or (mask_to_box(region.rle) if region.rle else None)
        return Caption(
            text,
            score,
            box,
            region.rle,
            region.predicted_iou,
            region.prompt,
            region.region_id,
            tuple(alternatives),
            texts.usage,
        )

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

    def _iter_embedded_regions(
        self,
        encoded: EncodedImages,
        requests: Sequence[Sequence[Prompt]],
        task: str,
        return_masks: bool,
        task_prompt: EncodedQuestion | None = None,
    ) -> Iterator[tuple[int, EmbeddedRegion]]:
        """Yield the prefix with the prompt of the task, mask and predicted IoU of each prompt, with its flat index."""
        flat_requests = [(index, prompt) for request in requests for index, prompt in enumerate(request)]
        prepared = None
        for indices, chunk, segmenter_output in self.iter_segmented_chunks(encoded, requests):
            prepared = self.model.prepare_mixer(segmenter_output) if prepared is None else prepared
            task_ids = torch.full((len(chunk),), self.tasks.index(task), device=self.device)
            queries = self.model.mix(segmenter_output, prepared)
            geometry = self.model.compute_geometry(segmenter_output, chunk)
            prefix = self.model.build_prefix(queries, task_ids, geometry)
            if task_prompt is not None:
                prefix = self.model.append_question(prefix, task_prompt)
            rles: Iterable[dict[str, Any] | None] = [None] * len(chunk)
            ious: Sequence[float | None] = [None] * len(chunk)
            if segmenter_output.masks is not None and return_masks:
                assert segmenter_output.iou_scores is not None  # of the masks
                best_logits = select_best_masks(segmenter_output.masks, segmenter_output.iou_scores)
                rles = self._iter_rles(best_logits, chunk.image_index, encoded.frames)
            if segmenter_output.iou_scores is not None:
                ious = clamp_ious(segmenter_output.iou_scores.amax(1))
            regions = []
            for index, row, rle, iou in zip(indices, prefix, rles, ious, strict=True):
                region_id, prompt = flat_requests[index]
                regions.append((index, EmbeddedRegion(prompt, region_id, row, rle, iou)))
            del segmenter_output, queries, prefix  # they are large, and generation needs the memory
            yield from regions

    def _generate_texts(self, prefixes: Sequence[Tensor], generation: Mapping[str, Any]) -> list[GeneratedTexts]:
        """Generate a caption or an answer after each prefix (K, E), in batches of prefixes of the same length."""
        tokenizer = self.require_tokenizer()
        eos_token_ids = get_eos_token_ids(self.model.language_model)
        texts: dict[int, GeneratedTexts] = {}
        rows_by_length: dict[int, list[int]] = {}
        for row, prefix in enumerate(prefixes):
            rows_by_length.setdefault(len(prefix), []).append(row)
        for length, rows in rows_by_length.items():
            generated = self.model.generate_from_prefix(torch.stack([prefixes[row] for row in rows]), **generation)
            scores = generated.scores.exp().tolist()
            for row, sequences, row_scores in zip(rows, generated.sequences.tolist(), scores, strict=True):
                scored_texts = list(zip(map(tokenizer.decode, sequences), row_scores, strict=True))
                texts[row] = GeneratedTexts(scored_texts, count_tokens(length, sequences, eos_token_ids))
        return [texts[row] for row in range(len(prefixes))]

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


def _group_regions(regions: Iterable[tuple[int, EmbeddedRegion]]) -> Iterator[list[tuple[int, EmbeddedRegion]]]:
    """Yield groups of regions, each for one call of the language model, in the order of their indices."""
    group: list[tuple[int, EmbeddedRegion]] = []
    for index, region in regions:
        group.append((index, region))
        if len(group) >= count_rows_per_call(len(region.prefix)):
            yield sorted(group, key=lambda pair: pair[0])
            group = []
    if group:
        yield sorted(group, key=lambda pair: pair[0])


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
