"""Predict the regions of a dataset as records that contain everything that metrics need.

A record is plain JSON, one per region and task (and control). The records of one image are consecutive:

    index                  index of the image in the dataset
    image_id, region_id    ids of the dataset
    task                   "caption" or "recognition"
    control                None, or the name of a negative control, see `CONTROLS`
    prompt                 the prompt: any of `box` [x1, y1, x2, y2], `points` [[x, y, label]] and `mask` RLE, in
                           image pixels
    caption, score         predicted text, and exp of the mean log-probability of its tokens
    mask                   predicted mask (COCO RLE, image resolution), or None
    predicted_iou          predicted IoU of the mask, or None
    truth                  ground truth: name, phrases, attributes, mask (RLE or None), box [x1, y1, x2, y2], and area
                           in pixels of the mask, or of the box without a mask

For dense captioning, where regions are proposed, there is one record per image and task. Its task is "dense" for
captions or "dense-recognition" for class names. Its `proposals` are objects with `box`, `score`, `caption` (the
predicted text), `name` (that of the proposer, or None) and `mask` (or None), best first. Its truth contains `regions`,
a list of `id`, `box`, and `phrases` or `name`.

For referring expression comprehension, a record has the task "comprehension" and, instead of a caption, `expressions`:
the `text` of each phrase, and the `box` and `score` of the region that matches it best; see
`sca.evaluation.comprehension`.

For questions, a record has the task "question" and `answers`: the `text` and `score` of each predicted answer. Its
truth contains `questions`: the `text`, `kind` and `answer` of each.

A caption that was judged before has `judgments`; see `sca.evaluation.metrics.stored_judgments`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice
from typing import Any, NamedTuple, Protocol, cast

import numpy as np
from PIL import Image
from sca_registry.contracts import (
    JUDGE_QUESTIONS,
    TASKS,
    Caption,
    Captioner,
    Dataset,
    Prompt,
    Proposals,
    Proposer,
    Region,
    Sample,
)
from sca_registry.spec import ZoomOptions

from sca.data.point_prompts import sample_point_prompt
from sca.inference.batch import caption_requests
from sca.inference.zoom_options import DEFAULT_ZOOM, ZOOM_OFF, ZoomValue, check_zoom, resolve_zoom
from sca.io import masks
from sca.io.validation import check_choice, check_range
from sca.output.jsonl import caption_to_record

PROMPT_TYPES = {
    "box": "the box of the region",
    "center": "the center point of the box",
    "random-point": "a random point inside the box",
    "mask-point": "a random point inside the mask",
    "box-and-point": "the box and a random point inside the mask",
    "mask": "the mask",
}
MASK_PROMPT_TYPES = ("mask-point", "box-and-point", "mask")  # require a mask
CONTROLS = {
    "wrong-region": "prompt of another region of the image with another name and other phrases",
    "color-swap": "image with red shown as green, green as blue and blue as red",
    "shuffled-mask": "box and mask of the region moved to another position in the image",
}
DENSE_TASKS = {"dense": "caption", "dense-recognition": "recognition"}  # task of each proposal, by task of the record
COMPREHENSION_TASK = "comprehension"
QUESTION_TASK = "question"
EXCLUSIVE_TASKS = (COMPREHENSION_TASK, QUESTION_TASK)  # evaluated alone
NUM_CANDIDATE_SHIFTS = 16  # candidate positions for a shifted region; the one with the least overlap is used

PromptsByRegion = dict[int, Prompt]  # prompts of one image by region id


class RecordPredictor(Protocol):
    """Options of an evaluation, which predict the records of a batch of images."""

    def predict_records(self, captioner: Any, samples: Sequence[tuple[int, Sample]]) -> list[dict[str, Any]]: ...


class PredictedBatch(NamedTuple):
    """The records of one batch of images."""

    indices: Sequence[int]  # indices of the images in the dataset
    records: list[dict[str, Any]]
    num_unreadable: int  # images that could not be read
    seconds: float = 0.0  # time of the predictions, without the reading of images


@dataclass(frozen=True)
class PromptingOptions:
    """Prompt type, tasks and controls of an evaluation.

    Args:
        prompt_type: One of `PROMPT_TYPES`. Random points depend only on `seed` and the region id. For a region without
            a ground-truth mask, "mask-point", "box-and-point" and "mask" use the mask that the captioner predicts for
            the box, as in SCA (arXiv 2312.00869).
        tasks: Tasks of every region that has the ground truth: phrases, or questions for a judge, for "caption", a name
            for "recognition". Or only "comprehension": `sca.evaluate` then finds the region of each phrase. Or only
            "question": it answers the questions of the dataset.
        controls: Negative controls of `CONTROLS`; each repeats all predictions.
        seed: Random seed of point prompts and shifted regions.
        generation: Generation options of the captioner.
        zoom: Predict small regions from crops: "auto", "off" or the area of the largest in grid cells.
        caption_task: Task of the captioner that generates the captions of the task "caption": a further task of a model
            that has one, such as "detail".
        caption_all: Also caption regions without phrases, for metrics that need none, such as "positions".

    Raises:
        ValueError: An unknown prompt type, task or control, no task, a negative seed, an invalid value of `zoom`, or an
            option that has no effect on the task.
    """

    prompt_type: str = "box"
    tasks: tuple[str, ...] = ("caption", "recognition")
    controls: tuple[str, ...] = ()
    seed: int = 0
    generation: Mapping[str, Any] = field(default_factory=dict)
    zoom: ZoomValue = DEFAULT_ZOOM
    caption_task: str = "caption"
    caption_all: bool = False

    def __post_init__(self) -> None:
        check_zoom(self.zoom)
        check_choice("prompt_type", self.prompt_type, PROMPT_TYPES)
        check_range("seed", self.seed, int)
        is_exclusive = len(self.tasks) == 1 and self.tasks[0] in EXCLUSIVE_TASKS
        for task in () if is_exclusive else self.tasks:
            check_choice("task", task, TASKS)
        for control in self.controls:
            check_choice("control", control, CONTROLS)
        if tuple(self.tasks) == (COMPREHENSION_TASK,):
            self._check_comprehension()
        if tuple(self.tasks) == (QUESTION_TASK,) and self.zoom != ZOOM_OFF:
            raise ValueError(f"zoom {self.zoom} has no effect on the task {QUESTION_TASK}; omit it")
        if not self.tasks:
            raise ValueError(f"tasks is empty; choose one or more of {', '.join(TASKS)}")
        if self.caption_task != "caption" and "caption" not in self.tasks:
            raise ValueError(
                f"caption_task {self.caption_task} has no effect on the task {self.tasks[0]}; omit it, or add the task "
                "caption"
            )
        if self.caption_all and "caption" not in self.tasks:
            raise ValueError(f"caption_all has no effect on the task {self.tasks[0]}; omit it, or add the task caption")
        object.__setattr__(self, "tasks", tuple(dict.fromkeys(self.tasks)))
        object.__setattr__(self, "controls", tuple(dict.fromkeys(self.controls)))

    def _check_comprehension(self) -> None:
        """Raise ValueError for an option that has no effect on comprehension."""
        unused = [f"control {name}" for name in self.controls]
        unused += [f"option generation.{name}" for name in self.generation]
        unused += [f"zoom {self.zoom}"] if self.zoom != ZOOM_OFF else []
        unused += [f"prompt type {self.prompt_type}"] if self.prompt_type != "box" else []
        if unused:
            raise ValueError(f"the {unused[0]} has no effect on the task {COMPREHENSION_TASK}; omit it")

    def predict_records(self, captioner: Captioner, samples: Sequence[tuple[int, Sample]]) -> list[dict[str, Any]]:
        """Predict the records of a batch of images.

        Args:
            captioner: Any captioner.
            samples: Dataset index and sample of each image.

        Returns:
            The records, grouped by image in the order of `samples`.
        """
        records: list[list[dict[str, Any]]] = [[] for _ in samples]
        for control, control_images, control_prompts in self._iter_controls(captioner, samples):
            for task in self.tasks:
                requests = [
                    {
                        region.id: prompts[region.id]
                        for region in sample.regions
                        if region.id in prompts and has_truth_for_task(region, task, self.caption_all)
                    }
                    for (_, sample), prompts in zip(samples, control_prompts, strict=True)
                ]
                captioner_task = self.caption_task if task == "caption" else task
                captions = control_images.caption_regions(requests, captioner_task, self.generation)
                for position, (index, sample) in enumerate(samples):
                    for region in sample.regions:
                        if region.id in captions[position]:
                            caption = captions[position][region.id]
                            records[position].append(_make_record(index, sample, region, task, control, caption))
        return [
            each for position, (_, sample) in enumerate(samples) for each in _sort_records(records[position], sample)
        ]

    def iter_encoded_controls(
        self, captioner: Captioner, samples: Sequence[tuple[int, Sample]]
    ) -> Iterator[tuple[str | None, Any, list[PromptsByRegion]]]:
        """Yield the inputs of the predictions and of each control.

        Args:
            captioner: Captioner with a method `encode`.
            samples: Dataset index and sample of each image.

        Yields:
            Name of the control, None for the regular predictions; the encoded images; and the prompts of each image by
            region id.
        """
        for control, images, prompts in self._iter_controls(captioner, samples):
            yield control, images.encoded, prompts

    def _iter_controls(
        self, captioner: Captioner, samples: Sequence[tuple[int, Sample]]
    ) -> Iterator[tuple[str | None, _EncodedImages, list[PromptsByRegion]]]:
        zoom = resolve_zoom(captioner, self.zoom)
        encoded_images = _EncodedImages(captioner, [sample.image for _, sample in samples], zoom)
        region_prompts = [
            _make_prompts(self, sample, encoded_images, position) for position, (_, sample) in enumerate(samples)
        ]
        for control in (None, *self.controls):
            control_prompts = [
                self._apply_control(control, sample, prompts)
                for (_, sample), prompts in zip(samples, region_prompts, strict=True)
            ]
            control_images = encoded_images
            if control == "color-swap":
                control_images = _EncodedImages(captioner, [_swap_colors(sample.image) for _, sample in samples], zoom)
            yield control, control_images, control_prompts

    def _apply_control(self, control: str | None, sample: Sample, prompts: PromptsByRegion) -> PromptsByRegion:
        if control == "wrong-region":
            other_regions = {
                region.id: _find_different_region(region, sample.regions, prompts) for region in sample.regions
            }
            return {region: prompts[other.id] for region, other in other_regions.items() if other is not None}
        if control == "shuffled-mask":
            shifted_regions = [_shift_region(region, sample.image.size, self.seed) for region in sample.regions]
            return {region.id: _make_prompt(self, region) for region in shifted_regions}
        return prompts


@dataclass(frozen=True)
class DenseCaptioningOptions:
    """Options of dense captioning, where regions are proposed and then captioned.

    Args:
        proposer: Proposer of the regions. Points of a proposer (the grid) are segmented as in everything mode, which
            requires a `MaskEngine`; boxes and masks are captioned unchanged.
        tasks: Tasks of `DENSE_TASKS`; one record per image each.
        generation: Generation options of the captioner.
        zoom: As in `PromptingOptions`.
        caption_task: As in `PromptingOptions`.
    """

    proposer: Proposer
    tasks: tuple[str, ...] = ("dense",)
    generation: Mapping[str, Any] = field(default_factory=dict)
    zoom: ZoomValue = DEFAULT_ZOOM
    caption_task: str = "caption"

    def predict_records(self, captioner: Captioner, samples: Sequence[tuple[int, Sample]]) -> list[dict[str, Any]]:
        """Predict one record per image and task, in the order of `samples` (dataset index and sample of each image)."""
        return [record for index, sample in samples for record in self._predict_image(captioner, index, sample)]

    def _predict_image(self, captioner: Captioner, index: int, sample: Sample) -> list[dict[str, Any]]:
        captioner_tasks = DENSE_TASKS | {"dense": self.caption_task}
        first_task, *other_tasks = (captioner_tasks[task] for task in self.tasks)
        encoded_image = _EncodedImages(captioner, [sample.image], resolve_zoom(captioner, self.zoom))
        regions = self._caption_proposals(encoded_image, sample, first_task)
        prompts = {position: caption.prompt for position, caption in enumerate(regions)}
        captions_by_task = [regions] + [
            list(encoded_image.caption_regions([prompts], task, self.generation)[0].values()) for task in other_tasks
        ]
        return [
            {
                "index": index,
                "image_id": sample.image_id,
                "region_id": None,
                "task": task,
                "control": None,
                "proposals": _make_proposal_records(regions, captions),
                "truth": {"regions": _make_dense_truth(sample.regions, task)},
            }
            for task, captions in zip(self.tasks, captions_by_task, strict=True)
        ]

    def _caption_proposals(self, encoded_image: _EncodedImages, sample: Sample, task: str) -> list[Caption]:
        """Return a caption of each proposed region, with its name and score."""
        proposals = self.proposer(sample.image, sample.image_id)
        if any(prompt.box is None and prompt.mask is None for prompt in proposals.prompts):
            captions = _caption_point_proposals(
                encoded_image.captioner, sample.image, proposals, task, self.generation, self.zoom
            )
            return [
                replace(each, proposal_score=each.score if each.predicted_iou is None else each.predicted_iou)
                for each in captions
            ]
        captions_by_row = encoded_image.caption_regions([dict(enumerate(proposals.prompts))], task, self.generation)[0]
        return [
            replace(captions_by_row[row], name=name, proposal_score=score)
            for row, (name, score) in enumerate(zip(proposals.names, proposals.scores, strict=True))
        ]


def draft_records(
    dataset: Dataset, tasks: Sequence[str], max_images: int | None = None, caption_all: bool = False
) -> Iterator[dict[str, Any]]:
    """Yield the task and ground truth of each record of a dataset without predicting.

    Args:
        dataset: Any dataset. Its images are not opened. A dataset without `iter_annotations` yields nothing.
        tasks: Tasks as in `PromptingOptions`, or of `DENSE_TASKS`.
        max_images: Maximum number of images. Defaults to all.
        caption_all: Whether regions without phrases are captioned, see `PromptingOptions`.

    Yields:
        Records without captions, in the order of the dataset.
    """
    if hasattr(dataset, "iter_annotations"):
        for regions in islice(dataset.iter_annotations(), max_images):
            for region in regions:
                yield from (
                    {"region_id": region.id, "task": task, "truth": make_truth(region)}
                    for task in tasks
                    if has_truth_for_task(region, task, caption_all)
                )


def predict_dataset(
    captioner: Captioner,
    dataset: Dataset,
    prompting: RecordPredictor | None = None,
    batch_size: int = 8,
    max_images: int | None = None,
    skip: Callable[[int], bool] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[PredictedBatch]:
    """Caption the regions of a dataset in batches of fixed composition.

    Images that a dataset with a method `read_sample` cannot read have no records.

    Args:
        captioner: Any captioner.
        dataset: Any dataset.
        prompting: Prompt type, tasks, controls and generation options. Defaults to box prompts.
        batch_size: Images per batch.
        max_images: Maximum number of images. Defaults to all.
        skip: Returns whether to skip the image at a dataset index.
        progress: Called with the number of images done (or skipped) and the total.

    Returns:
        An iterator over batches of records.

    Raises:
        ValueError: `batch_size` or `max_images` is less than 1; raised before the first batch.
    """
    for name, number in (("batch_size", batch_size), ("max_images", max_images)):
        if number is not None:
            check_range(name, number, int, 1)
    num_images = len(dataset) if max_images is None else min(max_images, len(dataset))
    batches = [range(start, min(start + batch_size, num_images)) for start in range(0, num_images, batch_size)]
    return _iter_predicted_batches(
        captioner, dataset, prompting or PromptingOptions(), batches, skip or (lambda _: False), progress
    )


def _iter_predicted_batches(
    captioner: Captioner,
    dataset: Dataset,
    prompting: RecordPredictor,
    batches: Sequence[range],
    skip: Callable[[int], bool],
    progress: Callable[[int, int], None] | None,
) -> Iterator[PredictedBatch]:
    read_sample = getattr(dataset, "read_sample", dataset.__getitem__)
    for batch in batches:
        if indices := [index for index in batch if not skip(index)]:
            samples = [(index, sample) for index in indices if (sample := read_sample(index)) is not None]
            start = time.perf_counter()
            records = prompting.predict_records(captioner, samples) if samples else []
            yield PredictedBatch(indices, records, len(indices) - len(samples), time.perf_counter() - start)
        if progress:
            progress(batch.stop, batches[-1].stop)


class _EncodedImages:
    """Images of a batch, encoded once, when they are first captioned."""

    def __init__(self, captioner: Captioner, images: Sequence[Image.Image], zoom: ZoomOptions | None):
        self.captioner, self.images, self.zoom = captioner, images, zoom

    @cached_property
    def encoded(self) -> Any:
        """The encoded images; None if the captioner has no method `encode`."""
        return self.captioner.encode(self.images) if hasattr(self.captioner, "encode") else None

    def caption_regions(
        self, requests: Sequence[PromptsByRegion], task: str, generation: Mapping[str, Any]
    ) -> list[dict[int, Caption]]:
        """Return the captions of each image by region id."""
        prompts = [list(request.values()) for request in requests]
        captions = caption_requests(self.captioner, self.images, prompts, task, self.encoded, self.zoom, **generation)
        return [
            dict(zip(request, image_captions, strict=True))
            for request, image_captions in zip(requests, captions, strict=True)
        ]

    def predict_masks(self, index: int, boxes: Mapping[int, Prompt]) -> dict[int, dict[str, Any]]:
        """Return the captioner's masks for boxes of one image. ValueError if it returns none."""
        requests: list[PromptsByRegion] = [{} for _ in self.images]
        requests[index] = dict(boxes)
        captions = self.caption_regions(requests, "caption", {})[index]
        regions_without_mask = [region for region, caption in captions.items() if caption.mask is None]
        if regions_without_mask:
            raise ValueError(
                "mask prompts are not possible: some regions have no mask in the dataset, and the model predicts none; "
                "use the prompt type box, center or random-point"
            )
        return {region: caption.mask for region, caption in captions.items() if caption.mask is not None}


