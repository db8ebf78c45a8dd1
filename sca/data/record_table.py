"""Dataset over a file of records, each about regions of one image: a JSON list or JSON Lines."""

from __future__ import annotations

from abc import abstractmethod
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from sca.data.custom import choose_split, make_val_fraction_key, resolve_data_file
from sca.data.json_stream import iter_located_elements
from sca.data.record_index import RecordIndex, group_indices_by_owner, read_jsonl_records
from sca.data.table import TableDataset
from sca.io.errors import InputError
from sca.io.image_names import ImageNameResolver
from sca.io.paths import expand_user, normalize_name
from sca.io.validation import check_object


class RecordTable(TableDataset):
    """Dataset over a file of records, each about regions of one image. The regions are counted from 0.

    A subclass reads a record in `_read_image_name`, `_count_regions`, `_read_image_size` and `_add_record`. The records
    stay in the file, see `RecordIndex`. A file named `*.jsonl` is JSON Lines; any other is a JSON list.

    Args:
        split: "train" or "val", or the name of a split of the files.
        file: File. `{split}` is replaced by the split.
        image_root: Folder that image names are relative to; None for that of the file.
        val_fraction: Fraction of the images of a file without splits that "val" has, see `Jsonl`.
        max_bad_records: Maximum number of unusable records of each kind, see `ConvertedTable`.
    """

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
        folder = self._get_default_image_root() if image_root is None else expand_user(image_root)
        selection_key = self._get_reading_options() + make_val_fraction_key(split, val_fraction)
        super().__init__(split, folder, [self.file], max_bad_records, selection_key)

    @abstractmethod
    def _read_image_name(self, record: dict[str, Any], location: str) -> str | None:
        """Return the name of the image; None, and counted, for a record that is not used. Raises InputError."""

    @abstractmethod
    def _add_record(self, row: dict[str, Any], record: dict[str, Any], first_region_id: int, location: str) -> None:
        """Add the regions of a record and the questions about them to the row of its image. Raises InputError."""

    def _count_regions(self, record: dict[str, Any], location: str) -> int:
        """Return the number of regions of a record. Raises InputError."""
        return 1

    def _read_image_size(self, record: dict[str, Any], location: str) -> tuple[int, int] | None:
        """Return the width and height of the annotated image; None if the record has no size. Raises InputError."""
        return None

    def _get_default_image_root(self) -> Path:
        return self.file.parent

    def _get_reading_options(self) -> str:
        """Return the options of the subclass that the content depends on, as a text."""
        return ""

    def _iter_records(self) -> Iterator[tuple[Any, int, int, int]]:
        """Yield each record, its number in the file, and its byte range."""
        if self.file.suffix == ".jsonl":
            for record, line, start, end in read_jsonl_records(self.file, self._reject_region):
                yield record, line, start, end
        else:
            for number, (record, start, end) in enumerate(iter_located_elements(self.file)):
                yield record, number, start, end

    def _describe_location(self, number: int) -> str:
        """Return the file and number of a record for error messages."""
        return f"{self.file}: line {number}" if self.file.suffix == ".jsonl" else f"{self.file}[{number}]"

    def _iter_entries(self, bar: tqdm[Any]) -> Iterator[Any]:
        """Yield the index of the records, and the index, name and records of an image; images as they appear."""
        name_resolver = ImageNameResolver(self._resolve_image_path)
        index = _NumberedIndex(self.file, self._describe_location)
        images: dict[str, int] = {}
        image_indices = array("q")
        num_regions = 0
        for content, number, start, end in self._iter_records():
            location = self._describe_location(number)
            with self._catch_record_errors():
                record = check_object(content, location)
                name = self._read_image_name(record, location)
                if name is None:
                    continue
                num_record_regions = self._count_regions(record, location)
                name = name_resolver.unify_spelling(normalize_name(name))
                image_indices.append(images.setdefault(name, len(images)))
                index.add_values((num_regions, number), start, end)
                num_regions += num_record_regions
        bar.reset(len(images))
        split_names, remarks = choose_split(map(name_resolver.identify_file, images), self.split, self.val_fraction)
        self.remarks: list[str] = remarks
        for name, (image_index, indices) in zip(
            images, group_indices_by_owner(image_indices, len(images)), strict=True
        ):
            if name_resolver.identify_file(name) in split_names:
                yield index, image_index, name, indices

    def _build_row(self, entry: Any) -> dict[str, Any] | None:
        index, image_id, name, indices = entry
        row: dict[str, Any] | None = None
        for number in indices:
            record, location = index[number]
            with self._catch_record_errors():
                recorded_size = self._read_image_size(record, location)
                if row is None:
                    size = recorded_size or self._measure_image_file(name)
                    if size is None:
                        return None
                    row = self._create_row(image_id, name, *size, is_size_recorded=recorded_size is not None)
                elif recorded_size and recorded_size != (row["width"], row["height"]):
                    raise InputError(
                        f"{location}: the image size is {recorded_size}, but an earlier record has "
                        f"{row['width'], row['height']}"
                    )
                self._add_record(row, record, index.columns["id"][number], location)
        return row


class _NumberedIndex(RecordIndex):
    """Index of records by the id of their first region and their number in the file.

    Args:
        path: File of the records.
        describe: Function that describes the location of a record by its number.
    """

    def __init__(self, path: Path, describe: Callable[[int], str]):
        super().__init__(path, str(path), ("id", "number"))
        self._describe = describe

    def describe_location(self, number: int) -> str:
        """Return the file and number of a record for error messages."""
        return self._describe(self.columns["number"][number])
