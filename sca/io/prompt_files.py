"""Prompts of many images: files in COCO, Label Studio or LabelMe JSON or JSON lines, and folders of LabelMe files."""

from __future__ import annotations

import math
import os
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, BinaryIO

from sca_registry.contracts import Prompt

from sca.io import masks
from sca.io.annotations import coco, label_studio, labelme
from sca.io.annotations.annotation import Annotation, Size, SkipCounter
from sca.io.coordinates import Box, compare_sizes, scale_box
from sca.io.errors import InputError
from sca.io.images import show
from sca.io.json import is_json_lines, open_regular_file, parse_json, parse_lines, read_regular_file
from sca.io.notices import notice_once
from sca.io.paths import ImageFiles, find_image, measure_named_image, possible_file_names
from sca.io.prompts import Point, check_and_count, quote, read_field, read_fields, read_mask
from sca.io.validation import read_id, read_name, read_size


@dataclass(frozen=True)
class _Entry:
    """One region of a prompts file as small as it was written: masks are decoded when they are asked for."""

    where: str  # the file and the record, for messages
    box: Box | None = None
    points: tuple[Point, ...] = ()
    mask: dict[str, Any] | Path | None = None
    size: Size | None = None  # of the image, where the file records it

    def prompt(self) -> Prompt:
        try:
            mask = read_mask(self.mask) if isinstance(self.mask, Path) else None
        except InputError as error:
            raise InputError(f"{self.where}, 'mask': {error}") from error
        return Prompt(self.box, self.points, masks.decode(self.mask) if isinstance(self.mask, dict) else mask)

    def fitting(self, width: int, height: int, clipped: SkipCounter) -> Prompt:
        """The prompt for an image of this size, see `check`; it is scaled if the file records another size.

        Counts a box that `check` clips. Raises InputError, which names the record.
        """
        prompt = self.prompt()
        try:
            if self.size and self.size != (width, height):
                prompt = _scale(prompt, self.size, (width, height))
                notice_once(
                    "scaled prompts",
                    f"{self.where}: the file records an image of {self.size[0]} x {self.size[1]}, and its regions are "
                    f"scaled to {width} x {height}",
                )
            return check_and_count(prompt, width, height, clipped, self.where)
        except ValueError as error:
            raise InputError(f"{self.where}: {error}") from error


def _scale(prompt: Prompt, recorded: Size, actual: Size) -> Prompt:
    """Turn a prompt for an image of the recorded size into one for the same image in its actual size.

    Raises ValueError if the aspect ratios differ.
    """
    across, down = compare_sizes(recorded, actual)
    box = prompt.box and scale_box(prompt.box, (across, down))
    points = tuple(
        (_scale_inside(x, across, recorded[0], actual[0]), _scale_inside(y, down, recorded[1], actual[1]), label)
        for x, y, label in prompt.points
    )
    mask = prompt.mask
    if mask is not None and mask.shape == recorded[::-1]:
        mask = masks.resize(mask, *actual)
    return Prompt(box, points, mask)


def _scale_inside(value: float, factor: float, recorded: int, actual: int) -> float:
    """Scale a coordinate; one inside the recorded side stays inside the actual one, however it is rounded."""
    scaled = value * factor
    return min(scaled, math.nextafter(actual, 0)) if value < recorded else scaled