def has_truth_for_task(region: Region, task: str, caption_all: bool = False) -> bool:
    """Return whether a region has ground truth for a task: a name for recognition, else phrases or judge questions.

    With `caption_all`, every region counts as having it for the task "caption".
    """
    if task == QUESTION_TASK:  # questions belong to the sample, see `check_has_questions`
        return True
    if DENSE_TASKS.get(task, task) == "recognition":
        return bool(region.name)
    return bool(region.phrases or (task == "caption" and (caption_all or region.attributes.get(JUDGE_QUESTIONS))))


def _make_dense_truth(regions: Sequence[Region], task: str) -> list[dict[str, Any]]:
    """Return the regions with ground truth for a dense task."""
    return [
        {
            "id": region.id,
            "box": [float(value) for value in region.box],
            **({"phrases": list(region.phrases)} if DENSE_TASKS[task] == "caption" else {"name": region.name}),
        }
        for region in regions
        if has_truth_for_task(region, task)
    ]


def _make_proposal_records(regions: Sequence[Caption], captions: Sequence[Caption]) -> list[dict[str, Any]]:
    """Return the proposals of an image, best first, with the texts of `captions`."""
    proposal_records = [
        {
            "box": list(region.box),
            "score": float(cast("float", region.proposal_score)),
            "caption": caption.text,
            "name": region.name,
            "mask": region.mask,
        }
        for region, caption in zip(regions, captions, strict=True)
        if region.box is not None
    ]
    return sorted(proposal_records, key=lambda each: -cast("float", each["score"]))


