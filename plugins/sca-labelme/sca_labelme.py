"""Dataset of LabelMe annotations (github.com/wkentaro/labelme), and the recall of their labels in captions."""

import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from sca_registry.contracts import MetricOutput, Region, Sample

from sca.io.annotations import labelme
from sca.io.annotations.annotation import Annotation, SkipCounter
from sca.io.annotations.shapes import clip_annotated_box, scale_region
from sca.io.coordinates import compute_resize_factors
from sca.io.errors import InputError
from sca.io.image_names import resolve_image_path
from sca.io.images import open_image
from sca.io.json import read_json
from sca.io.paths import expand_user

BAD_REGION_REASON = "unusable region"


class LabelMe:
    """Dataset of LabelMe JSON files, each stored next to its image.

    A region is a shape, or all shapes with the same `group_id`. Its label is the class name and its descriptions are
    the phrases. If an image file does not exist, `imageData` is used instead. If an image was resized, its regions are
    scaled to it.

    Args:
        split: Subfolder of `root`; `root` itself is used if it does not exist.
        root: Folder of the JSON files.

    Attributes:
        skipped: Number of skipped entries, such as keypoints, by reason.
        examples: Locations of the first skipped entries, by reason.

    Raises:
        ValueError: The folder contains no JSON files, a file is invalid (the message names the field), or, when a
            sample is read, an image has another aspect ratio than its file records.
    """

    def __init__(self, split: str, root: str):
        folder = expand_user(root) / split
        folder = folder if folder.is_dir() else folder.parent
        self.split = split
        self.files = labelme.list_labelme_files(folder)
        if not self.files:
            raise ValueError(f"no LabelMe files (*.json) in {folder}; pass their folder as root")
        skip = SkipCounter()
        self.skipped, self.examples = skip.counts, skip.examples
        self.image_paths, self.image_sizes, self.regions = [], [], []
        ids = itertools.count()  # region ids are unique in the dataset
        for file in self.files:
            content, image = _read_file(file)
            size = labelme.find_image_size(content, image, str(file))
            shapes = labelme.read_annotations(
                content, size, str(file), skip, lambda error: skip(BAD_REGION_REASON, str(error))
            )
            regions = [_shape_to_region(shape, size, next(ids), skip) for shape in shapes]
            self.image_paths.append(image)
            self.image_sizes.append(size)
            self.regions.append(tuple(region for region in regions if region))

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(index)
        file, path, size = self.files[index], self.image_paths[index], self.image_sizes[index]
        try:
            image = (
                open_image(path)
                if path.exists()
                else labelme.open_annotated_image(_read_file(file)[0], path, str(file))
            )
            factors = compute_resize_factors(size, image.size)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error
        if image.size == size:
            return Sample(image, index, self.regions[index])
        scaled = (scale_region(region, factors, image.size) for region in self.regions[index])
        return Sample(image, index, tuple(filter(None, scaled)))

    def iter_annotations(self) -> Iterator[tuple[Region, ...]]:
        """Return the regions of each image, in order, without opening images."""
        return iter(self.regions)


class LabelRecall:
    """Fraction of captions that contain the label of their region, ignoring case."""

    required_fields = ("task=caption", "caption", "truth.name")
    scores = ("label-recall/mean", "label-recall/captions")

    def __call__(self, records) -> MetricOutput:
        """Score caption records with a true class name; ValueError if there are none."""
        labeled_records = [r for r in records if r.get("task") == "caption" and (r.get("truth") or {}).get("name")]
        if not labeled_records:
            raise ValueError("metric 'label-recall': no record has a caption and a true name")
        is_named = [r["truth"]["name"].casefold() in r["caption"].casefold() for r in labeled_records]
        return MetricOutput({"label-recall/mean": float(np.mean(is_named)), "label-recall/captions": len(is_named)})


def _read_file(file: Path) -> tuple[dict, Path]:
    """Read a LabelMe file; return its content and the path of its image."""
    content = read_json(file)
    if not isinstance(content, dict) or not isinstance(content.get("imagePath"), str):
        raise ValueError(f"{file} has no imagePath, so it is not a LabelMe file")
    try:
        return content, resolve_image_path(content["imagePath"], [file.parent])
    except InputError as error:
        raise ValueError(f"{file}: {error}") from error


def _shape_to_region(shape: Annotation, size: tuple[int, int], region_id: int, skip: SkipCounter) -> Region | None:
    """Convert a shape to a region with its box clipped to the image; None, counted as skipped, without a box."""
    if shape.box is None:
        return skip("keypoint", shape.location)
    box = clip_annotated_box(shape.box, size, shape.location, skip, shape.mask)
    if box is None:
        return None
    if shape.unread_caption:
        skip(shape.unread_caption, shape.location)
    phrases = tuple(text.strip() for text in shape.captions if text.strip())
    return Region(region_id, box, shape.mask, shape.label, phrases)
