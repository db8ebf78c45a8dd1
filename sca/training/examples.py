"""From annotated images to batches: what is drawn for each region, and how examples are put together.

Everything drawn at random is a function of the seed and of the place in the stream, never of global state: a resumed
run sees exactly what the interrupted one would have seen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from sca_registry.contracts import (
    CAPTION,
    RECOGNITION,
    Batch,
    Dataset,
    PromptBatch,
    Region,
    Sample,
    Targets,
    Tokenizer,
)
from torch import Tensor

from sca.data.points import draw_point
from sca.inference.processor import MASK_PROMPT_LOGIT, Processor
from sca.io.masks import decode
from sca.nn.boxes import filled_boxes
from sca.training.auxiliary import UNKNOWN
from sca.training.phrases import told_by_rule
from sca.training.recipe import SamplingOptions

if TYPE_CHECKING:
    from sca.training.features import FeatureCache

Augmentation = Callable[[Sample, np.random.Generator], Sample]


@dataclass
class Example:
    """One image of a batch with R regions and T texts of them; boxes and points in the input frame, masks as shares of
    (4h, 4w) cells.
    """

    pixels: Tensor | None  # (3, S, S)
    features: Tensor | None  # (C, h, w), where they are cached
    boxes: Tensor  # (R, 4)
    points: Tensor  # (R, 1, 2)
    masks: Tensor  # (R, 4h, 4w)
    valid: Tensor  # (4h, 4w)
    has_mask: Tensor  # (R,)
    ids: list[list[int]]  # T
    task: Tensor  # (T,)
    region: Tensor  # (T,) the place of the region that each text is of, in 0..R-1
    labels: dict[str, Tensor]  # (R,) the place of each attribute's value in its list, `UNKNOWN` where it is
    size: int  # S
    prompt: str = "box"  # the kind drawn for this step

    def first(self, count: int) -> Example:
        """The first `count` regions, which were drawn in no order, and what is told of them."""
        told = self.region < count
        return replace(
            self,
            **{name: getattr(self, name)[:count] for name in ("boxes", "points", "masks", "has_mask")},
            ids=[words for words, kept in zip(self.ids, told.tolist(), strict=True) if kept],
            task=self.task[told],
            region=self.region[told],
            labels={name: labels[:count] for name, labels in self.labels.items()},
        )


class ExampleStream(torch.utils.data.Dataset):
    """`length` examples of a dataset, over as many epochs as it takes, each epoch in an order of its own."""

    def __init__(
        self,
        dataset: Dataset,
        processor: Processor,
        tokenizer: Tokenizer,
        drawing: SamplingOptions,
        length: int,
        seed: int = 0,
        attributes: Mapping[str, Sequence[str]] | None = None,
        augment: Augmentation | None = None,
        phrases: str = "given",
        names: str = "recognition",
        cache: FeatureCache | None = None,
    ):
        self.dataset = dataset
        self.processor = processor
        self.tokenizer = tokenizer
        self.drawing = drawing
        self.length = length
        self.seed = seed
        self.attributes = attributes or {}
        self.augment = augment
        self.phrases = phrases
        self.names = names
        self.cache = cache
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, dtype=int))

    def __len__(self) -> int:
        return self.length

    def index(self, place: int) -> int:
        """Which sample of the dataset has its turn."""
        epoch, index = divmod(place, len(self.dataset))
        if self._order[0] != epoch:
            self._order = (epoch, np.random.default_rng([self.seed, epoch]).permutation(len(self.dataset)))
        return int(self._order[1][index])

    def indices(self, places: int) -> set[int]:
        """The samples that have their turn in the first `places`."""
        return set(range(len(self.dataset))) if places >= len(self.dataset) else set(map(self.index, range(places)))

    def __getitem__(self, place: int) -> Example:
        draw = np.random.default_rng([self.seed, 1, place])
        sample = whole = self.dataset[self.index(place)]
        if self.augment:
            changed = self.augment(whole, draw)
            sample = changed if changed.regions else whole  # a crop may have lost them all
        if self.phrases == "rule":
            sample = told_by_rule(sample, whole)
        return self._example(sample, draw, place / self.length)

    def _example(self, sample: Sample, draw: np.random.Generator, progress: float) -> Example:
        frame = self.processor.frame(*sample.image.size)
        regions = [r for r in sample.regions if r.name or r.phrases]
        regions = [regions[i] for i in draw.permutation(len(regions))[: self.drawing.max_regions]]
        side, size = 4 * self.processor.grid, self.processor.image.size
        texts, boxes, points, masks = [], [], [], []
        for place, region in enumerate(regions):
            drawn = (self._words(region, draw, progress) for _ in range(self.drawing.captions_per_region))
            texts += [(place, task, text) for task, text in dict.fromkeys(drawn)]
            boxes.append(_jittered(region.box, self.drawing.box_jitter, draw))
            mask = None if region.mask is None else decode(region.mask)
            points.append(draw_point(region, mask, draw))
            masks.append(torch.zeros(side, side) if mask is None else self.processor.coverage(mask, frame))
        scale = torch.tensor(frame.scale)
        labels = {
            name: torch.tensor([_place(values, _fact(r, name)) for r in regions], dtype=torch.long)
            for name, values in self.attributes.items()
        }
        return Example(
            pixels=self.processor.pixels([sample.image])[0] if self.cache is None else None,
            features=None if self.cache is None else self.cache[sample.image],
            boxes=(torch.tensor(boxes).reshape(-1, 2, 2) * scale).flatten(1).clamp(0, size),
            points=torch.tensor(points).reshape(-1, 1, 2) * scale,
            masks=torch.stack(masks) if masks else torch.zeros(0, side, side),
            valid=self.processor.valid(frame),
            has_mask=torch.tensor([r.mask is not None for r in regions], dtype=torch.bool),
            ids=[self.tokenizer.encode(text, self.drawing.max_tokens) for _, _, text in texts],
            task=torch.tensor([task for _, task, _ in texts], dtype=torch.long),
            region=torch.tensor([place for place, _, _ in texts], dtype=torch.long),
            labels=labels,
            size=size,
        )

    def _words(self, region: Region, draw: np.random.Generator, progress: float) -> tuple[int, str]:
        """The task and the words of a region, `progress` (0..1) into the stream."""
        drawing = self.drawing
        names = progress < drawing.class_name_warmup or draw.random() < drawing.class_name_prob
        if region.name and (names or not region.phrases):
            caption = self.names == "caption" or (self.names == "both" and not region.phrases and draw.random() < 0.5)
            return CAPTION if caption else RECOGNITION, region.name
        if progress < drawing.class_name_warmup + drawing.short_caption_warmup:
            return CAPTION, region.phrases[0]
        telling = draw.random() < drawing.longest_caption_prob
        return CAPTION, region.phrases[-1 if telling else draw.integers(len(region.phrases))]


class Mixture(torch.utils.data.Dataset):
    """Several streams in one, in proportion to their weights. Whose turn it is at a place is drawn from the seed, and,
    once for every `step` places, how regions are prompted: all processes of a step prompt alike.
    """

    def __init__(
        self,
        streams: Sequence[ExampleStream],
        weights: Sequence[float],
        length: int,
        seed: int = 0,
        prompts: Mapping[str, float] | None = None,
        step: int = 1,
    ):
        self.streams = streams
        self.step = step
        draw = np.random.default_rng([seed, 2])
        self._stream = draw.choice(len(streams), size=length, p=np.asarray(weights) / sum(weights))
        self._place = np.zeros(length, dtype=int)  # in its own stream
        for number in range(len(streams)):
            mine = self._stream == number
            self._place[mine] = np.arange(mine.sum())
        kinds, shares = zip(*(prompts or {"box": 1.0}).items(), strict=True)
        draw = np.random.default_rng([seed, 3])
        self._prompts = draw.choice(kinds, size=-(-length // step), p=np.asarray(shares) / sum(shares))

    def samples(self) -> list[tuple[Dataset, int]]:
        """Each sample that is drawn, once: a dataset and the place in it."""
        lengths = np.bincount(self._stream, minlength=len(self.streams))
        drawn = [(s, index) for s, n in zip(self.streams, lengths, strict=True) for index in sorted(s.indices(int(n)))]
        return [(stream.dataset, index) for stream, index in drawn]

    def __len__(self) -> int:
        return len(self._stream)

    def __getitem__(self, place: int) -> Example:
        example = self.streams[self._stream[place]][int(self._place[place])]
        return replace(example, prompt=str(self._prompts[place // self.step]))


def collate(examples: Sequence[Example], pad: int, budget: int = 0) -> Batch:
    """Examples with any number of regions -> one flat batch, prompted as the first example says, of at most `budget`
    regions (0: all).
    """
    examples = _within(examples, budget)
    counts = torch.tensor([len(example.boxes) for example in examples])
    before = counts.cumsum(0) - counts  # regions of earlier examples
    owner = torch.repeat_interleave(torch.arange(len(examples)), counts)
    ids = [torch.tensor(words) for example in examples for words in example.ids]
    padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=pad)
    lengths = torch.tensor([len(words) for words in ids])
    targets = Targets(
        masks=torch.cat([example.masks for example in examples]),
        valid_pixels=torch.stack([example.valid for example in examples])[owner],
        has_mask=torch.cat([example.has_mask for example in examples]),
    )
    cached = examples[0].features is not None
    return Batch(
        pixel_values=None if cached else torch.stack([example.pixels for example in examples]),
        features=torch.stack([example.features for example in examples]) if cached else None,
        prompts=_prompts(examples, owner, targets),
        task_ids=torch.cat([example.task for example in examples]),
        input_ids=padded,
        attention_mask=(torch.arange(padded.shape[1]) < lengths[:, None]).long(),
        region_index=torch.cat([example.region + first for example, first in zip(examples, before, strict=True)]),
        targets=targets,
        extra={name: torch.cat([example.labels[name] for example in examples]) for name in examples[0].labels},
    )


def _within(examples: Sequence[Example], budget: int) -> Sequence[Example]:
    """Examples with at most `budget` regions together: those with few keep theirs, the others share what is left."""
    counts = [len(example.boxes) for example in examples]
    if not 0 < budget < sum(counts):
        return examples
    kept, left = dict(enumerate(counts)), budget
    for rank, place in enumerate(sorted(kept, key=kept.__getitem__)):  # the fewest first
        kept[place] = min(counts[place], left // (len(counts) - rank))
        left -= kept[place]
    return [example.first(kept[place]) for place, example in enumerate(examples)]


def _prompts(examples: Sequence[Example], owner: Tensor, targets: Targets) -> PromptBatch:
    kind = examples[0].prompt
    boxes, points = (torch.cat([getattr(example, name) for example in examples]) for name in ("boxes", "points"))
    masks = None
    if "mask" in kind:
        side = targets.masks.shape[-1]
        filled = filled_boxes(boxes, side, examples[0].size)
        shares = torch.where(targets.has_mask[:, None, None], targets.masks, filled)
        masks = ((shares * 2 - 1) * MASK_PROMPT_LOGIT).unsqueeze(1)
    return PromptBatch(
        owner,
        boxes=boxes if "box" in kind else None,
        points=points if "point" in kind else None,
        labels=torch.ones(points.shape[:2], dtype=torch.long) if "point" in kind else None,
        masks=masks,
    )


def _jittered(box: Sequence[float], jitter: float, draw: np.random.Generator) -> list[float]:
    x1, y1, x2, y2 = box
    sides = np.array([x2 - x1, y2 - y1, x2 - x1, y2 - y1])
    return (np.array(box) + draw.normal(size=4).clip(-2, 2) * jitter * sides).tolist()


def _fact(region: Region, name: str) -> str | None:
    """An attribute of the region; its class is the attribute "name"."""
    return region.name if name == "name" else region.attributes.get(name)


def _place(values: Sequence[str], value: str | None) -> int:
    return values.index(value) if value in values else UNKNOWN
