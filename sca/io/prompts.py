"""What a user points at: written on a command line, or listed in a file. Everything is in pixels of the image."""

from __future__ import annotations

import io
import json
import math
import os
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import ImageOps, UnidentifiedImageError
from sca_registry.contracts import Prompt

from sca.io import masks
from sca.io.annotations import coco, label_studio, labelme
from sca.io.annotations.annotation import Annotation, AnnotationError, Size, SkipCounter, read_size
from sca.io.coordinates import Box, clip_box, compare_sizes, find_normalized_scale, scale_box, scale_to_pixels
from sca.io.images import identify_image, show
from sca.io.json import IrregularFileError, JsonError, is_json_lines, open_regular_file, parse_json
from sca.io.notices import notice_once
from sca.io.numbers import is_finite_number
from sca.io.paths import ImageFiles, ImageNameError, expand_user, find_image, measure_named_image, possible_file_names

Point = tuple[float, float, int]
NPY = b"\x93NUMPY"  # what an array file begins with
MAX_POINTS = 256  # of a prompt that comes over a network: each costs as much as a token of text

_BOX = "a box is 4 numbers x1,y1,x2,y2 in pixels"
_POINT = "a point is x,y or x,y,label in pixels, label 1 inside or 0 outside"
_MASK = "give an image or a .npy array, not zero inside"
_REGION = "a region is written box=x1,y1,x2,y2;point=x,y,1;point=x,y,0;mask=FILE, each part where wanted"


class PromptError(ValueError):
    """A prompt that cannot be used; the message is one line that says which, why and what to do."""


# --- on a command line ----------------------------------------------------------------------------------------------


def parse_box(text: str) -> Box:
    """`"x1,y1,x2,y2"`; whether it fits an image is for `check`."""
    return _box(text.split(","), text)


def parse_point(text: str) -> Point:
    """`"x,y"`, inside, or `"x,y,label"` with label 1 inside or 0 outside."""
    return _point(text.split(","), text)


def parse_region(text: str, allow_pipe: bool = False) -> Prompt:
    """`"box=x1,y1,x2,y2;point=x,y,1;point=x,y,0;mask=FILE"`, each part where wanted, points as many as wanted.

    Args:
        text: The region.
        allow_pipe: As for `read_mask`.
    """
    box, points, mask = None, [], None
    for part in filter(None, (part.strip() for part in text.split(";"))):
        name, _, value = part.partition("=")
        match name.strip():
            case "box" if box is None:
                box = parse_box(value)
            case "point":
                points.append(parse_point(value))
            case "mask" if mask is None:
                mask = read_mask(expand_user(value.strip()), allow_pipe)
            case "box" | "mask" as twice:
                raise PromptError(f"{_quoted(text)} has two of '{twice}'; a region has at most one")
            case other:
                raise PromptError(f"{_quoted(other)} is no part of a region; {_REGION}")
    prompt = Prompt(box, tuple(points), mask)
    if not prompt:
        raise PromptError(f"{_quoted(text)} points at nothing; {_REGION}")
    return prompt


def mask_files(regions: Iterable[str]) -> list[str]:
    """List the mask files that regions, as `parse_region` takes them, name."""
    parts = (part.partition("=") for text in regions for part in text.split(";"))
    return [str(expand_user(value.strip())) for name, _, value in parts if name.strip() == "mask"]


def read_mask(path: str | Path, allow_pipe: bool = False) -> np.ndarray:
    """Read a mask file.

    Args:
        path: A .npy array, see `sca.io.masks.binarize`, or an image, see `sca.io.masks.binarize_image`.
        allow_pipe: Accept a pipe such as /dev/stdin, which only a path that a person typed may be.

    Returns:
        (height, width) bool.

    Raises:
        PromptError: One line with the file and what to do.
    """
    try:
        with open_regular_file(path, seekable=True, allow_pipe=allow_pipe) as file:
            is_array = str(path).lower().endswith(".npy") or file.read(len(NPY)) == NPY
            file.seek(0)
            if is_array:
                is_piped = isinstance(file, io.BytesIO)
                mapped = {} if is_piped else {"mmap_mode": "r"}
                return masks.binarize(np.load(file if is_piped else path, **mapped, allow_pickle=False))
            with identify_image(file) as image:
                return masks.binarize_image(ImageOps.exif_transpose(image), image.format in masks.LOSSY)
    except UnidentifiedImageError as error:
        raise PromptError(f"cannot read the mask {show(path)}: it is no image; {_MASK}") from error
    except Exception as error:  # a decoder may raise anything for damaged data
        reason = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
        raise PromptError(f"cannot read the mask {show(path)}: {reason}; {_MASK}") from error


