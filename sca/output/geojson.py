"""Write and read GeoJSON (RFC 7946) in pixels: one feature per region, with polygons along the mask's pixel edges."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sca_registry.contracts import Caption

from sca.io import masks
from sca.io.atomic import AtomicFile
from sca.io.errors import InputError, RejectCallback
from sca.io.images import format_path
from sca.io.validation import read_field, require_key, require_recorded_size
from sca.output.captioned_image import ImageOrSize, ImageSize
from sca.output.contours import mask_to_polygons, rings_to_mask
from sca.output.image_files import close_document
from sca.output.jsonl import OPTIONAL_SCORE_FIELDS, caption_to_record
from sca.output.omitted_regions import find_first_point

PROPERTY_NAMES = (
    *("image", "width", "height", "region_id", "prompt", "box", "caption", "score", "predicted_iou", "alternatives"),
    *("name", *OPTIONAL_SCORE_FIELDS),
)


class GeoJsonWriter:
    """Writer of one feature collection. Coordinates are x, y in image pixels, y downward, instead of degrees.

    A mask is a MultiPolygon, exact to the pixel; a box is a Polygon; a region with neither is its first point, or null
    without a point, as RFC 7946 (section 3.2) describes an unlocated feature.
    """

    def __init__(self, path: Path, model: str | None = None):
        self._file = AtomicFile(path)
        self._model, self._num_features, self._num_images = model, 0, 0
        self._file.write('{"type": "FeatureCollection", "features": [')

    def add(self, path: str, image: ImageOrSize, captions: Sequence[Caption]) -> None:
        lines = [json.dumps(self._make_feature(path, image, caption), allow_nan=False) for caption in captions]
        if lines:
            self._file.write((",\n" if self._num_features else "\n") + ",\n".join(lines))
        self._num_features += len(lines)
        self._num_images += 1

    def close(self, finished: bool = True) -> None:
        """Finish the file with the completed images. An unfinished run leaves an older file unchanged."""
        close_document(self._file, "\n]}\n", bool(self._num_images), finished)

    def _make_feature(self, path: str, image: ImageOrSize, caption: Caption) -> dict[str, Any]:
        caption_record = caption_to_record(path, image, caption)
        properties = {name: caption_record[name] for name in PROPERTY_NAMES if name in caption_record}
        return {
            "type": "Feature",
            "geometry": _make_geometry(caption_record),
            "properties": {**properties, "model": self._model},
        }


def _make_geometry(caption_record: dict[str, Any]) -> dict[str, Any] | None:
    if caption_record["mask"] and (mask_polygons := mask_to_polygons(masks.decode_rle(caption_record["mask"]))):
        closed_polygons = [[[*ring, ring[0]] for ring in polygon] for polygon in mask_polygons]
        return {"type": "MultiPolygon", "coordinates": closed_polygons}
    if caption_record["box"]:
        x1, y1, x2, y2 = caption_record["box"]
        return {"type": "Polygon", "coordinates": [[[x1, y1], [x2, y1], [x2, y2], [x1, y2], [x1, y1]]]}
    if point := find_first_point(caption_record):
        return {"type": "Point", "coordinates": [*point]}
    return None


def read_geojson_records(content: Mapping[str, Any], path: Path, reject: RejectCallback) -> Iterator[tuple[str, Any]]:
    """Yield the records of a file, each with its location for messages; MultiPolygons are converted to masks."""
    for index, feature in enumerate(read_field(content, "features", list, format_path(path))):
        location = f"{format_path(path)}, features[{index}]"
        try:
            record_data = _parse_feature(feature, location)
        except InputError as error:
            reject(error)
        else:
            yield location, record_data


def _parse_feature(feature: Any, location: str) -> dict[str, Any]:
    properties = dict(read_field(feature, "properties", dict, location))
    is_located = require_key(feature, "geometry", location) is not None
    geometry = read_field(feature, "geometry", dict, location) if is_located else {}
    if geometry.get("type") == "MultiPolygon":
        size = ImageSize(*require_recorded_size(properties, location))
        try:
            rings = [ring[:-1] for polygon in geometry["coordinates"] for ring in polygon]
            properties["mask"] = masks.encode_rle(rings_to_mask(rings, *size))
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{location}: invalid mask: {error}") from error
    return properties
