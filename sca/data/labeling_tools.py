"""Datasets of labeling tools: exports of Label Studio, and LabelMe files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm.auto import tqdm

from sca.data.custom import choose_split, make_val_fraction_key, resolve_split_path
from sca.data.record_parsing import read_dataset_json
from sca.data.table import TableDataset
from sca.io.annotations import label_studio, labelme
from sca.io.annotations.annotation import AnnotatedImage
from sca.io.errors import InputError
from sca.io.image_names import ImageNameResolver, read_named_image_size
from sca.io.paths import expand_user, normalize_name
from sca.io.validation import check_object, read_field, read_recorded_size


class LabelingToolDataset(TableDataset):
    """JSON export of Label Studio, a LabelMe file, or a folder of LabelMe files.

    A region's name is its label. Its phrases are its texts: Label Studio's text areas, or LabelMe's description.
    Annotations that are not regions, such as keypoints and relations, are skipped and counted. If LabelMe's image file
    is missing, the image inside the annotation file (`imageData`) replaces it. Images and regions are numbered from 0.
    See `TableDataset`.

    Args:
        split: "train" or "val", or the name of a split of the files.
        file: File or folder. `{split}` is replaced by the split.
        image_root: Folder that image names are relative to. Default: the folder of the file.
        val_fraction: Fraction of the images of a file without splits that "val" has: at least 4 images, or a third of
            all if that is fewer. "train" has the others.
        max_bad_records: Maximum number of unusable records of each kind, see `ConvertedTable`.
    """

    reader = "annotations"

    def __init__(
        self,
        split: str,
        file: str | Path,
        image_root: str | Path | None = None,
        val_fraction: float = 0.0,
        max_bad_records: int = 100,
    ):
        self.val_fraction = val_fraction
        self.file: Path = resolve_split_path(str(expand_user(file)), split)
        files = labelme.list_labelme_files(self.file) if self.file.is_dir() else [self.file]
        if not files or not files[0].is_file():
            raise InputError(f"{self.file} is neither a .json file nor a folder of LabelMe files; set file=PATH")
        folder = files[0].parent if image_root is None else expand_user(image_root)
        super().__init__(split, folder, files, max_bad_records, make_val_fraction_key(split, val_fraction))

    def _iter_entries(self, bar: tqdm[Any]) -> Iterator[Any]:
        """Yield the index of an image, the id of its first region, and the image with its regions."""
        name_resolver = ImageNameResolver(self._resolve_image_path)
        annotated_images = self._merge_images(self._iter_annotated_images(), name_resolver)
        bar.reset(len(annotated_images))
        labels = (each.label for image in annotated_images for each in image.annotations)
        class_names = tuple(sorted({label.strip() for label in labels if label and label.strip()}))
        self.attribute_values: dict[str, tuple[str, ...]] = {"name": class_names}
        names = [name_resolver.identify_file(image.name) for image in annotated_images]
        split_names, remarks = choose_split(names, self.split, self.val_fraction)
        self.remarks: list[str] = remarks
        first_region_id = 0
        for number, (image, name) in enumerate(zip(annotated_images, names, strict=True)):
            if name in split_names:
                yield number, first_region_id, image
            first_region_id += len(image.annotations)

    def _build_row(self, entry: Any) -> dict[str, Any] | None:
        number, first_region_id, annotated = entry
        if annotated.size is None:  # a task without regions
            self._skip("image without regions", annotated.name)
            return None
        width, height = annotated.size
        row = self._create_row(number, annotated.name, width, height, annotated.is_size_recorded)
        for region_id, region in enumerate(annotated.annotations, first_region_id):
            if region.box is None:
                self._skip("region without a box or mask", region.location)
                continue
            if region.unread_caption:
                self._skip(region.unread_caption, region.location)
            captions = [text.strip() for text in region.captions]
            texts = {"name": region.label, "phrases": captions}
            self._add_region(row, region_id, region.box, region.location, region.mask, **texts)
        return row

    def _open_image(self, name: str) -> Image.Image:
        if not name.endswith(".json"):
            return super()._open_image(name)
        return labelme.open_embedded_image(read_dataset_json(Path(name)), name)

    def _merge_images(
        self, annotated: Iterable[AnnotatedImage], name_resolver: ImageNameResolver
    ) -> list[AnnotatedImage]:
        """Merge the regions of each image file over all spellings of its name and all tasks."""
        merged: dict[str, AnnotatedImage] = {}
        for image in annotated:
            name = name_resolver.unify_spelling(image.name)
            first = merged.setdefault(name, image)
            if first is image:
                continue
            if first.size and image.size and first.size != image.size:
                sizes = " and ".join(f"{width} x {height}" for width, height in (first.size, image.size))
                self._reject_image(f"{image.location}: {name!r} is recorded with two sizes, {sizes}")
                continue
            regions = [*first.annotations, *image.annotations]
            merged[name] = first._replace(size=first.size or image.size, annotations=regions)
        return list(merged.values())

    def _iter_annotated_images(self) -> Iterator[AnnotatedImage]:
        for file in self.sources:
            content = read_dataset_json(file)
            if isinstance(content, list) or label_studio.is_task(content):
                measure = partial(read_named_image_size, roots=[self.image_root])
                yield from label_studio.read_tasks(content, str(file), self._skip, measure, self._reject_region)
                continue
            name = read_field(check_object(content, str(file)), "imagePath", str, str(file))
            try:
                image = self._read_labelme_image(content, normalize_name(name), file)
            except InputError as error:
                self._skip_image("image without data", str(file), str(error), stop=False)
            else:
                yield image

    def _read_labelme_image(self, content: dict[str, Any], name: str, file: Path) -> AnnotatedImage:
        """Read an image; an image stored in the annotation file is named by that file."""
        path = self._resolve_image_path(name)
        size = labelme.find_image_size(content, path, str(file))
        if not path.is_file() and content.get("imageData"):
            name = str(file.absolute())
        shapes = labelme.read_annotations(content, size, str(file), self._skip, self._reject_region)
        is_recorded = read_recorded_size(content, str(file), labelme.SIZE_FIELDS) is not None
        return AnnotatedImage(str(file), name, size, shapes, is_size_recorded=is_recorded)
