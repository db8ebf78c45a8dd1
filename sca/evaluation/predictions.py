"""What a captioner answers for the regions of a dataset, as records that hold all that metrics need.

A record is plain JSON, one a region and task (and control), and the regions of one image stay together:

    index                  the image's place in the dataset
    image_id, region_id    the dataset's
    task                   "caption" or "recognition"
    control                None, or the name of what was done on purpose to mislead, see `CONTROLS`
    prompt                 what was asked: any of `box` [x1, y1, x2, y2], `points` [[x, y, label]] and `mask` RLE, in
                           pixels of the image
    caption, score         the words, and exp of the mean log-probability of their tokens
    mask, iou              the predicted mask (COCO RLE, image resolution) and the predicted IoU of it, or None
    truth                  name, phrases, attributes, mask (RLE or None), box [x1, y1, x2, y2], and area in pixels:
                           of the mask, or of the box where there is no mask

Where regions are proposed and not given (dense captioning), there is one record an image: its task is "dense", its
`proposals` are tables of `box`, `score`, `caption`, `mask` (or None), best first, and its truth has `regions`, a list
of `id`, `box` and `phrases`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from sca_registry.contracts import TASKS, Caption, Captioner, Dataset, Prompt, Proposer, Region, Sample

from sca.data.points import draw_point_prompt
from sca.inference.batch import caption_requests
from sca.io import masks
from sca.io.validation import check_choice, check_range
from sca.output.jsonl import record

PROMPTS = {
    "box": "the region's own box",
    "center": "the point in the middle of the box",
    "random-point": "a point drawn inside the box",
    "mask-point": "a point drawn inside the mask",
    "mask": "the mask",
}
CONTROLS = {
    "wrong-region": "asked for another region of the image, which is called and described otherwise",
    "colour-swap": "red is shown as green, green as blue and blue as red",
    "shuffled-mask": "asked for the region's box and mask moved to another place of the image",
}
PLACES = 16  # are drawn for a region that is moved; the one that overlaps its own least is taken

Request = dict[int, Prompt]  # of one image: what is asked by the region's id


class Asked(NamedTuple):
    """What came of one batch of images."""

    places: Sequence[int]  # in the dataset
    records: list[dict[str, Any]]
    unread: int  # pictures that could not be read


@dataclass(frozen=True)
class Questions:
    """How regions are asked for.

    prompt: one of `PROMPTS`. Points are a function of `seed` and the region's id alone. Where a region has no true
    mask, "mask-point" and "mask" take the one that the captioner itself gives for the box, as the published study did
    (SCA, arXiv 2312.00869). tasks: asked of every region with the truth for it, phrases for "caption" and a name for
    "recognition". controls: of `CONTROLS`; each asks everything once more. generation: options of the captioner.

    ValueError for a word that is none of these.
    """

    prompt: str = "box"
    tasks: tuple[str, ...] = ("caption", "recognition")
    controls: tuple[str, ...] = ()
    seed: int = 0
    generation: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_choice("prompt", self.prompt, PROMPTS)
        for task in self.tasks:
            check_choice("task", task, TASKS)
        for control in self.controls:
            check_choice("control", control, CONTROLS)
        if not self.tasks:
            raise ValueError(f"tasks are empty; give one or more of {', '.join(TASKS)}")
        object.__setattr__(self, "tasks", tuple(dict.fromkeys(self.tasks)))
        object.__setattr__(self, "controls", tuple(dict.fromkeys(self.controls)))

    def ask(self, captioner: Captioner, samples: Sequence[tuple[int, Sample]]) -> list[dict[str, Any]]:
        """The records of images, given with their places in the dataset: those of one image together, in its order."""
        shown = _Shown(captioner, [sample.image for _, sample in samples])
        own = [_prompts(self, sample, shown, place) for place, (_, sample) in enumerate(samples)]
        told: list[list[dict[str, Any]]] = [[] for _ in samples]
        for control in (None, *self.controls):
            asked = [self._misled(control, sample, prompts) for (_, sample), prompts in zip(samples, own, strict=True)]
            seen = shown
            if control == "colour-swap":
                seen = _Shown(captioner, [_recoloured(sample.image) for _, sample in samples])
            for task in self.tasks:
                requests = [
                    {region.id: prompts[region.id] for region in sample.regions if _asks(region, task, prompts)}
                    for (_, sample), prompts in zip(samples, asked, strict=True)
                ]
                answers = seen.answer(requests, task, self.generation)
                for place, (index, sample) in enumerate(samples):
                    for region in sample.regions:
                        if region.id in answers[place]:
                            answer = answers[place][region.id]
                            told[place].append(_record(index, sample, region, task, control, answer))
        return [each for place, (_, sample) in enumerate(samples) for each in _in_order(told[place], sample)]

    def _misled(self, control: str | None, sample: Sample, prompts: Request) -> Request:
        if control == "wrong-region":
            others = {region.id: _other(region, sample.regions, prompts) for region in sample.regions}
            return {region: prompts[other.id] for region, other in others.items() if other is not None}
        if control == "shuffled-mask":
            moved = [_moved(region, sample.image.size, self.seed) for region in sample.regions]
            return {region.id: _prompt(self, region) for region in moved}
        return prompts


@dataclass(frozen=True)
class Proposing:
    """How regions are found and told of where none is given: dense captioning.

    proposer: where to look. Points of a proposer (the grid) are searched as "segment everything" does, which takes a
    `MaskEngine`; its boxes and masks are described as they are.
    """

    proposer: Proposer
    generation: Mapping[str, Any] = field(default_factory=dict)

    def ask(self, captioner: Captioner, samples: Sequence[tuple[int, Sample]]) -> list[dict[str, Any]]:
        """One record an image, in the order given."""
        return [self._ask(captioner, index, sample) for index, sample in samples]

    def _ask(self, captioner: Captioner, index: int, sample: Sample) -> dict[str, Any]:
        found = self.proposer(sample.image, sample.image_id)
        if any(prompt.box is None and prompt.mask is None for prompt in found.prompts):
            told = _everything(captioner, sample.image, found, self.generation)
            scores = [answer.predicted_iou if answer.predicted_iou is not None else answer.score for answer in told]
        else:
            told = captioner.caption(sample.image, found.prompts, **self.generation) if found.prompts else []
            scores = list(found.scores)
        proposals = [
            {"box": list(answer.box), "score": float(score), "caption": answer.text, "mask": answer.mask}
            for answer, score in zip(told, scores, strict=True)
            if answer.box is not None
        ]
        regions = [
            {"id": region.id, "box": [float(value) for value in region.box], "phrases": list(region.phrases)}
            for region in sample.regions
            if region.phrases
        ]
        return {
            "index": index,
            "image_id": sample.image_id,
            "region_id": None,
            "task": "dense",
            "control": None,
            "proposals": sorted(proposals, key=lambda each: -each["score"]),
            "truth": {"regions": regions},
        }


def draft_records(dataset: Dataset, tasks: Sequence[str], limit: int | None = None) -> Iterator[dict[str, Any]]:
    """Yield the task and the truth of each record that a dataset leads to, before anything is predicted.

    Args:
        dataset: Any dataset; none of its images is opened. One that cannot list its annotations yields nothing.
        tasks: Those of `Questions`.
        limit: Only the first images; by default all.
    """
    if hasattr(dataset, "annotations_of_all"):
        for regions in islice(dataset.annotations_of_all(), limit):
            for region in regions:
                yield from ({"task": task, "truth": _truth(region)} for task in tasks if _has_truth(region, task))


def predict(
    captioner: Captioner,
    dataset: Dataset,
    questions: Questions | Proposing | None = None,
    batch: int = 8,
    limit: int | None = None,
    skip: Callable[[int], bool] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[Asked]:
    """Asks for the regions of a dataset, `batch` images at a time and always the same together.

    limit: only the first so many images. skip: says which places in the dataset are left out. progress: called with
    the images done (or skipped) and all of them. A picture that a dataset with `read` cannot read has no record.

    ValueError for a number below 1, before anything is computed.
    """
    for name, number in (("batch", batch), ("limit", limit)):
        if number is not None:
            check_range(name, number, int, 1)
    every = len(dataset) if limit is None else min(limit, len(dataset))
    batches = [range(start, min(start + batch, every)) for start in range(0, every, batch)]
    return _predict(captioner, dataset, questions or Questions(), batches, skip or (lambda _: False), progress)


def _predict(
    captioner: Captioner,
    dataset: Dataset,
    questions: Questions | Proposing,
    batches: Sequence[range],
    skip: Callable[[int], bool],
    progress: Callable[[int, int], None] | None,
) -> Iterator[Asked]:
    read = getattr(dataset, "read", dataset.__getitem__)
    for batch in batches:
        if places := [place for place in batch if not skip(place)]:
            samples = [(place, sample) for place in places if (sample := read(place)) is not None]
            records = questions.ask(captioner, samples) if samples else []
            yield Asked(places, records, len(places) - len(samples))
        if progress:
            progress(batch.stop, batches[-1].stop)


class _Shown:
    """Images that a captioner was shown: encoded once for all that is asked of them, if it can encode."""

    def __init__(self, captioner: Captioner, images: Sequence[Image.Image]):
        self.captioner, self.images = captioner, images
        self.encoded = captioner.encode(images) if hasattr(captioner, "encode") else None

    def answer(self, requests: Sequence[Request], task: str, generation: Mapping[str, Any]) -> list[dict[int, Caption]]:
        """For each image the answers by region."""
        asked = [list(request.values()) for request in requests]
        given = caption_requests(self.captioner, self.images, asked, task, self.encoded, **generation)
        return [dict(zip(request, answers, strict=True)) for request, answers in zip(requests, given, strict=True)]

    def masks(self, place: int, boxes: Mapping[int, Prompt]) -> dict[int, dict[str, Any]]:
        """The captioner's own masks for boxes of one image. ValueError if it gives none."""
        requests: list[Request] = [{} for _ in self.images]
        requests[place] = dict(boxes)
        answers = self.answer(requests, "caption", {})[place]
        without = [region for region, answer in answers.items() if answer.mask is None]
        if without:
            raise ValueError(
                "prompts by mask need masks: the dataset has none for some regions, and the model gives none for their "
                "boxes; ask by box, center or random-point"
            )
        return {region: answer.mask for region, answer in answers.items()}


