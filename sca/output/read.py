"""Reading captions back from what `sca.output` writes: JSON lines, COCO, Parquet, GeoJSON, Label Studio and LabelMe.

What a format has no place for is unknown afterwards: COCO has no prompts, and a labelling tool no predicted IoU.
"""

from __future__ import annotations

import base64
import binascii
import io
import math
from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from sca_registry.contracts import Caption, Prompt

from sca import masks
from sca.images import identify_image, show
from sca.io.json import (
    IrregularFileError,
    JsonError,
    is_json_lines,
    open_regular_file,
    parse_json,
    read_regular_file,
)
from sca.io.numbers import is_finite_number, is_int64
from sca.io.paths import ImageNameError, find_image, remove_parents
from sca.output.label_studio import unpack
from sca.output.outline import fill
from sca.prompts import read_prompt

PARQUET = b"PAR1"  # what such a file begins with


class ReadError(ValueError):
    """Captions that cannot be read; the message is one line that says which, why and what to do."""


class Size(NamedTuple):
    """Of a picture that need not be opened."""

    width: int
    height: int

    @property
    def size(self) -> tuple[int, int]:
        return self.width, self.height


class Captioned(NamedTuple):
    """An image, as its records name it, with its captions in order."""

    image: str
    size: Size
    captions: list[Caption]
    model: str | None


def read_captions(path: str | Path) -> Iterator[Captioned]:
    """Image after image of a file, or of a folder of LabelMe files. The kind is told by the suffix and the content.

    ReadError for what is none of them, and for a record that is not whole.
    """
    path = Path(path)
    try:
        if path.is_dir():
            yield from _labelme(sorted(path.glob("*.json")), path)
            return
        with open_regular_file(path, seekable=True) as file:
            is_parquet = path.suffix.lower() == ".parquet" or file.read(len(PARQUET)) == PARQUET
            file.seek(0)
            if is_parquet:
                yield from _grouped(_rows(file, path))
            elif is_json_lines(path, file, "image"):
                yield from _grouped(_lines(file, path))
            else:
                yield from _json(file, path)
    except IrregularFileError as error:
        raise ReadError(str(error)) from error
    except OSError as error:
        raise ReadError(f"cannot read {show(path)}: {error.strerror or error}; check the name") from error
    except UnicodeDecodeError as error:
        raise ReadError(f"{show(path)} is not UTF-8 text") from error


def captioned(plain: Any, where: str) -> Captioned:
    """An image of a journal: `image`, `width`, `height` and `captions`, each as in a line of JSON lines. ReadError."""
    size = _size(_table(plain, where), where)
    told = [_caption(_table(each, where), size, n, where) for n, each in enumerate(_list(plain, "captions", where))]
    return Captioned(_name(plain, "image", where), size, told, None)


def _json(file: BinaryIO, path: Path) -> Iterator[Captioned]:
    content = _parsed(file.read().decode("utf-8-sig"), show(path))
    if isinstance(content, list):
        yield from _label_studio(content, path)
    elif isinstance(content, dict) and content.get("type") == "FeatureCollection":
        yield from _grouped(_features(content, path))
    elif isinstance(content, dict) and "shapes" in content:
        yield from _labelme([path], path.parent)
    elif isinstance(content, dict) and "annotations" in content:
        yield from _coco(content, path)
    else:
        raise ReadError(
            f"{show(path)} is none of JSON lines (.jsonl), COCO, Parquet, GeoJSON, Label Studio and LabelMe files"
        )


def _lines(file: BinaryIO, path: Path) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(io.TextIOWrapper(file, "utf-8-sig"), 1):
        if line.strip():
            where = f"{show(path)}, line {number}"
            yield where, _parsed(line, where)


