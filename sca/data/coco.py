"""Datasets in COCO's format: boxes, masks, class names, and captions if the annotations have them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tqdm.auto import tqdm

from sca.data.custom import choose_split, make_val_fraction_key, resolve_split_path
from sca.data.record_index import RecordIndex, group_indices_by_owner, index_json_lists
from sca.data.record_parsing import iter_identified_records, parse_phrases
from sca.data.table import TableDataset
from sca.io.annotations import coco
from sca.io.annotations.annotation import Annotation, SkipCallback
from sca.io.errors import InputError, RejectCallback
from sca.io.image_names import ImageNameResolver, split_path_parts
from sca.io.paths import expand_user
from sca.io.validation import read_field, require_recorded_size

NO_CATEGORIES_REASON = "file without categories"
EXPECTED_CONTENT = "COCO's format is an object with images, annotations and categories"


class CocoIndex(NamedTuple):
    """Index of a COCO file: its images, its annotations, and the names of its categories."""

    images: RecordIndex
    annotations: RecordIndex
    category_names: dict[int, str]
    thing_category_ids: set[int]  # categories marked as things
    has_categories: bool = True

    @classmethod
    def read(
        cls,
        path: Path,
        keys: Sequence[str] = ("id", "image_id"),  # integer fields of annotations
        requires_categories: bool = True,
        reject: Mapping[str, RejectCallback] | None = None,
    ) -> CocoIndex:
        """Read the lists of a file.

        Args:
            path: COCO JSON file.
            keys: Integer fields that every annotation has, starting with its id.
            requires_categories: Whether the file must have categories.
            reject: Callback of each list for the InputError of an unusable record; a list without one raises it.

        Returns:
            The index of the file.
        """
        lists: Mapping[str, Sequence[str]] = {"images": ("id",), "annotations": keys}
        categories = ("categories",)
        indexes, lists_in_memory = index_json_lists(
            path,
            lists,
            categories if requires_categories else (),
            EXPECTED_CONTENT,
            reject,
            () if requires_categories else categories,
        )
        reject_category = (reject or {}).get("categories")
        names, things = {}, set()
        for record, location in iter_identified_records(
            lists_in_memory.get("categories", []), f"{path}: categories", reject=reject_category
        ):
            try:
                names[record["id"]] = coco.clean_category_name(read_field(record, "name", str, location))
            except ValueError as error:
                if reject_category is None:
                    raise
                names[record["id"]] = ""
                reject_category(error)
            if record.get("isthing"):
                things.add(record["id"])
        images, annotations = (
            indexes[key].check_unique_ids((reject or {}).get(key)) for key in ("images", "annotations")
        )
        return cls(images, annotations, names, things, "categories" in lists_in_memory)

    def read_image_record(self, number: int) -> tuple[int, str, int, int]:
        """Return the id, file name, width and height of an image."""
        record, location = self.images[number]
        return record["id"], read_field(record, "file_name", str, location), *require_recorded_size(record, location)

    def get_category_name(self, record: Mapping[str, Any], location: str) -> str:
        """Return the category name of an annotation or segment.

        Args:
            record: Annotation or segment.
            location: File and record for error messages.

        Returns:
            The name of the category.

        Raises:
            InputError: The record has no valid category.
        """
        category_id = read_field(record, "category_id", int, location)
        if category_id not in self.category_names:
            raise InputError(f"{location}: category_id {category_id} has no name among the categories")
        return self.category_names[category_id]


class Coco(TableDataset):
    """COCO instances: a JSON file and a folder of images (arXiv 1405.0312).

    A region's name is its category with underscores replaced by spaces. Its phrases are the annotation's "caption" (a
    string or a list of strings), and its attributes are the annotation's "attributes". Segmentations may be polygons,
    uncompressed RLE or compressed RLE; the box of the segmentation replaces a missing bbox.

    Crowd regions, polygons with fewer than three points, and keypoints are skipped and counted. The file is streamed
    and never fully in memory.

    Args:
        split: Name of the split, such as "train".
        root: Folder with `train.json` and `train/`, or with `annotations/instances_train2017.json` and `train2017/`.
        annotations: JSON file, instead of the one in `root`.
        image_root: Image folder, instead of the one in `root`.
        max_bad_records: Maximum number of unusable records of each kind, see `ConvertedTable`.
    """

    reader = "coco"
    selection_key = ""
    layouts: tuple[tuple[str, str], ...] = (  # annotation file and image folder in `root`
        ("{split}.json", "{split}"),
        ("annotations/instances_{split}2017.json", "{split}2017"),
    )
    has_class_names = True  # whether categories name the regions

    def __init__(
        self,
        split: str,
        root: str | Path | None = None,
        annotations: str | Path | None = None,
        image_root: str | Path | None = None,
        max_bad_records: int = 100,
    ):
        annotation_file, image_folder = find_coco_files(self.layouts, split, root, annotations, image_root)
        self.annotations: Path = annotation_file
        super().__init__(split, image_folder, [self.annotations], max_bad_records, self.selection_key)

    def _iter_entries(self, bar: tqdm[Any]) -> Iterator[Any]:
        """Yield the file index, the index of an image, and the indices of its annotations."""
        coco_index = CocoIndex.read(self.annotations, requires_categories=False, reject=self._get_reject_callbacks())
        if self.has_class_names and not coco_index.has_categories:
            self._skip(NO_CATEGORIES_REASON, str(self.annotations))
        bar.reset(len(coco_index.images))
        if self.has_class_names:
            class_names = tuple(dict.fromkeys(filter(None, coco_index.category_names.values())))
            self.attribute_values: dict[str, tuple[str, ...]] = {"name": class_names}
        image_indices = coco_index.annotations.resolve_references(
            "image_id", coco_index.images, "the images", self._reject_region
        )
        for image_index, annotation_indices in group_indices_by_owner(image_indices, len(coco_index.images)):
            if image_index not in coco_index.images.duplicates:
                yield coco_index, image_index, annotation_indices

    def _build_row(self, entry: Any) -> dict[str, Any] | None:
        coco_index, image_index, annotation_indices = entry
        image_id, file, width, height = coco_index.read_image_record(image_index)
        row = self._create_row(image_id, self._map_file_name(file), width, height)
        self._add_annotations(row, [coco_index.annotations[each] for each in annotation_indices], coco_index)
        return row

    def _add_annotations(
        self, row: dict[str, Any], annotations: list[tuple[dict[str, Any], str]], coco_index: CocoIndex
    ) -> None:
        for record, location in annotations:
            with self._catch_record_errors():
                self._add_annotation(row, record, location, coco_index)

    def _add_annotation(
        self, row: dict[str, Any], record: dict[str, Any], location: str, coco_index: CocoIndex
    ) -> None:
        name = self._get_region_name(record, location, coco_index) if self.has_class_names else None
        if record.get("iscrowd"):
            return self._skip("crowd", location)
        region = read_region_annotation(record, location, row, self._skip)
        if region is None:
            return
        if region.unread_caption:
            self._skip(region.unread_caption, location)
        self._add_region(
            row,
            record["id"],
            region.box,
            location,
            mask=region.mask,
            name=name,
            phrases=parse_phrases(record.get("caption"), "caption", location),
            attributes=read_field(record, "attributes", dict, location) if record.get("attributes") else None,
        )

    def _get_region_name(self, record: dict[str, Any], location: str, coco_index: CocoIndex) -> str | None:
        """Return the category name; None without categories, or for a captioned region without one."""
        if not coco_index.has_categories:
            return None
        try:
            return coco_index.get_category_name(record, location)
        except ValueError as error:
            if not record.get("caption"):
                raise
            self._reject_category(error)
            return None

    def _map_file_name(self, name: str) -> str:
        """Map a file name in the JSON file to a path in the image folder."""
        return name


class GritVisualGenome(Coco):
    """Visual Genome as prepared by GRiT (arXiv 2212.00280).

    One phrase per region, in lower case, of at most 15 words. No class names. See `Coco`.

    Args:
        split: "train" or "test".
        root: Folder with `train.json` and `test.json`, and images in `images/`, `VG_100K/` or `VG_100K_2/`.
        annotations: JSON file, instead of the one in `root`.
        image_root: Image folder, instead of `root`.
        max_bad_records: Maximum number of unusable records of each kind, see `ConvertedTable`.
    """

    reader = "visual-genome-grit"
    layouts: tuple[tuple[str, str], ...] = (("{split}.json", "."), ("annotations/{split}.json", "."))
    has_class_names = False

    def _resolve_image_path(self, name: str) -> Path:
        path, file_name = super()._resolve_image_path(name), split_path_parts(name)[-1]
        paths = [path, *(self.image_root / folder / file_name for folder in ("images", "VG_100K", "VG_100K_2"))]
        return next(filter(os.path.isfile, paths), path)


class Objects365(Coco):
    """Objects365 v2 (ICCV 2019): boxes and class names. See `Coco`.

    Args:
        split: Name of the split, such as "train".
        root: Folder with `annotations/zhiyuan_objv2_train.json` or `objects365v2_train_fixann.json`, with or without
            `annotations/`, and the image folders `train/patch0/` and so on.
        annotations: JSON file, instead of the one in `root`.
        image_root: Image folder, instead of the one in `root`.
        max_bad_records: Maximum number of unusable records of each kind, see `ConvertedTable`.
    """

    reader = "objects365"
    layouts: tuple[tuple[str, str], ...] = tuple(
        (f"{folder}{file}", "{split}")
        for file in ("zhiyuan_objv2_{split}.json", "objects365v2_{split}_fixann.json")
        for folder in ("annotations/", "")
    )

    def _map_file_name(self, name: str) -> str:
        return "/".join(split_path_parts(name)[-2:])  # such as images/v1/patch8/objects365_v1_00420917.jpg


class V3Det(Coco):
    """V3Det (arXiv 2304.03752): boxes and names of 13,204 classes. See `Coco`.

    Args:
        split: Name of the split, such as "train".
        root: Folder with `annotations/v3det_2023_v1_train.json`, with or without `annotations/`. Its file names begin
            with `images/`.
        annotations: JSON file, instead of the one in `root`.
        image_root: Image folder, instead of `root`.
        max_bad_records: Maximum number of unusable records of each kind, see `ConvertedTable`.
    """

    reader = "v3det"
    layouts: tuple[tuple[str, str], ...] = (
        ("annotations/v3det_2023_v1_{split}.json", "."),
        ("v3det_2023_v1_{split}.json", "."),
    )


class CocoCaptions(Coco):
    """COCO Captions (arXiv 1504.00325): each image is one region with all its captions. See `Coco`.

    Args:
        split: Name of the split, such as "train".
        root: Folder with `annotations/captions_train2017.json` and `train2017/`, or with `captions_train.json` and
            `train/`.
        annotations: JSON file, instead of the one in `root`.
        image_root: Image folder, instead of the one in `root`.
        max_bad_records: Maximum number of unusable records of each kind, see `ConvertedTable`.
    """

    reader = "coco-captions"
    layouts: tuple[tuple[str, str], ...] = (
        ("annotations/captions_{split}2017.json", "{split}2017"),
        ("captions_{split}.json", "{split}"),
    )
    has_class_names = False

    def _add_annotations(
        self, row: dict[str, Any], annotations: list[tuple[dict[str, Any], str]], coco_index: CocoIndex
    ) -> None:
        phrases: list[str] = []
        for record, location in annotations:
            with self._catch_record_errors():
                phrases += parse_phrases(read_field(record, "caption", str, location), "caption", location)
        if annotations:
            (first, location), *_ = annotations
            self._add_region(row, first["id"], (0, 0, row["width"], row["height"]), location, phrases=phrases)


class CocoJson(Coco):
    """Any file in COCO's format, with its image folder. See `Coco`.

    Args:
        split: "train" or "val", or the name of a split of the files.
        annotations: JSON file. `{split}` is replaced by the split, where "val" may also be `valid` or `validation`.
        image_root: Image folder, which may contain `{split}`.
        val_fraction: Fraction of the images of a file without splits that "val" has: at least 4 images, or a third of
            all if that is fewer. "train" has the others.
        max_bad_records: Maximum number of unusable records of each kind, see `ConvertedTable`.
    """

    def __init__(
        self,
        split: str,
        annotations: str | Path,
        image_root: str | Path,
        val_fraction: float = 0.0,
        max_bad_records: int = 100,
    ):
        self.val_fraction = val_fraction
        annotations, image_root = (
            resolve_split_path(str(expand_user(path)), split) for path in (annotations, image_root)
        )
        self.selection_key: str = make_val_fraction_key(split, val_fraction)
        super().__init__(split, annotations=annotations, image_root=image_root, max_bad_records=max_bad_records)

    def _iter_entries(self, bar: tqdm[Any]) -> Iterator[Any]:
        """Yield the file index, the index of an image, and the annotations of all records of its file."""
        name_resolver = ImageNameResolver(self._resolve_image_path)
        entry_by_name: dict[str, tuple[CocoIndex, int, list[int]]] = {}
        for coco_index, image_index, annotation_indices in super()._iter_entries(bar):
            record, location = coco_index.images[image_index]
            name = record.get("file_name")
            name = name_resolver.unify_spelling(name) if isinstance(name, str) else location
            if name not in entry_by_name:
                entry_by_name[name] = coco_index, image_index, annotation_indices
            elif self._has_same_size(record, location, coco_index.images[entry_by_name[name][1]][0]):
                entry_by_name[name][2].extend(annotation_indices)
        split_names, remarks = choose_split(
            map(name_resolver.identify_file, entry_by_name), self.split, self.val_fraction
        )
        self.remarks: list[str] = remarks
        return (entry for name, entry in entry_by_name.items() if name_resolver.identify_file(name) in split_names)

    def _has_same_size(self, record: dict[str, Any], location: str, first_record: dict[str, Any]) -> bool:
        """Return whether two records of one image file have the same size; rejects the second if not."""
        sizes = [(each.get("width"), each.get("height")) for each in (first_record, record)]
        if sizes[0] != sizes[1]:
            self._reject_image(
                f"{location}: width and height are {sizes[1]}, but {sizes[0]} in another record of the same file"
            )
        return sizes[0] == sizes[1]


def read_region_annotation(
    record: dict[str, Any], location: str, row: dict[str, Any], skip: SkipCallback
) -> Annotation | None:
    """Read an annotation of an image.

    Args:
        record: COCO annotation.
        location: File and record for error messages.
        row: Table row of the image, with its `width` and `height`.
        skip: Callback that counts skipped content by reason.

    Returns:
        The annotation, which has a box; None, and counted, if its box and its mask are empty.

    Raises:
        InputError: It is invalid, or has neither a box nor a mask.
    """
    region = coco.read_annotation(record, location, (row["width"], row["height"]), None, skip)
    if region.box is not None:
        return region
    if not record.get("bbox") and not record.get("segmentation"):
        raise InputError(
            f"{location}: no 'bbox' or 'segmentation'; its keys are: {', '.join(map(str, record)) or 'none'}"
        )
    if not record.get("segmentation") and not any(record["bbox"]):
        skip("empty box", location)  # other empty regions are counted already
    return None


def find_coco_files(
    layouts: Iterable[tuple[str, str]],
    split: str,
    root: str | Path | None,
    annotations: str | Path | None = None,
    image_root: str | Path | None = None,
) -> tuple[Path, Path]:
    """Find the annotation file and the image folder of a split.

    Args:
        layouts: Pairs of annotation file and image folder in `root`, with `{split}` in place of the split.
        split: Name of the split.
        root: Folder of the dataset.
        annotations: Annotation file, instead of the one in `root`.
        image_root: Image folder, instead of the one in `root`.

    Returns:
        The first pair of paths that both exist.

    Raises:
        InputError: No pair exists, or neither `root` nor both `annotations` and `image_root` are given.
    """
    root, annotations, image_root = (
        None if path is None else expand_user(path) for path in (root, annotations, image_root)
    )
    if root is not None:
        names = [tuple(name.replace("{split}", split) for name in layout) for layout in layouts]
        candidates = [(annotations or f"{root}/{file}", image_root or f"{root}/{folder}") for file, folder in names]
    elif annotations is not None and image_root is not None:
        candidates = [(annotations, image_root)]
    else:
        raise InputError("no dataset files are named; set root=FOLDER, or both annotations=FILE and image_root=FOLDER")
    paths = [(Path(file), Path(folder)) for file, folder in candidates]
    for file, folder in paths:
        if file.is_file() and folder.is_dir():
            return file, folder
    searched = " or ".join(f"{file} with {folder}{os.sep}" for file, folder in paths)
    missing = dict.fromkeys(str(path) for pair in paths for path in pair if not path.exists())
    raise InputError(f"no data for split {split!r}: looked for {searched}; missing: {', '.join(missing)}")