def _asks(region: Region, task: str, prompts: Request) -> bool:
    return region.id in prompts and _has_truth(region, task)


def _has_truth(region: Region, task: str) -> bool:
    return bool(region.phrases if task == "caption" else region.name)


def _prompts(questions: Questions, sample: Sample, shown: _Shown, place: int) -> Request:
    """What is asked of every region of an image that has some truth."""
    regions = [
        region
        for region in sample.regions
        if any(_asks(region, task, {region.id: Prompt()}) for task in questions.tasks)
    ]
    if questions.prompt in ("mask-point", "mask"):
        boxes = {region.id: Prompt(box=region.box) for region in regions if region.mask is None}
        found = shown.masks(place, boxes) if boxes else {}
        regions = [replace(region, mask=found.get(region.id, region.mask)) for region in regions]
    return {region.id: _prompt(questions, region) for region in regions}


def _prompt(questions: Questions, region: Region) -> Prompt:
    x1, y1, x2, y2 = region.box
    if questions.prompt == "center":
        return Prompt(points=(((x1 + x2) / 2, (y1 + y2) / 2, 1),))
    if questions.prompt == "mask" and region.mask is not None:
        return Prompt(mask=masks.decode(region.mask))
    if questions.prompt in ("random-point", "mask-point"):
        kept = region if questions.prompt == "mask-point" else replace(region, mask=None)
        return draw_point_prompt(kept, np.random.default_rng([questions.seed, region.id]))
    return Prompt(box=region.box)


