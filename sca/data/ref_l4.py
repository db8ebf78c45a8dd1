"""Ref-L4 (arXiv 2406.16866): boxes on images of COCO and Objects365, with long descriptions."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from sca.data.parquet_rows import iter_parquet_rows
from sca.data.record_parsing import check_benchmark_split, parse_phrases
from sca.data.table import TableDataset
from sca.io.errors import InputError
from sca.io.image_names import resolve_image_path
from sca.io.paths import expand_user
from sca.io.validation import read_field, read_image_name, read_xywh_box, require_recorded_size

SPLITS = ("val", "test")
COLUMNS = ("id", "caption", "bbox", "bbox_id", "file_name", "width", "height")
IMAGE_FOLDERS = ("images", "")  # in `root`, extracted from images.tar.gz


class RefL4(TableDataset):
    """Ref-L4: `ref-l4-val.parquet` and `ref-l4-test.parquet`, with one description of a box per row.

    The descriptions with the same `bbox_id` are the phrases of one region, whose id is the first `id`. The layout is
    that of https://huggingface.co/datasets/JierunChen/Ref-L4, with the columns of its data loader in
    https://github.com/JierunChen/Ref-L4. See `TableDataset`.

    Args:
        split: "val" or "test".
        root: Folder with the Parquet files, and the content of `images.tar.gz` there or in `images`.
        max_bad_records: Maximum number of unusable records of each kind: a benchmark is complete by default.
    """

    reader = "ref-l4"

    def __init__(self, split: str, root: str | Path, max_bad_records: int = 0):
        check_benchmark_split(split, *SPLITS)
        folder = expand_user(root)
        self.file: Path = folder / f"ref-l4-{split}.parquet"
        if not self.file.is_file():
            raise InputError(f"{self.file} does not exist; set root=FOLDER with the files of Ref-L4")
        super().__init__(split, folder, [self.file], max_bad_records)

    def _resolve_image_path(self, name: str) -> Path:
        return resolve_image_path(name, [self.image_root / folder for folder in IMAGE_FOLDERS])

    def _iter_entries(self, bar: tqdm[Any]) -> Iterator[Any]:
        """Yield the index of an image, its name, and its rows with their locations; images in order of appearance."""
        images: dict[str, list[tuple[dict[str, Any], str]]] = {}
        for number, record in enumerate(iter_parquet_rows(self.file, COLUMNS)):
            location = f"{self.file}, row {number + 1}"
            with self._catch_record_errors():
                images.setdefault(read_image_name(record, "file_name", location), []).append((record, location))
        bar.reset(len(images))
        for index, (name, rows) in enumerate(images.items()):
            yield index, name, rows

    def _build_row(self, entry: Any) -> dict[str, Any]:
        index, name, records = entry
        row = self._create_row(index, name, *require_recorded_size(*records[0]))
        regions: dict[str, list[tuple[dict[str, Any], str]]] = {}
        for record, location in records:
            regions.setdefault(str(record["bbox_id"]), []).append((record, location))
        for region_records in regions.values():
            with self._catch_record_errors():
                self._add_described_box(row, region_records)
        return row

    def _add_described_box(self, row: dict[str, Any], records: list[tuple[dict[str, Any], str]]) -> None:
        first, location = records[0]
        texts = [read_field(record, "caption", str, place) for record, place in records]
        box = read_xywh_box(first, "bbox", location)
        if any(record["bbox"] != first["bbox"] for record, _ in records):
            raise InputError(f"{location}: bbox_id {first['bbox_id']} has several boxes; copy the file again")
        region_id = str(first["id"])
        if not region_id.isdecimal():
            raise InputError(f"{location}: id is {region_id!r:.60}; expected the digits of a number")
        self._add_region(row, int(region_id), box, location, phrases=parse_phrases(texts, "caption", location))
