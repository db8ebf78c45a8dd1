"""RefCOCO, RefCOCO+ and RefCOCOg: referring expressions for objects in COCO images.

The layout is that of https://github.com/lichengunc/refer. Its pickles are read without executing code in them.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from tqdm.auto import tqdm

from sca.data.coco import CocoIndex, read_region_annotation
from sca.data.record_parsing import iter_identified_records, parse_phrases, read_dataset_json
from sca.data.table import TableDataset
from sca.io.errors import InputError
from sca.io.json import open_regular_file
from sca.io.paths import expand_user
from sca.io.validation import read_field

DEFAULT_SPLIT_AUTHORS = {"refcoco": "unc", "refcoco+": "unc", "refcocog": "umd"}  # by collection
IMAGE_FOLDERS = ("images/mscoco/images/train2014", "train2014", "images")


class RefCoco(TableDataset):
    """RefCOCO, RefCOCO+ (arXiv 1608.00272) or RefCOCOg (arXiv 1511.02283), one region per ref.

    A region's id is its ref's, its phrases are the sentences in order, and its box, mask and name are those of its
    annotation. The ref determines the split, not its image: an image may be in several splits with different regions.
    See `TableDataset`.

    Args:
        split: Name of the split, such as "val" or "testA".
        root: Folder of the collection, or its parent folder. It contains `instances.json` and `refs(SPLIT_BY).p`, or
            `refs(SPLIT_BY).json` with the same content.
        collection: "refcoco", "refcoco+" or "refcocog".
        split_by: Authors of the split: "unc", "google" or "umd". Default: "umd" for RefCOCOg, else "unc".
        image_root: Folder of COCO's train2014. Default: `images/mscoco/images/train2014`, `train2014` or `images` in
            the folder of the collection or in `root`.
        max_bad_records: Maximum number of unusable records of each kind, see `ConvertedTable`.
    """

    reader = "refcoco"

    def __init__(
        self,
        split: str,
        root: str | Path,
        collection: str = "refcoco",
        split_by: str | None = None,
        image_root: str | Path | None = None,
        max_bad_records: int = 100,
    ):
        if collection not in DEFAULT_SPLIT_AUTHORS:
            raise InputError(f"unknown collection {collection!r}; choose from {', '.join(DEFAULT_SPLIT_AUTHORS)}")
        root = expand_user(root)
        folder = root / collection if (root / collection).is_dir() else root
        self.refs_file: Path = _find_refs_file(folder, split_by or DEFAULT_SPLIT_AUTHORS[collection])
        self.instances_file: Path = folder / "instances.json"
        if not self.instances_file.is_file():
            raise InputError(f"no instances.json next to {self.refs_file}; copy it from the download of RefCOCO")
        super().__init__(
            split,
            _find_image_folder([folder, root], image_root),
            [self.refs_file, self.instances_file],
            max_bad_records,
            split,
        )

    def _iter_entries(self, bar: tqdm[Any]) -> Iterator[Any]:
        """Yield the file index, an image index, and its refs with their locations and annotation indices."""
        refs = []
        for record, location in iter_identified_records(
            _read_refs(self.refs_file), f"{self.refs_file}: ", "ref_id", self._reject_region
        ):
            with self._catch_record_errors():
                refs.append((record, location, read_field(record, "split", str, location)))
        if all(split != self.split for *_, split in refs):
            self._check_max_bad()
            splits = dict.fromkeys(split for *_, split in refs)
            raise InputError(f"{self.refs_file} has no split {self.split!r}; it has: {', '.join(splits) or 'none'}")
        coco_index = CocoIndex.read(self.instances_file, reject=self._get_reject_callbacks())
        class_names = tuple(dict.fromkeys(filter(None, coco_index.category_names.values())))
        self.attribute_values: dict[str, tuple[str, ...]] = {"name": class_names}
        split_refs = []
        for ref, location in ((ref, location) for ref, location, split in refs if split == self.split):
            with self._catch_record_errors():
                split_refs.append(
                    (ref, location, *(read_field(ref, key, int, location) for key in ("image_id", "ann_id")))
                )
        refs_by_image: dict[int, list[Any]] = {}
        target_indices = (
            coco_index.images.find_indices([each[2] for each in split_refs]),
            coco_index.annotations.find_indices([each[3] for each in split_refs]),
        )
        for (ref, location, *_), image, annotation in zip(
            split_refs, *(each.tolist() for each in target_indices), strict=True
        ):
            if image < 0:
                self._reject_region(
                    f"{location}: image_id {ref['image_id']} is not among the images of {self.instances_file}"
                )
            elif annotation < 0:
                self._reject_region(
                    f"{location}: ann_id {ref['ann_id']} is not among the annotations of {self.instances_file}"
                )
            else:
                refs_by_image.setdefault(image, []).append((ref, location, annotation))
        bar.reset(len(refs_by_image))
        for image, image_refs in refs_by_image.items():
            yield coco_index, image, image_refs

    def _build_row(self, entry: Any) -> dict[str, Any]:
        coco_index, image_index, refs = entry
        row = self._create_row(*coco_index.read_image_record(image_index))
        for ref, location, annotation_index in refs:
            with self._catch_record_errors():
                annotation, annotation_location = coco_index.annotations[annotation_index]
                self._add_ref(row, ref, location, annotation, annotation_location, coco_index)
        return row

    def _add_ref(
        self,
        row: dict[str, Any],
        ref: dict[str, Any],
        location: str,
        annotation: dict[str, Any],
        annotation_location: str,
        coco_index: CocoIndex,
    ) -> None:
        if annotation["image_id"] != ref["image_id"]:
            problem = f"is of image {annotation['image_id']}, not of {ref['image_id']}"
            raise InputError(f"{location}: ann_id {ref['ann_id']} {problem}")
        region = read_region_annotation(annotation, annotation_location, row, self._skip)
        if region is None:
            return
        self._add_region(
            row,
            ref["ref_id"],
            region.box,
            f"{location}, {annotation_location}",
            mask=region.mask,
            name=coco_index.get_category_name(annotation, annotation_location),
            phrases=_read_sentences(ref, location),
        )


class _SafeUnpickler(pickle.Unpickler):
    """Unpickler of lists, dicts, strings and numbers that refuses every global."""

    def find_class(self, module: str, name: str) -> NoReturn:
        raise pickle.UnpicklingError(f"it refers to {module}.{name}")


def _read_refs(path: Path) -> list[Any]:
    if path.suffix == ".json":
        refs = read_dataset_json(path)
    else:
        try:
            with open_regular_file(path) as file:
                refs = _SafeUnpickler(file, encoding="latin1").load()  # pickled by Python 2
        except Exception as error:  # an unpickler may raise anything for damaged data
            raise InputError(
                f"{path} is not a complete pickle of lists, dicts, strings and numbers: {error}"
            ) from error
    if not isinstance(refs, list):
        raise InputError(f"{path} must contain a list of refs, not a {type(refs).__name__}")
    return refs


def _read_sentences(ref: dict[str, Any], location: str) -> list[str]:
    sentences = read_field(ref, "sentences", list, location)
    sentence_locations = [f"{location}: sentences[{number}]" for number in range(len(sentences))]
    texts = [
        read_field(each, "sent", str, sentence_location)
        for each, sentence_location in zip(sentences, sentence_locations, strict=True)
    ]
    return parse_phrases(texts, "sent", location)


def _find_refs_file(folder: Path, split_by: str) -> Path:
    """Return the refs file of the split authors `split_by`. Raises InputError."""
    paths = [folder / f"refs({split_by}){suffix}" for suffix in (".p", ".json")]
    for path in paths:
        if path.is_file():
            return path
    available = sorted(path.name for path in folder.glob("refs(*).*"))
    raise InputError(
        f"no {paths[0].name} or {paths[1].name} in {folder}; found: "
        f"{', '.join(available) or 'no refs file'}; set split_by=unc, google or umd, and root=FOLDER with this file"
    )


def _find_image_folder(folders: Sequence[Path], image_root: str | Path | None) -> Path:
    paths = [*dict.fromkeys(folder / name for folder in folders for name in IMAGE_FOLDERS)]
    if image_root is not None:
        paths = [expand_user(image_root)]
    for path in paths:
        if path.is_dir():
            return path
    raise InputError(f"no folder {' or '.join(map(str, paths))}; set image_root=FOLDER with COCO's train2014 images")