def _rows(file: BinaryIO, path: Path) -> Iterator[tuple[str, Any]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ReadError("parquet needs pyarrow: pip install 'segment-caption-anything[data]'") from error
    try:
        number = 0
        for batch in pyarrow.parquet.ParquetFile(file).iter_batches(1000):
            for row in batch.to_pylist():
                number += 1
                where = f"{show(path)}, row {number}"
                for name in ("prompt", "others"):
                    row[name] = None if row.get(name) is None else _parsed(row[name], where)
                yield where, row
    except pyarrow.ArrowException as error:
        raise ReadError(f"{show(path)} is not a whole Parquet file: {' '.join(str(error).split())}") from error


def _features(content: Mapping[str, Any], path: Path) -> Iterator[tuple[str, Any]]:
    """Records; the mask of a MultiPolygon is what it holds."""
    for number, feature in enumerate(_list(content, "features", show(path))):
        where = f"{show(path)}, features[{number}]"
        plain = dict(_table(_table(feature, where).get("properties"), f"{where}, 'properties'"))
        shape = _table(feature.get("geometry"), f"{where}, 'geometry'")
        if shape.get("type") == "MultiPolygon":
            size = _size(plain, where)
            try:
                rings = [ring[:-1] for polygon in shape["coordinates"] for ring in polygon]
                plain["mask"] = masks.encode(fill(rings, *size))
            except (ValueError, KeyError, TypeError) as error:
                raise ReadError(f"{where}: a mask that cannot be read: {error}") from error
        yield where, plain


def _grouped(records: Iterable[tuple[str, Any]]) -> Iterator[Captioned]:
    """Records of an image stand together."""
    seen: set[str] = set()
    for name, some in groupby(records, key=lambda pair: _name(pair[1], "image", pair[0])):
        captions, size, model = [], None, None
        for where, plain in some:
            if size is None and name in seen:
                raise ReadError(f"{where}: {name!r} had records before, with others between; sort them by image")
            seen.add(name)
            given = _size(plain, where)
            if given != (size or given):
                raise ReadError(f"{where}: the image is {given.width} x {given.height}, and was {size} before")
            size, model = given, plain.get("model") or model
            captions.append(_caption(plain, size, len(captions), where))
        yield Captioned(name, size, captions, model)


def _coco(content: Mapping[str, Any], path: Path) -> Iterator[Captioned]:
    told: dict[Any, list[tuple[str, Any]]] = {}
    info = content.get("info")
    model = info.get("model") if isinstance(info, dict) else None
    for number, each in enumerate(_list(content, "annotations", show(path))):
        where = f"{show(path)}, annotations[{number}]"
        told.setdefault(_key(_table(each, where), "image_id", where), []).append((where, each))
    for number, image in enumerate(_list(content, "images", show(path))):
        where = f"{show(path)}, images[{number}]"
        size = _size(_table(image, where), where)
        captions = []
        for place, each in told.pop(_key(image, "id", where), []):
            x, y, width, height = _numbers(each.get("bbox") or [0, 0, 0, 0], 4, f"{place}, 'bbox'")
            code = each.get("segmentation")
            plain = {**each, "box": [x, y, x + width, y + height] if width and height else None}
            plain["mask"] = code if isinstance(code, dict) else None
            captions.append(_caption(plain, size, len(captions), place))
        yield Captioned(_name(image, "file_name", where), size, captions, model)
    if told:
        raise ReadError(f"{show(path)}: annotations of images that are not there: {list(told)[:3]}")


def _label_studio(content: list[Any], path: Path) -> Iterator[Captioned]:
    for number, task in enumerate(content):
        where = f"{show(path)}, task {number}"
        name = _name(_table(_table(task, where).get("data"), f"{where}, 'data'"), "image", f"{where}, 'data'")
        found = (task.get("annotations") or task.get("predictions") or [{}])[0]
        results: dict[str, list[Mapping[str, Any]]] = {}
        for piece in _table(found, where).get("result") or []:
            results.setdefault(str(_table(piece, where).get("id")), []).append(piece)
        data, captions = task["data"], []
        size = _size(data, where) if "width" in data else None
        for identity, pieces in results.items():
            place = f"{where}, region {identity!r}"
            plain: dict[str, Any] = {}
            for piece in pieces:
                size = _size({f"{side}": piece.get(f"original_{side}") for side in ("width", "height")}, place)
                _take(plain, piece, size, place)
            captions.append(_caption(plain, size, len(captions), place))
        if size is None:
            raise ReadError(f"{where}: nothing says how large the image is; leave tasks without regions out")
        yield Captioned(name, size, captions, found.get("model_version") or None)


def _take(plain: dict[str, Any], piece: Mapping[str, Any], size: Size, where: str) -> None:
    """What one result says of a region."""
    value = _table(piece.get("value"), f"{where}, 'value'")
    match piece.get("type"):
        case "brushlabels":
            try:
                plain["mask"] = masks.encode(unpack(value["rle"], *size))
            except (ValueError, KeyError, TypeError) as error:
                raise ReadError(f"{where}: a brush that cannot be read: {error}") from error
            plain["box"] = masks.box_of(plain["mask"])
        case "rectanglelabels":
            x, y, width, height = _numbers([value.get(k) for k in ("x", "y", "width", "height")], 4, where)
            ends = (x + width) / 100, (y + height) / 100
            plain["box"] = [x / 100 * size.width, y / 100 * size.height, ends[0] * size.width, ends[1] * size.height]
        case "textarea":
            words = value.get("text")
            plain["caption"] = " ".join(words) if isinstance(words, list) else words
    if piece.get("score") is not None:
        plain["score"] = piece["score"]


def _labelme(paths: list[Path], folder: Path) -> Iterator[Captioned]:
    if not paths:
        raise ReadError(f"no .json files in {show(folder)}; a folder is read as LabelMe files")
    for path in paths:
        content = _table(_parsed(read_regular_file(path).decode("utf-8-sig"), show(path)), show(path))
        size = _size({"width": content.get("imageWidth"), "height": content.get("imageHeight")}, show(path))
        name = _image_beside(path, _name(content, "imagePath", show(path)))
        captions = []
        for number, shape in enumerate(_list(content, "shapes", show(path))):
            where = f"{show(path)}, shapes[{number}]"
            captions.append(_caption(_shape(_table(shape, where), size, where), size, number, where))
        yield Captioned(name, size, captions, content.get("model"))


def _image_beside(path: Path, name: str) -> str:
    """The image that a file names relative to its own folder."""
    try:
        return str(remove_parents(find_image(name, [path.parent])))
    except ImageNameError as error:
        raise ReadError(f"{show(path)}, 'imagePath': {error}") from error


def _shape(shape: Mapping[str, Any], size: Size, where: str) -> dict[str, Any]:
    plain = {"caption": shape.get("description") or shape.get("label"), "score": shape.get("score")}
    plain["iou"] = shape.get("iou")
    corners = [_numbers(point, 2, f"{where}, 'points'") for point in _list(shape, "points", where)]
    if not corners:
        raise ReadError(f"{where}: no points")
    xs, ys = zip(*corners, strict=True)
    match shape.get("shape_type"):
        case "mask":
            try:
                with identify_image(io.BytesIO(base64.b64decode(shape.get("mask") or "", validate=True))) as image:
                    inside = np.asarray(image.convert("L")) > 0
                whole = np.zeros((size.height, size.width), bool)
                x, y = int(min(xs)), int(min(ys))
                whole[y : y + inside.shape[0], x : x + inside.shape[1]] = inside
            except (binascii.Error, OSError, ValueError) as error:
                raise ReadError(f"{where}: a mask that cannot be read: {error}") from error
            plain["mask"] = masks.encode(whole)
            plain["box"] = masks.box_of(whole)
        case "point":
            plain["prompt"] = {"points": [[xs[0], ys[0], 1]]}
        case _:
            plain["box"] = [min(xs), min(ys), max(xs), max(ys)]
    return plain


def _caption(plain: Mapping[str, Any], size: Size, region: int, where: str) -> Caption:
    text = plain.get("caption")
    if not isinstance(text, str):
        raise ReadError(f"{where}, 'caption': text, not {text!r:.40}")
    code, box, prompt = plain.get("mask"), plain.get("box"), plain.get("prompt")
    try:
        code = None if code is None else masks.checked(code)
        asked = read_prompt(prompt, where, *size) if prompt else Prompt()
    except ValueError as error:
        raise ReadError(str(error) if str(error).startswith(where) else f"{where}, 'mask': {error}") from error
    if code is not None and code["size"] != [size.height, size.width]:
        raise ReadError(f"{where}, 'mask': its size is {code['size']}, the image's {[size.height, size.width]}")
    others = tuple((str(each["caption"]), _number(each.get("score"))) for each in plain.get("others") or ())
    return Caption(
        text,
        _number(plain.get("score")),
        None if box is None else _numbers(box, 4, f"{where}, 'box'"),
        code,
        None if plain.get("iou") is None else _number(plain["iou"]),
        asked,
        plain["region"] if is_int64(plain.get("region")) else region,
        others,
    )


def _parsed(text: str, where: str) -> Any:
    try:
        return parse_json(text, surrogates=True)
    except JsonError as error:
        raise ReadError(f"{where}: not whole JSON: {error}") from error


def _table(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise ReadError(f"{where}: an object, not {value!r:.40}")
    return value


def _list(table: Mapping[str, Any], field: str, where: str) -> list[Any]:
    if not isinstance(table.get(field), list):
        raise ReadError(f"{where}, {field!r}: a list, not {table.get(field)!r:.40}")
    return table[field]


def _name(record: Any, field: str, where: str) -> str:
    value = _table(record, where).get(field)
    if not isinstance(value, str) or not value or "\0" in value:
        raise ReadError(f"{where}, {field!r}: the name of an image, not {value!r:.40}")
    return value


def _key(record: Mapping[str, Any], field: str, where: str) -> int | str:
    value = record.get(field)
    if not isinstance(value, int | str):
        raise ReadError(f"{where}, {field!r}: a number or text, not {value!r:.40}")
    return value


def _size(record: Mapping[str, Any], where: str) -> Size:
    sides = [_table(record, where).get(side) for side in ("width", "height")]
    if not all(isinstance(side, int) and not isinstance(side, bool) and side > 0 for side in sides):
        raise ReadError(f"{where}: 'width' and 'height' of the image in whole pixels, not {sides}")
    if sides[0] * sides[1] > masks.PIXEL_LIMIT:
        raise ReadError(f"{where}: an image of {sides[0]} x {sides[1]} has more pixels than are allowed")
    return Size(*sides)


def _numbers(value: Any, count: int, where: str) -> tuple[float, ...]:
    good = isinstance(value, list | tuple) and len(value) == count
    if not good or not all(map(is_finite_number, value)):
        raise ReadError(f"{where}: {count} numbers, not {value!r:.60}")
    return tuple(float(x) for x in value)


def _number(value: Any) -> float:
    return float(value) if is_finite_number(value) else math.nan
