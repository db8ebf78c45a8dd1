"""Prompts of many images: files in COCO, Label Studio or LabelMe JSON or JSON lines, and folders of LabelMe files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from sca.io.annotations import coco, label_studio, labelme
from sca.io.annotations.annotation import Annotation, Size, SkipCounter
from sca.io.coordinates import Box
from sca.io.errors import InputError
from sca.io.image_names import ImageFiles, find_image, measure_named_image, possible_file_names
from sca.io.images import show
from sca.io.json import is_json_lines, open_regular_file, parse_json, parse_lines, read_regular_file
from sca.io.prompts import quote, read_field, read_fields
from sca.io.region_prompts import Entry, RegionPrompts, find_root
from sca.io.validation import read_id, get_image_name, read_size


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
    return RegionPrompts(path, _merge_spellings(entries, [find_root(path), Path()]), skip, problems)


def _read_file(path: Path, skip: SkipCounter, problems: list[str]) -> dict[str, list[Entry]]:
    with open_regular_file(path, seekable=True, allow_pipe=True) as file:
        if is_json_lines(path, file, "image"):
            return _lines(file, path, problems)
        return _regions(parse_json(file.read(), show(path), surrogates=True), path, skip, problems)


def _read_folder(folder: Path, skip: SkipCounter, problems: list[str]) -> dict[str, list[Entry]]:
    files = labelme.list_files(folder)
    if not files:
        raise InputError(f"no .json files in {show(folder)}; a folder of prompts contains LabelMe files")
    entries: dict[str, list[Entry]] = {}
    for file in files:
        with _noting(problems):
            for name, regions in _read_labelme_file(file, skip, problems).items():
                entries.setdefault(name, []).extend(regions)
    return entries


def _read_labelme_file(path: Path, skip: SkipCounter, problems: list[str]) -> dict[str, list[Entry]]:
    try:
        content = parse_json(read_regular_file(path), show(path), surrogates=True)
        if not isinstance(content, dict) or "shapes" not in content:
            raise InputError(f"{show(path)} is not a LabelMe file (no 'shapes'); name it by itself, or move it")
        return _labelme(content, path, skip, problems)
    except OSError as error:
        raise InputError(f"cannot read {show(path)}: {error.strerror}; copy it again") from error


def _merge_spellings(entries: Mapping[str, list[Entry]], roots: Sequence[Path]) -> dict[str, list[Entry]]:
    """Merge the regions of keys that are spellings of one image file under the first of these keys."""
    files = ImageFiles(partial(find_image, roots=roots))
    names = {key: possible_file_names(key) for key in entries}
    sharing = Counter(name for found in names.values() for name in found)
    merged: dict[str, list[Entry]] = {}
    for key, regions in entries.items():
        is_shared = any(sharing[name] > 1 for name in names[key])
        merged.setdefault(files.unify(key) if is_shared else key, []).extend(regions)
    return merged


def _lines(file: BinaryIO, path: Path, problems: list[str]) -> dict[str, list[Entry]]:
    entries: dict[str, list[Entry]] = {}
    for where, record in parse_lines(file, show(path), lambda error: problems.append(str(error))):
        with _noting(problems):
            image, entry = _line(record, where, path)
            entries.setdefault(image, []).append(entry)
    return entries


def _line(record: Any, where: str, path: Path) -> tuple[str, Entry]:
    """The image of a line, and its region."""
    if not isinstance(record, dict):
        raise InputError(f'{where}: a line is an object like {{"image": "a.jpg", "box": [x1, y1, x2, y2]}}')
    image = get_image_name(record, "image", where)
    box, points, mask = read_fields(record.get("prompt", record), where)
    if isinstance(mask, str):
        mask = read_field(where, "mask", partial(find_image, roots=[path.parent]), mask)
        if not mask.is_file():
            raise InputError(f"{where}, 'mask': there is no file {show(mask)}; name it relative to {show(path)}")
    return image, Entry(where, box, points, mask, _recorded_size(record, where))


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


def _regions(content: Any, path: Path, skip: SkipCounter, problems: list[str]) -> dict[str, list[Entry]]:
    if label_studio.is_task(content) or (isinstance(content, list) and content):
        return _label_studio(content, path, skip, problems)
    if isinstance(content, dict) and "shapes" in content:
        return _labelme(content, path, skip, problems)
    return _coco(content, path, skip, problems)


def _coco(content: Any, path: Path, skip: SkipCounter, problems: list[str]) -> dict[str, list[Entry]]:
    for name in ("images", "annotations"):
        if not isinstance(content, dict) or not isinstance(content.get(name), list):
            raise InputError(
                f"{show(path)}: no list '{name}', which COCO JSON has; for one region a line name the file .jsonl"
            )
    keys: dict[Any, str] = {}
    sizes: dict[str, Size | None] = {}
    entries: dict[str, list[Entry]] = {}
    for place, image in enumerate(content["images"]):
        where = f"{show(path)}, images[{place}]"
        with _noting(problems):
            number, name = read_id(image, "id", where), get_image_name(image, "file_name", where)
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
            entries[name].append(Entry(where, _coco_box(annotation, where, skip), size=sizes[name]))
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


def _labelme(content: Mapping[str, Any], path: Path, skip: SkipCounter, problems: list[str]) -> dict[str, list[Entry]]:
    name = get_image_name(content, "imagePath", show(path))
    image = read_field(show(path), "imagePath", partial(find_image, roots=[path.parent]), name)
    size = labelme.find_size(content, image, show(path))
    shapes = labelme.read_shapes(content, size, show(path), skip, lambda error: problems.append(str(error)))
    return {name: _annotated(shapes, size, skip)}


def _label_studio(content: Any, path: Path, skip: SkipCounter, problems: list[str]) -> dict[str, list[Entry]]:
    entries: dict[str, list[Entry]] = {}
    measure = partial(measure_named_image, roots=[path.parent, Path()])
    for image in label_studio.read_tasks(content, show(path), skip, measure, lambda error: problems.append(str(error))):
        entries.setdefault(image.name, []).extend(_annotated(image.annotations, image.size, skip))
    return entries


def _annotated(annotations: Iterable[Annotation], size: Size | None, skip: SkipCounter) -> list[Entry]:
    """Each region by its box, or by its point where it has none."""
    entries = []
    for each in annotations:
        if each.box or each.point:
            points = () if each.box or not each.point else ((*each.point, 1),)
            entries.append(Entry(each.place, each.box, points, size=size))
        else:
            skip("empty mask", each.place)
    return entries
