"""Label Studio's tasks: https://labelstud.io/guide/task_format. Coordinates are per cent of the image."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np

from sca.io import masks
from sca.io.annotations import brush
from sca.io.annotations.annotation import AnnotatedImage, Annotation, Size, Skip, find_unread_caption
from sca.io.annotations.shapes import (
    Points,
    bound_points,
    decode_mask,
    fill_polygons,
    rotate_rectangle,
    trace_ellipse,
)
from sca.io.coordinates import Box
from sca.io.errors import InputError, Reject, raise_error
from sca.io.images import SUFFIXES
from sca.io.validation import (
    check_name,
    check_numbers,
    check_type,
    is_finite_number,
    read_field,
    check_object,
    read_size,
    read_texts,
)

Results = Sequence[Mapping[str, Any]]
Point = tuple[float, float]
Measure = Callable[[str], Size | None]
SHAPES = ("rectangle", "polygon", "ellipse", "brush", "bitmask", "keypoint", "vector")
SEVERAL = "task with several {}, of which one is read"


def read_tasks(
    content: Any, where: str, skip: Skip, measure: Measure, reject: Reject = raise_error
) -> Iterator[AnnotatedImage]:
    """Read the images of an export, in order.

    A task's annotation is the first that is marked as ground truth, or else the first; cancelled ones are passed over.
    Where a task has no annotation, it is its first draft, or else its first prediction.

    Args:
        content: A list of tasks, or one task.
        where: The file, for messages.
        skip: Called for each task, result or part that cannot be kept.
        measure: Returns the size of an image by its name, None if it cannot; called where no shape records the size.
        reject: Called for each task, result or region that cannot be read, with an error that names it; raises it by
            default.
    """
    for number, task in enumerate(content if isinstance(content, list) else [content]):
        try:
            images = _read_task(task, f"{where}, task {number}", skip, measure, reject)
        except InputError as error:
            reject(error)
        else:
            yield from images


def _read_task(task: Any, place: str, skip: Skip, measure: Measure, reject: Reject) -> list[AnnotatedImage]:
    if "data" not in check_object(task, place):
        raise InputError(f"{place}: no 'data'; export the tasks as JSON (JSON-MIN and COCO results have none)")
    data = check_object(task["data"], f"{place}, 'data'")
    chosen = choose_annotation(task, place, skip)
    results = _read_results(chosen.get("result") or [], f"{place}, 'result'", reject)
    images = name_images(data, results, place)
    model = chosen.get("model_version") if isinstance(chosen.get("model_version"), str) else None
    found = []
    for (key, index), name in images.items():
        its = [each for each in results if _is_of(each, key, index, images)]
        recorded, its = agree_size(its, data, len(images) == 1, place, reject)
        size = recorded or (measure(name) if any(map(_kind, its)) else None)
        regions = read_regions(its, size, place, skip, reject)
        found.append(AnnotatedImage(place, name, size, regions, model, is_size_recorded=recorded is not None))
    return found


def _read_results(results: Any, place: str, reject: Reject) -> list[Mapping[str, Any]]:
    check_type(place, results, list, InputError)
    kept = []
    for number, result in enumerate(results):
        try:
            kept.append(check_object(result, f"{place}[{number}]"))
        except InputError as error:
            reject(error)
    return kept


def is_task(content: Any) -> bool:
    """Whether a JSON value is a single task; a file of several is a list."""
    return isinstance(content, Mapping) and isinstance(content.get("data"), Mapping)


def choose_annotation(task: Mapping[str, Any], place: str, skip: Skip) -> Mapping[str, Any]:
    """Return the annotation, draft or prediction of a task that counts; empty if there is none."""
    annotations = _tables(task.get("annotations") or [], f"{place}, 'annotations'")
    for annotation in annotations:
        if annotation.get("was_cancelled"):
            skip("cancelled annotation", place)
    if annotations:
        finished = [each for each in annotations if not each.get("was_cancelled")]
        if len(finished) > 1:
            skip(SEVERAL.format("annotations"), place)
        finished.sort(key=lambda each: not each.get("ground_truth"))  # the others keep their order
        return finished[0] if finished else {}
    for kind in ("drafts", "predictions"):
        listed = task.get(kind)
        found = (
            [each for each in listed if isinstance(each, Mapping)] if isinstance(listed, list) else []
        )  # or only ids
        if len(found) > 1:
            skip(SEVERAL.format(kind), place)
        if found:
            return found[0]
    return {}


def name_images(data: Mapping[str, Any], results: Results, place: str) -> dict[tuple[str, int], str]:
    """Find the images of a task: the key in its data and the place in that key's list -> the name.

    The keys are those that the results' `to_name` repeat, or else "image", or else the only one whose value names an
    image.

    Raises:
        InputError: If no key or several could be meant.
    """
    of_shapes = dict.fromkeys(str(each.get("to_name")) for each in results if _kind(each))
    keys = [key for key in of_shapes if key in data] or [key for key in data if key == "image"]
    keys = keys or [key for key, value in data.items() if _names_image(value)]
    if not keys or (len(keys) > 1 and not set(keys) <= of_shapes.keys()):
        found = "several values name" if keys else "no value names"
        raise InputError(f"{place}, 'data': {found} an image; name it 'image' (keys: {', '.join(data) or 'none'})")
    images = {}
    for key in keys:
        values = data[key] if isinstance(data[key], list) else [data[key]]
        for index, name in enumerate(values):
            images[key, index] = check_name(f"{place}, 'data', {key!r}", name)
    return images


def agree_size(
    results: Results, data: Mapping[str, Any], is_only: bool, place: str, reject: Reject = raise_error
) -> tuple[Size | None, Results]:
    """Find the size of an image: the one that its first shape records, or else the task's data, as our export does.

    Args:
        results: Of the image.
        data: Of the task.
        is_only: Whether the task has one image.
        place: The task, for messages.
        reject: Called for each shape that records no size of an image, or another one.

    Returns:
        Width and height, None if nothing records them; and the results without the rejected ones.
    """
    size, kept = None, []
    for number, result in enumerate(results):
        try:
            recorded = _recorded_size(result, number, size, place)
        except InputError as error:
            reject(error)
        else:
            size = size or recorded
            kept.append(result)
    if size is None and is_only:
        with suppress(InputError):  # columns of the user's own
            size = read_size(data, place)
    return size, kept


def _recorded_size(result: Mapping[str, Any], number: int, known: Size | None, place: str) -> Size | None:
    """Return the size that a shape records; None for one without, and for a result without a shape."""
    if not _kind(result):
        return None
    where = f"{place}, {_name_region(result, number)}"
    size = read_size(result, where, ("original_width", "original_height"))
    if size and known and size != known:
        raise InputError(f"{where}: an image of {size[0]} x {size[1]}, and {known[0]} x {known[1]} in a result before")
    return size


def _name_region(result: Mapping[str, Any], number: int) -> str:
    identity = result.get("id")
    return f"region {identity!r}" if isinstance(identity, str) else f"result {number}"


def read_regions(
    results: Results, size: Size | None, place: str, skip: Skip, reject: Reject = raise_error
) -> list[Annotation]:
    """Read the regions of one image: results with the same id are one region.

    Args:
        results: Of the image.
        size: Width and height; without them no shape can be read.
        place: The task, for messages.
        skip: Called for each result or part that cannot be kept.
        reject: Called for each region that cannot be read, with an error that names it (default: raise it).
    """
    regions: dict[Any, list[Mapping[str, Any]]] = {}
    for number, result in enumerate(results):
        identity = result.get("id")
        regions.setdefault(identity if isinstance(identity, str) else number, []).append(result)
    found = []
    for number, pieces in enumerate(regions.values()):
        where = f"{place}, {_name_region(pieces[0], number)}"
        shapes = [piece for piece in pieces if _kind(piece)]
        for kind in (piece.get("type") for piece in pieces if not _kind(piece)):
            if kind == "textarea" and not shapes:
                skip("text without a region", where)
            elif kind not in ("textarea", "labels"):
                skip(kind if isinstance(kind, str) else "result without a type", where)
        try:
            region = _read_region(pieces, shapes, size, where, skip) if shapes else None
        except InputError as error:
            reject(error)
        else:
            found += [region] if region else []
    return found


def _read_region(pieces: Results, shapes: Results, size: Size | None, place: str, skip: Skip) -> Annotation | None:
    if size is None:
        raise InputError(f"{place}: no 'original_width' and 'original_height', and no image to measure")
    geometry = _read_geometry(shapes, size, place, skip)
    if geometry is None:
        return None
    captions = tuple(text for piece in pieces for text in _texts(piece, place))
    labels = dict.fromkeys(label for piece in pieces for label in _labels(piece))
    score = next((piece["score"] for piece in pieces if piece.get("score") is not None), None)
    notes = [each for piece in pieces for each in (piece, piece.get("meta")) if isinstance(each, Mapping)]
    unread = next(filter(None, (find_unread_caption(each, ("textarea",)) for each in notes)), None)
    unread = None if captions else unread
    return Annotation(place, *geometry, ", ".join(labels) or None, captions, score, unread=unread)


def _read_geometry(
    shapes: Results, size: Size, place: str, skip: Skip
) -> tuple[Box | None, Mapping[str, Any] | None, Point | None] | None:
    """Read the shapes of a region: the union of its masks, its first box, or else its first point. Others are counted,
    except repetitions.
    """
    boxes, codes, points = dict[Box, None](), list[Mapping[str, Any]](), dict[Point, None]()
    for piece in shapes:
        turn = piece.get("image_rotation")
        if is_finite_number(turn) and turn % 360:
            skip("region on an image that was turned in Label Studio", place)
        elif _kind(piece) == "keypoint" and piece.get("parentID"):
            skip("keypoint", place)
        else:
            box, mask, point = read_shape(piece, size, place, skip)
            boxes |= {box: None} if box and not mask else {}
            codes += [mask] if mask else []
            points |= {point: None} if point else {}
    mask = masks.merge(codes) if codes else None
    for _ in list(boxes)[1:]:
        skip("further box of a region", place)
    for _ in list(points)[0 if boxes or mask else 1 :]:
        skip("keypoint", place)
    if boxes or mask:
        return next(iter(boxes), None) or (masks.box_of(mask) if mask else None), mask, None
    return (None, None, next(iter(points))) if points else None


def read_shape(
    result: Mapping[str, Any], size: Size, place: str, skip: Skip
) -> tuple[Box | None, Mapping[str, Any] | None, Point | None]:
    """Read the box, the mask or the point of a result, in pixels. All are None for what was counted.

    Raises:
        InputError: If its value cannot be read.
    """
    value, kind = check_object(result.get("value"), f"{place}, 'value'"), _kind(result)
    x_scale, y_scale = size[0] / 100, size[1] / 100
    try:
        match kind:
            case "rectangle":
                x, y, width, height = _numbers(value, ("x", "y", "width", "height"))
                (degrees,) = _numbers({"rotation": 0, **_given(value)}, ("rotation",))
                x1, y1, w, h = x * x_scale, y * y_scale, width * x_scale, height * y_scale
                if degrees % 360 == 0:
                    return (x1, y1, (x + width) / 100 * size[0], (y + height) / 100 * size[1]), None, None
                return _filled(rotate_rectangle(x1, y1, w, h, degrees), size, place, skip)
            case "ellipse":
                x, y, radius_x, radius_y = _numbers(value, ("x", "y", "radiusX", "radiusY"))
                (degrees,) = _numbers({"rotation": 0, **_given(value)}, ("rotation",))
                around = trace_ellipse(x * x_scale, y * y_scale, radius_x * x_scale, radius_y * y_scale, degrees)
                return _filled(around, size, place, skip)
            case "polygon":
                corners = [_pair(each) for each in value["points"]]
                return _filled([(x * x_scale, y * y_scale) for x, y in corners], size, place, skip)
            case "vector":
                vertices = [check_object(each, "a vertex") for each in value["vertices"]]
                if not value.get("closed") or any(each.get("isBezier") for each in vertices):
                    skip("open or curved vector", place)
                    return None, None, None
                corners = [_numbers(each, ("x", "y")) for each in vertices]
                return _filled([(x * x_scale, y * y_scale) for x, y in corners], size, place, skip)
            case "brush":
                code = read_field(value, "rle", list, "'value'")
                return None, masks.encode(brush.unpack(code, *size)), None
            case "bitmask":
                inside = decode_mask(value.get("imageDataURL"), "'imageDataURL'", size)
                if inside.shape != size[::-1]:
                    raise InputError(f"'imageDataURL' is {inside.shape[1]} x {inside.shape[0]}, the image {size}")
                return None, masks.encode(np.asarray(inside)), None
            case _:
                x, y = _numbers(value, ("x", "y"))
                return None, None, (x * x_scale, y * y_scale)
    except (ValueError, KeyError, TypeError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else error
        raise InputError(f"{place}: a {kind} that cannot be read: {reason}") from error


def _filled(
    points: Points, size: Size, place: str, skip: Skip
) -> tuple[Box | None, Mapping[str, Any] | None, Point | None]:
    if len(points) < 3:
        skip("polygon with fewer than three points", place)
        return None, None, None
    mask = fill_polygons([points], size)
    if masks.area(mask):
        return masks.box_of(mask), mask, None
    skip("shape covering no pixel, read as its box", place)
    return bound_points(points), None, None


def _kind(result: Mapping[str, Any]) -> str | None:
    """One of SHAPES; None for a result without a shape. `labels` has that of its own value."""
    kind, value = result.get("type"), result.get("value")
    if kind == "labels" and isinstance(value, Mapping):
        by_key = {"rle": "brush", "imageDataURL": "bitmask", "vertices": "vector", "points": "polygon"}
        by_key |= {"radiusX": "ellipse", "height": "rectangle", "x": "keypoint"}
        return next((shape for key, shape in by_key.items() if key in value), None)
    shape = kind.removesuffix("labels") if isinstance(kind, str) else None
    return shape if shape in SHAPES else None


def _texts(result: Mapping[str, Any], place: str) -> list[str]:
    if result.get("type") != "textarea":
        return []
    value = check_object(result.get("value"), f"{place}, 'value'")
    return read_texts(f"{place}, 'text'", value.get("text"))


def _labels(result: Mapping[str, Any]) -> list[str]:
    kind, value = str(result.get("type")), result.get("value")
    labels = value.get(kind) if kind.endswith("labels") and isinstance(value, Mapping) else None
    return [label for label in labels if isinstance(label, str)] if isinstance(labels, list) else []


def _is_of(result: Mapping[str, Any], key: str, index: int, images: Mapping[tuple[str, int], str]) -> bool:
    """Whether a result is of this image of its task."""
    several = len({key for key, _ in images}) > 1
    place = result.get("item_index") if isinstance(result.get("item_index"), int) else 0
    return (not several or result.get("to_name") == key) and (place == index or (key, place) not in images)


def _names_image(value: Any) -> bool:
    """Whether a value of a task's data names an image: a path or a URL, whose query may hold the path."""
    first = value[0] if isinstance(value, list) and value else value
    return isinstance(first, str) and any(part.lower().endswith(SUFFIXES) for part in re.split("[?#&]", first))


def _given(value: Mapping[str, Any]) -> dict[str, Any]:
    return {key: each for key, each in value.items() if each is not None}


def _numbers(value: Mapping[str, Any], keys: Sequence[str]) -> list[float]:
    return [float(read_field(value, key, float, "'value'")) for key in keys]


def _pair(value: Any) -> tuple[float, float]:
    check_numbers("a point", value, "x, y")
    return float(value[0]), float(value[1])


def _tables(value: Any, place: str) -> list[Mapping[str, Any]]:
    check_type(place, value, list, InputError)
    return [check_object(each, place) for each in value]
