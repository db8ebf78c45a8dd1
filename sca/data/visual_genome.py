"""Visual Genome's region descriptions in the original layout, with the splits of DenseCap."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from sca.data.json_stream import iter_list_elements
from sca.data.record_parsing import iter_identified_records, parse_phrases, read_dataset_json
from sca.data.table import TableDataset
from sca.io.errors import InputError
from sca.io.paths import expand_user
from sca.io.validation import check_object, read_field, require_recorded_size, xywh_to_xyxy

SPLITS_FILE = "densecap_splits.json"
IMAGE_FOLDERS = ("VG_100K", "VG_100K_2")
BOX_FIELDS = ("x", "y", "width", "height")


class VisualGenome(TableDataset):
    """Visual Genome (arXiv 1602.07332): one phrase per region, no masks and no class names.

    Images are in the order of `region_descriptions.json`. Of records with the same region id the first is kept. An
    image of the split without a record in `image_data.json` is an unusable image. See `TableDataset`.

    Args:
        split: "train", "val" or "test".
        root: Folder with `image_data.json`, `region_descriptions.json`, and the images `VG_100K/ID.jpg` or
            `VG_100K_2/ID.jpg`.
        splits: JSON file {"train": [image id, ...], "val": ..., "test": ...}. Default: `densecap_splits.json` in `root`
            (arXiv 1511.07571).
        max_bad_records: Maximum number of unusable records of each kind, see `ConvertedTable`.
    """

    reader = "visual-genome"

    def __init__(self, split: str, root: str | Path, splits: str | Path | None = None, max_bad_records: int = 100):
        root = expand_user(root)
        self.image_data: Path = root / "image_data.json"
        self.descriptions: Path = root / "region_descriptions.json"
        self.splits: Path = root / SPLITS_FILE if splits is None else expand_user(splits)
        if not self.splits.is_file():
            raise InputError(
                f"{self.splits} does not exist; download info/{SPLITS_FILE} from https://github.com/jcjohnson/densecap "
                f"to {root}, or set splits=FILE"
            )
        for file in (self.image_data, self.descriptions):
            if not file.is_file():
                raise InputError(f"no {file.name} in {root}; set root=FOLDER with the files of Visual Genome")
        super().__init__(split, root, [self.descriptions, self.image_data, self.splits], max_bad_records, split)

    def _resolve_image_path(self, name: str) -> Path:
        paths = [self.image_root / folder / name for folder in IMAGE_FOLDERS]
        return next((path for path in paths if path.is_file()), paths[0])

    def _iter_entries(self, bar: tqdm[Any]) -> Iterator[Any]:
        """Yield a row without regions, and the record, location and id of each of its regions."""
        split_image_ids = self._read_split_image_ids()
        bar.reset(len(split_image_ids))
        size_by_image_id = {}
        for record, location in iter_identified_records(
            iter_list_elements(self.image_data), f"{self.image_data}: ", "image_id", self._reject_image
        ):
            if record["image_id"] in split_image_ids:
                with self._catch_record_errors(self._reject_image):
                    size_by_image_id[record["image_id"]] = require_recorded_size(record, location)
        for image_id in sorted(split_image_ids - size_by_image_id.keys()):
            self._skip_image("image without data", f"{image_id}.jpg", str(image_id), stop=False)
        self._check_max_bad()
        region_ids: set[int] = set()
        described_images = iter_list_elements(self.descriptions)
        for description, location in iter_identified_records(
            described_images, f"{self.descriptions}: ", reject=self._reject_image
        ):
            image_id = description["id"]
            if image_id not in split_image_ids:
                continue
            split_image_ids.remove(image_id)
            if image_id not in size_by_image_id:
                continue  # already counted
            regions: list[tuple[dict[str, Any], str, int]] = []
            with self._catch_record_errors(self._reject_image):
                for region_index, region in enumerate(read_field(description, "regions", list, location)):
                    with self._catch_record_errors():
                        self._append_region(regions, region, f"{location}: regions[{region_index}]", region_ids)
            yield self._create_row(image_id, f"{image_id}.jpg", *size_by_image_id[image_id]), regions
        for image_id in sorted(split_image_ids & size_by_image_id.keys()):
            self._skip("image without regions", f"{image_id}.jpg")

    def _build_row(self, entry: Any) -> dict[str, Any]:
        row, regions = entry
        for region, location, region_id in regions:
            with self._catch_record_errors():
                if region.get("image_id", row["image_id"]) != row["image_id"]:
                    raise InputError(f"{location}: image_id {region['image_id']!r:.80} differs from that of its image")
                box_values = (read_field(region, side, float, location) for side in BOX_FIELDS)
                box = xywh_to_xyxy(f"{location}: the box", *box_values)
                phrase = parse_phrases(read_field(region, "phrase", str, location), "phrase", location)
                self._add_region(row, region_id, box, location, phrases=phrase)
        return row

    def _append_region(
        self, regions: list[tuple[dict[str, Any], str, int]], region: Any, location: str, region_ids: set[int]
    ) -> None:
        """Append a region with its location and id, unless its id is repeated."""
        region_id = read_field(region, "region_id", int, location)
        location = f"{location} (region_id {region_id})"
        if region_id in region_ids:
            return self._skip("duplicate region id", location)
        region_ids.add(region_id)
        regions.append((region, location, region_id))

    def _read_split_image_ids(self) -> set[int]:
        content = check_object(read_dataset_json(self.splits), str(self.splits))
        if self.split not in content:
            raise InputError(f"{self.splits} has no split {self.split!r}; it has: {', '.join(content) or 'none'}")
        id_list = read_field(content, self.split, list, str(self.splits))
        image_ids: set[int] = set()
        for index, image_id in enumerate(id_list):
            if type(image_id) is not int:
                raise InputError(f"{self.splits}: {self.split}[{index}] must be an image id, not {image_id!r:.80}")
            if image_id in image_ids:
                self._skip("duplicate image id", f"{self.splits}: {self.split}[{index}] (id {image_id})")
            image_ids.add(image_id)
        return image_ids
