"""Floors: what can be had without looking, and by looking at what was seen in training."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import islice
from typing import Any

import sca_registry
import torch
from PIL import Image
from sca_registry.contracts import TASKS, Caption, Dataset, Prompt, Region, Sample
from sca_registry.spec import GENERATION
from torch import Tensor
from torch.nn import functional as F

from sca.captioners.regions import Box, RegionCaptioner, ScoredText, Seen, generation_of
from sca.data.summary import check_not_empty
from sca.inference.engine import Encoded
from sca.inference.requests import check_task
from sca.io.masks import box_of, encode
from sca.nn.roi_align import roi_align

TOGETHER = 16  # images encoded at a time


class MostFrequent:
    """Says of every region what is said most often in training, without a look at it: for recognition the name that
    most regions have, for a caption the phrase that occurs most often; of several the one that came first.

    dataset, split, options: whose regions; the dataset's own options go into the table `options`. limit: how many of
    its images are read, from the first on; 0 for all. The score is the share of names, or of phrases, that it is.
    """

    generation_options = tuple(GENERATION)  # that `generation_of` takes

    def __init__(self, dataset: str, split: str = "train", options: Mapping[str, Any] | None = None, limit: int = 1000):
        self.training = Training(dataset, split, options or {}, limit)
        self.facts = {"captioner": "most-frequent", **self.training.facts}

    @cached_property
    def said(self) -> dict[str, tuple[str, float]]:
        """The text and its share by task; nothing where no region has words for it."""
        counts: dict[str, Counter[str]] = {task: Counter() for task in TASKS}
        for sample in self.training.samples():
            for region in sample.regions:
                counts["recognition"].update([region.name] if region.name else [])
                counts["caption"].update(region.phrases)
        most = {task: words.most_common(1)[0] for task, words in counts.items() if words}
        return {task: (text, count / counts[task].total()) for task, (text, count) in most.items()}

    def describe(
        self, image: Image.Image, prompts: Sequence[Prompt], task: str = "caption", **generation: Any
    ) -> list[Caption]:
        check_task(task)
        generation_of(generation)  # makes no difference, but is not anything
        self.training.require(task, self.said)
        captions = []
        for place, prompt in enumerate(prompts):
            code = None if prompt.mask is None else encode(prompt.mask)
            box = prompt.box or (code and box_of(code))
            captions.append(Caption(*self.said[task], box, code, None, prompt, place))
        return captions


class NearestNeighbour(RegionCaptioner):
    """Says of a region what is said in training of the region that looks most alike: by the cosine of the encoder's
    features, averaged over the box by ROIAlign. A caption is that region's last phrase, the most telling.

    encoder: any, also one without masks; points need masks, see `RegionCaptioner`. dataset, split, options, limit: as
    for `MostFrequent`. Training images are encoded when the first question comes. The score is the cosine.
    """

    def __init__(
        self,
        encoder: str | Mapping[str, Any],
        dataset: str,
        split: str = "train",
        options: Mapping[str, Any] | None = None,
        limit: int = 1000,
        device: str = "cpu",
    ):
        super().__init__(encoder, device, masks=False)
        self.training = Training(dataset, split, options or {}, limit)
        self.facts = {"captioner": "nearest-neighbour", "encoder": encoder, **self.training.facts}

    @torch.inference_mode()
    def words(self, regions: Sequence[Seen], task: str, encoded: Encoded, **generation: Any) -> list[ScoredText]:
        generation_of(generation)  # makes no difference, but is not anything
        known, features = self.known
        rows = [row for row, region in enumerate(known) if _told(region, task)]
        self.training.require(task, [task] if rows else [])
        if not regions:
            return []
        boxes = [seen.prompt.box or seen.tight for seen in regions]
        asked = self._features(encoded, [seen.owner for seen in regions], boxes)
        likeness, nearest = (asked @ features[rows].T).clamp(-1, 1).max(1)  # (N,)
        texts = [_told(known[rows[place]], task) for place in nearest.tolist()]
        return [ScoredText(*each) for each in zip(texts, likeness.tolist(), strict=True)]

    @cached_property
    def known(self) -> tuple[list[Region], Tensor]:
        """The R regions of the training images, and their features (R, C)."""
        known, features = [], []
        unread = self.training.samples()
        while samples := list(islice(unread, TOGETHER)):
            regions = [(owner, region) for owner, sample in enumerate(samples) for region in sample.regions]
            encoded = self.encode([sample.image for sample in samples])
            boxes = [region.box for _, region in regions]
            features.append(self._features(encoded, [owner for owner, _ in regions], boxes))
            known += [region for _, region in regions]
        return known, torch.cat(features) if features else torch.empty(0, self.model.encoder.channels)

    def _features(self, encoded: Encoded, owner: Sequence[int], boxes: Iterable[Box]) -> Tensor:
        """(N, C) of length 1, for boxes in image pixels."""
        scales = torch.tensor([encoded.frames[place].scale for place in owner]).reshape(-1, 2).repeat(1, 2)
        cells = torch.tensor(list(boxes)).reshape(-1, 4) * scales / self.model.encoder.stride  # (N, 4)
        places = torch.tensor(owner, dtype=torch.long, device=self.device)
        return F.normalize(roi_align(encoded.features, places, cells.to(self.device), 1).flatten(1).float(), dim=1)


class Training:
    """The regions that a floor has seen: the first `limit` images of a dataset's split, 0 for all."""

    def __init__(self, dataset: str, split: str, options: Mapping[str, Any], limit: int):
        if limit < 0:
            raise ValueError(f"limit is {limit}: give a whole number, 0 for all")
        self.facts = {"dataset": dataset, "split": split, "options": dict(options), "limit": limit}
        self.dataset: Dataset = sca_registry.datasets.build(dataset, split, **options)
        check_not_empty(self.dataset, f"{dataset} {split}")

    def samples(self) -> Iterator[Sample]:
        """Those whose pictures can be read."""
        read = getattr(self.dataset, "read", self.dataset.__getitem__)
        return filter(None, map(read, range(self.facts["limit"] or len(self.dataset))[: len(self.dataset)]))

    def require(self, task: str, there: Iterable[str]) -> None:
        """Raises ValueError unless a task is among those that there are words for."""
        if task not in there:
            words = {"recognition": "name, which recognition says", "caption": "phrase, which captions say"}[task]
            raise ValueError(f"no region of {self.facts['dataset']} {self.facts['split']} that was read has a {words}")


def _told(region: Region, task: str) -> str | None:
    """What is said of a region."""
    return region.name if task == "recognition" else next(reversed(region.phrases), None)
