"""SA-1B: masks without names, and captions where somebody made them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from sca.data.coco import read_region
from sca.data.fields import identified, note_unread_caption, read_json, read_phrases
from sca.data.table import TableDataset
from sca.io.errors import InputError
from sca.io.paths import expand_user
from sca.io.validation import read_field, check_object, require_size
from sca.io.walk import walk_files

CAPTIONS = ".captions.json"  # what the name of a file of captions ends with


class Sa1b(TableDataset):
    """Dataset: `Sa1b("train", root=FOLDER)`: masks of SA-1B (arXiv 2304.02643) with captions.

    `root` holds `sa_1.json`, `sa_1.jpg` and so on, or folders of them, as the archives have them. SA-1B has no words:
    an annotation may have a "caption" (a string or a list of them), or `sa_1.captions.json` beside the file maps
    annotation ids to captions. Masks without words are left out and counted, and so is a caption of a mask, or a file
    of captions of a picture, that is not there. A box is the tight one of its mask: published boxes end on the last
    pixel instead of behind it, and those of masks a pixel wide have no width. There is one split, "train". The rest is
    that of `TableDataset`.
    """

    reader = "sa1b"

    def __init__(self, split: str, root: str | Path, max_bad: int = 100):
        if split != "train":
            raise InputError(f"SA-1B has one split, train, and {split!r} was asked for")
        root = expand_user(root)
        below = (path for path in walk_files(root) if path.match("sa_*.json"))
        there = sorted(below, key=lambda file: (str(file.parent), len(file.name), file.name))  # by number in a folder
        self.files = [path for path in there if not path.name.endswith(CAPTIONS)]
        if not self.files:
            raise InputError(f"no SA-1B in {root}: there is no sa_*.json; give root=FOLDER that has them")
        named: dict[str, Path] = {}
        for file in self.files:
            if (other := named.setdefault(file.name, file)) != file:
                raise InputError(f"{file} is the same picture as {other}; a picture may be there once")
        self.captions = [path for path in there if path.name.endswith(CAPTIONS)]
        super().__init__(split, root, [*self.files, *self.captions], max_bad)

    def _entries(self, bar: tqdm) -> Iterator[Any]:
        bar.reset(len(self.files))
        known = set(map(_captions, self.files))
        for lost in (file for file in self.captions if file not in known):
            self._skip("captions of no picture", str(lost))
        yield from self.files

    def _record(self, entry: Any) -> dict[str, Any]:
        file = entry
        content = read_json(file)
        record, place = read_field(content, "image", dict, str(file)), f"{file}: image"
        folder = file.parent.relative_to(self.images)
        name = str(folder / read_field(record, "file_name", str, place))
        image_id = read_field(record, "image_id", int, place)
        if file.stem != f"sa_{image_id}":
            raise InputError(f"{place}: image_id {image_id} is not that in the name of the file")
        image = self._image(image_id, name, *require_size(record, place))
        captions = check_object(read_json(_captions(file)), str(_captions(file))) if _captions(file).is_file() else {}
        where = f"{file}: annotations"
        for annotation, at in identified(
            read_field(content, "annotations", list, str(file)), where, reject=self._reject
        ):
            with self._rejecting():
                beside = captions.pop(str(annotation["id"]), None)
                if beside is None:
                    note_unread_caption(annotation, ("caption",), at, self._skip)
                told = read_phrases(annotation.get("caption"), "caption", at) + read_phrases(beside, "caption", at)
                shape = {**annotation, "bbox": None} if annotation.get("segmentation") else annotation
                region = read_region(shape, at, image, self._skip)
                if region is not None:
                    self._keep(image, annotation["id"], region.box, at, mask=region.mask, phrases=told)
        for identity in captions:
            self._skip("caption of no mask", f"{_captions(file)}: {identity}")
        return image


def _captions(file: Path) -> Path:
    return file.with_suffix(CAPTIONS)
