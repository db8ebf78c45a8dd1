"""Reading captions from what `sca.output` writes and labeling tools export: JSON lines, COCO, Parquet, GeoJSON, Label
Studio and LabelMe.

What a format has no place for is unknown afterwards: COCO has no prompts, and a labeling tool no predicted IoU.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from PIL import Image
from sca_registry.contracts import Caption, Prompt

from sca.io import masks
from sca.io.annotations import coco, label_studio, labelme
from sca.io.annotations.annotation import Annotation, SkipCounter
from sca.io.annotations.shapes import fit_box
from sca.io.coordinates import compare_sizes
from sca.io.errors import InputError, Reject, raise_error
from sca.io.images import open_image, show
from sca.io.json import is_json_lines, open_regular_file, parse_json, parse_lines, read_regular_file
from sca.io.notices import notice_once
from sca.io.paths import ImageFiles, find_image, measure_named_image, remove_parents
from sca.io.prompts import read_prompt
from sca.io.validation import (
    check_numbers,
    check_type,
    is_finite_number,
    is_int64,
    read_field,
    read_id,
    read_name,
    require,
    require_size,
)
from sca.output.outline import fill

PARQUET = b"PAR1"  # what such a file begins with


class Size(NamedTuple):
    """Of a picture that need not be opened."""

    width: int
    height: int

    @property
    def size(self) -> tuple[int, int]:
        return self.width, self.height


class Captioned(NamedTuple):
    """An image, as its records name it, with its captions in order; `embedded` opens the image that its file contains,
    where the image's own file does not exist.
    """

    image: str
    size: Size
    captions: list[Caption]
    model: str | None
    embedded: Callable[[], Image.Image] | None = None

    def open(self, roots: Sequence[Path]) -> Image.Image:
        """Open the image, resized to `size` if its file was resized since.

        Args:
            roots: Folders that the image's name may start from.

        Raises:
            InputError: It cannot be opened, or its aspect ratio is not that of `size`.
        """
        path = find_image(self.image, roots)
        image = self.embedded() if self.embedded and not path.exists() else open_image(path)
        return resize_to_recorded(image, self.size, self.image)


def resize_to_recorded(image: Image.Image, size: Size, name: str) -> Image.Image:
    """Return an image in the size that its captions record.

    Args:
        image: The image as it is now.
        size: What the captions record.
        name: Of the image, for messages.

    Raises:
        InputError: The aspect ratios differ; names both sizes.
    """
    if image.size == size:
        return image
    try:
        compare_sizes(size, image.size)
    except ValueError as error:
        raise InputError(f"{show(name)}: {error}") from error
    actual = f"{image.width} x {image.height}"
    notice_once(
        "resized images",
        f"{show(name)} is {actual}, and its captions record {size.width} x {size.height}: it is resized to that",
    )
    return image.resize(size)


def read_captions(
    path: str | Path,
    skip: SkipCounter | None = None,
    roots: Sequence[Path] | None = None,
    reject: Reject = raise_error,
) -> Iterator[Captioned]:
    """Read a file, or a folder of LabelMe files, image by image. Suffix and content decide what it is.

    Args:
        path: The file or folder, or a pipe such as /dev/stdin, as a person typed it.
        skip: Counts what cannot be kept (default: it is a warning at the end).
        roots: Folders that names of images may start from (default: the working folder and the file's). Images are
            opened only where a file does not record their size.
        reject: Called for each record that is damaged, with an error that names it (default: raise an InputError).

    Raises:
        InputError: For a file of another kind.
    """
    path, counter = Path(path), SkipCounter() if skip is None else skip
    roots = (Path(), path.parent) if roots is None else roots
    try:
        if path.is_dir():
            yield from _labelme(labelme.list_files(path), path, counter, reject)
        else:
            with open_regular_file(path, seekable=True, allow_pipe=True) as file:
                is_parquet = path.suffix.lower() == ".parquet" or file.read(len(PARQUET)) == PARQUET
                file.seek(0)
                if is_parquet:
                    yield from _grouped(_rows(file, path), counter, reject)
                elif is_json_lines(path, file, "image"):
                    yield from _grouped(parse_lines(file, show(path), reject), counter, reject)
                else:
                    yield from _json(file, path, counter, roots, reject)
    except OSError as error:
        raise InputError(f"cannot read {show(path)}: {error.strerror or error}; check the name") from error
    if skip is None and (summary := counter.summarize()):
        warnings.warn(f"{show(path)}: {summary}", stacklevel=2)


def captioned(plain: Any, where: str) -> Captioned:
    """An image of a journal: `image`, `width`, `height` and `captions`, each as in a line of JSON lines. InputError."""
    size = Size(*require_size(plain, where))
    captions = read_field(plain, "captions", list, where)
    told = [_caption(each, size, number, where) for number, each in enumerate(captions)]
    return Captioned(read_name(plain, "image", where), size, told, None)


def merge_images(
    captioned: Iterable[Captioned], roots: Sequence[Path], reject: Reject = raise_error
) -> dict[str, Captioned]:
    """Merge the captions of each image file, in whatever spelling and however often it occurs.

    Args:
        captioned: Images, in order.
        roots: Folders that names of images may start from.
        reject: Called for an image that states another size than before.

    Returns:
        The images by the first names of their files; captions that are added get region numbers of their own.
    """
    files = ImageFiles(partial(find_image, roots=roots))
    merged: dict[str, Captioned] = {}
    for each in captioned:
        name = files.unify(each.image)
        first = merged.setdefault(name, each)
        if first is each:
            continue
        if first.size != each.size:
            sizes = [f"{size.width} x {size.height}" for size in (first.size, each.size)]
            reject(InputError(f"{show(each.image)} is {sizes[0]} and {sizes[1]} in one file; give one size"))
            continue
        start = 1 + max((caption.region for caption in first.captions), default=-1)
        more = [replace(caption, region=number) for number, caption in enumerate(each.captions, start)]
        merged[name] = first._replace(captions=[*first.captions, *more])
    return merged


def _json(file: BinaryIO, path: Path, skip: SkipCounter, roots: Sequence[Path], reject: Reject) -> Iterator[Captioned]:
    content = parse_json(file.read(), show(path), surrogates=True)
    if isinstance(content, list) or label_studio.is_task(content):
        yield from merge_images(_label_studio(content, path, skip, roots, reject), roots, reject).values()
    elif isinstance(content, dict) and content.get("type") == "FeatureCollection":
        yield from _grouped(_features(content, path, reject), skip, reject)
    elif isinstance(content, dict) and "shapes" in content:
        yield from _labelme([path], path.parent, skip, reject)
    elif isinstance(content, dict) and "annotations" in content:
        yield from merge_images(_coco(content, path, skip, roots, reject), roots, reject).values()
    else:
        raise InputError(
            f"{show(path)} is none of JSON lines (.jsonl), COCO, Parquet, GeoJSON, Label Studio and LabelMe files"
        )


def _rows(file: BinaryIO, path: Path) -> Iterator[tuple[str, Any]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise InputError("parquet needs pyarrow: pip install 'segment-caption-anything[data]'") from error
    try:
        number = 0
        for batch in pyarrow.parquet.ParquetFile(file).iter_batches(1000):
            for row in batch.to_pylist():
                number += 1
                where = f"{show(path)}, row {number}"
                for name in ("prompt", "others"):
                    row[name] = None if row.get(name) is None else parse_json(row[name], where, surrogates=True)
                yield where, row
    except pyarrow.ArrowException as error:
        raise InputError(f"{show(path)} is not a whole Parquet file: {' '.join(str(error).split())}") from error


def _features(content: Mapping[str, Any], path: Path, reject: Reject) -> Iterator[tuple[str, Any]]:
    """Records; the mask of a MultiPolygon is what it holds."""
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


def _grouped(records: Iterable[tuple[str, Any]], skip: SkipCounter, reject: Reject) -> Iterator[Captioned]:
    """Records of an image stand together."""
    seen: set[str] = set()
    for name, some in groupby(_named(records, reject), key=lambda record: record[0]):
        captions, size, model = [], None, None
        for _, where, plain in some:
            if size is None and name in seen:
                raise InputError(f"{where}: {name!r} had records before, with others between; sort them by image")
            seen.add(name)
            try:
                given = Size(*require_size(plain, where))
                if given != (size or given):
                    raise InputError(f"{where}: the image is {given.width} x {given.height}, and was {size} before")
                size, model = given, plain.get("model") or model
                caption = _fit(_caption(plain, size, len(captions), where), size, where, skip)
            except InputError as error:
                reject(error)
            else:
                captions += [caption] if caption else []
        if size is not None:
            yield Captioned(name, size, captions, model)


def _named(records: Iterable[tuple[str, Any]], reject: Reject) -> Iterator[tuple[str, str, Any]]:
    for where, plain in records:
        try:
            name = read_name(plain, "image", where)
        except InputError as error:
            reject(error)
        else:
            yield name, where, plain


def _fit(caption: Caption, size: Size, where: str, skip: SkipCounter) -> Caption | None:
    """Clip the box of a caption to its image; None, and counted, for a box that is normalized or outside."""
    if caption.box is None:
        return caption
    box = fit_box(caption.box, size, where, skip, caption.mask)
    return None if box is None else replace(caption, box=box)


def _coco(
    content: Mapping[str, Any], path: Path, skip: SkipCounter, roots: Sequence[Path], reject: Reject
) -> Iterator[Captioned]:
    told: dict[Any, list[tuple[str, Any]]] = {}
    info = content.get("info")
    model = info.get("model") if isinstance(info, dict) else None
    names = coco.name_categories(content)
    for number, each in enumerate(read_field(content, "annotations", list, show(path))):
        where = f"{show(path)}, annotations[{number}]"
        try:
            told.setdefault(read_id(each, "image_id", where), []).append((where, each))
        except InputError as error:
            reject(error)
    for number, image in enumerate(read_field(content, "images", list, show(path))):
        where, records = f"{show(path)}, images[{number}]", list[tuple[str, Any]]()
        try:
            records = told.pop(read_id(image, "id", where), [])
            file_name = read_name(image, "file_name", where)
            measured = None if {"width", "height"} <= image.keys() else measure_named_image(file_name, roots)
            size = Size(*measured) if measured else Size(*require_size(image, where))
        except InputError as error:
            reject(error)
            for place, _ in records:
                skip("region of an image that cannot be used", place)
            continue
        captions = []
        for place, record in records:
            try:
                annotation = coco.read_annotation(record, place, size, names.get(str(record.get("category_id"))), skip)
                region = record["region"] if is_int64(record.get("region")) else len(captions)
                captions += [caption] if (caption := _region(annotation, size, region, skip)) else []
            except InputError as error:
                reject(error)
        yield Captioned(file_name, size, captions, model)
    for place, _ in (record for records in told.values() for record in records):
        reject(InputError(f"{place}, 'image_id': no image has this id; add the image or remove the annotation"))


def _label_studio(
    content: Any, path: Path, skip: SkipCounter, roots: Sequence[Path], reject: Reject
) -> Iterator[Captioned]:
    measure = partial(measure_named_image, roots=roots)
    for image in label_studio.read_tasks(content, show(path), skip, measure, reject):
        size = image.size or measure(image.name)
        if size is None:
            skip("image without regions, whose size is unknown", f"{image.place}, {show(image.name)}")
            continue
        yield Captioned(image.name, Size(*size), _regions(image.annotations, Size(*size), skip, reject), image.model)


def _labelme(paths: list[Path], folder: Path, skip: SkipCounter, reject: Reject) -> Iterator[Captioned]:
    if not paths:
        raise InputError(f"no .json files in {show(folder)}; a folder is read as LabelMe files")
    for path in paths:
        try:
            image = _labelme_file(path, skip, reject)
        except InputError as error:
            reject(error)
        else:
            yield image


def _labelme_file(path: Path, skip: SkipCounter, reject: Reject) -> Captioned:
    where = show(path)
    content = parse_json(read_regular_file(path), where, surrogates=True)
    name = _image_beside(path, read_name(content, "imagePath", where))
    size = Size(*labelme.find_size(content, Path(name), where))
    regions = _regions(labelme.read_shapes(content, size, where, skip, reject), size, skip, reject)
    embedded = partial(labelme.open_embedded, content, where) if content.get("imageData") else None
    return Captioned(name, size, regions, content.get("model"), embedded)


def _image_beside(path: Path, name: str) -> str:
    """The image that a file names relative to its own folder."""
    try:
        return str(remove_parents(find_image(name, [path.parent])))
    except InputError as error:
        raise InputError(f"{show(path)}, 'imagePath': {error}") from error


def _regions(annotations: Iterable[Annotation], size: Size, skip: SkipCounter, reject: Reject) -> list[Caption]:
    captions = []
    for number, annotation in enumerate(annotations):
        try:
            captions += [caption] if (caption := _region(annotation, size, number, skip)) else []
        except InputError as error:
            reject(error)
    return captions


def _region(annotation: Annotation, size: Size, region: int, skip: SkipCounter) -> Caption | None:
    """The caption of an annotation; None, and counted, where its box is normalized or outside of the image."""
    prompt = Prompt()
    if annotation.point:
        x, y = annotation.point
        if not (0 <= x < size.width and 0 <= y < size.height):
            sides = f"{size.width} x {size.height}"
            raise InputError(f"{annotation.place}: the point {x:g}, {y:g} is outside the image of {sides}")
        prompt = Prompt(points=((x, y, 1),))
    if annotation.unread:
        skip(annotation.unread, annotation.place)
    if not annotation.texts:
        skip("region without text", annotation.place)
    text, *others = annotation.texts or ("",)
    caption = Caption(
        text,
        _number(annotation.score),
        annotation.box,
        annotation.mask,
        None if annotation.iou is None else _number(annotation.iou),
        prompt,
        region,
        tuple((other, math.nan) for other in others),
    )
    return _fit(caption, size, annotation.place, skip)


def _caption(plain: Mapping[str, Any], size: Size, region: int, where: str) -> Caption:
    text = _text(plain, where)
    code, box, prompt = plain.get("mask"), plain.get("box"), plain.get("prompt")
    try:
        code = None if code is None else masks.checked(code)
        asked = read_prompt(prompt, where, *size) if prompt else Prompt()
    except ValueError as error:
        raise InputError(str(error) if str(error).startswith(where) else f"{where}, 'mask': {error}") from error
    if code is not None and code["size"] != [size.height, size.width]:
        raise InputError(f"{where}, 'mask': its size is {code['size']}, the image's {[size.height, size.width]}")
    if box is not None:
        check_numbers(f"{where}, 'box'", box, "x1, y1, x2, y2")
    others = read_field(plain, "others", list, where) if plain.get("others") else []
    return Caption(
        text,
        _number(plain.get("score")),
        None if box is None else tuple(map(float, box)),
        code,
        None if plain.get("iou") is None else _number(plain["iou"]),
        asked,
        plain["region"] if is_int64(plain.get("region")) else region,
        tuple(_other(each, f"{where}, 'others'") for each in others),
    )


def _text(plain: Any, where: str) -> str:
    """A caption, which may contain half of a surrogate pair."""
    text = require(plain, "caption", where)
    check_type(f"{where}, 'caption'", text, str, InputError)
    return text


def _other(plain: Any, where: str) -> tuple[str, float]:
    return _text(plain, where), _number(plain.get("score"))


def _number(value: Any) -> float:
    return float(value) if is_finite_number(value) else math.nan
