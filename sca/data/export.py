"""Export of datasets to public formats, for tools that read COCO, Visual Genome or RefCOCO.

The datasets of this package read the same formats, so exports also test them end to end.
"""

from __future__ import annotations

import json
import logging
import pickle
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from sca_registry.contracts import Dataset, Sample

from sca.data.export_coco import (
    write_coco,
    write_coco_captions,
    write_coco_panoptic,
    write_grit,
    write_objects365,
    write_v3det,
)
from sca.data.export_records import (
    UniqueIds,
    get_region_texts,
    make_annotation_record,
    make_image_record,
    save_image,
    write_instances,
    write_json,
)
from sca.data.record_parsing import EmptyDatasetError
from sca.data.summary import summarize_dataset
from sca.io.atomic import write_folder
from sca.io.masks import mask_to_box
from sca.io.text import format_count

logger: logging.Logger = logging.getLogger(__name__)

SAMPLES, QUESTIONS = "samples", "questions"  # counted during an export
QUESTION_FORMAT = "jsonl"


def export_dataset(
    dataset: Dataset | Mapping[str, Dataset], folder: str | Path, format: str, max_images: int | None = None
) -> Path:
    """Export a dataset, or several splits of one, to a folder.

    Formats:

    - `coco`: `{split}.json` (instances with RLE masks, phrases as "caption", and "attributes") and `{split}/*.png`.
      Read it with `Coco(split, root=folder)`.
    - `coco-captions`, `coco-panoptic`, `objects365`, `v3det`, `vg-grit`, `sa1b`: the layouts of `CocoCaptions`,
      `CocoPanoptic`, `Objects365`, `V3Det`, `GritVisualGenome` and `Sa1b`. A captions file has the phrases of all
      regions of an image. Panoptic and SA-1B files have only regions with masks; in panoptic files smaller masks cover
      larger ones. GRiT files have one region per phrase with new ids. In captions, GRiT and SA-1B files the name
      replaces missing phrases.
    - `jsonl`: `{split}.jsonl` and `{split}/*.png`, with all fields of all regions. Read it with
      `Jsonl(split, file=FILE)`.
    - `vg`: `image_data.json`, `region_descriptions.json` (one region per phrase with new ids, boxes in integer pixels),
      `densecap_splits.json` and `VG_100K/*.jpg`. Has no masks or class names; the name replaces missing phrases. Read
      it with `VisualGenome(split, root=folder)`.
    - `refcoco`: `instances.json` (all regions), `refs(unc).p` (one ref per region with phrases) and `images/*.png`.
      Read it with `RefCoco(split, root=folder)`. `refcocog` has the same refs in `refs(google).p` and `refs(umd).p`
      instead.

    The folder is written atomically.

    Args:
        dataset: Dataset, or {split: dataset}. The split of a single dataset is its attribute `split`, else "train".
        folder: New or empty folder.
        format: Name of the format.
        max_images: Maximum number of samples per split, from the first.

    Returns:
        Path of the folder.

    Raises:
        ValueError: The format is unknown.
        OutputError: The folder is not empty or cannot be written.
        InputError: An id is repeated in one file.
        EmptyDatasetError: No sample is readable.
    """
    if format not in EXPORT_WRITERS:
        raise ValueError(f"unknown format {format!r}; choose from {', '.join(EXPORT_WRITERS)}")
    folder = Path(folder)
    splits = dataset if isinstance(dataset, Mapping) else {getattr(dataset, "split", "train"): dataset}
    counts: Counter[str] = Counter()
    with write_folder(folder) as draft:
        EXPORT_WRITERS[format](
            {name: _iter_and_count_samples(part, counts, max_images) for name, part in splits.items()}, draft
        )
        if not counts[SAMPLES]:
            raise EmptyDatasetError(f"no sample can be read; {'; '.join(map(summarize_dataset, splits.values()))}")
    if counts[QUESTIONS] and format != QUESTION_FORMAT:
        logger.warning(
            "sca: %s of the dataset are not exported; the format %s contains questions",
            format_count(counts[QUESTIONS], "question"),
            QUESTION_FORMAT,
        )
    return folder


def _iter_and_count_samples(dataset: Dataset, counts: Counter[str], max_images: int | None) -> Iterator[Sample]:
    is_iterable = hasattr(dataset, "__iter__")  # iteration skips unusable samples
    samples = iter(dataset) if is_iterable else map(dataset.__getitem__, range(len(dataset)))
    for sample in islice(samples, max_images):
        counts[SAMPLES] += 1
        counts[QUESTIONS] += len(sample.questions)
        yield sample


def _write_visual_genome(splits: Mapping[str, Iterator[Sample]], folder: Path) -> None:
    unique_ids = UniqueIds()
    image_ids_by_split: dict[str, list[int]] = {"train": [], "val": [], "test": []}
    images, descriptions = [], []
    region_id = 0
    for split, samples in splits.items():
        split_image_ids = image_ids_by_split.setdefault(split, [])
        for sample in samples:
            unique_ids.add_sample(sample, split)
            file_name = f"VG_100K/{sample.image_id}.jpg"
            save_image(sample, folder / file_name, quality=95)
            width, height = sample.image.size
            split_image_ids.append(sample.image_id)
            images.append(
                {
                    "image_id": sample.image_id,
                    "url": file_name,
                    "width": width,
                    "height": height,
                    "coco_id": None,
                    "flickr_id": None,
                }
            )
            regions = []
            for region in sample.regions:
                x1, y1, x2, y2 = (round(value) for value in region.box)
                for phrase in get_region_texts(region):
                    region_id += 1
                    regions.append(
                        {
                            "region_id": region_id,
                            "image_id": sample.image_id,
                            "phrase": phrase,
                            "x": x1,
                            "y": y1,
                            "width": max(x2 - x1, 1),
                            "height": max(y2 - y1, 1),
                        }
                    )
            descriptions.append({"id": sample.image_id, "regions": regions})
    write_json(folder / "image_data.json", images)
    write_json(folder / "region_descriptions.json", descriptions)
    write_json(folder / "densecap_splits.json", image_ids_by_split)


