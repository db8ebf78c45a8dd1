"""Dataset over a table of `sca.data.conversion`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cached_property
from typing import Any

from PIL import Image
from sca_registry.contracts import Question, Region, Sample

from sca.data import record_parsing
from sca.data.conversion import ConvertedTable
from sca.io.annotations.shapes import scale_region
from sca.io.coordinates import compute_resize_factors
from sca.io.errors import InputError
from sca.io.images import open_image, read_image_file_size


class TableDataset(ConvertedTable):
    """Dataset over a converted table: `dataset[i]` returns a `Sample`.

    Regions of an image that was resized after its annotation are scaled to it. An unreadable image, or one whose aspect
    ratio differs from the recorded one (with the EXIF orientation applied), is found only when it is read. Iteration
    then skips it, and an index returns the next readable sample instead. Both are counted in `skipped`.

    Takes the arguments and has the attributes of `ConvertedTable`.
    """

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: int) -> Sample:
        """Return a sample, or the next readable one.

        Args:
            index: Index of the sample.

        Returns:
            The sample.

        Raises:
            IndexError: The index is out of range.
            EmptyDatasetError: No image can be read.
            InputError: More than `max_bad_records` images are unusable.
        """
        self._check_index(index)
        for step in range(len(self)):
            sample = self.read_sample((index + step) % len(self))
            if sample is not None:
                return sample
        raise record_parsing.EmptyDatasetError(
            f"no image in {self.image_root} can be read; {self._summarize_skipped()}"
        )

    def __iter__(self) -> Iterator[Sample]:
        """Iterate over the readable samples once."""
        return (sample for sample in map(self.read_sample, range(len(self))) if sample is not None)

    def read_sample(self, index: int) -> Sample | None:
        """Read exactly one sample.

        Args:
            index: Index of the sample.

        Returns:
            The sample; None, and counted in `skipped`, if its image is unusable.

        Raises:
            IndexError: The index is out of range.
            InputError: More than `max_bad_records` images are unusable.
        """
        self._check_index(index)
        row = self._table[int(index)]
        name, size = row["file"], (row["width"], row["height"])
        try:
            image = self._open_image(name)
        except InputError as error:
            self._skip_image("image unreadable", name, f"{name} ({error})")
            return None
        regions = [_row_to_region(region, *size) for region in row["regions"]]
        if image.size != size:
            try:
                scale = compute_resize_factors(size, image.size)
            except ValueError as error:
                self._skip_image("image of a different size", name, f"{name} ({error})")
                return None
            regions = [scaled for region in regions if (scaled := scale_region(region, scale, image.size)) is not None]
            if not regions:
                self._skip_image("image of a different size", name, f"{name} (no region is inside it)")
                return None
        region_ids = {region.id for region in regions}
        questions = [each for each in _read_questions(row) if region_ids.issuperset(each.region_ids)]
        return Sample(image, row["image_id"], tuple(regions), tuple(questions))

    def iter_annotations(self) -> Iterator[tuple[Region, ...]]:
        """Yield the regions of each image in order, without opening images."""
        for row in self._table:
            yield tuple(_row_to_region(region, row["width"], row["height"]) for region in row["regions"])

    def iter_questions(self) -> Iterator[tuple[Question, ...]]:
        """Yield the questions about each image in order, without opening images."""
        for row in self._table.select_columns("questions"):
            yield _read_questions(row)

    @cached_property
    def image_ids(self) -> list[int]:
        """Ids of the images in order."""
        return self._table.data["image_id"].to_pylist()

    def _open_image(self, name: str) -> Image.Image:
        """Open an image by its name in the table. Raises InputError."""
        return open_image(self._resolve_image_path(name))

    def _measure_image_file(self, name: str) -> tuple[int, int] | None:
        """Return the width and height of an image file; None, and counted, if it is missing or unreadable."""
        path = self._find_image_file(name)
        if path is None:
            return None
        try:
            return read_image_file_size(path)
        except InputError as error:
            self._skip_image("image unreadable", name, f"{name} ({error})", stop=False)
            return None

    def _check_index(self, index: int) -> None:
        if not 0 <= index < len(self):
            raise IndexError(f"sample index {index} is out of range for {self.sources[0]} with {len(self)} samples")


def _read_questions(row: dict[str, Any]) -> tuple[Question, ...]:
    return tuple(Question(**{**each, "region_ids": tuple(each["region_ids"])}) for each in row["questions"])


def _row_to_region(region_row: dict[str, Any], width: int, height: int) -> Region:
    attributes = json.loads(region_row["attributes"])
    return Region(
        region_row["id"],
        tuple(region_row["box"]),
        None if region_row["mask"] is None else {"size": [height, width], "counts": region_row["mask"]},
        region_row["name"],
        tuple(region_row["phrases"]),
        {key: tuple(value) if isinstance(value, list) else value for key, value in attributes.items()},
    )
