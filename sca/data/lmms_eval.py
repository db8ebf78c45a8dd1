"""RefCOCO, RefCOCO+ and RefCOCOg in the Parquet files of lmms-eval (arXiv 2407.12772), which contain the images."""

from __future__ import annotations

import glob
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm.auto import tqdm

from sca.data.parquet_rows import iter_parquet_rows, open_parquet, read_row_group
from sca.data.record_parsing import parse_phrases
from sca.data.table import TableDataset
from sca.io.errors import InputError
from sca.io.images import open_image_header, read_image, read_upright_size
from sca.io.paths import expand_user
from sca.io.validation import read_field, read_xywh_box, require_key

COLUMNS = ("image", "answer", "bbox")
ROW_MARK = "#row="  # between the file name and the row of an image


class LmmsEvalRegions(TableDataset):
    """Regions of lmms-eval: `data/SPLIT-*.parquet` with one region, its expressions and its image per row.

    The box of a row is `bbox`, its phrases are the texts in `answer`. Every row is a sample of its own. The layout is
    that of https://huggingface.co/datasets/lmms-lab/RefCOCOg, which the tasks `refcocog_bbox_val` and
    `refcocog_bbox_test` of https://github.com/EvolvingLMMs-Lab/lmms-eval read. See `TableDataset`.

    Only the images of one row group are in memory: read the samples in order, since each change of the row group reads
    and decodes another one.

    Args:
        split: Name of the split, such as "val" or "test".
        root: Folder of the dataset, or its folder `data`.
        max_bad_records: Maximum number of unusable records of each kind: a benchmark is complete by default.
    """

    reader = "lmms-eval-regions"

    def __init__(self, split: str, root: str | Path, max_bad_records: int = 0):
        folder = expand_user(root)
        pattern = f"{glob.escape(split)}-*.parquet"
        is_name = not {"/", os.sep, "\0"} & set(split)
        files = sorted([*folder.glob(pattern), *folder.glob(f"data/{pattern}")]) if is_name else []
        if not files:
            raise InputError(f"no {split}-*.parquet in {folder} or its folder data; set root=FOLDER and a split")
        self._cells_path: Path | None = None
        self._cells: dict[int, Any] = {}  # images of the row group that was read last, by row
        super().__init__(split, files[0].parent, files, max_bad_records)

    def _iter_entries(self, bar: tqdm[Any]) -> Iterator[Any]:
        """Yield the number of a row, its file, its number in the file, its content and its location."""
        number = 0
        for path in self.sources:
            for row, content in enumerate(iter_parquet_rows(path, COLUMNS)):
                yield number, path, row, content, f"{path}, row {row + 1}"
                number += 1

    def _build_row(self, entry: Any) -> dict[str, Any]:
        number, path, row_number, content, location = entry
        with _open_embedded_image(content, location) as file:
            open_image_header(file, location)  # raises InputError for a file that is not an image
            file.seek(0)
            width, height = read_upright_size(file)
        row = self._create_row(number, f"{path.name}{ROW_MARK}{row_number}", width, height)
        box = read_xywh_box(content, "bbox", location)
        self._add_region(row, number, box, location, phrases=parse_phrases(content["answer"], "answer", location))
        return row

    def _resolve_image_path(self, name: str) -> Path:
        return self.image_root / name.partition(ROW_MARK)[0]

    def _find_image_file(self, name: str) -> Path | None:
        return self._resolve_image_path(name)

    def _open_image(self, name: str) -> Image.Image:
        path, row = self._resolve_image_path(name), int(name.partition(ROW_MARK)[2])
        with _open_embedded_image({"image": self._read_image_cell(path, row)}, name) as file:
            return read_image(file, name)

    def _read_image_cell(self, path: Path, row: int) -> Any:
        """Return the column `image` of a row; the row group that contains it stays in memory for the next rows."""
        if path != self._cells_path or row not in self._cells:
            file = open_parquet(path, ["image"])
            start = 0
            for group in range(file.num_row_groups):
                stop = start + file.metadata.row_group(group).num_rows
                if start <= row < stop:
                    cells = [each["image"] for each in read_row_group(path, file, group, ["image"])]
                    self._cells_path, self._cells = path, dict(zip(range(start, stop), cells, strict=True))
                start = stop
        return self._cells[row]


def _open_embedded_image(content: Any, location: str) -> io.BytesIO:
    cell = read_field(content, "image", dict, location)
    data = require_key(cell, "bytes", location)
    if not isinstance(data, bytes):
        raise InputError(f"{location}: the image has no bytes; download the files again")
    return io.BytesIO(data)
