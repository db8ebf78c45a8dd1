"""JSON Lines, one region per line: files written by hand or by `sca caption`."""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sca_registry.contracts import JUDGE_QUESTIONS, Question
from tqdm.auto import tqdm

from sca.data import record_parsing
from sca.data.custom import choose_split, make_val_fraction_key, resolve_data_file
from sca.data.record_index import LineIndex, group_indices_by_owner, read_jsonl_records
from sca.data.record_parsing import count_unread_caption, parse_phrases
from sca.data.table import TableDataset
from sca.io.errors import InputError
from sca.io.image_names import ImageNameResolver, resolve_image_path
from sca.io.paths import expand_user, normalize_name
from sca.io.validation import read_field, read_number_list, require_recorded_size

BOX_FORMAT = "x1, y1, x2, y2"
TEXT_FIELDS = ("caption", "phrases", "name")


class Jsonl(TableDataset):
    """JSON Lines file with one region per line.

        {"image": "a.jpg", "box": [x1, y1, x2, y2], "caption": "a dog"}

    Fields of a line:

    - `image`: file name, relative to `image_root`, else to the folder of the file or to the current directory.
    - `box`: x1 y1 x2 y2 in image pixels. Default: the box of the mask.
    - `caption`, or `phrases` (a list), or only a `name`, or only questions.
    - `question` and its `answer`, and optionally its `kind`, `regions` and `is_about_image`; or `questions`, a list of
      objects with these fields. `regions` contains the `id` of each region that the question is about: "<region 1>" in
      its text refers to the first one. Default: the region of the line. `is_about_image` is true if the answer also
      depends on other regions, as a count does. The `caption` of a line with a `question` and no `answer` is the
      answer, as `sca caption --question` writes it.
    - `mask`: COCO RLE or polygons; optional.
    - `attributes`: optional. A region may have only `judge_questions`, see `sca_registry.contracts.JudgeQuestion`.
    - `width` and `height` of the image; optional. Without them the image file is opened to measure it.
    - `id` and `image_id`: ids of the region and of the image, on every line or on none. Default: counted from 0.

    Other fields are ignored, so that the output of `sca caption` can be read. Text is UTF-8; blank lines are skipped.
    See `TableDataset`.

    Args:
        split: "train" or "val", or the name of a split of the files.
        file: JSON Lines file. `{split}` is replaced by the split.
        image_root: Folder that image names are relative to.
        val_fraction: Fraction of the images of a file without splits that "val" has: at least 4 images, or a third of
            all if that is fewer. "train" has the others.
        max_bad_records: Maximum number of unusable records of each kind, see `ConvertedTable`.
    """

    reader = "jsonl"

    def __init__(
        self,
        split: str,
        file: str | Path,
        image_root: str | Path | None = None,
        val_fraction: float = 0.0,
        max_bad_records: int = 100,
    ):
        self.val_fraction = val_fraction
        self.file: Path = resolve_data_file(file, split)
        self.working_folder: str = os.getcwd() if image_root is None else ""
        folder = self.file.parent if image_root is None else expand_user(image_root)
        val_fraction_key = make_val_fraction_key(split, val_fraction)
        super().__init__(split, folder, [self.file], max_bad_records, self.working_folder + val_fraction_key)

    def _resolve_image_path(self, name: str) -> Path:
        return resolve_image_path(name, [self.image_root, *([self.working_folder] if self.working_folder else [])])

    def _iter_entries(self, bar: tqdm[Any]) -> Iterator[Any]:
        """Yield the line index, an image's name and id, and its line numbers; images in order of appearance."""
        images: dict[str, tuple[int, int]] = {}  # index and id of each image
        name_by_image_id: dict[int, str] = {}
        class_names: set[str] = set()
        name_resolver = ImageNameResolver(self._resolve_image_path)
        image_indices = array("q")
        is_key_expected: dict[str, bool] = {}
        line_index = LineIndex(self.file, str(self.file), ("id", "line"))
        for record, line, start, end in read_jsonl_records(self.file, self._reject_region):
            with self._catch_record_errors():
                location = f"{self.file}: line {line}"
                is_key_expected = is_key_expected or {key: key in record for key in ("id", "image_id")}
                for key, expected in is_key_expected.items():
                    if (key in record) != expected:
                        problem = f"no {key!r}, which the first line has"
                        problem = problem if expected else f"{key!r}, which the first line lacks"
                        raise InputError(f"{location}: {problem}; set it on every line or on none")
                region_id = read_field(record, "id", int, location) if is_key_expected["id"] else len(image_indices)
                location = f"{location} (id {region_id})"
                name = name_resolver.unify_spelling(normalize_name(read_field(record, "image", str, location)))
                previous_image_id = images[name][1] if name in images else len(images)
                image_id = (
                    read_field(record, "image_id", int, location) if is_key_expected["image_id"] else previous_image_id
                )
                if name_by_image_id.get(image_id, name) != name:
                    raise InputError(
                        f"{location}: duplicate image_id {image_id}, which {name_by_image_id[image_id]} has"
                    )
                if previous_image_id != image_id and name in images:
                    raise InputError(
                        f"{location}: image_id {image_id} differs from the earlier {previous_image_id} of this image"
                    )
                name_by_image_id[image_id] = name
                number, _ = images.setdefault(name, (len(images), image_id))
                if isinstance(record.get("name"), str) and record["name"].strip():
                    class_names.add(record["name"].strip())
                line_index.add_values((region_id, line), start, end)
                image_indices.append(number)
        for number in line_index.check_unique_ids(self._reject_region).duplicates:
            image_indices[number] = -1
        self.attribute_values: dict[str, tuple[str, ...]] = {"name": tuple(sorted(class_names))} if class_names else {}
        bar.reset(len(images))
        split_names, remarks = choose_split(map(name_resolver.identify_file, images), self.split, self.val_fraction)
        self.remarks: list[str] = remarks
        for (name, (_, image_id)), (_, lines) in zip(
            images.items(), group_indices_by_owner(image_indices, len(images)), strict=True
        ):
            if name_resolver.identify_file(name) in split_names:
                yield line_index, name, image_id, lines

    def _build_row(self, entry: Any) -> dict[str, Any] | None:
        line_index, name, image_id, indices = entry
        lines = list(self._iter_lines_of_same_size([(number, *line_index[number]) for number in indices]))
        recorded_size = next(
            (require_recorded_size(record, location) for _, record, location in lines if "width" in record), None
        )
        size = recorded_size or self._measure_image_file(name)
        if not size:
            return None
        row = self._create_row(image_id, name, *size, is_size_recorded=recorded_size is not None)
        for number, record, location in lines:
            with self._catch_record_errors():
                self._add_line(row, record, line_index.columns["id"][number], location)
        return row

    def _iter_lines_of_same_size(
        self, lines: list[tuple[int, dict[str, Any], str]]
    ) -> Iterator[tuple[int, dict[str, Any], str]]:
        """Yield the lines of an image with the first recorded image size; reject the others."""
        first_size: tuple[int, int] | None = None
        for number, record, location in lines:
            with self._catch_record_errors():
                size = (
                    require_recorded_size(record, location) if "width" in record or "height" in record else first_size
                )
                if first_size and size != first_size:
                    raise InputError(f"{location}: the image size is {size}, but an earlier line has {first_size}")
                first_size = size
                yield number, record, location

    def _add_line(self, row: dict[str, Any], record: dict[str, Any], region_id: int, location: str) -> None:
        mask_value = record.get("mask")
        box = (
            None if mask_value and record.get("box") is None else read_number_list(record, "box", BOX_FORMAT, location)
        )
        if box and (box[2] < box[0] or box[3] < box[1]):
            raise InputError(f"{location}: box is {box}, with x2 < x1 or y2 < y1; expected {BOX_FORMAT}")
        count_unread_caption(record, ("caption", "phrases"), location, self._skip)
        text_fields = [key for key in TEXT_FIELDS if record.get(key) is not None]
        if record.get("question") is not None and record.get("answer") is None and "caption" in text_fields:
            text_fields.remove("caption")
            record = {**record, "answer": record["caption"]}
        questions = _parse_questions(record, region_id, location)
        attributes = read_field(record, "attributes", dict, location) if record.get("attributes") else {}
        if not text_fields and not questions and not attributes.get(JUDGE_QUESTIONS):
            raise InputError(f"{location}: no text; set name, caption, phrases, or question and answer")
        if {"caption", "phrases"} <= set(text_fields):
            raise InputError(f"{location}: caption and phrases are mutually exclusive; omit one of them")
        phrase_field = next((key for key in ("caption", "phrases") if key in text_fields), "caption")
        mask = record_parsing.parse_mask(mask_value, "mask", row["width"], row["height"], location, self._skip)
        if box is None and mask is None:
            return  # an empty mask, already counted
        self._add_region(
            row,
            region_id,
            box,
            location,
            mask=mask,
            name=read_field(record, "name", str, location) if "name" in text_fields else None,
            phrases=parse_phrases(record.get(phrase_field), phrase_field, location)
            if phrase_field in text_fields
            else [],
            attributes=attributes,
            questions=questions,
        )


def _parse_questions(record: dict[str, Any], region_id: int, location: str) -> list[Question]:
    """Return the questions of a line. Raises InputError for an invalid one."""
    tables = read_field(record, "questions", list, location) if record.get("questions") is not None else []
    if record.get("question") is not None or record.get("answer") is not None:
        tables = [record, *tables]
    questions = []
    for table in tables:
        if not isinstance(table, dict):
            raise InputError(f"{location}: questions has {table!r:.60}; expected objects with question and answer")
        fields: dict[str, Any] = {
            key: read_field(table, key, kind, location)
            for key, kind in (("kind", str), ("is_about_image", bool))
            if table.get(key) is not None
        }
        region_ids = [region_id] if table.get("regions") is None else read_field(table, "regions", list, location)
        if not all(isinstance(each, int) and not isinstance(each, bool) for each in region_ids):
            raise InputError(f"{location}: regions is {region_ids!r:.60}; expected a list of ids")
        text, answer = (read_field(table, key, str, location).strip() for key in ("question", "answer"))
        try:
            questions.append(Question(text, answer, tuple(region_ids), **fields))
        except ValueError as error:
            raise InputError(f"{location}: {error}") from error
    return questions