def _other(region: Region, regions: Sequence[Region], prompts: Request) -> Region | None:
    """The next region of the image that is called something else and told of otherwise, if there is one."""
    place = regions.index(region)
    for other in (*regions[place + 1 :], *regions[:place]):
        same = bool(set(other.phrases) & set(region.phrases)) or (region.name is not None and other.name == region.name)
        if other.id in prompts and not same:
            return other
    return None


def _moved(region: Region, size: tuple[int, int], seed: int) -> Region:
    """The region's box, and what of its mask is inside, at another place of the image (width, height)."""
    draw = np.random.default_rng([seed, region.id, 1])
    x1, y1, x2, y2 = region.box
    room = np.array([size[0] - (x2 - x1), size[1] - (y2 - y1)])
    places = (draw.random((PLACES, 2)) * np.maximum(room, 0)).round()  # (PLACES, 2) corners
    common = np.maximum(0, np.array([x2 - x1, y2 - y1]) - np.abs(places - [x1, y1])).prod(1)
    x, y = (float(value) for value in places[common.argmin()])
    mask = region.mask
    if mask is not None:
        inside = masks.decode(mask)
        rows, columns = np.nonzero(inside)
        rows, columns = rows + round(y - y1), columns + round(x - x1)
        kept = (rows >= 0) & (rows < size[1]) & (columns >= 0) & (columns < size[0])
        inside[:] = False
        inside[rows[kept], columns[kept]] = True
        mask = masks.encode(inside)
    return replace(region, box=(x, y, x + x2 - x1, y + y2 - y1), mask=mask)


