"""Baselines: the most frequent text of the training data, and the text of the most similar training region."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import islice
from typing import Any, cast

import sca_registry
import torch
from PIL import Image
from sca_registry.contracts import TASKS, Caption, Dataset, Prompt, Region, Sample
from sca_registry.spec import DEFAULT_GENERATION
from torch import Tensor
from torch.nn import functional as F

from sca.captioners.region_captioner import Box, RegionCaptioner, RegionView, ScoredText, resolve_generation_options
from sca.data.summary import check_dataset_not_empty
from sca.inference.engine import EncodedImages
from sca.inference.prompt_arguments import check_task, get_tasks
from sca.io.masks import encode_rle, mask_to_box
from sca.model import SegmentationModel
from sca.nn.roi_align import roi_align

ENCODE_BATCH_SIZE = 16  # images encoded at a time


class MostFrequent:
    """Baseline that returns the most frequent training text for every region, without reading the image.

    Recognition returns the class name of most regions, captioning the most frequent phrase. Ties go to the text that
    came first. The score is the fraction of the training names or phrases that equal the text.

    Args:
        dataset: Name of the training dataset.
        split: Split of the dataset.
        dataset_options: Options of the dataset.
        max_images: Maximum number of images read, from the first; 0 for all.

    Raises:
        ValueError: `max_images` is negative, or the dataset is empty or rejects its options.
    """

    generation_options: tuple[str, ...] = tuple(DEFAULT_GENERATION)  # accepted by `resolve_generation_options`

    def __init__(
        self,
        dataset: str,
        split: str = "train",
        dataset_options: Mapping[str, Any] | None = None,
        max_images: int = 1000,
    ):
        self.training_regions: TrainingRegions = TrainingRegions(dataset, split, dataset_options or {}, max_images)
        self.metadata: dict[str, Any] = {"captioner": "most-frequent", **self.training_regions.metadata}

    @cached_property
    def most_frequent_texts(self) -> dict[str, tuple[str, float]]:
        """Most frequent text and its fraction by task; tasks without any text are missing."""
        counts: dict[str, Counter[str]] = {task: Counter() for task in TASKS}
        for sample in self.training_regions.iter_samples():
            for region in sample.regions:
                counts["recognition"].update([region.name] if region.name else [])
                counts["caption"].update(region.phrases)
        most_common = {task: texts.most_common(1)[0] for task, texts in counts.items() if texts}
        return {task: (text, count / counts[task].total()) for task, (text, count) in most_common.items()}

    def caption(
        self, image: Image.Image, prompts: Sequence[Prompt], task: str = "caption", **generation: Any
    ) -> list[Caption]:
        """Return the most frequent text of a task for each prompt.

        Args:
            image: Image, which is not read.
            prompts: Prompts in image pixels.
            task: "recognition" or "caption".
            **generation: Generation options, which are checked and have no effect.

        Returns:
            A caption per prompt, in the same order.

        Raises:
            ValueError: The task is unknown, or the training regions have no text for it.
            RegistryError: A generation option is invalid.
        """
        check_task(task, get_tasks(self))
        resolve_generation_options(generation)  # only checks the options
        self.training_regions.check_has_text(task, self.most_frequent_texts)
        captions = []
        for index, prompt in enumerate(prompts):
            rle = None if prompt.mask is None else encode_rle(prompt.mask)
            box = prompt.box or (mask_to_box(rle) if rle else None)
            captions.append(Caption(*self.most_frequent_texts[task], box, rle, None, prompt, index))
        return captions


class NearestNeighbor(RegionCaptioner):
    """Baseline that returns the text of the most similar training region.

    Similarity is the cosine of encoder features averaged over the box by RoIAlign (arXiv 1703.06870), and is also the
    score. Recognition returns the class name of that region, captioning its last and most specific phrase. Training
    images are encoded at the first request.

    Args:
        encoder: Any encoder, see `RegionCaptioner`. Point prompts need one whose segmenter predicts masks.
        dataset: Name of the training dataset.
        split: Split of the dataset.
        dataset_options: Options of the dataset.
        max_images: Maximum number of images read, from the first; 0 for all.
        device: Device of the encoder.

    Raises:
        ValueError: `max_images` is negative, or the dataset is empty or rejects its options.
        RegistryError: The encoder is unknown, or an option is invalid.
        InputError: The checkpoint of the encoder cannot be read.
    """

    model: SegmentationModel

    def __init__(
        self,
        encoder: str | Mapping[str, Any],
        dataset: str,
        split: str = "train",
        dataset_options: Mapping[str, Any] | None = None,
        max_images: int = 1000,
        device: str = "cpu",
    ):
        super().__init__(encoder, device, requires_masks=False)
        self.training_regions: TrainingRegions = TrainingRegions(dataset, split, dataset_options or {}, max_images)
        self.metadata: dict[str, Any] = {
            "captioner": "nearest-neighbor",
            "encoder": encoder,
            **self.training_regions.metadata,
        }

    @torch.inference_mode()
    def caption_regions(
        self, regions: Sequence[RegionView], task: str, encoded: EncodedImages, **generation: Any
    ) -> list[ScoredText]:
        """Return the text of the nearest training region for each region; see `RegionCaptioner`."""
        resolve_generation_options(generation)  # only checks the options
        indexed_regions, features = self.training_index
        rows = [row for row, region in enumerate(indexed_regions) if _get_text(region, task)]
        self.training_regions.check_has_text(task, [task] if rows else [])
        if not regions:
            return []
        boxes = [view.prompt.box or view.tight_box for view in regions]
        query_features = self._pool_box_features(encoded, [view.image_index for view in regions], boxes)
        similarities, nearest = (query_features @ features[rows].T).clamp(-1, 1).max(1)  # (N,)
        texts = [cast("str", _get_text(indexed_regions[rows[index]], task)) for index in nearest.tolist()]
        return [ScoredText(*each) for each in zip(texts, similarities.tolist(), strict=True)]

    @cached_property
    def training_index(self) -> tuple[list[Region], Tensor]:
        """Regions of the training images, and their features (R, C)."""
        indexed_regions, features = [], []
        samples_left = self.training_regions.iter_samples()
        while samples := list(islice(samples_left, ENCODE_BATCH_SIZE)):
            regions = [(image_index, region) for image_index, sample in enumerate(samples) for region in sample.regions]
            encoded = self.encode([sample.image for sample in samples])
            boxes = [region.box for _, region in regions]
            features.append(self._pool_box_features(encoded, [image_index for image_index, _ in regions], boxes))
            indexed_regions += [region for _, region in regions]
        return indexed_regions, torch.cat(features) if features else torch.empty(0, self.model.encoder.channels)

    def _pool_box_features(self, encoded: EncodedImages, image_index: Sequence[int], boxes: Iterable[Box]) -> Tensor:
        """Return L2-normalized features (N, C) of boxes in image pixels."""
        scales = torch.tensor([encoded.frames[index].scale for index in image_index]).reshape(-1, 2).repeat(1, 2)
        cells = torch.tensor(list(boxes)).reshape(-1, 4) * scales / self.model.encoder.stride  # (N, 4)
        image_index_tensor = torch.tensor(image_index, dtype=torch.long, device=self.device)
        return F.normalize(
            roi_align(encoded.require_features(), image_index_tensor, cells.to(self.device), 1).flatten(1).float(),
            dim=1,
        )


class TrainingRegions:
    """Training regions of a baseline.

    Args:
        dataset: Name of the dataset.
        split: Split of the dataset.
        dataset_options: Options of the dataset.
        max_images: Maximum number of images read, from the first; 0 for all.

    Raises:
        ValueError: `max_images` is negative, or the dataset is empty or rejects its options.
    """

    def __init__(self, dataset: str, split: str, dataset_options: Mapping[str, Any], max_images: int):
        if max_images < 0:
            raise ValueError(f"max_images is {max_images}; expected an integer of at least 0 (0 for all images)")
        self.metadata: dict[str, Any] = {
            "dataset": dataset,
            "split": split,
            "dataset_options": dict(dataset_options),
            "max_images": max_images,
        }
        self.dataset: Dataset = sca_registry.datasets.build(dataset, split, **dataset_options)
        check_dataset_not_empty(self.dataset, f"{dataset} {split}")
        self.metadata["dataset_hash"] = getattr(self.dataset, "content_hash", None)

    def iter_samples(self) -> Iterator[Sample]:
        """Yield the samples whose images can be read."""
        read_sample = getattr(self.dataset, "read_sample", self.dataset.__getitem__)
        return filter(
            None, map(read_sample, range(self.metadata["max_images"] or len(self.dataset))[: len(self.dataset)])
        )

    def check_has_text(self, task: str, available: Iterable[str]) -> None:
        """Check that the training regions have texts for a task.

        Args:
            task: "recognition" or "caption".
            available: Tasks with at least one text.

        Raises:
            ValueError: The task is not among them.
        """
        if task not in available:
            missing = {"recognition": "a name for recognition", "caption": "a phrase for captions"}[task]
            raise ValueError(f"no region read from {self.metadata['dataset']} {self.metadata['split']} has {missing}")


def _get_text(region: Region, task: str) -> str | None:
    return region.name if task == "recognition" else next(reversed(region.phrases), None)