def _make_prompts(
    prompting: PromptingOptions, sample: Sample, encoded_images: _EncodedImages, index: int
) -> PromptsByRegion:
    """Return the prompts of all regions of an image that have ground truth, or of all with `caption_all`."""
    regions = [
        region
        for region in sample.regions
        if any(has_truth_for_task(region, task, prompting.caption_all) for task in prompting.tasks)
    ]
    if prompting.prompt_type in MASK_PROMPT_TYPES:
        boxes = {region.id: Prompt(box=region.box) for region in regions if region.mask is None}
        predicted_masks = encoded_images.predict_masks(index, boxes) if boxes else {}
        regions = [replace(region, mask=predicted_masks.get(region.id, region.mask)) for region in regions]
    return {region.id: _make_prompt(prompting, region) for region in regions}


def _make_prompt(prompting: PromptingOptions, region: Region) -> Prompt:
    x1, y1, x2, y2 = region.box
    if prompting.prompt_type == "center":
        return Prompt(points=(((x1 + x2) / 2, (y1 + y2) / 2, 1),))
    if prompting.prompt_type == "mask" and region.mask is not None:
        return Prompt(mask=masks.decode_rle(region.mask))
    if prompting.prompt_type in ("random-point", "mask-point"):
        point_region = region if prompting.prompt_type == "mask-point" else replace(region, mask=None)
        return sample_point_prompt(point_region, np.random.default_rng([prompting.seed, region.id]))
    if prompting.prompt_type == "box-and-point":
        point_prompt = sample_point_prompt(region, np.random.default_rng([prompting.seed, region.id]))
        return Prompt(region.box, point_prompt.points)
    return Prompt(box=region.box)


