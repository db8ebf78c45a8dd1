"""Datasets in the layout of COCO: boxes, masks, class names, and captions where the annotations have them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tqdm.auto import tqdm

from sca.data.fields import identified, read_phrases
from sca.data.own import check_hold_out, choose_split, find_split
from sca.data.records import Records, grouped, index
from sca.data.table import TableDataset
from sca.io.annotations import coco
from sca.io.annotations.annotation import Annotation, Skip
from sca.io.errors import InputError, Reject
from sca.io.image_names import ImageFiles, split_name
from sca.io.paths import expand_user
from sca.io.validation import read_field, require_size

UNCATEGORIZED = "file without categories"
WHAT = "COCO's format is an object with images, annotations and categories"


class Index(NamedTuple):
    """A file in COCO's format: its images, its annotations, and the name of each category."""

    images: Records
    annotations: Records
    names: dict[int, str]
    things: set[int]  # the categories that are things, where that is said
    has_categories: bool = True

    @classmethod
    def read(
        cls,
        path: Path,
        keys: Sequence[str] = ("id", "image_id"),  # of annotations
        is_named: bool = True,
        reject: Mapping[str, Reject] | None = None,
    ) -> Index:
        """Read the lists of a file.

        Args:
            path: The file.
            keys: Whole numbers that every annotation has, the first of which identifies it.
            is_named: Whether there must be categories; otherwise they are read where they are there.
            reject: For each list what receives the InputError of an unusable record; without one it is raised.
        """
        lists: Mapping[str, Sequence[str]] = {"images": ("id",), "annotations": keys}
        categories = ("categories",)
        found, kept = index(path, lists, categories if is_named else (), WHAT, reject, () if is_named else categories)
        reject_category = (reject or {}).get("categories")
        names, things = {}, set()
        for record, place in identified(kept.get("categories", []), f"{path}: categories", reject=reject_category):
            try:
                names[record["id"]] = coco.clean_name(read_field(record, "name", str, place))
            except ValueError as error:
                if reject_category is None:
                    raise
                names[record["id"]] = ""
                reject_category(error)
            if record.get("isthing"):
                things.add(record["id"])
        images, annotations = (found[key].unique((reject or {}).get(key)) for key in ("images", "annotations"))
        return cls(images, annotations, names, things, "categories" in kept)

    def image(self, number: int) -> tuple[int, str, int, int]:
        """Id, file name, width and height."""
        record, place = self.images[number]
        return record["id"], read_field(record, "file_name", str, place), *require_size(record, place)

    def name(self, record: Mapping[str, Any], place: str) -> str:
        """The name of the category of an annotation or a segment."""
        number = read_field(record, "category_id", int, place)
        if number not in self.names:
            raise InputError(f"{place}: category_id {number} has no name among the categories")
        return self.names[number]


