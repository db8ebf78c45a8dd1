"""Prompts for many images: COCO, Label Studio and LabelMe JSON, JSON Lines, and folders of LabelMe files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from sca.io.annotations import coco, label_studio, labelme
from sca.io.annotations.annotation import Annotation, ImageSize, SkipCounter
from sca.io.coordinates import Box
from sca.io.errors import InputError
from sca.io.image_names import ImageNameResolver, list_possible_file_names, read_named_image_size, resolve_image_path
from sca.io.images import format_path
from sca.io.json import is_json_lines_file, open_regular_file, parse_json, parse_json_lines, read_regular_file
from sca.io.prompts import parse_field, parse_prompt_fields, quote_value
from sca.io.region_prompts import RegionPromptEntry, RegionPrompts, get_image_root
from sca.io.validation import read_id, read_image_name, read_recorded_size


def read_region_prompts(path: str | Path) -> RegionPrompts:
    """Read a prompts file, which may be a pipe, or a folder of LabelMe files.

    A file with the suffix .jsonl or .ndjson is JSON Lines; any other is COCO, Label Studio or LabelMe JSON:

    - JSON Lines: one region per line, `{"image": "a.jpg", "box": [x1, y1, x2, y2], "points": [[x, y, label]], "mask":
      RLE or FILE}`, or a record of `sca`, whose `prompt` is reused. Paths of mask files are relative to the prompts
      file.
    - COCO: `bbox` as x, y, width, height, else the box of `segmentation`.
    - Label Studio and LabelMe: the box of each region, else its point.

    Images without annotations have an empty list. `check_prompt` later checks each prompt against its image.

    Args:
        path: File or folder.

    Returns:
        The prompts. `problems` names the file, the line or record, and the field of each record without a prompt.

    Raises:
        InputError: The file or folder cannot be read, or none of its records can.
    """
    path, skip_counter, problems = Path(path), SkipCounter(), list[str]()
    read_entries = _read_labelme_folder if path.is_dir() else _read_prompt_file
    try:
        entries = read_entries(path, skip_counter, problems)
    except OSError as error:
        raise InputError(f"cannot read the prompts {format_path(path)}: {error.strerror}; check the name") from error
    if problems and not any(entries.values()):
        suffix = f" (and {len(problems) - 1} more records cannot be used)" if len(problems) > 1 else ""
        raise InputError(f"{problems[0]}{suffix}")
    return RegionPrompts(path, _merge_spellings(entries, [get_image_root(path), Path()]), skip_counter, problems)


def _read_prompt_file(path: Path, skip: SkipCounter, problems: list[str]) -> dict[str, list[RegionPromptEntry]]:
    with open_regular_file(path, require_seekable=True, allow_pipe=True) as file:
        if is_json_lines_file(path, file, "image"):
            return _read_json_lines(file, path, problems)
        return _parse_json_content(
            parse_json(file.read(), format_path(path), allow_surrogates=True), path, skip, problems
        )


def _read_labelme_folder(folder: Path, skip: SkipCounter, problems: list[str]) -> dict[str, list[RegionPromptEntry]]:
    files = labelme.list_labelme_files(folder)
    if not files:
        raise InputError(f"no .json files in {format_path(folder)}; a folder of prompts contains LabelMe files")
    entries: dict[str, list[RegionPromptEntry]] = {}
    for file in files:
        with _collect_problems(problems):
            for name, regions in _read_labelme_file(file, skip, problems).items():
                entries.setdefault(name, []).extend(regions)
    return entries


def _read_labelme_file(path: Path, skip: SkipCounter, problems: list[str]) -> dict[str, list[RegionPromptEntry]]:
    try:
        content = parse_json(read_regular_file(path), format_path(path), allow_surrogates=True)
        if not isinstance(content, dict) or "shapes" not in content:
            raise InputError(
                f"{format_path(path)} is not a LabelMe file (it has no 'shapes'); move it out of the folder, or pass "
                "it to --prompts by itself"
            )
        return _parse_labelme(content, path, skip, problems)
    except OSError as error:
        raise InputError(
            f"cannot read {format_path(path)}: {error.strerror}; check that the file exists and is readable"
        ) from error


def _merge_spellings(
    entries: Mapping[str, list[RegionPromptEntry]], roots: Sequence[Path]
) -> dict[str, list[RegionPromptEntry]]:
    """Merge the regions of keys that spell the same image file under the first of these keys."""
    name_resolver = ImageNameResolver(partial(resolve_image_path, roots=roots))
    file_names_by_key = {key: list_possible_file_names(key) for key in entries}
    file_name_counts = Counter(name for file_names in file_names_by_key.values() for name in file_names)
    merged: dict[str, list[RegionPromptEntry]] = {}
    for key, regions in entries.items():
        is_shared = any(file_name_counts[name] > 1 for name in file_names_by_key[key])
        merged.setdefault(name_resolver.unify_spelling(key) if is_shared else key, []).extend(regions)
    return merged


def _read_json_lines(file: BinaryIO, path: Path, problems: list[str]) -> dict[str, list[RegionPromptEntry]]:
    entries: dict[str, list[RegionPromptEntry]] = {}
    for location, record in parse_json_lines(file, format_path(path), lambda error: problems.append(str(error))):
        with _collect_problems(problems):
            image, entry = _parse_line(record, location, path)
            entries.setdefault(image, []).append(entry)
    return entries


def _parse_line(record: Any, location: str, path: Path) -> tuple[str, RegionPromptEntry]:
    """Return the image key and the region of a line."""
    if not isinstance(record, dict):
        raise InputError(
            f'{location} is not a JSON object; write lines such as {{"image": "a.jpg", "box": [x1, y1, x2, y2]}}'
        )
    image = read_image_name(record, "image", location)
    box, points, mask = parse_prompt_fields(record.get("prompt", record), location)
    if isinstance(mask, str):
        mask = parse_field(location, "mask", partial(resolve_image_path, roots=[path.parent]), mask)
        if not mask.is_file():
            raise InputError(
                f"{location}, 'mask': there is no file {format_path(mask)}; name it relative to {format_path(path)}"
            )
    return image, RegionPromptEntry(location, box, points, mask, _read_nonzero_size(record, location))


def _read_nonzero_size(record: Mapping[str, Any], location: str) -> ImageSize | None:
    """Return the recorded width and height of an image; None if they are missing or 0."""
    if not record.get("width") or not record.get("height"):
        return None
    return read_recorded_size(record, location)


@contextmanager
def _collect_problems(problems: list[str]) -> Iterator[None]:
    """Append the error of one record to the problems, so that reading continues."""
    try:
        yield
    except InputError as error:
        problems.append(str(error))


def _parse_json_content(
    content: Any, path: Path, skip: SkipCounter, problems: list[str]
) -> dict[str, list[RegionPromptEntry]]:
    if label_studio.is_task(content) or (isinstance(content, list) and content):
        return _parse_label_studio(content, path, skip, problems)
    if isinstance(content, dict) and "shapes" in content:
        return _parse_labelme(content, path, skip, problems)
    return _parse_coco(content, path, skip, problems)


def _parse_coco(content: Any, path: Path, skip: SkipCounter, problems: list[str]) -> dict[str, list[RegionPromptEntry]]:
    for name in ("images", "annotations"):
        if not isinstance(content, dict) or not isinstance(content.get(name), list):
            raise InputError(
                f"{format_path(path)} is not COCO JSON: it has no list '{name}'. If it contains one region per line "
                "(JSON Lines), rename it to .jsonl"
            )
    name_by_id: dict[Any, str] = {}
    size_by_name: dict[str, ImageSize | None] = {}
    entries: dict[str, list[RegionPromptEntry]] = {}
    for index, image in enumerate(content["images"]):
        location = f"{format_path(path)}, images[{index}]"
        with _collect_problems(problems):
            image_id, name = read_id(image, "id", location), read_image_name(image, "file_name", location)
            if image_id in name_by_id or name in entries:
                field = "'id'" if image_id in name_by_id else "'file_name'"
                raise InputError(f"{location}, {field} is already used by a different image; it must be unique")
            name_by_id[image_id], entries[name], size_by_name[name] = name, [], _read_nonzero_size(image, location)
    for index, annotation in enumerate(content["annotations"]):
        location = f"{format_path(path)}, annotations[{index}]"
        with _collect_problems(problems):
            image_id = read_id(annotation, "image_id", location)
            if image_id not in name_by_id:
                raise InputError(f"{location}, 'image_id': no image has the id {quote_value(image_id)}")
            name = name_by_id[image_id]
            entries[name].append(
                RegionPromptEntry(
                    location, _read_coco_box(annotation, location, skip), recorded_size=size_by_name[name]
                )
            )
    return entries


def _read_coco_box(annotation: Mapping[str, Any], location: str, skip: SkipCounter) -> Box:
    skipped: list[tuple[str, str]] = []
    box = coco.read_annotation(annotation, location, None, None, lambda *part: skipped.append(part)).box
    if box is not None:
        for reason, skip_location in skipped:
            skip(reason, skip_location)
        return box
    if annotation.get("segmentation"):
        raise InputError(f"{location}, 'segmentation' is empty; remove the annotation or add a 'bbox'")
    if annotation.get("bbox"):
        raise InputError(
            f"{location}, 'bbox': {quote_value(annotation['bbox'])} has no area; width and height must be above 0"
        )
    raise InputError(f"{location} has neither 'bbox' nor 'segmentation'; add one of them")


def _parse_labelme(
    content: Mapping[str, Any], path: Path, skip: SkipCounter, problems: list[str]
) -> dict[str, list[RegionPromptEntry]]:
    name = read_image_name(content, "imagePath", format_path(path))
    image = parse_field(format_path(path), "imagePath", partial(resolve_image_path, roots=[path.parent]), name)
    size = labelme.find_image_size(content, image, format_path(path))
    shapes = labelme.read_annotations(content, size, format_path(path), skip, lambda error: problems.append(str(error)))
    return {name: _make_entries(shapes, size, skip)}


def _parse_label_studio(
    content: Any, path: Path, skip: SkipCounter, problems: list[str]
) -> dict[str, list[RegionPromptEntry]]:
    entries: dict[str, list[RegionPromptEntry]] = {}
    measure = partial(read_named_image_size, roots=[path.parent, Path()])
    for image in label_studio.read_tasks(
        content, format_path(path), skip, measure, lambda error: problems.append(str(error))
    ):
        entries.setdefault(image.name, []).extend(_make_entries(image.annotations, image.size, skip))
    return entries


def _make_entries(
    annotations: Iterable[Annotation], size: ImageSize | None, skip: SkipCounter
) -> list[RegionPromptEntry]:
    """Create an entry for each region from its box, or from its point if it has no box."""
    entries = []
    for each in annotations:
        if each.box or each.point:
            points = () if each.box or not each.point else ((*each.point, 1),)
            entries.append(RegionPromptEntry(each.location, each.box, points, recorded_size=size))
        else:
            skip("empty mask", each.location)
    return entries
