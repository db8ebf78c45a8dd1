"""JSON lines, one a region: what people write by hand, and what `sca caption` writes."""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from sca.data import fields
from sca.data.fields import note_unread_caption, read_phrases
from sca.data.own import check_hold_out, choose_split, find_split
from sca.data.records import Lines, grouped, read_jsonl_records
from sca.data.table import TableDataset
from sca.io.errors import InputError
from sca.io.image_names import ImageFiles, find_image
from sca.io.images import measure_image
from sca.io.paths import expand_user, normalize_name
from sca.io.validation import read_field, parse_numbers, require_size

ORDER = "x1, y1, x2, y2"
WORDS = ("caption", "phrases", "name")


class Jsonl(TableDataset):
    """Dataset: `Jsonl("val", file=FILE)[i]` -> `Sample`; a line is one region of an image:

        {"image": "a.jpg", "box": [x1, y1, x2, y2], "caption": "a dog"}

    In place of a caption it may have `phrases`, a list, or only a `name`. It may have a `mask` (COCO RLE or polygons),
    whose box is taken where the line has none, `attributes`, and `width` and `height` of the image, which is opened
    otherwise. `id` and `image_id` are the region's and the image's if every line has one, and otherwise count lines and
    images from 0. Other fields are passed over, so that what `sca caption` writes can be read.

    `file` may hold `{split}`, in whose place the split is put; of a file without splits, "val" has the share
    `hold_out` of the images, at least 4 images (or a third, if that is fewer), and "train" the others. An image is
    named relative to `images` if given, else to the file's folder or, if it is not there, to the working folder. Text
    is UTF-8; blank lines are passed over.
    """

    reader = "jsonl"

    def __init__(
        self,
        split: str,
        file: str | Path,
        images: str | Path | None = None,
        hold_out: float = 0.0,
        max_bad: int = 100,
    ):
        self.hold_out = hold_out
        self.file = find_split(str(expand_user(file)), split)
        if not self.file.is_file():
            raise InputError(f"there is no file {self.file}; give file=FILE, which may hold {{split}}")
        self.working = os.getcwd() if images is None else ""
        folder = self.file.parent if images is None else expand_user(images)
        choice = check_hold_out(split, hold_out)
        super().__init__(split, folder, [self.file], max_bad, self.working + choice)

    def _path(self, name: str) -> Path:
        return find_image(name, [self.images, *([self.working] if self.working else [])])

    def _entries(self, bar: tqdm) -> Iterator[Any]:
        """All lines, the name and the id of an image, and the numbers of its lines; images as they first come."""
        images: dict[str, tuple[int, int]] = {}  # the place of each, and its id
        owners: dict[int, str] = {}
        names: set[str] = set()
        files = ImageFiles(self._path)
        places = array("q")
        keyed: dict[str, bool] = {}
        found = Lines(self.file, str(self.file), ("id", "line"))
        for record, line, start, end in read_jsonl_records(self.file, self._reject):
            with self._rejecting():
                place = f"{self.file}: line {line}"
                keyed = keyed or {key: key in record for key in ("id", "image_id")}
                for key, given in keyed.items():
                    if (key in record) != given:
                        told = f"no {key!r}, which the first line has"
                        told = told if given else f"{key!r}, which the first line lacks"
                        raise InputError(f"{place}: {told}; give it on every line, or on none")
                identity = read_field(record, "id", int, place) if keyed["id"] else len(places)
                place = f"{place} (id {identity})"
                name = files.unify(normalize_name(read_field(record, "image", str, place)))
                known = images[name][1] if name in images else len(images)
                image_id = read_field(record, "image_id", int, place) if keyed["image_id"] else known
                if owners.get(image_id, name) != name:
                    raise InputError(f"{place}: image_id {image_id} was given before, to {owners[image_id]}")
                if known != image_id and name in images:
                    raise InputError(
                        f"{place}: image_id {image_id} is another than before, {known}, for the same image"
                    )
                owners[image_id] = name
                number, _ = images.setdefault(name, (len(images), image_id))
                if isinstance(record.get("name"), str) and record["name"].strip():
                    names.add(record["name"].strip())
                found.note((identity, line), start, end)
                places.append(number)
        for number in found.unique(self._reject).repeated:
            places[number] = -1
        self.attributes = {"name": tuple(sorted(names))} if names else {}
        bar.reset(len(images))
        chosen, self.remarks = choose_split(map(files.identify, images), self.split, self.hold_out)
        for (name, (_, image_id)), (_, lines) in zip(images.items(), grouped(places, len(images)), strict=True):
            if files.identify(name) in chosen:
                yield found, name, image_id, lines

    def _record(self, entry: Any) -> dict[str, Any] | None:
        found, name, image_id, numbers = entry
        told = list(self._agreeing([(number, *found[number]) for number in numbers]))
        recorded = next((require_size(record, place) for _, record, place in told if "width" in record), None)
        sides = recorded or self._read_size(name)
        if not sides:
            return None
        image = self._image(image_id, name, *sides, is_size_recorded=recorded is not None)
        for number, record, place in told:
            with self._rejecting():
                self._add(image, record, found.columns["id"][number], place)
        return image

    def _agreeing(self, lines: list[tuple[int, dict[str, Any], str]]) -> Iterator[tuple[int, dict[str, Any], str]]:
        """The lines of an image that record the size of the first that records one; the others are rejected."""
        given: tuple[int, int] | None = None
        for number, record, place in lines:
            with self._rejecting():
                sides = require_size(record, place) if "width" in record or "height" in record else given
                if given and sides != given:
                    raise InputError(f"{place}: width and height are {sides}, and {given} on a line before")
                given = sides
                yield number, record, place

    def _read_size(self, name: str) -> tuple[int, int] | None:
        """Return width and height of an image file; None, and counted, if it is missing or unreadable."""
        path = self._find(name)
        if path is None:
            return None
        try:
            return measure_image(path)
        except InputError as error:
            return self._skip_image("image unreadable", name, f"{name} ({error})", stop=False)

    def _add(self, image: dict[str, Any], record: dict[str, Any], identity: int, place: str) -> None:
        shape = record.get("mask")
        box = None if shape and record.get("box") is None else parse_numbers(record, "box", ORDER, place)
        if box and (box[2] < box[0] or box[3] < box[1]):
            raise InputError(f"{place}: box is {box}, whose ends come before its beginnings; it is {ORDER}")
        note_unread_caption(record, ("caption", "phrases"), place, self._skip)
        words = [key for key in WORDS if record.get(key) is not None]
        if not words or len({"caption", "phrases"} & set(words)) == 2:
            raise InputError(
                f"{place}: give a caption or phrases, a name, or both; there is {' and '.join(words) or 'none'}"
            )
        told = next((key for key in ("caption", "phrases") if key in words), "caption")
        mask = fields.mask(shape, "mask", image["width"], image["height"], place, self._skip)
        if box is None and mask is None:
            return  # an empty mask, counted
        self._keep(
            image,
            identity,
            box,
            place,
            mask=mask,
            name=read_field(record, "name", str, place) if "name" in words else None,
            phrases=read_phrases(record.get(told), told, place),
            attributes=read_field(record, "attributes", dict, place) if record.get("attributes") else None,
        )
