"""Datasets in the files of labeling tools: exports of Label Studio, and folders of LabelMe files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm.auto import tqdm

from sca.data.fields import read_json
from sca.data.own import check_hold_out, choose_split, find_split
from sca.data.table import TableDataset
from sca.io.annotations import label_studio, labelme
from sca.io.annotations.annotation import AnnotatedImage
from sca.io.errors import InputError
from sca.io.image_names import ImageFiles, measure_named_image
from sca.io.paths import expand_user, normalize_name
from sca.io.validation import read_field, check_object, read_size


class Annotations(TableDataset):
    """Dataset: `Annotations("val", file=PATH, hold_out=0.1)[i]` -> `Sample`: a JSON export of Label Studio, a LabelMe
    file, or a folder of LabelMe files.

    A region's name is its label, and its phrases are its texts: Label Studio's text areas, LabelMe's description. What
    cannot be a region, such as a keypoint or a relation, is counted. An image is named relative to `images` if given,
    else to the file's folder; where LabelMe's image is missing, it is the one inside its file (`imageData`). Images and
    regions are numbered from 0. `hold_out` is that of `CocoJson`. The rest is that of `TableDataset`.
    """

    reader = "annotations"

    def __init__(
        self,
        split: str,
        file: str | Path,
        images: str | Path | None = None,
        hold_out: float = 0.0,
        max_bad: int = 100,
    ):
        self.hold_out = hold_out
        self.file = find_split(str(expand_user(file)), split)
        files = labelme.list_files(self.file) if self.file.is_dir() else [self.file]
        if not files or not files[0].is_file():
            raise InputError(f"{self.file} is neither a .json file nor a folder of LabelMe files; give file=PATH")
        folder = files[0].parent if images is None else expand_user(images)
        super().__init__(split, folder, files, max_bad, check_hold_out(split, hold_out))

    def _entries(self, bar: tqdm) -> Iterator[Any]:
        """The number of an image, that of its first region, and the image with its regions."""
        files = ImageFiles(self._path)
        found = self._merge(self._annotated(), files)
        bar.reset(len(found))
        names = (each.label for image in found for each in image.annotations)
        self.attributes = {"name": tuple(sorted({name.strip() for name in names if name and name.strip()}))}
        names = [files.identify(image.name) for image in found]
        chosen, self.remarks = choose_split(names, self.split, self.hold_out)
        first = 0
        for number, (image, name) in enumerate(zip(found, names, strict=True)):
            if name in chosen:
                yield number, first, image
            first += len(image.annotations)

    def _record(self, entry: Any) -> dict[str, Any] | None:
        number, first, annotated = entry
        if annotated.size is None:  # of a task without regions
            return self._skip("image without regions", annotated.name)
        image = self._image(number, annotated.name, *annotated.size, annotated.is_size_recorded)
        for identity, region in enumerate(annotated.annotations, first):
            if region.box is None:
                self._skip("region without a box or mask", region.place)
                continue
            if region.unread:
                self._skip(region.unread, region.place)
            captions = [text.strip() for text in region.captions]
            self._keep(image, identity, region.box, region.place, region.mask, name=region.label, phrases=captions)
        return image

    def _open_image(self, name: str) -> Image.Image:
        if not name.endswith(".json"):
            return super()._open_image(name)
        return labelme.open_embedded(read_json(Path(name)), name)

    def _merge(self, annotated: Iterable[AnnotatedImage], files: ImageFiles) -> list[AnnotatedImage]:
        """Merge the regions of each image file, in whatever spelling and in however many tasks it occurs."""
        found: dict[str, AnnotatedImage] = {}
        for image in annotated:
            name = files.unify(image.name)
            first = found.setdefault(name, image)
            if first is image:
                continue
            if first.size and image.size and first.size != image.size:
                sizes = " and ".join(f"{width} x {height}" for width, height in (first.size, image.size))
                self._reject_image(f"{image.place}: {name!r} is recorded with two sizes, {sizes}")
                continue
            regions = [*first.annotations, *image.annotations]
            found[name] = first._replace(size=first.size or image.size, annotations=regions)
        return list(found.values())

    def _annotated(self) -> Iterator[AnnotatedImage]:
        for file in self.sources:
            content = read_json(file)
            if isinstance(content, list) or label_studio.is_task(content):
                measure = partial(measure_named_image, roots=[self.images])
                yield from label_studio.read_tasks(content, str(file), self._skip, measure, self._reject)
                continue
            name = read_field(check_object(content, str(file)), "imagePath", str, str(file))
            try:
                image = self._labelme(content, normalize_name(name), file)
            except InputError as error:
                self._skip_image("image without data", str(file), str(error), stop=False)
            else:
                yield image

    def _labelme(self, content: dict[str, Any], name: str, file: Path) -> AnnotatedImage:
        """An image; one that is inside the file is named by the file."""
        path = self._path(name)
        size = labelme.find_size(content, path, str(file))
        if not path.is_file() and content.get("imageData"):
            name = str(file.absolute())
        shapes = labelme.read_shapes(content, size, str(file), self._skip, self._reject)
        is_recorded = read_size(content, str(file), labelme.SIDES) is not None
        return AnnotatedImage(str(file), name, size, shapes, is_size_recorded=is_recorded)