def _write_refcoco(
    splits: Mapping[str, Iterator[Sample]], folder: Path, split_authors: Sequence[str] = ("unc",)
) -> None:
    unique_ids = UniqueIds()
    categories: dict[str, int] = {}
    images, annotations = [], []
    refs: list[dict[str, Any]] = []
    num_sentences = 0
    for split, samples in splits.items():
        for sample in samples:
            unique_ids.add_sample(sample, split)
            file_name = f"{sample.image_id:012d}.png"
            save_image(sample, folder / "images" / file_name)
            images.append(make_image_record(sample, file_name))
            for region_index, region in enumerate(sample.regions):
                annotations.append(make_annotation_record(region, sample.image_id, categories))
                if not region.phrases:
                    continue
                sentence_ids = range(num_sentences, num_sentences + len(region.phrases))
                num_sentences = sentence_ids.stop
                refs.append(
                    {
                        "ref_id": len(refs),
                        "ann_id": region.id,
                        "image_id": sample.image_id,
                        "category_id": annotations[-1]["category_id"],
                        "split": split,
                        "file_name": f"{sample.image_id:012d}_{region_index}.png",
                        "sent_ids": list(sentence_ids),
                        "sentences": [
                            _make_sentence_record(raw, sent_id)
                            for raw, sent_id in zip(region.phrases, sentence_ids, strict=True)
                        ],
                    }
                )
    write_instances(folder / "instances.json", images, annotations, categories)
    for authors in split_authors:
        (folder / f"refs({authors}).p").write_bytes(pickle.dumps(refs, protocol=2))


def _write_sa1b(splits: Mapping[str, Iterator[Sample]], folder: Path) -> None:
    unique_ids = UniqueIds()
    for split, samples in splits.items():
        for sample in samples:
            unique_ids.add_sample(sample, split)
            name = f"sa_{sample.image_id}"
            save_image(sample, folder / f"{name}.jpg", quality=95)
            width, height = sample.image.size
            image = {"image_id": sample.image_id, "width": width, "height": height, "file_name": f"{name}.jpg"}
            masked_regions = [(region, region.mask) for region in sample.regions if region.mask]
            annotations = []
            for region, mask in masked_regions:
                x1, y1, x2, y2 = mask_to_box(mask) or region.box
                box = [x1, y1, x2 - 1 - x1, y2 - 1 - y1]  # published boxes end at the last pixel
                annotations.append(make_annotation_record(region, sample.image_id, {}) | {"bbox": box})
            captions_by_region_id = {region.id: list(get_region_texts(region)) for region, _ in masked_regions}
            write_json(folder / f"{name}.json", {"image": image, "annotations": annotations})
            write_json(folder / f"{name}.captions.json", captions_by_region_id)


def _write_jsonl(splits: Mapping[str, Iterator[Sample]], folder: Path) -> None:
    for split, samples in splits.items():
        unique_ids = UniqueIds()
        with open(folder / f"{split}.jsonl", "w", encoding="utf-8") as file:
            for sample in samples:
                unique_ids.add_sample(sample, split)
                name = f"{split}/{sample.image_id:012d}.png"
                save_image(sample, folder / name)
                width, height = sample.image.size
                for region in sample.regions:
                    line = {"image": name, "image_id": sample.image_id, "id": region.id, "box": region.box}
                    questions = [
                        {"question": each.text, "answer": each.answer, "kind": each.kind, "regions": each.region_ids}
                        | ({"is_about_image": True} if each.is_about_image else {})
                        for each in sample.questions
                        if each.region_ids[0] == region.id
                    ]
                    extras = {
                        "name": region.name,
                        "mask": region.mask,
                        "phrases": region.phrases,
                        "questions": questions,
                    }
                    extras = {key: value for key, value in {**extras, "attributes": region.attributes}.items() if value}
                    file.write(json.dumps({**line, **extras, "width": width, "height": height}) + "\n")


EXPORT_WRITERS: dict[str, Callable[[Mapping[str, Iterator[Sample]], Path], None]] = {
    "coco": write_coco,
    "coco-captions": write_coco_captions,
    "coco-panoptic": write_coco_panoptic,
    "jsonl": _write_jsonl,
    "objects365": write_objects365,
    "sa1b": _write_sa1b,
    "v3det": write_v3det,
    "vg": _write_visual_genome,
    "vg-grit": write_grit,
    "refcoco": _write_refcoco,
    "refcocog": partial(_write_refcoco, split_authors=("google", "umd")),
}


def _make_sentence_record(raw: str, sent_id: int) -> dict[str, Any]:
    """Return a sentence in RefCOCO's format: raw, and in lower case without punctuation."""
    tokens = re.sub(r"[^\w\s]", "", raw.lower()).split()
    return {"raw": raw, "sent": " ".join(tokens), "sent_id": sent_id, "tokens": tokens}
