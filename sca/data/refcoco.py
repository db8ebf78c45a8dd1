"""RefCOCO, RefCOCO+ and RefCOCOg: referring expressions for objects in COCO images.

The layout is that of https://github.com/lichengunc/refer. Its pickles are read without executing code in them.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from tqdm.auto import tqdm

from sca.data.coco import CocoIndex, read_region_annotation
from sca.data.record_index import group_indices_by_owner
from sca.data.record_parsing import iter_identified_records, parse_phrases, read_dataset_json
from sca.data.table import TableDataset
from sca.io.errors import InputError
from sca.io.json import open_regular_file
from sca.io.paths import expand_user
from sca.io.validation import check_choice, read_field

DEFAULT_SPLIT_AUTHORS = {"refcoco": "unc", "refcoco+": "unc", "refcocog": "umd"}  # by collection
IMAGE_FOLDERS = ("images/mscoco/images/train2014", "train2014", "images")
OBJECTS = ("referred", "all")


class _Ref(NamedTuple):
    """Ref of the split, with its file and position for error messages."""

    record: dict[str, Any]
    location: str


class _Object(NamedTuple):
    """Annotated object that becomes a region."""

    region_id: int
    annotation: int  # index in the list of annotations
    refs: tuple[_Ref, ...]


class RefCoco(TableDataset):
    """RefCOCO, RefCOCO+ (arXiv 1608.00272) or RefCOCOg (arXiv 1511.02283).

    A region is the object of a ref: its id is the ref's, its phrases are the sentences in order, and its box, mask and
    name are those of the annotation. The ref determines the split, not its image: an image may be in several splits
    with different regions.

    With `objects="all"`, the regions are all annotated objects of the same images, as in comprehension among true boxes
    (MAttNet, arXiv 1801.08186). A region's id is then its annotation's. Its phrases are the sentences of its refs in
    the split; other objects have no phrases. Crowd annotations without a ref are skipped and counted.

    See `TableDataset`.

    Args:
        split: Name of the split, such as "val" or "testA".
        root: Folder of the collection, or its parent folder. It contains `instances.json` and `refs(SPLIT_BY).p`, or
            `refs(SPLIT_BY).json` with the same content.
        collection: "refcoco", "refcoco+" or "refcocog".
        split_by: Authors of the split: "unc", "google" or "umd". Default: "umd" for RefCOCOg, else "unc".
        image_root: Folder of COCO's train2014. Default: `images/mscoco/images/train2014`, `train2014` or `images` in
            the folder of the collection or in `root`.
        objects: "referred" or "all".
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
        objects: str = "referred",
        max_bad_records: int = 100,
    ):
        if collection not in DEFAULT_SPLIT_AUTHORS:
            raise InputError(f"unknown collection {collection!r}; choose from {', '.join(DEFAULT_SPLIT_AUTHORS)}")
        check_choice("objects", objects, OBJECTS)
        self.objects = objects
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
            f"{split}:{objects}",
        )

    def _iter_entries(self, bar: tqdm[Any]) -> Iterator[Any]:
        """Yield the file index, an image index, and the objects of the image."""
        refs = self._read_split_refs()
        coco_index = CocoIndex.read(self.instances_file, reject=self._get_reject_callbacks())
        class_names = tuple(dict.fromkeys(filter(None, coco_index.category_names.values())))
        self.attribute_values: dict[str, tuple[str, ...]] = {"name": class_names}
        objects_by_image = self._group_referred_objects(refs, coco_index)
        if self.objects == "all":
            objects_by_image = self._group_all_objects(objects_by_image, coco_index)
        bar.reset(len(objects_by_image))
        for image, objects in objects_by_image.items():
            yield coco_index, image, objects

    def _read_split_refs(self) -> list[_Ref]:
        refs, splits = [], []
        for record, location in iter_identified_records(
            _read_refs(self.refs_file), f"{self.refs_file}: ", "ref_id", self._reject_region
        ):
            with self._catch_record_errors():
                splits.append(read_field(record, "split", str, location))
                refs.append(_Ref(record, location))
        if self.split not in splits:
            self._check_max_bad()
            available = ", ".join(dict.fromkeys(splits)) or "none"
            raise InputError(f"{self.refs_file} has no split {self.split!r}; it has: {available}")
        return [ref for ref, split in zip(refs, splits, strict=True) if split == self.split]

    def _group_referred_objects(self, refs: Sequence[_Ref], coco_index: CocoIndex) -> dict[int, list[_Object]]:
        """Return one object per ref, by image index. Invalid refs are counted."""
        valid_refs = []
        for ref in refs:
            with self._catch_record_errors():
                for key in ("image_id", "ann_id"):
                    read_field(ref.record, key, int, ref.location)
                valid_refs.append(ref)
        images = coco_index.images.find_indices([ref.record["image_id"] for ref in valid_refs]).tolist()
        annotations = coco_index.annotations.find_indices([ref.record["ann_id"] for ref in valid_refs]).tolist()
        objects_by_image: dict[int, list[_Object]] = {}
        for ref, image, annotation in zip(valid_refs, images, annotations, strict=True):
            with self._catch_record_errors():
                self._check_targets(ref, image, annotation, coco_index)
                objects_by_image.setdefault(image, []).append(_Object(ref.record["ref_id"], annotation, (ref,)))
        return objects_by_image

    def _check_targets(self, ref: _Ref, image: int, annotation: int, coco_index: CocoIndex) -> None:
        """Raise InputError unless the image and the annotation of a ref, as indices, exist and belong together."""
        image_id, annotation_id = ref.record["image_id"], ref.record["ann_id"]
        if image < 0:
            raise InputError(f"{ref.location}: image_id {image_id} is not among the images of {self.instances_file}")
        if annotation < 0:
            raise InputError(
                f"{ref.location}: ann_id {annotation_id} is not among the annotations of {self.instances_file}"
            )
        if (other_id := coco_index.annotations.columns["image_id"][annotation]) != image_id:
            raise InputError(f"{ref.location}: ann_id {annotation_id} is of image {other_id}, not of {image_id}")

    def _group_all_objects(
        self, objects_by_image: Mapping[int, Sequence[_Object]], coco_index: CocoIndex
    ) -> dict[int, list[_Object]]:
        """Return one object per annotation of each image, with the refs of `objects_by_image`."""
        image_indices = coco_index.annotations.resolve_references(
            "image_id", coco_index.images, "the images", self._reject_region
        )
        annotations_by_image = dict(group_indices_by_owner(image_indices, len(coco_index.images)))
        annotation_ids = coco_index.annotations.columns["id"]
        all_objects = {}
        for image, referred_objects in objects_by_image.items():
            refs_by_annotation: dict[int, tuple[_Ref, ...]] = {}
            for each in referred_objects:
                refs_by_annotation[each.annotation] = (*refs_by_annotation.get(each.annotation, ()), *each.refs)
            all_objects[image] = [
                _Object(annotation_ids[annotation], annotation, refs_by_annotation.get(annotation, ()))
                for annotation in annotations_by_image[image]
            ]
        return all_objects

    def _build_row(self, entry: Any) -> dict[str, Any]:
        coco_index, image_index, objects = entry
        row = self._create_row(*coco_index.read_image_record(image_index))
        for each in objects:
            with self._catch_record_errors():
                self._add_object(row, each, coco_index)
        return row

    def _add_object(self, row: dict[str, Any], annotated_object: _Object, coco_index: CocoIndex) -> None:
        refs = annotated_object.refs
        annotation, annotation_location = coco_index.annotations[annotated_object.annotation]
        if not refs and annotation.get("iscrowd"):
            return self._skip("crowd", annotation_location)
        region = read_region_annotation(annotation, annotation_location, row, self._skip)
        if region is None:
            return
        self._add_region(
            row,
            annotated_object.region_id,
            region.box,
            ", ".join([*(ref.location for ref in refs), annotation_location]),
            mask=region.mask,
            name=coco_index.get_category_name(annotation, annotation_location),
            phrases=[sentence for ref in refs for sentence in _read_sentences(ref)],
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


def _read_sentences(ref: _Ref) -> list[str]:
    sentences = read_field(ref.record, "sentences", list, ref.location)
    sentence_locations = [f"{ref.location}: sentences[{number}]" for number in range(len(sentences))]
    texts = [
        read_field(each, "sent", str, sentence_location)
        for each, sentence_location in zip(sentences, sentence_locations, strict=True)
    ]
    return parse_phrases(texts, "sent", ref.location)


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