class Coco(TableDataset):
    """Dataset: `Coco("train", root=FOLDER)[i]` -> `Sample`, from COCO instances JSON and a folder of pictures.

    `root` holds either `train.json` and `train/`, or `annotations/instances_train2017.json` and `train2017/` (for the
    split "train"); `annotations` and `images` name a file and a folder outright, in place of those.

    Segmentations may be polygons, uncompressed or compressed RLE, and stand in for a bbox that is missing. A region's
    name is its category's, with underscores read as spaces; its phrases are the annotation's "caption" (a string or a
    list of them), and its attributes the annotation's "attributes". Crowds are left out, polygons with fewer than three
    points and keypoints are dropped; all are counted. The file is streamed: however large it is, it is never in memory
    as a whole. The rest is that of `TableDataset`.
    """

    reader = "coco"
    choice = ""
    layouts: tuple[tuple[str, str], ...] = (  # annotations and pictures in `root`
        ("{split}.json", "{split}"),
        ("annotations/instances_{split}2017.json", "{split}2017"),
    )
    named = True  # regions are called by their categories

    def __init__(
        self,
        split: str,
        root: str | Path | None = None,
        annotations: str | Path | None = None,
        images: str | Path | None = None,
        max_bad: int = 100,
    ):
        self.annotations, pictures = find(self.layouts, split, root, annotations, images)
        super().__init__(split, pictures, [self.annotations], max_bad, self.choice)

    def _entries(self, bar: tqdm) -> Iterator[Any]:
        """The index, the number of an image, and those of its annotations."""
        found = Index.read(self.annotations, is_named=False, reject=self._rejects())
        if self.named and not found.has_categories:
            self._skip(UNCATEGORIZED, str(self.annotations))
        bar.reset(len(found.images))
        if self.named:
            self.attributes = {"name": tuple(dict.fromkeys(filter(None, found.names.values())))}
        owners = found.annotations.owners("image_id", found.images, "the images", self._reject)
        for number, its in grouped(owners, len(found.images)):
            if number not in found.images.repeated:
                yield found, number, its

    def _record(self, entry: Any) -> dict[str, Any] | None:
        found, number, annotations = entry
        identity, file, width, height = found.image(number)
        image = self._image(identity, self._file(file), width, height)
        self._fill(image, [found.annotations[each] for each in annotations], found)
        return image

    def _fill(self, image: dict[str, Any], annotations: list[tuple[dict[str, Any], str]], found: Index) -> None:
        for record, place in annotations:
            with self._rejecting():
                self._add(image, record, place, found)

    def _add(self, image: dict[str, Any], record: dict[str, Any], place: str, found: Index) -> None:
        name = self._name(record, place, found) if self.named else None
        if record.get("iscrowd"):
            return self._skip("crowd", place)
        region = read_region(record, place, image, self._skip)
        if region is None:
            return
        if region.unread:
            self._skip(region.unread, place)
        self._keep(
            image,
            record["id"],
            region.box,
            place,
            mask=region.mask,
            name=name,
            phrases=read_phrases(record.get("caption"), "caption", place),
            attributes=read_field(record, "attributes", dict, place) if record.get("attributes") else None,
        )

    def _name(self, record: dict[str, Any], place: str, found: Index) -> str | None:
        """The name of the category; None where the file has no categories, and where it has no name, which is counted,
        and the annotation has a caption.
        """
        if not found.has_categories:
            return None
        try:
            return found.name(record, place)
        except ValueError as error:
            if not record.get("caption"):
                raise
            return self._reject_category(error)

    def _file(self, name: str) -> str:
        """Where a picture that the file calls `name` lies in the folder of pictures."""
        return name


class GritVisualGenome(Coco):
    """Dataset: Visual Genome as GRiT (arXiv 2212.00280) prepared it: one phrase a region, in lower case, of 15 words at
    most. `root` holds `train.json` and `test.json`, and pictures in `images/`, `VG_100K/` or `VG_100K_2/`. See `Coco`.
    """

    reader = "visual-genome-grit"
    layouts = (("{split}.json", "."), ("annotations/{split}.json", "."))
    named = False

    def _path(self, name: str) -> Path:
        path, base = super()._path(name), split_name(name)[-1]
        paths = [path, *(self.images / folder / base for folder in ("images", "VG_100K", "VG_100K_2"))]
        return next(filter(os.path.isfile, paths), path)


class Objects365(Coco):
    """Dataset: Objects365 v2 (ICCV 2019), class names and boxes. `root` holds `annotations/zhiyuan_objv2_train.json`
    (or without `annotations/`, or `objects365v2_train_fixann.json`) and `train/patch0/` and so on. See `Coco`.
    """

    reader = "objects365"
    layouts = tuple(
        (f"{folder}{file}", "{split}")
        for file in ("zhiyuan_objv2_{split}.json", "objects365v2_{split}_fixann.json")
        for folder in ("annotations/", "")
    )

    def _file(self, name: str) -> str:
        return "/".join(split_name(name)[-2:])  # images/v1/patch8/objects365_v1_00420917.jpg


class V3Det(Coco):
    """Dataset: V3Det (arXiv 2304.03752), class names of 13,204 kinds and boxes. `root` holds
    `annotations/v3det_2023_v1_train.json` (or without `annotations/`), whose file names begin with `images/`.
    See `Coco`.
    """

    reader = "v3det"
    layouts = (("annotations/v3det_2023_v1_{split}.json", "."), ("v3det_2023_v1_{split}.json", "."))


