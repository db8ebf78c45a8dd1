"""Training data of Describe Anything (DAM, arXiv 2504.16072): masks with detailed captions."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sca.data.json_stream import LIST_START, iter_members
from sca.data.record_parsing import parse_mask, parse_phrases
from sca.data.record_table import RecordTable
from sca.io.errors import InputError
from sca.io.validation import read_field, read_image_name, read_recorded_size

SAMPLE_KEY = "sample_id"  # key of a record's list in the file, added to the record
IMAGE_FOLDER = "images"


class DamJson(RecordTable):
    """Describe Anything's data: `annotations.json` of one of its parts, such as COCOStuff.

        {"SAMPLE": [{"mask_rle": {"size": [height, width], "counts": "..."}, "caption": "TEXT"}, ...], ...}

    The image of a sample is `images/SAMPLE.jpg`. Extract the image archives first, such as with
    `for file in images/*.tar; do tar -xf "$file" -C images; done`. The pickle files in them are not read, because
    reading one can run its code; delete them. Records of videos are skipped and counted. The layout is that of
    huggingface.co/datasets/nvidia/describe-anything-dataset. Takes the arguments of `RecordTable`.
    """

    reader = "dam-json"

    def _get_default_image_root(self) -> Path:
        return self.file.parent / IMAGE_FOLDER

    def _iter_records(self) -> Iterator[tuple[Any, int, int, int]]:
        number = 0
        for sample, record, start, end in iter_members(self.file):
            if sample is None:
                raise InputError(f"{self.file} is a list; expected an object with the regions of each sample")
            if record is not LIST_START:
                yield {**record, SAMPLE_KEY: sample} if isinstance(record, dict) else record, number, start, end
                number += 1

    def _read_image_name(self, record: dict[str, Any], location: str) -> str | None:
        if isinstance(record.get("mask_rle"), list):
            self._skip("record of a video", location)
            return None
        return f"{read_image_name(record, SAMPLE_KEY, location)}.jpg"

    def _read_image_size(self, record: dict[str, Any], location: str) -> tuple[int, int] | None:
        size = read_field(read_field(record, "mask_rle", dict, location), "size", list, location)
        height, width = size if len(size) == 2 else (0, 0)
        return read_recorded_size({"width": width, "height": height}, f"{location}: mask_rle")

    def _add_record(self, row: dict[str, Any], record: dict[str, Any], first_region_id: int, location: str) -> None:
        size = row["width"], row["height"]
        mask = parse_mask(record["mask_rle"], "mask_rle", *size, location, self._skip)
        phrases = parse_phrases(read_field(record, "caption", str, location), "caption", location)
        if mask:
            self._add_region(row, first_region_id, None, location, mask=mask, phrases=phrases)