def read_prompt(plain: Any, where: str, width: int, height: int) -> Prompt:
    """`{"box": [x1, y1, x2, y2], "points": [[x, y, label]], "mask": RLE}`, each part where wanted, as a prompt for an
    image of this size (see `check`); messages call it `where`.
    """
    box, points, mask = _fields(plain, where)
    if isinstance(mask, str):
        raise PromptError(f"{where}, 'mask': an RLE, not a file's name")
    if mask is not None and mask["size"] != [height, width]:  # before it is decoded: it may be huge
        raise PromptError(
            f"{where}, 'mask': the mask is {mask['size'][1]} x {mask['size'][0]}, the image {width} x {height} "
            "(width x height); give a mask of the image's size"
        )
    try:
        return check(Prompt(box, points, None if mask is None else masks.decode(mask)), width, height)
    except PromptError as error:
        raise PromptError(f"{where}: {error}") from error


# --- against an image -----------------------------------------------------------------------------------------------


def check(prompt: Prompt, width: int, height: int) -> Prompt:
    """The prompt as plain numbers, its box clipped to the image; `PromptError` if it does not fit `width` x `height`.

    A box may reach over the edge, since boxes often do by a pixel, but not lie outside. A point lies in
    0 <= x < width, 0 <= y < height. A mask has the image's size and something inside. Normalized coordinates and
    regions of negative points only are refused.
    """
    if not prompt:
        raise PromptError("the prompt is empty; give a box, a point or a mask")
    box = None if prompt.box is None else _clipped(_box(prompt.box), width, height)
    points = tuple(_point(point) for point in prompt.points)
    if points and not any(label for _, _, label in points) and prompt.box is None and prompt.mask is None:
        raise PromptError("all points have label 0 (outside); add a point with label 1, a box or a mask")
    _check_points_are_pixels(points, width, height)
    for x, y, label in points:
        if not (0 <= x < width and 0 <= y < height):
            raise PromptError(
                f"the point {x:g},{y:g},{label} is outside the {width} x {height} image; "
                f"x goes from 0 to below {width}, y from 0 to below {height}"
            )
    return Prompt(box, points, None if prompt.mask is None else _fitting(prompt.mask, width, height))


def check_and_count(prompt: Prompt, width: int, height: int, clipped: SkipCounter, place: str) -> Prompt:
    """`check` a prompt, and count its box in `clipped` under `place` if it reached over the edge."""
    checked = check(prompt, width, height)
    if prompt.box is not None and checked.box != _box(prompt.box):
        clipped("box clipped", place)
    return checked


def _clipped(box: Box, width: int, height: int) -> Box:
    x1, y1, x2, y2 = box
    text = ",".join(f"{value:g}" for value in box)
    for low, high, axis in ((x1, x2, "x"), (y1, y2, "y")):
        if high <= low:
            state = "empty" if high == low else "reversed"
            hint = ""
            if x2 > 0 and y2 > 0:
                hint = f" (x,y,width,height {text} would be {x1:g},{y1:g},{x1 + x2:g},{y1 + y2:g})"
            raise PromptError(
                f"the box {text} is {state}: {axis}2 must be greater than {axis}1; write x1,y1,x2,y2{hint}"
            )
    clipped = clip_box(box, width, height)
    scale = find_normalized_scale(box, width, height)
    if clipped is not None and scale is None:
        return clipped
    problem = f"{'lies outside' if clipped is None else 'leaves'} the {width} x {height} image"
    if scale == 1:
        problem = f"lies within 0..1 of the {width} x {height} image"
    hint = "boxes are x1,y1,x2,y2 in its pixels"
    if scale is not None:
        pixels = ",".join(f"{value:g}" for value in scale_to_pixels(box, scale, width, height))
        hint += f": if it is normalized to 0..{scale}, write {pixels}"
    raise PromptError(f"the box {text} {problem}; {hint}")


def _check_points_are_pixels(points: Sequence[Point], width: int, height: int) -> None:
    """Refuse points that are all within 0..1 and not at a corner of a pixel: they are normalized."""
    values = [value for x, y, _ in points for value in (x, y)]
    if not values or max(width, height) <= 1 or not 0 <= min(values) <= max(values) <= 1:
        return
    if all(map(float.is_integer, values)):
        return
    x, y, label = points[0]
    pixels = ",".join(f"{value:g}" for value in scale_to_pixels((x, y), 1, width, height))
    raise PromptError(
        f"the point {x:g},{y:g},{label} lies within 0..1; points are in pixels: "
        f"if it is normalized to 0..1, write {pixels}"
    )


