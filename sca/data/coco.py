"""Datasets in the layout of COCO instances: boxes, masks, class names, and captions where the annotations have them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sca.data.fields import corners, field, four, listed, phrases, read_json, size
from sca.data.own import check_hold_out, chosen
from sca.data.table import TableDataset


class Coco(TableDataset):
    """Dataset: `Coco("train", root=FOLDER)[i]` -> `Sample`, from COCO instances JSON and a folder of pictures.

    `root` holds either `train.json` and `train/`, or `annotations/instances_train2017.json` and `train2017/` (for the
    split "train"); `annotations` and `images` name a file and a folder outright, in place of those.

    Segmentations may be polygons, uncompressed or compressed RLE. A region's name is its category's; its phrases are
    the annotation's "caption" (a string or a list of them), and its attributes the annotation's "attributes". Crowds
    are left out, and polygons of fewer than three points are dropped, both counted. The rest is that of `TableDataset`.
    """

    reader = "coco"
    choice = ""

    def __init__(
        self,
        split: str,
        root: str | Path | None = None,
        annotations: str | Path | None = None,
        images: str | Path | None = None,
        max_bad: int = 100,
    ):
        self.annotations, pictures = _files(split, root, annotations, images)
        super().__init__(split, pictures, [self.annotations], max_bad, self.choice)

    def _records(self) -> Iterator[dict[str, Any]]:
        content, categories = read_instances(self.annotations)
        where = str(self.annotations)
        self.attributes = {"name": tuple(dict.fromkeys(categories.values()))}
        images = {record["id"]: self._image(*described(record, at)) for record, at in listed(content, "images", where)}
        for record, place in listed(content, "annotations", where):
            image_id = field(record, "image_id", int, place)
            if image_id not in images:
                raise ValueError(f"{place}: image_id {image_id} is not among the images")
            name = category(record, categories, place)
            if record.get("iscrowd"):
                self._skip("crowd", place)
                continue
            self._keep(
                images[image_id],
                record["id"],
                box(record, place),
                place,
                mask=("segmentation", record.get("segmentation")),
                name=name,
                phrases=phrases(record.get("caption"), "caption", place),
                attributes=field(record, "attributes", dict, place) if record.get("attributes") else None,
            )
        del content
        yield from images.values()


class CocoJson(Coco):
    """Dataset: `CocoJson("val", annotations=FILE, images=FOLDER)`: any file in COCO's format, see `Coco`.

    Both may hold `{split}`, in whose place the split is put. hold_out: the share of the images of a file without splits
    that "val" has; "train" has the others.
    """

    def __init__(
        self, split: str, annotations: str | Path, images: str | Path, hold_out: float = 0.0, max_bad: int = 100
    ):
        self.hold_out = hold_out
        annotations, images = (str(path).replace("{split}", split) for path in (annotations, images))
        self.choice = check_hold_out(split, hold_out)
        super().__init__(split, annotations=annotations, images=images, max_bad=max_bad)

    def _records(self) -> Iterator[dict[str, Any]]:
        return (record for record in super()._records() if chosen(record["file"], self.split, self.hold_out))


def read_instances(path: Path) -> tuple[dict[str, Any], dict[int, str]]:
    """What an instances file has, and the name of each category."""
    content = read_json(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path}: COCO instances are an object with images, annotations and categories")
    listing = listed(content, "categories", str(path))
    return content, {record["id"]: field(record, "name", str, place).strip() for record, place in listing}


def described(record: dict[str, Any], place: str) -> tuple[int, str, int, int]:
    """Id, file name, width and height of an image."""
    return record["id"], field(record, "file_name", str, place), *size(record, place)


def category(record: dict[str, Any], categories: dict[int, str], place: str) -> str:
    """The name of an annotation's category."""
    number = field(record, "category_id", int, place)
    if number not in categories:
        raise ValueError(f"{place}: category_id {number} has no name among the categories")
    return categories[number]


def box(record: dict[str, Any], place: str) -> tuple[float, float, float, float]:
    """x1 y1 x2 y2 of an annotation."""
    return corners(*four(record, "bbox", "x, y, width, height", place), place)


def _files(
    split: str, root: str | Path | None, annotations: str | Path | None, images: str | Path | None
) -> tuple[Path, Path]:
    """The annotation file and the image folder, both there."""
    if root is not None:
        names = (split, split), (f"annotations/instances_{split}2017", f"{split}2017")
        layouts = [(annotations or f"{root}/{file}.json", images or f"{root}/{folder}") for file, folder in names]
    elif annotations is not None and images is not None:
        layouts = [(annotations, images)]
    else:
        raise ValueError("give root=FOLDER, or both annotations=FILE and images=FOLDER")
    paths = [(Path(file), Path(folder)) for file, folder in layouts]
    for file, folder in paths:
        if file.is_file() and folder.is_dir():
            return file, folder
    looked = " or ".join(f"{file} with {folder}{os.sep}" for file, folder in paths)
    missing = dict.fromkeys(str(path) for pair in paths for path in pair if not path.exists())
    raise ValueError(f"no COCO data for split {split!r}: looked for {looked}; not there: {', '.join(missing)}")
