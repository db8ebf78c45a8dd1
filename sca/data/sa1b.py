"""SA-1B: masks without class names, with optional captions."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from sca.data.coco import read_region_annotation
from sca.data.record_parsing import count_unread_caption, iter_identified_records, parse_phrases, read_dataset_json
from sca.data.table import TableDataset
from sca.io.errors import InputError
from sca.io.file_walk import walk_files
from sca.io.paths import expand_user
from sca.io.validation import check_object, read_field, require_recorded_size

CAPTIONS_SUFFIX = ".captions.json"


class Sa1b(TableDataset):
    """SA-1B (arXiv 2304.02643): masks with captions.

    SA-1B has no captions of its own. An annotation may have a "caption" (a string or a list of strings), or the file
    `sa_1.captions.json` next to `sa_1.json` maps annotation ids to captions. Masks without captions are skipped and
    counted, as are captions of missing masks and caption files of missing images.

    A box is the tight box of its mask: published boxes end at the last pixel instead of after it, so those of
    one-pixel-wide masks have zero width. See `TableDataset`.

    Args:
        split: "train".
        root: Folder with `sa_1.json`, `sa_1.jpg` and so on, or with subfolders of them, as in the archives.
        max_bad_records: Maximum number of unusable records of each kind, see `ConvertedTable`.
    """

    reader = "sa1b"

    def __init__(self, split: str, root: str | Path, max_bad_records: int = 100):
        if split != "train":
            raise InputError(f"no split {split!r} in SA-1B; its only split is train")
        root = expand_user(root)
        annotation_files = (path for path in walk_files(root) if path.match("sa_*.json"))
        # Numeric order in each folder.
        sorted_files = sorted(annotation_files, key=lambda file: (str(file.parent), len(file.name), file.name))
        self.files: list[Path] = [path for path in sorted_files if not path.name.endswith(CAPTIONS_SUFFIX)]
        if not self.files:
            raise InputError(f"no sa_*.json in {root}; set root=FOLDER with the files of SA-1B")
        file_by_name: dict[str, Path] = {}
        for file in self.files:
            if (other := file_by_name.setdefault(file.name, file)) != file:
                raise InputError(f"{file} and {other} are the same image; remove one of them")
        self.caption_files: list[Path] = [path for path in sorted_files if path.name.endswith(CAPTIONS_SUFFIX)]
        super().__init__(split, root, [*self.files, *self.caption_files], max_bad_records)

    def _iter_entries(self, bar: tqdm[Any]) -> Iterator[Any]:
        bar.reset(len(self.files))
        expected_caption_files = set(map(_get_captions_file, self.files))
        for unmatched_file in (file for file in self.caption_files if file not in expected_caption_files):
            self._skip("captions without image", str(unmatched_file))
        yield from self.files

    def _build_row(self, entry: Any) -> dict[str, Any]:
        file = entry
        content = read_dataset_json(file)
        record, image_location = read_field(content, "image", dict, str(file)), f"{file}: image"
        folder = file.parent.relative_to(self.image_root)
        name = str(folder / read_field(record, "file_name", str, image_location))
        image_id = read_field(record, "image_id", int, image_location)
        if file.stem != f"sa_{image_id}":
            raise InputError(f"{image_location}: image_id {image_id} does not match the file name")
        row = self._create_row(image_id, name, *require_recorded_size(record, image_location))
        captions = (
            check_object(read_dataset_json(_get_captions_file(file)), str(_get_captions_file(file)))
            if _get_captions_file(file).is_file()
            else {}
        )
        list_location = f"{file}: annotations"
        for annotation, location in iter_identified_records(
            read_field(content, "annotations", list, str(file)), list_location, reject=self._reject_region
        ):
            with self._catch_record_errors():
                separate_captions = captions.pop(str(annotation["id"]), None)
                if separate_captions is None:
                    count_unread_caption(annotation, ("caption",), location, self._skip)
                phrases = parse_phrases(annotation.get("caption"), "caption", location) + parse_phrases(
                    separate_captions, "caption", location
                )
                unboxed_annotation = {**annotation, "bbox": None} if annotation.get("segmentation") else annotation
                region = read_region_annotation(unboxed_annotation, location, row, self._skip)
                if region is not None:
                    self._add_region(row, annotation["id"], region.box, location, mask=region.mask, phrases=phrases)
        for annotation_id in captions:
            self._skip("caption without mask", f"{_get_captions_file(file)}: {annotation_id}")
        return row


def _get_captions_file(file: Path) -> Path:
    return file.with_suffix(CAPTIONS_SUFFIX)