def _fitting(mask: np.ndarray, width: int, height: int) -> np.ndarray:
    try:
        inside = masks.binarize(np.asarray(mask))
    except ValueError as error:
        raise PromptError(f"the mask is unusable: {error}") from error
    if inside.shape != (height, width):
        raise PromptError(
            f"the mask is {inside.shape[1]} x {inside.shape[0]}, the image {width} x {height} (width x height); "
            "give a mask of the image's size"
        )
    if not inside.any():
        raise PromptError("the mask is empty: nothing in it is inside; mark the region with another value")
    if inside.all():
        notice_once("whole mask", f"a mask covers the whole {width} x {height} image; outside is 0")
    return inside


# --- in files -------------------------------------------------------------------------------------------------------


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
        except PromptError as error:
            raise PromptError(f"{self.where}, 'mask': {error}") from error
        return Prompt(self.box, self.points, masks.decode(self.mask) if isinstance(self.mask, dict) else mask)

    def fitting(self, width: int, height: int, clipped: SkipCounter) -> Prompt:
        """The prompt for an image of this size, see `check`; it is scaled if the file records another size.

        Counts a box that `check` clips. Raises PromptError, which names the record.
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
            raise PromptError(f"{self.where}: {error}") from error


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
            except PromptError as error:
                problems.append(str(error))
        return prompts, problems

    def count(self, key: str) -> int:
        """How many regions an image has."""
        return len(self._entries[key])

    def match(self, images: Sequence[str | Path]) -> dict[Path, str]:
        """The key of each image that has one.

        A key is a path, relative to the prompts file's folder or else to the working folder, in any spelling that
        `find_image` reads; a key that is the path of no image given counts by its file name. `PromptError` if an image
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
                raise self._ambiguous(f"the file name {_quoted(image.name)}", named, sharing[name])
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

    def _ambiguous(self, what: str, keys: Sequence[str], images: int = 1) -> PromptError:
        several = f"the keys {', '.join(map(_quoted, keys))}" if len(keys) > 1 else f"{images} images"
        return PromptError(
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
            with suppress(ImageNameError):  # a URL, or several files: only the file name counts
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
        PromptError: If the file or folder cannot be read, or none of its records.
    """
    path, skip, problems = Path(path), SkipCounter(), list[str]()
    read = _read_folder if path.is_dir() else _read_file
    try:
        entries = read(path, skip, problems)
    except AnnotationError as error:
        raise PromptError(str(error)) from error
    except OSError as error:
        raise PromptError(f"cannot read the prompts {show(path)}: {error.strerror}; check the name") from error
    if problems and not any(entries.values()):
        more = f" (and {len(problems) - 1} more records cannot be used)" if len(problems) > 1 else ""
        raise PromptError(f"{problems[0]}{more}")
    return RegionPrompts(path, _merge_spellings(entries, [_find_root(path), Path()]), skip, problems)


def _find_root(path: Path) -> Path:
    """Return the folder that the image names of a prompts file or folder are relative to."""
    return path if path.is_dir() else path.parent


def _read_file(path: Path, skip: SkipCounter, problems: list[str]) -> dict[str, list[_Entry]]:
    try:
        with _opened(path) as file:
            lines = is_json_lines(path, file, "image")
            text = io.TextIOWrapper(file, "utf-8-sig")
            return _lines(text, path, problems) if lines else _regions(text.read(), path, skip, problems)
    except UnicodeDecodeError as error:
        raise PromptError(f"{show(path)} is not UTF-8 text; give COCO JSON, or JSON lines named .jsonl") from error


def _read_folder(folder: Path, skip: SkipCounter, problems: list[str]) -> dict[str, list[_Entry]]:
    files = labelme.list_files(folder)
    if not files:
        raise PromptError(f"no .json files in {show(folder)}; a folder of prompts contains LabelMe files")
    entries: dict[str, list[_Entry]] = {}
    for file in files:
        with _noting(problems):
            for name, regions in _read_labelme_file(file, skip, problems).items():
                entries.setdefault(name, []).extend(regions)
    return entries


def _read_labelme_file(path: Path, skip: SkipCounter, problems: list[str]) -> dict[str, list[_Entry]]:
    try:
        with _opened(path) as file:
            content = _json(file.read().decode("utf-8-sig"), show(path))
        if not isinstance(content, dict) or "shapes" not in content:
            raise PromptError(f"{show(path)} is not a LabelMe file (no 'shapes'); name it by itself, or move it")
        return _labelme(content, path, skip, problems)
    except UnicodeDecodeError as error:
        raise PromptError(f"{show(path)} is not UTF-8 text; copy it again") from error
    except OSError as error:
        raise PromptError(f"cannot read {show(path)}: {error.strerror}; copy it again") from error
    except AnnotationError as error:
        raise PromptError(str(error)) from error


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


def _opened(path: Path) -> BinaryIO:
    try:
        return open_regular_file(path, seekable=True, allow_pipe=True)
    except IrregularFileError as error:
        raise PromptError(str(error)) from error


def _lines(file, path: Path, problems: list[str]) -> dict[str, list[_Entry]]:
    entries: dict[str, list[_Entry]] = {}
    for number, line in enumerate(file, 1):
        if line.strip():
            with _noting(problems):
                image, entry = _line(line, f"{show(path)}, line {number}", path)
                entries.setdefault(image, []).append(entry)
    return entries


def _line(line: str, where: str, path: Path) -> tuple[str, _Entry]:
    """The image of a line, and its region."""
    record = _json(line, where)
    if not isinstance(record, dict):
        raise PromptError(f'{where}: a line is an object like {{"image": "a.jpg", "box": [x1, y1, x2, y2]}}')
    image = _text(record, "image", where)
    box, points, mask = _fields(record.get("prompt", record), where)
    if isinstance(mask, str):
        mask = _at(where, "mask", partial(find_image, roots=[path.parent]), mask)
        if not mask.is_file():
            raise PromptError(f"{where}, 'mask': there is no file {show(mask)}; name it relative to {show(path)}")
    return image, _Entry(where, box, points, mask, _recorded_size(record, where))


def _recorded_size(record: Mapping[str, Any], where: str) -> Size | None:
    """Width and height of the image that a record states; None if it does not, or has 0 in their place."""
    if not record.get("width") or not record.get("height"):
        return None
    try:
        return read_size(record, ("width", "height"), where)
    except AnnotationError as error:
        raise PromptError(str(error)) from error


@contextmanager
def _noting(problems: list[str]) -> Iterator[None]:
    """Add what is wrong with one record to the problems; the next one is read."""
    try:
        yield
    except PromptError as error:
        problems.append(str(error))


def _fields(asked: Any, where: str) -> tuple[Box | None, tuple[Point, ...], dict[str, Any] | str | None]:
    """Box, points and mask of a prompt as plain values; a mask that is text, the name of a file, is left as it is."""
    if not isinstance(asked, dict):
        raise PromptError(f"{where}, 'prompt': an object with 'box', 'points' or 'mask', not {_quoted(asked)}")
    box, points, mask = (asked.get(name) for name in ("box", "points", "mask"))
    if box is None and not points and mask is None:
        others = f", only {', '.join(map(_quoted, asked))}" if asked else ""
        raise PromptError(f"{where}: no 'box', 'points' or 'mask'{others}")
    box = None if box is None else _at(where, "box", _box, box)
    points = () if points is None else _at(where, "points", _points, points)
    return box, points, mask if mask is None or isinstance(mask, str) else _at(where, "mask", masks.checked, mask)


def _regions(text: str, path: Path, skip: SkipCounter, problems: list[str]) -> dict[str, list[_Entry]]:
    content = _json(text, show(path))
    if label_studio.is_task(content) or (isinstance(content, list) and content):
        return _label_studio(content, path, skip, problems)
    if isinstance(content, dict) and "shapes" in content:
        return _labelme(content, path, skip, problems)
    return _coco(content, path, skip, problems)


def _coco(content: Any, path: Path, skip: SkipCounter, problems: list[str]) -> dict[str, list[_Entry]]:
    for name in ("images", "annotations"):
        if not isinstance(content, dict) or not isinstance(content.get(name), list):
            raise PromptError(
                f"{show(path)}: no list '{name}', which COCO JSON has; for one region a line name the file .jsonl"
            )
    keys: dict[Any, str] = {}
    sizes: dict[str, Size | None] = {}
    entries: dict[str, list[_Entry]] = {}
    for place, image in enumerate(content["images"]):
        where = f"{show(path)}, images[{place}]"
        with _noting(problems):
            number, name = _id(image, "id", where), _text(image, "file_name", where)
            if number in keys or name in entries:
                field = "'id'" if number in keys else "'file_name'"
                raise PromptError(f"{where}, {field}: another image has it too; each image has its own")
            keys[number], entries[name], sizes[name] = name, [], _recorded_size(image, where)
    for place, annotation in enumerate(content["annotations"]):
        where = f"{show(path)}, annotations[{place}]"
        with _noting(problems):
            number = _id(annotation, "image_id", where)
            if number not in keys:
                raise PromptError(f"{where}, 'image_id': no image has the id {_quoted(number)}")
            name = keys[number]
            entries[name].append(_Entry(where, _coco_box(annotation, where, skip), size=sizes[name]))
    return entries


def _coco_box(annotation: Mapping[str, Any], where: str, skip: SkipCounter) -> Box:
    counted: list[tuple[str, str]] = []
    try:
        box = coco.read_annotation(annotation, where, None, None, lambda *part: counted.append(part)).box
    except AnnotationError as error:
        raise PromptError(str(error)) from error
    if box is not None:
        for reason, place in counted:
            skip(reason, place)
        return box
    if annotation.get("segmentation"):
        raise PromptError(f"{where}, 'segmentation': it is empty; remove the annotation or give a 'bbox'")
    if annotation.get("bbox"):
        raise PromptError(f"{where}, 'bbox': {_quoted(annotation['bbox'])} has no area; width and height are above 0")
    raise PromptError(f"{where}: neither 'bbox' nor 'segmentation'; an annotation needs one to be a prompt")


def _labelme(content: Mapping[str, Any], path: Path, skip: SkipCounter, problems: list[str]) -> dict[str, list[_Entry]]:
    name = _text(content, "imagePath", show(path))
    image = _at(show(path), "imagePath", partial(find_image, roots=[path.parent]), name)
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


# --- the pieces -----------------------------------------------------------------------------------------------------


def _box(values: Any, given: Any = None) -> Box:
    x1, y1, x2, y2 = _numbers(values, (4,), given, _BOX)
    return x1, y1, x2, y2


def _point(values: Any, given: Any = None) -> Point:
    x, y, *label = _numbers(values, (2, 3), given, _POINT)
    if label not in ([], [0], [1]):
        raise PromptError(
            f"the label of the point {_quoted(values if given is None else given)} is not 1 or 0; {_POINT}"
        )
    return x, y, int(label[0]) if label else 1


def _points(values: Any) -> tuple[Point, ...]:
    if not isinstance(values, list):
        raise PromptError(f"a list of points [[x, y, label]], not {_quoted(values)}")
    return tuple(_point(point) for point in values)


def _numbers(values: Any, lengths: tuple[int, ...], given: Any, form: str) -> list[float]:
    """So many finite numbers, or text that writes them on a command line (`given` is then the whole of it)."""
    given = values if given is None else given
    if isinstance(values, str | Mapping) or not hasattr(values, "__len__") or len(values) not in lengths:
        raise PromptError(f"{form}, not {_quoted(given)}")
    found = []
    for value in values:
        number = _parse_float(value) if isinstance(given, str) else value
        if not is_finite_number(number):
            raise PromptError(f"{_quoted(value)} in {_quoted(given)} is not a finite number; {form}")
        found.append(float(number))
    return found


def _parse_float(text: str) -> float:
    """The number that a text contains, NaN if it contains none."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def _at(where: str, field: str, read: Callable[[Any], Any], value: Any) -> Any:
    try:
        return read(value)
    except ValueError as error:
        raise PromptError(f"{where}, '{field}': {error}") from error


def _json(text: str, where: str) -> Any:
    try:
        return parse_json(text, surrogates=True)
    except JsonError as error:
        cause = error.__cause__
        if not isinstance(cause, json.JSONDecodeError):
            raise PromptError(f"{where}: not JSON that can be read: {error}") from error
        place = f"column {cause.colno}" if cause.lineno == 1 else f"line {cause.lineno}, column {cause.colno}"
        raise PromptError(f"{where}: not JSON at {place}: {cause.msg}") from error


def _text(record: Any, field: str, where: str) -> str:
    value = record.get(field) if isinstance(record, dict) else None
    if not isinstance(value, str) or not value.strip() or "\0" in value:
        raise PromptError(f"{where}, '{field}': the image's file name as text, not {_quoted(value)}")
    return value


def _id(record: Any, field: str, where: str) -> int | str:
    value = record.get(field) if isinstance(record, dict) else None
    if not isinstance(value, int | str) or isinstance(value, bool):
        raise PromptError(f"{where}, '{field}': a number or text, not {_quoted(value)}")
    return value


def _quoted(value: Any) -> str:
    """A value on one line, not too long."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
