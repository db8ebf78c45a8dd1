"""Read Label Studio tasks: https://labelstud.io/guide/task_format. Coordinates are percentages of the image."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np

from sca.io import masks
from sca.io.annotations.annotation import AnnotatedImage, Annotation, ImageSize, SkipCallback, describe_unread_caption
from sca.io.annotations.brush_rle import decode_brush_rle
from sca.io.annotations.shapes import (
    Points,
    compute_bounding_box,
    decode_base64_mask,
    fill_polygons,
    rotate_rectangle,
    trace_ellipse,
)
from sca.io.coordinates import Box
from sca.io.errors import InputError, RejectCallback, raise_error
from sca.io.images import IMAGE_SUFFIXES
from sca.io.validation import (
    check_image_name,
    check_numbers,
    check_object,
    check_type,
    is_finite_number,
    parse_texts,
    read_field,
    read_recorded_size,
)

Results = Sequence[Mapping[str, Any]]
Point = tuple[float, float]
MeasureCallback = Callable[[str], ImageSize | None]
SHAPE_TYPES = ("rectangle", "polygon", "ellipse", "brush", "bitmask", "keypoint", "vector")
MULTIPLE_RESULTS_REASON = "task with several {}, of which one is read"


def read_tasks(
    content: Any, display_name: str, skip: SkipCallback, measure: MeasureCallback, reject: RejectCallback = raise_error
) -> Iterator[AnnotatedImage]:
    """Read the images of an export, in order.

    The annotation of a task is the first one marked as ground truth, else the first; canceled ones are skipped. A task
    without annotations uses its first draft, else its first prediction.

    Args:
        content: List of tasks, or one task.
        display_name: Name of the file in messages.
        skip: Called for each task, result or item that cannot be kept.
        measure: Returns the size of an image by its name, or None. Called if no shape records the size.
        reject: Called with an error for each task, result or region that is invalid. Raises it by default.

    Yields:
        An image with its annotations.
    """
    for number, task in enumerate(content if isinstance(content, list) else [content]):
        try:
            images = _read_task(task, f"{display_name}, task {number}", skip, measure, reject)
        except InputError as error:
            reject(error)
        else:
            yield from images


def _read_task(
    task: Any, location: str, skip: SkipCallback, measure: MeasureCallback, reject: RejectCallback
) -> list[AnnotatedImage]:
    if "data" not in check_object(task, location):
        raise InputError(f"{location}: 'data' is missing; export from Label Studio as JSON, not as JSON-MIN or COCO")
    data = check_object(task["data"], f"{location}, 'data'")
    annotation = choose_annotation(task, location, skip)
    results = _read_results(annotation.get("result") or [], f"{location}, 'result'", reject)
    images = find_image_names(data, results, location)
    model = annotation.get("model_version") if isinstance(annotation.get("model_version"), str) else None
    annotated_images = []
    for (key, index), name in images.items():
        image_results: Results = [each for each in results if _belongs_to_image(each, key, index, images)]
        recorded_size, image_results = resolve_image_size(image_results, data, len(images) == 1, location, reject)
        size = recorded_size or (measure(name) if any(map(get_shape_type, image_results)) else None)
        regions = read_regions(image_results, size, location, skip, reject)
        annotated_images.append(
            AnnotatedImage(location, name, size, regions, model, is_size_recorded=recorded_size is not None)
        )
    return annotated_images


def _read_results(results: Any, location: str, reject: RejectCallback) -> list[Mapping[str, Any]]:
    check_type(location, results, list, InputError)
    objects: list[Mapping[str, Any]] = []
    for number, result in enumerate(results):
        try:
            objects.append(check_object(result, f"{location}[{number}]"))
        except InputError as error:
            reject(error)
    return objects


def is_task(content: Any) -> bool:
    """Return whether a JSON value is a single task; a file with several tasks is a list."""
    return isinstance(content, Mapping) and isinstance(content.get("data"), Mapping)


def choose_annotation(task: Mapping[str, Any], location: str, skip: SkipCallback) -> Mapping[str, Any]:
    """Return the annotation, draft or prediction of a task to use; empty without one."""
    annotations = _check_objects(task.get("annotations") or [], f"{location}, 'annotations'")
    for annotation in annotations:
        if annotation.get("was_cancelled"):
            skip("cancelled annotation", location)
    if annotations:
        finished = [each for each in annotations if not each.get("was_cancelled")]
        if len(finished) > 1:
            skip(MULTIPLE_RESULTS_REASON.format("annotations"), location)
        finished.sort(key=lambda each: not each.get("ground_truth"))  # stable: the others keep their order
        return finished[0] if finished else {}
    for source_key in ("drafts", "predictions"):
        items = task.get(source_key)
        # Exports may contain only the ids of drafts and predictions.
        candidates = [each for each in items if isinstance(each, Mapping)] if isinstance(items, list) else []
        if len(candidates) > 1:
            skip(MULTIPLE_RESULTS_REASON.format(source_key), location)
        if candidates:
            return candidates[0]
    return {}


def find_image_names(data: Mapping[str, Any], results: Results, location: str) -> dict[tuple[str, int], str]:
    """Map (data key, index in the list of that key) to the name of each image of a task.

    The data keys are those in `to_name` of the results, else "image", else the only key whose value names an image.

    Args:
        data: `data` of the task.
        results: Results of its annotation.
        location: Task, for messages.

    Returns:
        Image names by data key and index; the index is 0 for a single name.

    Raises:
        InputError: No key or several keys match.
    """
    referenced_keys = dict.fromkeys(str(each.get("to_name")) for each in results if get_shape_type(each))
    keys = [key for key in referenced_keys if key in data] or [key for key in data if key == "image"]
    keys = keys or [key for key, value in data.items() if _is_image_reference(value)]
    if not keys or (len(keys) > 1 and not set(keys) <= referenced_keys.keys()):
        problem = "several values name" if keys else "no value names"
        raise InputError(f"{location}, 'data': {problem} an image; name it 'image' (keys: {', '.join(data) or 'none'})")
    images = {}
    for key in keys:
        values = data[key] if isinstance(data[key], list) else [data[key]]
        for index, name in enumerate(values):
            images[key, index] = check_image_name(f"{location}, 'data', {key!r}", name)
    return images


def resolve_image_size(
    results: Results, data: Mapping[str, Any], is_only: bool, location: str, reject: RejectCallback = raise_error
) -> tuple[ImageSize | None, Results]:
    """Return the size of an image: that of its first shape, else that of the task's data, which our export writes.

    Args:
        results: Results of the image.
        data: Data of the task.
        is_only: Whether the task has one image.
        location: Task, for messages.
        reject: Called for each shape that records no size, or a different one.

    Returns:
        Width and height, None if not recorded; and the results without the rejected ones.
    """
    size, accepted = None, []
    for number, result in enumerate(results):
        try:
            recorded = _read_shape_image_size(result, number, size, location)
        except InputError as error:
            reject(error)
        else:
            size = size or recorded
            accepted.append(result)
    if size is None and is_only:
        with suppress(InputError):  # columns defined by the user
            size = read_recorded_size(data, location)
    return size, accepted


def _read_shape_image_size(
    result: Mapping[str, Any], number: int, previous_size: ImageSize | None, location: str
) -> ImageSize | None:
    """Return the image size that a shape records; None without one, and for a result without a shape."""
    if not get_shape_type(result):
        return None
    result_location = f"{location}, {_describe_region(result, number)}"
    size = read_recorded_size(result, result_location, ("original_width", "original_height"))
    if size and previous_size and size != previous_size:
        raise InputError(
            f"{result_location}: the image size is {size[0]} x {size[1]}, but an earlier result records "
            f"{previous_size[0]} x {previous_size[1]}"
        )
    return size


def _describe_region(result: Mapping[str, Any], number: int) -> str:
    region_id = result.get("id")
    return f"region {region_id!r:.60}" if isinstance(region_id, str) else f"result {number}"


def read_regions(
    results: Results, size: ImageSize | None, location: str, skip: SkipCallback, reject: RejectCallback = raise_error
) -> list[Annotation]:
    """Read the regions of one image. Results with the same id are one region.

    Args:
        results: Results of the image.
        size: Width and height; without them no shape can be read.
        location: Task, for messages.
        skip: Called for each result or item that cannot be kept.
        reject: Called with an error for each region that is invalid. Raises it by default.

    Returns:
        The annotations, in the order of their first results.
    """
    regions: dict[Any, list[Mapping[str, Any]]] = {}
    for number, result in enumerate(results):
        region_id = result.get("id")
        regions.setdefault(region_id if isinstance(region_id, str) else number, []).append(result)
    annotations = []
    for number, region_results in enumerate(regions.values()):
        region_location = f"{location}, {_describe_region(region_results[0], number)}"
        shapes = [piece for piece in region_results if get_shape_type(piece)]
        for result_type in (piece.get("type") for piece in region_results if not get_shape_type(piece)):
            if result_type == "textarea" and not shapes:
                skip("text without a region", region_location)
            elif result_type not in ("textarea", "labels"):
                skip(result_type if isinstance(result_type, str) else "result without a type", region_location)
        try:
            region = _read_region(region_results, shapes, size, region_location, skip) if shapes else None
        except InputError as error:
            reject(error)
        else:
            annotations += [region] if region else []
    return annotations


def _read_region(
    results: Results, shapes: Results, size: ImageSize | None, location: str, skip: SkipCallback
) -> Annotation | None:
    if size is None:
        raise InputError(
            f"{location}: no 'original_width' and 'original_height', and its image was not found; add both fields or "
            "the image"
        )
    geometry = _read_geometry(shapes, size, location, skip)
    if geometry is None:
        return None
    captions = tuple(text for piece in results for text in _read_captions(piece, location))
    labels = dict.fromkeys(label for piece in results for label in read_labels(piece))
    score = next((piece["score"] for piece in results if piece.get("score") is not None), None)
    records = [each for piece in results for each in (piece, piece.get("meta")) if isinstance(each, Mapping)]
    unread_caption = next(filter(None, (describe_unread_caption(each, ("textarea",)) for each in records)), None)
    unread_caption = None if captions else unread_caption
    return Annotation(
        location,
        *geometry,
        ", ".join(labels) or None,
        captions,
        score,
        unread_caption=unread_caption,
        separate_labels=tuple(labels),
    )


def _read_geometry(
    shapes: Results, size: ImageSize, location: str, skip: SkipCallback
) -> tuple[Box | None, dict[str, Any] | None, Point | None] | None:
    """Return the union of the masks, the first box or else the first point of a region; count other shapes once."""
    boxes, rles, points = dict[Box, None](), list[dict[str, Any]](), dict[Point, None]()
    for result in shapes:
        if is_image_rotated(result):
            skip("region on an image that was turned in Label Studio", location)
        elif get_shape_type(result) == "keypoint" and result.get("parentID"):
            skip("keypoint", location)
        else:
            box, mask, point = read_shape(result, size, location, skip)
            boxes |= {box: None} if box and not mask else {}
            rles += [mask] if mask else []
            points |= {point: None} if point else {}
    mask = masks.merge_rles(rles) if rles else None
    for _ in list(boxes)[1:]:
        skip("further box of a region", location)
    for _ in list(points)[0 if boxes or mask else 1 :]:
        skip("keypoint", location)
    if boxes or mask:
        return next(iter(boxes), None) or (masks.mask_to_box(mask) if mask else None), mask, None
    return (None, None, next(iter(points))) if points else None


def read_shape(
    result: Mapping[str, Any], size: ImageSize, location: str, skip: SkipCallback
) -> tuple[Box | None, dict[str, Any] | None, Point | None]:
    """Return the box, the mask or the point of a result in pixels. All are None for a result that was counted.

    Args:
        result: Result of a labeling tool.
        size: Width and height of the image.
        location: Task, for messages.
        skip: Called for each result that cannot be kept.

    Returns:
        Box x1, y1, x2, y2; mask as RLE; and point x, y. At most one is set.

    Raises:
        InputError: The value is invalid.
    """
    value, shape_type = check_object(result.get("value"), f"{location}, 'value'"), get_shape_type(result)
    x_scale, y_scale = size[0] / 100, size[1] / 100
    try:
        match shape_type:
            case "rectangle":
                x, y, width, height = _read_value_numbers(value, ("x", "y", "width", "height"))
                degrees = _read_rotation(value)
                x1, y1, w, h = x * x_scale, y * y_scale, width * x_scale, height * y_scale
                if degrees % 360 == 0:
                    return (x1, y1, (x + width) / 100 * size[0], (y + height) / 100 * size[1]), None, None
                return _fill_shape(rotate_rectangle(x1, y1, w, h, degrees), size, location, skip)
            case "ellipse":
                x, y, radius_x, radius_y = _read_value_numbers(value, ("x", "y", "radiusX", "radiusY"))
                degrees = _read_rotation(value)
                ellipse_points = trace_ellipse(
                    x * x_scale, y * y_scale, radius_x * x_scale, radius_y * y_scale, degrees
                )
                return _fill_shape(ellipse_points, size, location, skip)
            case "polygon":
                corners = [_parse_point(each) for each in value["points"]]
                return _fill_shape([(x * x_scale, y * y_scale) for x, y in corners], size, location, skip)
            case "vector":
                vertices = [check_object(each, "a vertex") for each in value["vertices"]]
                if not value.get("closed") or any(each.get("isBezier") for each in vertices):
                    skip("open or curved vector", location)
                    return None, None, None
                vertex_points = [_read_value_numbers(each, ("x", "y")) for each in vertices]
                return _fill_shape([(x * x_scale, y * y_scale) for x, y in vertex_points], size, location, skip)
            case "brush":
                code = read_field(value, "rle", list, "'value'")
                return None, masks.encode_rle(decode_brush_rle(code, *size)), None
            case "bitmask":
                bitmask = decode_base64_mask(value.get("imageDataURL"), "'imageDataURL'", size)
                if bitmask.shape != size[::-1]:
                    raise InputError(f"'imageDataURL' is {bitmask.shape[1]} x {bitmask.shape[0]}, the image {size}")
                return None, masks.encode_rle(np.asarray(bitmask)), None
            case _:
                x, y = _read_value_numbers(value, ("x", "y"))
                return None, None, (x * x_scale, y * y_scale)
    except (ValueError, KeyError, TypeError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else error
        raise InputError(f"{location}: cannot read the {shape_type}: {reason}") from error


def _fill_shape(
    points: Points, size: ImageSize, location: str, skip: SkipCallback
) -> tuple[Box | None, dict[str, Any] | None, Point | None]:
    if len(points) < 3:
        skip("polygon with fewer than three points", location)
        return None, None, None
    mask = fill_polygons([points], size)
    if masks.compute_mask_area(mask):
        return masks.mask_to_box(mask), mask, None
    skip("shape covering no pixel, read as its box", location)
    return compute_bounding_box(points), None, None


def get_shape_type(result: Mapping[str, Any]) -> str | None:
    """Return a key of SHAPES, None for a result without a shape; the type of `labels` depends on its value."""
    result_type, value = result.get("type"), result.get("value")
    if result_type == "labels" and isinstance(value, Mapping):
        shape_type_by_key = {"rle": "brush", "imageDataURL": "bitmask", "vertices": "vector", "points": "polygon"}
        shape_type_by_key |= {"radiusX": "ellipse", "height": "rectangle", "x": "keypoint"}
        return next((shape for key, shape in shape_type_by_key.items() if key in value), None)
    shape = result_type.removesuffix("labels") if isinstance(result_type, str) else None
    return shape if shape in SHAPE_TYPES else None


def has_mask(result: Mapping[str, Any]) -> bool:
    """Return whether the shape of a result is read as a mask of the size of the image. Rotated rectangles are."""
    shape_type, value = get_shape_type(result), result.get("value")
    if shape_type != "rectangle":
        return shape_type not in (None, "keypoint")
    try:
        return isinstance(value, Mapping) and _read_rotation(value) % 360 != 0
    except ValueError:  # reported when the shape is read
        return False


def is_image_rotated(result: Mapping[str, Any]) -> bool:
    """Return whether the image was rotated in Label Studio; the coordinates of the result are those of this view."""
    rotation = result.get("image_rotation")
    return is_finite_number(rotation) and rotation % 360 != 0


def _read_captions(result: Mapping[str, Any], location: str) -> list[str]:
    if result.get("type") != "textarea":
        return []
    value = check_object(result.get("value"), f"{location}, 'value'")
    return parse_texts(f"{location}, 'text'", value.get("text"))


def read_labels(result: Mapping[str, Any]) -> list[str]:
    """Return the labels of a result; empty for one without labels."""
    result_type, value = str(result.get("type")), result.get("value")
    labels = value.get(result_type) if result_type.endswith("labels") and isinstance(value, Mapping) else None
    return [label for label in labels if isinstance(label, str)] if isinstance(labels, list) else []


def _belongs_to_image(result: Mapping[str, Any], key: str, index: int, images: Mapping[tuple[str, int], str]) -> bool:
    """Return whether a result belongs to this image of its task."""
    has_several_keys = len({key for key, _ in images}) > 1
    item_index = result.get("item_index") if isinstance(result.get("item_index"), int) else 0
    return (not has_several_keys or result.get("to_name") == key) and (
        item_index == index or (key, item_index) not in images
    )


def _is_image_reference(value: Any) -> bool:
    """Return whether a value of a task's data names an image: a path or a URL, whose query may contain the path."""
    first = value[0] if isinstance(value, list) and value else value
    return isinstance(first, str) and any(part.lower().endswith(IMAGE_SUFFIXES) for part in re.split("[?#&]", first))


def _read_value_numbers(value: Mapping[str, Any], keys: Sequence[str]) -> list[float]:
    return [float(read_field(value, key, float, "'value'")) for key in keys]


def _read_rotation(value: Mapping[str, Any]) -> float:
    return 0.0 if value.get("rotation") is None else float(read_field(value, "rotation", float, "'value'"))


def _parse_point(value: Any) -> tuple[float, float]:
    check_numbers("a point", value, "x, y")
    return float(value[0]), float(value[1])


def _check_objects(value: Any, location: str) -> list[Mapping[str, Any]]:
    check_type(location, value, list, InputError)
    return [check_object(each, location) for each in value]
