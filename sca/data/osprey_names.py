"""Names of LVIS and PACO as Osprey (arXiv 2312.10032) evaluates them: 1,000 images each, with masks and class names."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from sca.data.coco import read_region_annotation
from sca.data.record_parsing import check_benchmark_split, read_dataset_json
from sca.data.table import TableDataset
from sca.io.annotations import coco
from sca.io.errors import InputError
from sca.io.image_names import resolve_image_path
from sca.io.paths import expand_user
from sca.io.validation import check_choice, check_type, read_field, read_image_name, require_key, require_recorded_size

SPLIT = "val"
COLLECTIONS = ("lvis", "paco")
IMAGE_FOLDERS = ("", "train2017", "val2017")  # of COCO, in `image_root`


class OspreyNames(TableDataset):
    """Masks and class names of LVIS or PACO in the files of Osprey, a JSON list of images.

        [{"file_name": "000000123456.jpg", "height": 480, "width": 640, "categories": ["car:wheel"],
          "annotations": [{"segmentation": [[...]]}]}]

    The name of a region is the category of the same index, with spaces instead of underscores and colons. The id of a
    region is its position in the file. The files are `lvis_val_1k_category.json` and `paco_val_1k_category.json` of
    https://huggingface.co/datasets/sunshine-lwt/Osprey-ValData; the layout is that of `osprey/eval/lvis_paco_eval.py`
    in https://github.com/CircleRadon/Osprey. See `TableDataset`.

    Args:
        split: "val".
        root: Folder with the JSON file.
        collection: "lvis" or "paco".
        image_root: Folder with the images of COCO 2017, or with its folders `train2017` and `val2017`. Default: `root`.
        max_bad_records: Maximum number of unusable records of each kind: a benchmark is complete by default.
    """

    reader = "osprey-names"

    def __init__(
        self,
        split: str,
        root: str | Path,
        collection: str = "lvis",
        image_root: str | Path | None = None,
        max_bad_records: int = 0,
    ):
        check_benchmark_split(split, SPLIT)
        check_choice("collection", collection, COLLECTIONS)
        self.file: Path = expand_user(root) / f"{collection}_val_1k_category.json"
        if not self.file.is_file():
            raise InputError(f"{self.file} does not exist; set root=FOLDER with the file of Osprey")
        folder = expand_user(root if image_root is None else image_root)
        super().__init__(split, folder, [self.file], max_bad_records)

    def _resolve_image_path(self, name: str) -> Path:
        return resolve_image_path(name, [self.image_root / folder for folder in IMAGE_FOLDERS])

    def _iter_entries(self, bar: tqdm[Any]) -> Iterator[Any]:
        """Yield the index of an image, its record, its location, and the number of annotations before it."""
        records = read_dataset_json(self.file)
        check_type(str(self.file), records, list, InputError)
        bar.reset(len(records))
        annotations_before = 0
        for index, record in enumerate(records):
            yield index, record, f"{self.file}[{index}]", annotations_before
            annotations = record.get("annotations") if isinstance(record, dict) else None
            annotations_before += len(annotations) if isinstance(annotations, list) else 0

    def _build_row(self, entry: Any) -> dict[str, Any]:
        index, record, location, annotations_before = entry
        width, height = require_recorded_size(record, location)
        row = self._create_row(index, read_image_name(record, "file_name", location), width, height)
        categories, annotations = (read_field(record, key, list, location) for key in ("categories", "annotations"))
        if len(categories) != len(annotations):
            raise InputError(f"{location} has {len(categories)} categories and {len(annotations)} annotations")
        for number, (name, annotation) in enumerate(zip(categories, annotations, strict=True)):
            place = f"{location}: annotations[{number}]"
            with self._catch_record_errors():
                check_type(f"{location}: categories[{number}]", name, str, InputError)
                mask = {"segmentation": require_key(annotation, "segmentation", place)}
                region = read_region_annotation(mask, place, row, self._skip)
                if region is not None:
                    clean_name = coco.clean_category_name(name.replace(":", " "))
                    self._add_region(
                        row, annotations_before + number, region.box, place, mask=region.mask, name=clean_name
                    )
        return row
