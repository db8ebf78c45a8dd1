"""RefCOCO, RefCOCO+ and RefCOCOg: expressions that refer to one thing in a COCO picture.

In the layout of https://github.com/lichengunc/refer, whose pickles are read without running anything that is in them.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from tqdm.auto import tqdm

from sca.data.coco import Index, read_region
from sca.data.fields import identified, read_json, read_phrases
from sca.data.table import TableDataset
from sca.io.errors import InputError
from sca.io.json import open_regular_file
from sca.io.paths import expand_user
from sca.io.validation import read_field

BY = {"refcoco": "unc", "refcoco+": "unc", "refcocog": "umd"}  # who split the collection, where nobody says
PICTURES = ("images/mscoco/images/train2014", "train2014", "images")


class RefCoco(TableDataset):
    """Dataset: `RefCoco("testA", root=FOLDER)[i]` -> `Sample`, one region a referring expression.

    `root` has a folder of the `collection`, "refcoco", "refcoco+" or "refcocog", with `instances.json` and `refs(BY).p`
    (or `.json` of the same content), or is that folder. `by` is who made the split: unc, google or umd. `images` is the
    folder of COCO's train2014, by default `images/mscoco/images/train2014` or `train2014` in `root`.

    The split of an expression decides and not that of its image, so an image may be in several splits, with different
    regions. A region's id is its ref's, its phrases are the sentences in their order, and box, mask and name are those
    of its annotation.
    """

    reader = "refcoco"

    def __init__(
        self,
        split: str,
        root: str | Path,
        collection: str = "refcoco",
        by: str | None = None,
        images: str | Path | None = None,
        max_bad: int = 100,
    ):
        if collection not in BY:
            raise InputError(f"no collection {collection!r}; there are: {', '.join(BY)}")
        root = expand_user(root)
        folder = root / collection if (root / collection).is_dir() else root
        self.refs, self.instances = _refs(folder, by or BY[collection]), folder / "instances.json"
        if not self.instances.is_file():
            raise InputError(f"there is no instances.json beside {self.refs}")
        super().__init__(split, _pictures(root, images), [self.refs, self.instances], max_bad, split)

    def _entries(self, bar: tqdm) -> Iterator[Any]:
        """The index, the number of an image, and its refs with their places and the numbers of their annotations."""
        refs = []
        for record, place in identified(_read_refs(self.refs), f"{self.refs}: ", "ref_id", self._reject):
            with self._rejecting():
                refs.append((record, place, read_field(record, "split", str, place)))
        if all(split != self.split for *_, split in refs):
            self._stop_if_too_many()
            splits = dict.fromkeys(split for *_, split in refs)
            raise InputError(f"{self.refs} has no split {self.split!r}; it has: {', '.join(splits) or 'none'}")
        found = Index.read(self.instances, reject=self._rejects())
        self.attributes = {"name": tuple(dict.fromkeys(filter(None, found.names.values())))}
        mine = []
        for ref, place in ((ref, place) for ref, place, split in refs if split == self.split):
            with self._rejecting():
                mine.append((ref, place, *(read_field(ref, key, int, place) for key in ("image_id", "ann_id"))))
        images: dict[int, list[Any]] = {}
        known = found.images.find([each[2] for each in mine]), found.annotations.find([each[3] for each in mine])
        for (ref, place, *_), image, annotation in zip(mine, *(each.tolist() for each in known), strict=True):
            if image < 0:
                self._reject(f"{place}: image_id {ref['image_id']} is not among the images of {self.instances}")
            elif annotation < 0:
                self._reject(f"{place}: ann_id {ref['ann_id']} is not among the annotations of {self.instances}")
            else:
                images.setdefault(image, []).append((ref, place, annotation))
        bar.reset(len(images))
        for image, its in images.items():
            yield found, image, its

    def _record(self, entry: Any) -> dict[str, Any]:
        found, number, refs = entry
        image = self._image(*found.image(number))
        for ref, place, which in refs:
            with self._rejecting():
                self._add(image, ref, place, *found.annotations[which], found)
        return image

    def _add(
        self, image: dict[str, Any], ref: dict[str, Any], place: str, annotation: dict[str, Any], at: str, found: Index
    ) -> None:
        if annotation["image_id"] != ref["image_id"]:
            told = f"is of image {annotation['image_id']}, not of {ref['image_id']}"
            raise InputError(f"{place}: ann_id {ref['ann_id']} {told}")
        region = read_region(annotation, at, image, self._skip)
        if region is None:
            return
        self._keep(
            image,
            ref["ref_id"],
            region.box,
            f"{place}, {at}",
            mask=region.mask,
            name=found.name(annotation, at),
            phrases=_sentences(ref, place),
        )


class _Plain(pickle.Unpickler):
    """Unpickles lists, tables, texts and numbers, and nothing that has to be looked up anywhere."""

    def find_class(self, module: str, name: str) -> NoReturn:
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def _read_refs(path: Path) -> list[Any]:
    if path.suffix == ".json":
        refs = read_json(path)
    else:
        try:
            with open_regular_file(path) as file:
                refs = _Plain(file, encoding="latin1").load()  # written by Python 2
        except Exception as error:  # an unpickler may raise anything for damaged data
            raise InputError(
                f"{path} is no whole pickle of only lists, tables, texts and numbers, and was not read: {error}"
            ) from error
    if not isinstance(refs, list):
        raise InputError(f"{path} must be a list of refs, not of type {type(refs).__name__}")
    return refs


def _sentences(ref: dict[str, Any], place: str) -> list[str]:
    sentences = read_field(ref, "sentences", list, place)
    places = [f"{place}: sentences[{number}]" for number in range(len(sentences))]
    sent = [read_field(each, "sent", str, at) for each, at in zip(sentences, places, strict=True)]
    return read_phrases(sent, "sent", place)


def _refs(folder: Path, by: str) -> Path:
    """The file of the refs as split by `by`."""
    paths = [folder / f"refs({by}){suffix}" for suffix in (".p", ".json")]
    for path in paths:
        if path.is_file():
            return path
    there = sorted(path.name for path in folder.glob("refs(*).*"))
    raise InputError(
        f"no {paths[0].name} or {paths[1].name} in {folder}; there is: {', '.join(there) or 'no refs file at all'}; "
        "give by=unc, google or umd, and root=FOLDER that has them"
    )


def _pictures(root: Path, images: str | Path | None) -> Path:
    paths = [expand_user(images)] if images is not None else [root / name for name in PICTURES]
    for path in paths:
        if path.is_dir():
            return path
    raise InputError(f"no folder {' or '.join(map(str, paths))}: give images=FOLDER, that of COCO's train2014 pictures")