def _find_different_region(region: Region, regions: Sequence[Region], prompts: PromptsByRegion) -> Region | None:
    """Return the next region of the image with another name and other phrases, if any."""
    index = regions.index(region)
    for other in (*regions[index + 1 :], *regions[:index]):
        has_same_truth = bool(set(other.phrases) & set(region.phrases)) or (
            region.name is not None and other.name == region.name
        )
        if other.id in prompts and not has_same_truth:
            return other
    return None


def _shift_region(region: Region, image_size: tuple[int, int], seed: int) -> Region:
    """Move a region's box, and its mask inside the box, within an image of size (width, height)."""
    rng = np.random.default_rng([seed, region.id, 1])
    x1, y1, x2, y2 = region.box
    free_space = np.array([image_size[0] - (x2 - x1), image_size[1] - (y2 - y1)])
    corners = (rng.random((NUM_CANDIDATE_SHIFTS, 2)) * np.maximum(free_space, 0)).round()
    intersections = np.maximum(0, np.array([x2 - x1, y2 - y1]) - np.abs(corners - [x1, y1])).prod(1)
    x, y = (float(value) for value in corners[intersections.argmin()])
    mask = region.mask
    if mask is not None:
        bitmap = masks.decode_rle(mask)
        rows, columns = np.nonzero(bitmap)
        rows, columns = rows + round(y - y1), columns + round(x - x1)
        is_inside_image = (rows >= 0) & (rows < image_size[1]) & (columns >= 0) & (columns < image_size[0])
        bitmap[:] = False
        bitmap[rows[is_inside_image], columns[is_inside_image]] = True
        mask = masks.encode_rle(bitmap)
    return replace(region, box=(x, y, x + x2 - x1, y + y2 - y1), mask=mask)


