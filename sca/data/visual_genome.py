"""Visual Genome's region descriptions, in the publishers' layout and in the splits of DenseCap."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from sca.data.fields import identified, read_json, read_phrases
from sca.data.json_stream import stream
from sca.data.table import TableDataset
from sca.io.errors import InputError
from sca.io.paths import expand_user
from sca.io.validation import convert_box, read_field, check_object, require_size

SPLITS = "densecap_splits.json"
FOLDERS = ("VG_100K", "VG_100K_2")
SIDES = ("x", "y", "width", "height")


class VisualGenome(TableDataset):
    """Dataset: `VisualGenome("test", root=FOLDER)[i]` -> `Sample`, one phrase a region and no masks or names.

    `root` has `image_data.json`, `region_descriptions.json` and the pictures `VG_100K/ID.jpg` or `VG_100K_2/ID.jpg`.
    `splits` is a file {"train": [image id, ...], "val": ..., "test": ...}, by default `densecap_splits.json` in `root`.

    Images come in the order of `region_descriptions.json`. Of a region id that is given twice the first counts; an
    image of the split that `image_data.json` does not have is a bad image, see `TableDataset`.
    """

    reader = "visual-genome"

    def __init__(self, split: str, root: str | Path, splits: str | Path | None = None, max_bad: int = 100):
        root = expand_user(root)
        self.data, self.descriptions = root / "image_data.json", root / "region_descriptions.json"
        self.splits = root / SPLITS if splits is None else expand_user(splits)
        if not self.splits.is_file():
            raise InputError(
                f"no file {self.splits}, which says what is in which split: take info/{SPLITS} of the densecap "
                f"repository (https://github.com/jcjohnson/densecap) and put it into {root}, or give splits=FILE"
            )
        for file in (self.data, self.descriptions):
            if not file.is_file():
                raise InputError(f"no Visual Genome in {root}: there is no {file.name}; give root=FOLDER that has it")
        super().__init__(split, root, [self.descriptions, self.data, self.splits], max_bad, split)

    def _path(self, name: str) -> Path:
        paths = [self.images / folder / name for folder in FOLDERS]
        return next((path for path in paths if path.is_file()), paths[0])

    def _entries(self, bar: tqdm) -> Iterator[Any]:
        """A row without its regions, and of each of them the record, the place and the id."""
        wanted = self._ids()
        bar.reset(len(wanted))
        sizes = {}
        for record, place in identified(stream(self.data), f"{self.data}: ", "image_id", self._reject_image):
            if record["image_id"] in wanted:
                with self._rejecting(self._reject_image):
                    sizes[record["image_id"]] = require_size(record, place)
        for image_id in sorted(wanted - sizes.keys()):
            self._skip_image("image without data", f"{image_id}.jpg", str(image_id), stop=False)
        self._stop_if_too_many()
        seen: set[int] = set()  # region ids
        listing = stream(self.descriptions)
        for described, place in identified(listing, f"{self.descriptions}: ", reject=self._reject_image):
            image_id = described["id"]
            if image_id not in wanted:
                continue
            wanted.remove(image_id)
            if image_id not in sizes:
                continue  # counted already
            regions: list[tuple[dict[str, Any], str, int]] = []
            with self._rejecting(self._reject_image):
                for count, region in enumerate(read_field(described, "regions", list, place)):
                    with self._rejecting():
                        self._collect(regions, region, f"{place}: regions[{count}]", seen)
            yield self._image(image_id, f"{image_id}.jpg", *sizes[image_id]), regions
        for image_id in sorted(wanted & sizes.keys()):
            self._skip("image without regions", f"{image_id}.jpg")

    def _record(self, entry: Any) -> dict[str, Any]:
        image, regions = entry
        for region, place, identity in regions:
            with self._rejecting():
                if region.get("image_id", image["image_id"]) != image["image_id"]:
                    raise InputError(f"{place}: image_id {region['image_id']!r:.80} is not that of its image")
                sides = (read_field(region, side, float, place) for side in SIDES)
                box = convert_box(f"{place}: the box", *sides)
                phrase = read_phrases(read_field(region, "phrase", str, place), "phrase", place)
                self._keep(image, identity, box, place, phrases=phrase)
        return image

    def _collect(self, regions: list[tuple[dict[str, Any], str, int]], region: Any, place: str, seen: set[int]) -> None:
        """Add a region with its place and id, unless its id is among those that were seen."""
        identity = read_field(region, "region_id", int, place)
        place = f"{place} (region_id {identity})"
        if identity in seen:
            return self._skip("region id repeated", place)
        seen.add(identity)
        regions.append((region, place, identity))

    def _ids(self) -> set[int]:
        content = check_object(read_json(self.splits), str(self.splits))
        if self.split not in content:
            raise InputError(f"{self.splits} has no split {self.split!r}; it has: {', '.join(content) or 'none'}")
        listed = read_field(content, self.split, list, str(self.splits))
        wanted: set[int] = set()
        for place, image_id in enumerate(listed):
            if type(image_id) is not int:
                raise InputError(f"{self.splits}: {self.split}[{place}] must be an image id, not {image_id!r:.80}")
            if image_id in wanted:
                self._skip("image id repeated", f"{self.splits}: {self.split}[{place}] (id {image_id})")
            wanted.add(image_id)
        return wanted