class RegionPrompts(Mapping[str, list[Prompt]]):
    """The prompts of a file, by image key: what the file calls the image. Keys keep the file's order.

    skip: the count of what the file contains and a prompt cannot be.
    clipped: the count of boxes that `fitting` clipped to their image.
    problems: a line for each record of which no prompt could be made; it names file, record and field.
    """

    def __init__(
        self, path: Path, entries: Mapping[str, list[_Entry]], skip: SkipCounter, problems: Sequence[str] = ()
    ):
        self.path, self.skip, self.clipped = path, skip, SkipCounter()
        self._entries = entries
        self.problems = tuple(problems)

    def __getitem__(self, key: str) -> list[Prompt]:
        return [entry.prompt() for entry in self._entries[key]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def fitting(self, key: str, width: int, height: int) -> tuple[list[Prompt], list[str]]:
        """The prompts of an image that fit it, each checked by itself.

        Args:
            key: What the file calls the image.
            width: Of the image in pixels.
            height: Of the image in pixels.

        Returns:
            The prompts that fit, and a line for each that does not, which names its record.
        """
        prompts, problems = [], []
        for entry in self._entries[key]:
            try:
                prompts.append(entry.fitting(width, height, self.clipped))
            except InputError as error:
                problems.append(str(error))
        return prompts, problems

    def count(self, key: str) -> int:
        """How many regions an image has."""
        return len(self._entries[key])

    def match(self, images: Sequence[str | Path]) -> dict[Path, str]:
        """The key of each image that has one.

        A key is a path, relative to the prompts file's folder or else to the working folder, in any spelling that
        `find_image` reads; a key that is the path of no image given counts by its file name. `InputError` if an image
        could mean several keys, or a file name several images or keys.
        """
        paths = [Path(image) for image in images]
        found = {image: key for image in paths if (key := self._key_of_path(image)) is not None}
        taken = set(found.values())
        by_name: dict[str, list[str]] = {}
        for key, names in self._file_names.items():
            for name in names if key not in taken else ():
                by_name.setdefault(name, []).append(key)
        rest = {image: unicodedata.normalize("NFC", image.name) for image in paths if image not in found}
        sharing = Counter(rest.values())
        for image, name in rest.items():
            named = by_name.get(name, [])
            if named and (len(named) > 1 or sharing[name] > 1):
                raise self._ambiguous(f"the file name {quote(image.name)}", named, sharing[name])
            if named:
                found[image] = named[0]
        return {image: found[image] for image in paths if image in found}

    def _key_of_path(self, image: Path) -> str | None:
        """The key that is the path of an image: as written, else in another spelling or by a link."""
        key = self._paths.get(os.path.abspath(image)) if ".." not in image.parts else None
        if key is not None:
            return key
        keys = self._files.get(os.path.realpath(image), [])
        if len(keys) > 1:
            raise self._ambiguous(f"the image {show(image)}", keys)
        return keys[0] if keys else None

    def _ambiguous(self, what: str, keys: Sequence[str], images: int = 1) -> InputError:
        several = f"the keys {', '.join(map(quote, keys))}" if len(keys) > 1 else f"{images} images"
        return InputError(
            f"{show(self.path)}: {what} could mean {several}; write image paths relative to the prompts file"
        )

    @cached_property
    def _paths(self) -> dict[str, str]:
        """Absolute path -> key; one relative to the prompts file counts before one relative to the working folder."""
        keys = [key for key in self if ".." not in Path(key).parts]
        return {os.path.abspath(root / key): key for root in (Path(), _find_root(self.path)) for key in keys}

    @cached_property
    def _files(self) -> dict[str, list[str]]:
        """The real path of an existing image -> its keys."""
        files: dict[str, list[str]] = {}
        root = _find_root(self.path)
        for key in self:
            with suppress(InputError):  # a URL, or several files: only the file name counts
                files.setdefault(os.path.realpath(find_image(key, [root, Path()])), []).append(key)
        return files

    @cached_property
    def _file_names(self) -> dict[str, set[str]]:
        return {key: possible_file_names(key) for key in self}


def read_prompts(path: str | Path) -> RegionPrompts:
    """Read a prompts file, which may be a pipe, or a folder of LabelMe files.

    A file is JSON lines if its suffix is .jsonl or .ndjson, else COCO, Label Studio or LabelMe JSON. A line is one
    region: `{"image": "a.jpg", "box": [x1, y1, x2, y2], "points": [[x, y, label]], "mask": RLE or FILE}`, or a record
    of `sca`, whose `prompt` is repeated. Mask files are named relative to the prompts file. Of COCO, `bbox` is read as
    x, y, width, height, or else the box of `segmentation`; of the other tools, the box of each region, or the point of
    one that is only a point. Images without annotations have an empty list. Whether a prompt fits is for `check`.

    Returns:
        The prompts; `problems` names the file, the line or record, and the field of each record without a prompt.

    Raises:
        InputError: If the file or folder cannot be read, or none of its records.
    """
    path, skip, problems = Path(path), SkipCounter(), list[str]()
    read = _read_folder if path.is_dir() else _read_file
    try:
        entries = read(path, skip, problems)
    except OSError as error:
        raise InputError(f"cannot read the prompts {show(path)}: {error.strerror}; check the name") from error
    if problems and not any(entries.values()):
        more = f" (and {len(problems) - 1} more records cannot be used)" if len(problems) > 1 else ""
        raise InputError(f"{problems[0]}{more}")
    return RegionPrompts(path, _merge_spellings(entries, [_find_root(path), Path()]), skip, problems)


def _find_root(path: Path) -> Path:
    """Return the folder that the image names of a prompts file or folder are relative to."""
    return path if path.is_dir() else path.parent


def _read_file(path: Path, skip: SkipCounter, problems: list[str]) -> dict[str, list[_Entry]]:
    with open_regular_file(path, seekable=True, allow_pipe=True) as file:
        if is_json_lines(path, file, "image"):
            return _lines(file, path, problems)
        return _regions(parse_json(file.read(), show(path), surrogates=True), path, skip, problems)


def _read_folder(folder: Path, skip: SkipCounter, problems: list[str]) -> dict[str, list[_Entry]]:
    files = labelme.list_files(folder)
    if not files:
        raise InputError(f"no .json files in {show(folder)}; a folder of prompts contains LabelMe files")
    entries: dict[str, list[_Entry]] = {}
    for file in files:
        with _noting(problems):
            for name, regions in _read_labelme_file(file, skip, problems).items():
                entries.setdefault(name, []).extend(regions)
    return entries


def _read_labelme_file(path: Path, skip: SkipCounter, problems: list[str]) -> dict[str, list[_Entry]]:
    try:
        content = parse_json(read_regular_file(path), show(path), surrogates=True)
        if not isinstance(content, dict) or "shapes" not in content:
            raise InputError(f"{show(path)} is not a LabelMe file (no 'shapes'); name it by itself, or move it")
        return _labelme(content, path, skip, problems)
    except OSError as error:
        raise InputError(f"cannot read {show(path)}: {error.strerror}; copy it again") from error


def _merge_spellings(entries: Mapping[str, list[_Entry]], roots: Sequence[Path]) -> dict[str, list[_Entry]]:
    """Merge the regions of keys that are spellings of one image file under the first of these keys."""
    files = ImageFiles(partial(find_image, roots=roots))
    names = {key: possible_file_names(key) for key in entries}
    sharing = Counter(name for found in names.values() for name in found)
    merged: dict[str, list[_Entry]] = {}
    for key, regions in entries.items():
        is_shared = any(sharing[name] > 1 for name in names[key])
        merged.setdefault(files.unify(key) if is_shared else key, []).extend(regions)
    return merged


def _lines(file: BinaryIO, path: Path, problems: list[str]) -> dict[str, list[_Entry]]:
    entries: dict[str, list[_Entry]] = {}
    for where, record in parse_lines(file, show(path), lambda error: problems.append(str(error))):
        with _noting(problems):
            image, entry = _line(record, where, path)
            entries.setdefault(image, []).append(entry)
    return entries


def _line(record: Any, where: str, path: Path) -> tuple[str, _Entry]:
    """The image of a line, and its region."""
    if not isinstance(record, dict):
        raise InputError(f'{where}: a line is an object like {{"image": "a.jpg", "box": [x1, y1, x2, y2]}}')
    image = read_name(record, "image", where)
    box, points, mask = read_fields(record.get("prompt", record), where)
    if isinstance(mask, str):
        mask = read_field(where, "mask", partial(find_image, roots=[path.parent]), mask)
        if not mask.is_file():
            raise InputError(f"{where}, 'mask': there is no file {show(mask)}; name it relative to {show(path)}")
    return image, _Entry(where, box, points, mask, _recorded_size(record, where))


def _recorded_size(record: Mapping[str, Any], where: str) -> Size | None:
    """Width and height of the image that a record states; None if it does not, or has 0 in their place."""
    if not record.get("width") or not record.get("height"):
        return None
    return read_size(record, where)


@contextmanager
def _noting(problems: list[str]) -> Iterator[None]:
    """Add what is wrong with one record to the problems; the next one is read."""
    try:
        yield
    except InputError as error:
        problems.append(str(error))


def _regions(content: Any, path: Path, skip: SkipCounter, problems: list[str]) -> dict[str, list[_Entry]]:
    if label_studio.is_task(content) or (isinstance(content, list) and content):
        return _label_studio(content, path, skip, problems)
    if isinstance(content, dict) and "shapes" in content:
        return _labelme(content, path, skip, problems)
    return _coco(content, path, skip, problems)


def _coco(content: Any, path: Path, skip: SkipCounter, problems: list[str]) -> dict[str, list[_Entry]]:
    for name in ("images", "annotations"):
        if not isinstance(content, dict) or not isinstance(content.get(name), list):
            raise InputError(
                f"{show(path)}: no list '{name}', which COCO JSON has; for one region a line name the file .jsonl"
            )
    keys: dict[Any, str] = {}
    sizes: dict[str, Size | None] = {}
    entries: dict[str, list[_Entry]] = {}
    for place, image in enumerate(content["images"]):
        where = f"{show(path)}, images[{place}]"
        with _noting(problems):
            number, name = read_id(image, "id", where), read_name(image, "file_name", where)
            if number in keys or name in entries:
                field = "'id'" if number in keys else "'file_name'"
                raise InputError(f"{where}, {field}: another image has it too; each image has its own")
            keys[number], entries[name], sizes[name] = name, [], _recorded_size(image, where)
    for place, annotation in enumerate(content["annotations"]):
        where = f"{show(path)}, annotations[{place}]"
        with _noting(problems):
            number = read_id(annotation, "image_id", where)
            if number not in keys:
                raise InputError(f"{where}, 'image_id': no image has the id {quote(number)}")
            name = keys[number]
            entries[name].append(_Entry(where, _coco_box(annotation, where, skip), size=sizes[name]))
    return entries


def _coco_box(annotation: Mapping[str, Any], where: str, skip: SkipCounter) -> Box:
    counted: list[tuple[str, str]] = []
    box = coco.read_annotation(annotation, where, None, None, lambda *part: counted.append(part)).box
    if box is not None:
        for reason, place in counted:
            skip(reason, place)
        return box
    if annotation.get("segmentation"):
        raise InputError(f"{where}, 'segmentation': it is empty; remove the annotation or give a 'bbox'")
    if annotation.get("bbox"):
        raise InputError(f"{where}, 'bbox': {quote(annotation['bbox'])} has no area; width and height are above 0")
    raise InputError(f"{where}: neither 'bbox' nor 'segmentation'; an annotation needs one to be a prompt")


def _labelme(content: Mapping[str, Any], path: Path, skip: SkipCounter, problems: list[str]) -> dict[str, list[_Entry]]:
    name = read_name(content, "imagePath", show(path))
    image = read_field(show(path), "imagePath", partial(find_image, roots=[path.parent]), name)
    size = labelme.find_size(content, image, show(path))
    shapes = labelme.read_shapes(content, size, show(path), skip, lambda error: problems.append(str(error)))
    return {name: _annotated(shapes, size, skip)}


def _label_studio(content: Any, path: Path, skip: SkipCounter, problems: list[str]) -> dict[str, list[_Entry]]:
    entries: dict[str, list[_Entry]] = {}
    measure = partial(measure_named_image, roots=[path.parent, Path()])
    for image in label_studio.read_tasks(content, show(path), skip, measure, lambda error: problems.append(str(error))):
        entries.setdefault(image.name, []).extend(_annotated(image.annotations, image.size, skip))
    return entries


def _annotated(annotations: Iterable[Annotation], size: Size | None, skip: SkipCounter) -> list[_Entry]:
    """Each region by its box, or by its point where it has none."""
    entries = []
    for each in annotations:
        if each.box or each.point:
            points = () if each.box or not each.point else ((*each.point, 1),)
            entries.append(_Entry(each.place, each.box, points, size=size))
        else:
            skip("empty mask", each.place)
    return entries