def _swap_colors(image: Image.Image) -> Image.Image:
    red, green, blue = image.split()
    return Image.merge("RGB", (blue, red, green))


def _caption_point_proposals(
    captioner: Any,
    image: Image.Image,
    proposals: Proposals,
    task: str,
    generation: Mapping[str, Any],
    zoom: ZoomValue,
) -> list[Caption]:
    from sca.inference.automatic import caption_everything
    from sca.inference.engine import MaskEngine
    from sca.inference.predictor import Predictor

    if not isinstance(captioner, MaskEngine) or captioner.model is None:
        raise ValueError("point proposals need a captioner that predicts masks; use a proposer of boxes")
    predictor = Predictor(captioner)
    predictor.set_image(image)
    return caption_everything(predictor, task, proposals=proposals, zoom=zoom, **generation)


def _sort_records(records: Sequence[dict[str, Any]], sample: Sample) -> list[dict[str, Any]]:
    """Sort records by region, regular predictions before controls."""
    region_order = {region.id: index for index, region in enumerate(sample.regions)}
    return sorted(records, key=lambda each: (each["control"] is not None, region_order[each["region_id"]]))


def _make_record(
    index: int, sample: Sample, region: Region, task: str, control: str | None, caption: Caption
) -> dict[str, Any]:
    caption_record = caption_to_record("", sample.image, caption)
    return {
        "index": index,
        "image_id": sample.image_id,
        "region_id": region.id,
        "task": task,
        "control": control,
        **{key: caption_record[key] for key in ("prompt", "caption", "score", "mask", "predicted_iou")},
        "truth": make_truth(region),
    }


def make_truth(region: Region) -> dict[str, Any]:
    """Return the ground truth of a region as the field `truth` of its records."""
    mask = region.mask
    return {
        "name": region.name,
        "phrases": list(region.phrases),
        "attributes": {fact: list(v) if isinstance(v, tuple) else v for fact, v in region.attributes.items()},
        "mask": None if mask is None else {"size": list(mask["size"]), "counts": mask["counts"]},
        "box": [float(value) for value in region.box],
        "area": _compute_area(region),
    }


def _compute_area(region: Region) -> float:
    if region.mask is not None:
        return float(masks.compute_mask_area(region.mask))
    x1, y1, x2, y2 = region.box
    return float((x2 - x1) * (y2 - y1))