def _recoloured(image: Image.Image) -> Image.Image:
    red, green, blue = image.split()
    return Image.merge("RGB", (blue, red, green))


def _everything(captioner: Any, image: Image.Image, proposals: Any, generation: Mapping[str, Any]) -> list[Caption]:
    from sca.inference.automatic import caption_everything
    from sca.inference.engine import MaskEngine
    from sca.inference.predictor import Predictor

    if not isinstance(captioner, MaskEngine) or captioner.model is None:
        raise ValueError("points of a proposer are searched by what gives masks; another captioner needs boxes")
    predictor = Predictor(captioner)
    predictor.set_image(image)
    return caption_everything(predictor, proposals=proposals, **generation)


def _in_order(records: Sequence[dict[str, Any]], sample: Sample) -> list[dict[str, Any]]:
    """By region, and of one region what was asked first before what was asked to mislead."""
    place = {region.id: number for number, region in enumerate(sample.regions)}
    return sorted(records, key=lambda each: (each["control"] is not None, place[each["region_id"]]))


def _record(
    index: int, sample: Sample, region: Region, task: str, control: str | None, answer: Caption
) -> dict[str, Any]:
    plain = record("", sample.image, answer)
    return {
        "index": index,
        "image_id": sample.image_id,
        "region_id": region.id,
        "task": task,
        "control": control,
        **{key: plain[key] for key in ("prompt", "caption", "score", "mask", "iou")},
        "truth": _truth(region),
    }


def _truth(region: Region) -> dict[str, Any]:
    mask = region.mask
    return {
        "name": region.name,
        "phrases": list(region.phrases),
        "attributes": {fact: list(v) if isinstance(v, tuple) else v for fact, v in region.attributes.items()},
        "mask": None if mask is None else {"size": list(mask["size"]), "counts": mask["counts"]},
        "box": [float(value) for value in region.box],
        "area": _area(region),
    }


def _area(region: Region) -> float:
    if region.mask is not None:
        return float(masks.area(region.mask))
    x1, y1, x2, y2 = region.box
    return float((x2 - x1) * (y2 - y1))
