"""Pictures annotated with LabelMe (github.com/wkentaro/labelme), and a metric that looks for labels in captions."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from sca_registry.contracts import Region, Sample, Scores

from sca.io.json import read_json
from sca.io.paths import ImageNameError, find_image
from sca.masks import box_of, encode


class LabelMe:
    """The JSON files of `root/split`, or of `root` where there is no such folder, each beside its picture.

    A polygon, rectangle or circle is a region: its label the name, its description, if any, the phrase. Other shapes
    are left out. ValueError for a folder without files, and for a file that cannot be used, with the field.
    """

    def __init__(self, split: str, root: str):
        folder = Path(root).expanduser() / split
        folder = folder if folder.is_dir() else folder.parent
        self.split = split
        self.files = sorted(folder.glob("*.json"))
        if not self.files:
            raise ValueError(f"there are no LabelMe files (*.json) in {folder}")
        self.records = [_read(file) for file in self.files]
        counts = [len(record["shapes"]) for record in self.records]
        self.first = [sum(counts[:number]) for number in range(len(counts))]  # each region has an id of its own

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(index)
        file, record = self.files[index], self.records[index]
        try:
            with Image.open(find_image(record["imagePath"], [file.parent])) as stored:
                image = stored.convert("RGB")
        except (OSError, ImageNameError) as error:
            raise ValueError(f"{file}: the picture {record['imagePath']!r} cannot be read ({error})") from error
        regions = []
        for number, shape in enumerate(record["shapes"]):
            mask = _mask(shape, image.size, f"{file}: shapes[{number}]")
            if mask is not None and mask.any():
                said = (shape.get("description") or "").strip()
                regions.append(
                    Region(
                        self.first[index] + number, box_of(mask), encode(mask), shape["label"], (said,) if said else ()
                    )
                )
        return Sample(image, index, tuple(regions))


class LabelRecall:
    """The share of captions in which the label of their region is found, letters' case aside."""

    needs = ("task=caption", "caption", "truth.name")

    def __call__(self, records) -> Scores:
        asked = [r for r in records if r.get("task") == "caption" and (r.get("truth") or {}).get("name")]
        if not asked:
            raise ValueError("metric 'label-recall': no record has a caption and a true name")
        found = [r["truth"]["name"].casefold() in r["caption"].casefold() for r in asked]
        return Scores({"label-recall/mean": float(np.mean(found)), "label-recall/captions": len(found)})


def _read(file: Path) -> dict:
    record = read_json(file)
    if not isinstance(record, dict) or not isinstance(record.get("imagePath"), str):
        raise ValueError(f"{file} has no imagePath, so it is not a file of LabelMe")
    shapes = record.get("shapes")
    if not isinstance(shapes, list) or not all(isinstance(s, dict) and isinstance(s.get("label"), str) for s in shapes):
        raise ValueError(f"{file}: shapes is not a list of shapes with a label")
    return record


def _mask(shape: dict, size: tuple[int, int], where: str) -> np.ndarray | None:
    """(height, width) bool; None for a shape without an inside."""
    kind = shape.get("shape_type") or "polygon"
    if kind not in ("polygon", "rectangle", "circle"):
        return None
    try:
        points = [(float(x), float(y)) for x, y in shape["points"]]
        assert len(points) >= (3 if kind == "polygon" else 2)
    except (KeyError, TypeError, ValueError, AssertionError) as error:
        raise ValueError(f"{where}: points of a {kind} are not what they should be") from error
    drawn = Image.new("1", size)
    pen = ImageDraw.Draw(drawn)
    if kind == "polygon":
        pen.polygon(points, fill=1, outline=1)
        return np.array(drawn)
    (x, y), (u, v) = points[:2]
    if kind == "rectangle":
        pen.rectangle((min(x, u), min(y, v), max(x, u), max(y, v)), fill=1)
    else:
        radius = ((x - u) ** 2 + (y - v) ** 2) ** 0.5
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=1)
    return np.array(drawn)
