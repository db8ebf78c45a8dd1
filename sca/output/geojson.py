"""GeoJSON (RFC 7946) in pixels: a feature a region, whose polygons follow the edges of its mask's pixels."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from sca_registry.contracts import Caption

from sca.io import masks
from sca.io.atomic import AtomicFile
from sca.io.errors import InputError, Reject
from sca.io.images import show
from sca.io.validation import read_field, require_size
from sca.output.captioned import Size
from sca.output.files import close_document
from sca.output.jsonl import record
from sca.output.outline import fill, polygons

PROPERTIES = ("image", "width", "height", "region", "prompt", "box", "caption", "score", "iou", "others")


class GeoJson:
    """One collection. Coordinates are x, y in pixels of the image, y downwards, in place of degrees.

    A mask is a MultiPolygon, exact to the pixel; a box a Polygon; a region with neither has its first point.
    """

    def __init__(self, path: Path, model: str | None = None):
        self._file = AtomicFile(path)
        self._model, self._features, self._images = model, 0, 0
        self._file.write('{"type": "FeatureCollection", "features": [')

    def add(self, path: str, image: Image.Image, captions: Sequence[Caption]) -> None:
        lines = [json.dumps(self._feature(path, image, caption), allow_nan=False) for caption in captions]
        if lines:
            self._file.write((",\n" if self._features else "\n") + ",\n".join(lines))
        self._features += len(lines)
        self._images += 1

    def close(self, finished: bool = True) -> None:
        """Keep the images that are done. A run that did not finish leaves an older file unchanged."""
        close_document(self._file, "\n]}\n", bool(self._images), finished)

    def _feature(self, path: str, image: Image.Image, caption: Caption) -> dict[str, Any]:
        plain = record(path, image, caption)
        properties = {name: plain[name] for name in PROPERTIES if name in plain}
        return {"type": "Feature", "geometry": _geometry(plain), "properties": {**properties, "model": self._model}}


def _geometry(plain: dict[str, Any]) -> dict[str, Any]:
    if plain["mask"] and (found := polygons(masks.decode(plain["mask"]))):
        closed = [[[*ring, ring[0]] for ring in polygon] for polygon in found]
        return {"type": "MultiPolygon", "coordinates": closed}
    if plain["box"]:
        x1, y1, x2, y2 = plain["box"]
        return {"type": "Polygon", "coordinates": [[[x1, y1], [x2, y1], [x2, y2], [x1, y2], [x1, y1]]]}
    x, y, _ = plain["prompt"]["points"][0] if plain["prompt"].get("points") else (0.0, 0.0, 1)
    return {"type": "Point", "coordinates": [x, y]}


def read_features(content: Mapping[str, Any], path: Path, reject: Reject) -> Iterator[tuple[str, Any]]:
    """Read the records of a file, each with its place for messages; a MultiPolygon is decoded to a mask."""
    for number, feature in enumerate(read_field(content, "features", list, show(path))):
        where = f"{show(path)}, features[{number}]"
        try:
            plain = _feature(feature, where)
        except InputError as error:
            reject(error)
        else:
            yield where, plain


def _feature(feature: Any, where: str) -> dict[str, Any]:
    plain = dict(read_field(feature, "properties", dict, where))
    shape = read_field(feature, "geometry", dict, where)
    if shape.get("type") == "MultiPolygon":
        size = Size(*require_size(plain, where))
        try:
            rings = [ring[:-1] for polygon in shape["coordinates"] for ring in polygon]
            plain["mask"] = masks.encode(fill(rings, *size))
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{where}: a mask that cannot be read: {error}") from error
    return plain
