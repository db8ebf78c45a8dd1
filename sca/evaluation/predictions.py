"""What a model answers for the regions of a dataset, as records that hold all that metrics need.

A record is plain JSON, one a region and task, and the regions of one image stay together:

    image_id, region_id    the dataset's
    task                   "caption" or "recognition"
    prompt                 what was asked: `box` [x1, y1, x2, y2] or `points` [[x, y, label]], image pixels
    caption, score         the words, and exp of the mean log-probability of their tokens
    mask, iou              the predicted mask (COCO RLE, image resolution) and the predicted IoU of it, or None
    truth                  name, phrases, attributes, mask (RLE or None), box [x1, y1, x2, y2], and area in pixels:
                           of the mask, or of the box where there is no mask
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np
from sca_registry.contracts import TASKS, Caption, Captioner, Dataset, Prompt, Region, Sample

from sca import masks
from sca.output.jsonl import record
from sca.training.examples import point_prompt

PROMPTS = ("box", "point")


def predict(
    predictor: Captioner,
    dataset: Dataset,
    prompt: str = "box",
    tasks: Sequence[str] = ("caption", "recognition"),
    batch: int = 8,
    seed: int = 0,
    limit: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[dict[str, Any]]:
    """Records of every region that has the truth its task asks for: phrases for "caption", a name for "recognition".

    prompt: "box" asks with the region's own box, "point" with one point drawn inside its mask (its box where there is
    no mask); the point is a function of `seed` and the region's id alone. batch: images at a time, if the predictor can
    `encode` several and `answer`, as `sca.Predictor` does. limit: only the first so many images. progress: called with
    the images done and all of them.

    ValueError for another prompt or task, or a number below 1, before anything is computed.
    """
    if prompt not in PROMPTS:
        raise ValueError(f"no prompt {prompt!r}: regions are asked for by {' or '.join(map(repr, PROMPTS))}")
    for task in tasks:
        if task not in TASKS:
            raise ValueError(f"no task {task!r}: there are {' and '.join(map(repr, TASKS))}")
    for name, number in (("batch", batch), ("limit", limit)):
        if number is not None and number < 1:
            raise ValueError(f"{name} must be 1 or more, not {number}")
    return _records(predictor, dataset, prompt, tuple(dict.fromkeys(tasks)), batch, seed, limit, progress)


def _records(
    predictor: Captioner,
    dataset: Dataset,
    prompt: str,
    tasks: Sequence[str],
    batch: int,
    seed: int,
    limit: int | None,
    progress: Callable[[int, int], None] | None,
) -> Iterator[dict[str, Any]]:
    every = len(dataset) if limit is None else min(limit, len(dataset))
    done = 0
    samples = islice(iter(dataset), every)
    while chunk := list(islice(samples, batch)):
        requests = [{region.id: _prompt(region, prompt, seed) for region in sample.regions} for sample in chunk]
        answers = _answers(predictor, chunk, requests, tasks)
        for place, sample in enumerate(chunk):
            for region in sample.regions:
                for task in tasks:
                    if _has_truth(region, task):
                        yield _record(sample, region, task, answers[task][place][region.id])
        done += len(chunk)
        if progress:
            progress(done, every)


def _answers(
    predictor: Captioner, samples: Sequence[Sample], prompts: Sequence[Mapping[int, Prompt]], tasks: Sequence[str]
) -> dict[str, list[dict[int, Caption]]]:
    """For each task the answers of each image by region id, for those regions that have truth."""
    images = [sample.image for sample in samples]
    encoded = predictor.encode(images) if hasattr(predictor, "encode") else None  # once for all tasks
    answers = {}
    for task in tasks:
        asked = [[region.id for region in sample.regions if _has_truth(region, task)] for sample in samples]
        requests = [[mine[region] for region in regions] for mine, regions in zip(prompts, asked, strict=True)]
        if encoded is not None:
            given = predictor.answer(encoded, requests, task)
        else:
            pairs = zip(images, requests, strict=True)
            given = [predictor.describe(image, request, task=task) if request else [] for image, request in pairs]
        answers[task] = [dict(zip(regions, found, strict=True)) for regions, found in zip(asked, given, strict=True)]
    return answers


def _has_truth(region: Region, task: str) -> bool:
    return bool(region.phrases if task == "caption" else region.name)


def _prompt(region: Region, prompt: str, seed: int) -> Prompt:
    if prompt == "box":
        return Prompt(box=region.box)
    return point_prompt(region, np.random.default_rng([seed, region.id]))


def _record(sample: Sample, region: Region, task: str, answer: Caption) -> dict[str, Any]:
    plain = record("", sample.image, answer)
    return {
        "image_id": sample.image_id,
        "region_id": region.id,
        "task": task,
        **{key: plain[key] for key in ("prompt", "caption", "score", "mask", "iou")},
        "truth": {
            "name": region.name,
            "phrases": list(region.phrases),
            "attributes": {fact: list(v) if isinstance(v, tuple) else v for fact, v in region.attributes.items()},
            "mask": None
            if region.mask is None
            else {"size": list(region.mask["size"]), "counts": region.mask["counts"]},
            "box": [float(value) for value in region.box],
            "area": _area(region),
        },
    }


def _area(region: Region) -> float:
    if region.mask is not None:
        return float(masks.area(region.mask))
    x1, y1, x2, y2 = region.box
    return float((x2 - x1) * (y2 - y1))