class CocoCaptions(Coco):
    """Dataset: COCO's captions (arXiv 1504.00325), each image as one region with all of its captions. `root` holds
    `annotations/captions_train2017.json` and `train2017/`. See `Coco`.
    """

    reader = "coco-captions"
    layouts = (("annotations/captions_{split}2017.json", "{split}2017"), ("captions_{split}.json", "{split}"))
    named = False

    def _fill(self, image: dict[str, Any], annotations: list[tuple[dict[str, Any], str]], found: Index) -> None:
        told: list[str] = []
        for record, place in annotations:
            with self._rejecting():
                told += read_phrases(read_field(record, "caption", str, place), "caption", place)
        if annotations:
            (first, place), *_ = annotations
            self._keep(image, first["id"], (0, 0, image["width"], image["height"]), place, phrases=told)


class CocoJson(Coco):
    """Dataset: `CocoJson("val", annotations=FILE, images=FOLDER)`: any file in COCO's format, see `Coco`.

    Both may hold `{split}`, in whose place the split is put; "val" may be called `valid` or `validation`. hold_out: the
    share of the images of a file without splits that "val" has, at least 4 images (or a third, if that is fewer);
    "train" has the others.
    """

    def __init__(
        self, split: str, annotations: str | Path, images: str | Path, hold_out: float = 0.0, max_bad: int = 100
    ):
        self.hold_out = hold_out
        annotations, images = (find_split(str(expand_user(path)), split) for path in (annotations, images))
        self.choice = check_hold_out(split, hold_out)
        super().__init__(split, annotations=annotations, images=images, max_bad=max_bad)

    def _entries(self, bar: tqdm) -> Iterator[Any]:
        """The index, the number of an image, and those of the annotations of all records of its file."""
        files = ImageFiles(self._path)
        merged: dict[str, tuple[Index, int, list[int]]] = {}
        for found, number, its in super()._entries(bar):
            record, place = found.images[number]
            name = record.get("file_name")
            name = files.unify(name) if isinstance(name, str) else place
            if name not in merged:
                merged[name] = found, number, its
            elif self._agrees(record, place, found.images[merged[name][1]][0]):
                merged[name][2].extend(its)
        chosen, self.remarks = choose_split(map(files.identify, merged), self.split, self.hold_out)
        return (entry for name, entry in merged.items() if files.identify(name) in chosen)

    def _agrees(self, record: dict[str, Any], place: str, first: dict[str, Any]) -> bool:
        """Whether two records of one image file state the same size; the second one is rejected otherwise."""
        sizes = [(each.get("width"), each.get("height")) for each in (first, record)]
        if sizes[0] != sizes[1]:
            self._reject_image(f"{place}: width and height are {sizes[1]}, and {sizes[0]} in a record of the same file")
        return sizes[0] == sizes[1]


def read_region(record: dict[str, Any], place: str, image: dict[str, Any], skip: Skip) -> Annotation | None:
    """Read an annotation of an image, which is a row of the table.

    Returns:
        The annotation, which has a box; None, and counted, if its box and its mask are empty.

    Raises:
        InputError: If it cannot be read, or has neither a box nor a mask. One line that names it.
    """
    region = coco.read_annotation(record, place, (image["width"], image["height"]), None, skip)
    if region.box is not None:
        return region
    if not record.get("bbox") and not record.get("segmentation"):
        raise InputError(f"{place}: no 'bbox'; it has: {', '.join(map(str, record)) or 'nothing'}")
    if not record.get("segmentation") and not any(record["bbox"]):
        skip("empty box", place)  # others are counted already
    return None


def find(
    layouts: Iterable[tuple[str, str]],
    split: str,
    root: str | Path | None,
    annotations: str | Path | None = None,
    images: str | Path | None = None,
) -> tuple[Path, Path]:
    """The annotation file and the image folder, both there."""
    root, annotations, images = (None if path is None else expand_user(path) for path in (root, annotations, images))
    if root is not None:
        names = [tuple(name.replace("{split}", split) for name in layout) for layout in layouts]
        given = [(annotations or f"{root}/{file}", images or f"{root}/{folder}") for file, folder in names]
    elif annotations is not None and images is not None:
        given = [(annotations, images)]
    else:
        raise InputError("give root=FOLDER, or both annotations=FILE and images=FOLDER")
    paths = [(Path(file), Path(folder)) for file, folder in given]
    for file, folder in paths:
        if file.is_file() and folder.is_dir():
            return file, folder
    looked = " or ".join(f"{file} with {folder}{os.sep}" for file, folder in paths)
    missing = dict.fromkeys(str(path) for pair in paths for path in pair if not path.exists())
    raise InputError(f"no data for split {split!r}: looked for {looked}; not there: {', '.join(missing)}")
