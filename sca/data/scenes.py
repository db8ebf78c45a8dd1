"""Synthetic scenes with exact labels, for training and evaluation without downloads.

A scene is two to five objects on a varied background. Each object has a size, a texture, a color and a shape. A region
has the visible mask of its object, the box of the mask, the shape as its name, and phrases of a fixed grammar:

    a SIZE TEXTURE COLOR SHAPE [RELATION a COLOR SHAPE]        a small striped red circle left of a blue square

`parse_statement` parses a phrase and `is_relation_true` checks its relation, so that a caption can be scored by its
content rather than its wording. The module does not import torch.
"""

from __future__ import annotations

import colorsys
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, NamedTuple

import numpy as np
from PIL import Image, ImageDraw
from pycocotools import mask as rle
from sca_registry.contracts import Question, Region, Sample

from sca.data.scene_questions import RELATIONS, make_questions
from sca.io.errors import InputError

COLORS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "white")
SHAPE_NAMES = ("circle", "square", "triangle", "star", "cross")
SIZE_NAMES = ("small", "medium", "large")
TEXTURES = ("plain", "striped", "dotted")
LOCATION_WORDS = ("top", "bottom", "left", "right")  # in the order of a location such as "top left"

NAME_ATTRIBUTES = ("size", "texture", "color", "shape")  # which class names may contain
DEFAULT_NAME_ATTRIBUTES = ("shape",)

DEFAULT_SPLIT_SIZES = {"train": 100_000, "val": 500, "test": 500}
BASE_IMAGE_SIZE = 128  # image side for all lengths below, in pixels
DIAMETERS = {"small": (18, 24), "medium": (32, 40), "large": (50, 64)}  # longer side of the unrotated bounding box
SIZE_PROBABILITIES = (0.4, 0.35, 0.25)
MIN_VISIBLE_FRACTION = 0.6  # minimum visible fraction of each shape
MIN_RELATION_RATIO = 1.25  # minimum ratio of the distances along both axes
MIN_CENTER_DISTANCE = 10  # minimum distance of two centers, along the larger axis
OVERLAP_PROBABILITY = 0.18  # probability that a shape overlaps another
QUESTION_STREAM = 1  # random stream of questions, apart from that of the image
MAX_PLACEMENT_TRIES = 30
SUPERSAMPLE = 4

HUES = {  # hue and its maximum jitter, in degrees
    "red": (358, 5),
    "orange": (27, 4),
    "yellow": (54, 4),
    "green": (125, 12),
    "cyan": (183, 6),
    "blue": (228, 7),
    "purple": (284, 8),
}


def _build_outlines() -> dict[str, np.ndarray]:
    """Return each shape as a (P, 2) polygon, y down; the longer side of its bounding box is 1."""

    def make_ring(radii: Iterable[float]) -> np.ndarray:
        radii = np.asarray(tuple(radii))
        turn = 2 * np.pi * np.arange(len(radii)) / len(radii) - np.pi / 2
        return radii[:, None] * np.stack([np.cos(turn), np.sin(turn)], axis=1)

    arm_half_width = 0.19
    corner = np.array([[arm_half_width, -0.5], [arm_half_width, -arm_half_width], [0.5, -arm_half_width]])
    quarter_turn = np.array([[0, 1], [-1, 0]])  # for row vectors: (x, y) -> (-y, x)
    outlines = {
        "circle": make_ring([1] * 64),
        "square": np.array([[-0.5, -0.5], [0.5, -0.5], [0.5, 0.5], [-0.5, 0.5]]),
        "triangle": make_ring([1] * 3),
        "star": make_ring([1, 0.48] * 5),
        "cross": np.concatenate([corner @ np.linalg.matrix_power(quarter_turn, turns) for turns in range(4)]),
    }
    return {shape: outline / np.ptp(outline, axis=0).max() for shape, outline in outlines.items()}


OUTLINES = _build_outlines()


class Statement(NamedTuple):
    """Content of a phrase; None for each attribute that it does not state."""

    size: str | None = None
    texture: str | None = None
    color: str | None = None
    shape: str | None = None
    relation: str | None = None
    other_color: str | None = None
    other_shape: str | None = None
    location: str | None = None


def parse_statement(text: str) -> Statement | None:
    """Parse a phrase of the grammar above, or a referring expression of `sca.data.referring_scenes`.

    The location is the location words before the relation, in the order of `LOCATION_WORDS`. Unknown words are ignored,
    and of two words for one attribute the first counts, so that malformed captions of a partly trained model are still
    parsed.

    Args:
        text: Phrase.

    Returns:
        The statement; None if the phrase states no attribute and no relation.
    """
    text = " ".join(re.findall("[a-z]+", text.lower()))
    head, *rest = re.split(rf"\b({'|'.join(RELATIONS)})\b", text, maxsplit=1)
    relation, tail = rest if rest else (None, "")
    statement = Statement(
        _find_first_word(head, SIZE_NAMES),
        _find_first_word(head, TEXTURES),
        _find_first_word(head, COLORS),
        _find_first_word(head, SHAPE_NAMES),
        relation,
        _find_first_word(tail, COLORS),
        _find_first_word(tail, SHAPE_NAMES),
        " ".join(word for word in LOCATION_WORDS if word in head.split()) or None,
    )
    return statement if any(statement) else None


def _find_first_word(text: str, words: tuple[str, ...]) -> str | None:
    return next((word for word in text.split() if word in words), None)


def is_relation_true(statement: Statement, region: Region, others: Iterable[Region]) -> bool:
    """Return whether the stated relation holds to any other object of the stated color and shape.

    The relation is the direction along the axis with the larger distance between the centers.

    Args:
        statement: Parsed phrase. Without a relation, or without both color and shape of the other object, it is not
            true.
        region: Region that the phrase describes.
        others: Regions of the scene, which may include `region`.

    Returns:
        True if the relation holds.
    """
    return statement.relation is not None and any(
        other.id != region.id
        and other.attributes["color"] == statement.other_color
        and other.attributes["shape"] == statement.other_shape
        and compute_relation(region, other)[0] == statement.relation
        for other in others
    )


def compute_relation(region: Region, other: Region) -> tuple[str, float]:
    """Compute the relation of a region to another one.

    Args:
        region: Region of a scene.
        other: Another region of the same scene.

    Returns:
        The direction from `other` to `region`, and the ratio of the larger to the smaller distance of their centers
        along the axes.
    """
    (x, y), (other_x, other_y) = region.attributes["center"], other.attributes["center"]
    dx, dy = x - other_x, y - other_y
    large, small = max(abs(dx), abs(dy)), min(abs(dx), abs(dy))
    ratio = large / small if small else math.inf
    if abs(dx) >= abs(dy):
        return ("left of" if dx < 0 else "right of"), ratio
    return ("above" if dy < 0 else "below"), ratio


def _find_clear_relation(region: Region, other: Region) -> str | None:
    relation, ratio = compute_relation(region, other)
    return relation if ratio >= MIN_RELATION_RATIO else None


class _DrawnShape(NamedTuple):
    """Shape drawn on its own patch, before it is placed."""

    attributes: dict[str, Any]  # color, shape, size, texture
    alpha: np.ndarray  # (h, w) float32: covered fraction of each pixel
    solid: np.ndarray  # (h, w) bool: pixels covered by at least half
    center: np.ndarray  # (2,) x y relative to the corner of the patch
    paint: np.ndarray  # (3,) or (h, w, 3) float32 in 0..255


class Scenes:
    """Synthetic scenes, drawn on access and deterministic for a seed, split and index.

    Splits use separate random streams. Image and region ids are unique over all splits. The `attributes` of a region
    are its color, shape, size, texture, `center` (x, y) in pixels, and `visible`, the fraction of the object that no
    other object covers. If its most specific phrase states a relation, they also contain `relation`, `other_color` and
    `other_shape`.

    Args:
        split: "train", "val" or "test".
        num_images: Number of scenes. Default: 100,000 in train, 500 in val and test.
        image_size: Side of the square image in pixels, at least 32. All lengths scale with it.
        seed: Random seed.
        name_attributes: Attributes that form the class name of a region, in this order; for example texture, color and
            shape for "striped red circle".
        questions: Also generate questions about the regions, see `sca.data.scene_questions`. Their wordings in "train"
            differ from those in the other splits.

    Raises:
        InputError: The split or an attribute is unknown, or the size is too small.
    """

    attribute_values: ClassVar[dict[str, tuple[str, ...]]] = {
        "color": COLORS,
        "shape": SHAPE_NAMES,
        "size": SIZE_NAMES,
        "texture": TEXTURES,
        "relation": RELATIONS,
        "other_color": COLORS,
        "other_shape": SHAPE_NAMES,
    }
    relation_attributes: ClassVar[tuple[str, ...]] = (
        "relation",
        "other_color",
        "other_shape",
    )
    split_sizes: ClassVar[dict[str, int]] = DEFAULT_SPLIT_SIZES
    num_shapes_range: ClassVar[tuple[int, int]] = (2, 5)

    def __init__(
        self,
        split: str,
        num_images: int | None = None,
        image_size: int = BASE_IMAGE_SIZE,
        seed: int = 0,
        name_attributes: Sequence[str] = DEFAULT_NAME_ATTRIBUTES,
        questions: bool = False,
    ):
        if split not in self.split_sizes:
            raise InputError(f"the dataset 'scenes' has no split {split!r}; choose from {', '.join(self.split_sizes)}")
        if image_size < 32:
            raise InputError(f"scenes of {image_size} pixels are too small to distinguish the shapes; use 32 or more")
        if not name_attributes or not set(name_attributes) <= set(NAME_ATTRIBUTES):
            raise InputError(
                f"name_attributes is {list(name_attributes)}; choose one or more of {', '.join(NAME_ATTRIBUTES)}"
            )
        self.name_attributes: tuple[str, ...] = tuple(name_attributes)
        self.has_questions = questions
        self.split = split
        self.image_size = image_size
        self.seed = seed
        self.num_images: int = self.split_sizes[split] if num_images is None else num_images
        self._split_index = list(self.split_sizes).index(split)
        self._scale = image_size / BASE_IMAGE_SIZE
        pixel_centers = (np.arange(image_size, dtype=np.float32) + 0.5) / image_size - 0.5
        self._x_grid, self._y_grid = pixel_centers[None, :, None], pixel_centers[:, None, None]  # in -0.5..0.5

    def __len__(self) -> int:
        return self.num_images

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < self.num_images:
            raise IndexError(f"scene {index} of {self.num_images}")
        rng = np.random.default_rng([self.seed, self._split_index, int(index)])
        canvas = self._draw_background(rng)
        shape_index_map = np.full((self.image_size, self.image_size), -1, dtype=np.int8)  # topmost shape of each pixel
        shape_attributes = self._place_shapes(rng, canvas, shape_index_map)

        canvas *= 1 + rng.uniform(-0.25, 0.25) * self._x_grid + rng.uniform(-0.25, 0.25) * self._y_grid
        canvas += rng.uniform(1, 5) * rng.standard_normal(canvas.shape, dtype=np.float32)
        image = Image.fromarray(np.clip(canvas, 0, 255, out=canvas).astype(np.uint8))
        image_id = int(index) * len(self.split_sizes) + self._split_index
        regions = tuple(
            replace(region, name=self._make_name(region))
            for region in _build_regions(image_id, shape_attributes, shape_index_map)
        )
        return Sample(image, image_id, regions, self._make_questions(regions, int(index)))

    def _make_questions(self, regions: Sequence[Region], index: int) -> tuple[Question, ...]:
        if not self.has_questions:
            return ()
        rng = np.random.default_rng([self.seed, self._split_index, index, QUESTION_STREAM])
        return make_questions(regions, self.attribute_values, _find_clear_relation, rng, self.split != "train")

    def _make_name(self, region: Region) -> str:
        return " ".join(region.attributes[attribute] for attribute in self.name_attributes)

    def _place_shapes(
        self, rng: np.random.Generator, canvas: np.ndarray, shape_index_map: np.ndarray
    ) -> list[dict[str, Any]]:
        """Draw the shapes, later ones over earlier ones, and return their attributes in order."""
        shape_attributes: list[dict[str, Any]] = []
        areas = np.zeros(0, dtype=int)
        visible_areas = areas
        min_shapes, max_shapes = self.num_shapes_range
        num_shapes = int(rng.integers(min_shapes, max_shapes + 1))
        while len(shape_attributes) < num_shapes:
            shape = self._draw_shape(rng, self._sample_attributes(rng, shape_attributes))
            position = self._find_position(rng, shape, shape_attributes, areas, visible_areas, shape_index_map)
            if position is None:
                if len(shape_attributes) >= min_shapes:
                    break
                continue
            left, top, covered = position
            height, width = shape.solid.shape
            window = slice(top, top + height), slice(left, left + width)
            alpha = shape.alpha[..., None]
            canvas[window] += alpha * (shape.paint - canvas[window])
            shape_index_map[window][shape.solid] = len(shape_attributes)
            areas = np.append(areas, shape.solid.sum())
            visible_areas = np.append(visible_areas - covered, areas[-1])
            x, y = shape.center + np.array((left, top))
            shape_attributes.append({**shape.attributes, "center": (float(x), float(y))})
        return [
            {**attributes, "visible": visible_fraction}
            for attributes, visible_fraction in zip(shape_attributes, (visible_areas / areas).tolist(), strict=True)
        ]

    def _find_position(
        self,
        rng: np.random.Generator,
        shape: _DrawnShape,
        shape_attributes: list[dict[str, Any]],
        areas: np.ndarray,
        visible_areas: np.ndarray,
        shape_index_map: np.ndarray,
    ) -> tuple[int, int, np.ndarray] | None:
        """Return the corner of a shape's patch and its overlap with each earlier shape in pixels, or None.

        The shape is inside the canvas, leaves enough of every earlier shape visible, keeps its center away from theirs,
        and covers no shape of its own color, because the edge would be invisible.
        """
        height, width = shape.solid.shape
        centers = np.array([attributes["center"] for attributes in shape_attributes]).reshape(-1, 2)
        has_same_color = np.array(
            [attributes["color"] == shape.attributes["color"] for attributes in shape_attributes], dtype=bool
        )
        should_overlap = rng.random() < OVERLAP_PROBABILITY
        fallback = None
        corners = rng.integers(
            0, (self.image_size - width + 1, self.image_size - height + 1), size=(MAX_PLACEMENT_TRIES, 2)
        )
        for left, top in corners.tolist():
            if (np.abs(centers - shape.center - (left, top)).max(axis=1) < MIN_CENTER_DISTANCE * self._scale).any():
                continue
            covered_indices = shape_index_map[top : top + height, left : left + width][shape.solid]
            covered_areas = np.bincount(covered_indices + 1, minlength=len(shape_attributes) + 1)[1:]
            if (
                covered_areas[has_same_color].any()
                or (visible_areas - covered_areas < MIN_VISIBLE_FRACTION * areas).any()
            ):
                continue
            if not shape_attributes or covered_areas.any() == should_overlap:
                return left, top, covered_areas
            fallback = fallback or (left, top, covered_areas)
        return fallback

    def _sample_attributes(self, rng: np.random.Generator, earlier_shapes: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Sample the attributes of the next shape, here independently of the earlier ones."""
        return {
            "color": COLORS[rng.integers(len(COLORS))],
            "shape": SHAPE_NAMES[rng.integers(len(SHAPE_NAMES))],
            "size": SIZE_NAMES[rng.choice(len(SIZE_NAMES), p=SIZE_PROBABILITIES)],
            "texture": TEXTURES[rng.integers(len(TEXTURES))],
        }

    def _draw_shape(self, rng: np.random.Generator, attributes: dict[str, Any]) -> _DrawnShape:
        diameter = rng.uniform(*DIAMETERS[attributes["size"]]) * self._scale
        angle = math.radians(rng.uniform(-20, 20))
        rotation = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
        outline = diameter * OUTLINES[attributes["shape"]] @ rotation
        center = rng.random(2) - outline.min(axis=0)
        outline = outline + center
        width, height = np.ceil(outline.max(axis=0)).astype(int).tolist()
        supersampled = Image.new("L", (SUPERSAMPLE * width, SUPERSAMPLE * height))
        ImageDraw.Draw(supersampled).polygon((SUPERSAMPLE * outline - 0.5).ravel().tolist(), fill=255)
        coverage = np.asarray(supersampled.reduce(SUPERSAMPLE))
        alpha = coverage.astype(np.float32) / 255
        paint = self._sample_texture(rng, attributes, height, width, center)
        return _DrawnShape(attributes, alpha, coverage >= 128, center, paint)

    def _sample_texture(
        self, rng: np.random.Generator, attributes: dict[str, Any], height: int, width: int, center: np.ndarray
    ) -> np.ndarray:
        """Return (3,) for a plain shape, or (height, width, 3) in a light and a dark tone of the color."""
        base_color = _sample_color(rng, attributes["color"])
        if attributes["texture"] == "plain":
            return base_color
        light, dark = base_color + 0.2 * (255 - base_color), base_color * 0.45
        angle = rng.uniform(0, math.pi)
        x = np.arange(width, dtype=np.float32)[None] + np.float32(0.5 - center[0])
        y = np.arange(height, dtype=np.float32)[:, None] + np.float32(0.5 - center[1])
        along = (math.cos(angle) * x + math.sin(angle) * y) / self._scale  # in pixels of the 128-pixel canvas
        if attributes["texture"] == "striped":
            wave = np.sin(along * (2 * math.pi / rng.uniform(5.5, 6.5)) + rng.uniform(0, 2 * math.pi))
            light_fraction = np.clip(0.5 + 1.5 * wave, 0, 1)
        else:
            across = (math.cos(angle) * y - math.sin(angle) * x) / self._scale
            pitch = rng.uniform(6, 7)
            shift = rng.uniform(-1, 1, size=2)  # keeps a dot near the center of even the smallest shape
            squares = [
                np.square(coordinate - pitch * np.round(coordinate / pitch))
                for coordinate in (along + np.float32(shift[0]), across + np.float32(shift[1]))
            ]
            light_fraction = np.clip(1.7 + 0.5 - np.sqrt(squares[0] + squares[1]), 0, 1)
        return light + light_fraction[..., None] * (dark - light)

    def _draw_background(self, rng: np.random.Generator) -> np.ndarray:
        """Return (size, size, 3) float32 in 0..255: a muted gradient, clouds, checks or lines."""
        first, second = (_sample_muted_color(rng) for _ in range(2))
        pattern = rng.integers(4)
        if pattern == 0:
            angle = rng.uniform(0, 2 * math.pi)
            blend = 0.5 + 0.7 * (math.cos(angle) * self._x_grid + math.sin(angle) * self._y_grid)
        elif pattern == 1:
            coarse = Image.fromarray(rng.random([rng.integers(3, 9)] * 2, dtype=np.float32))
            blend = np.asarray(coarse.resize((self.image_size, self.image_size), Image.Resampling.BICUBIC))[..., None]
        else:
            second = first + rng.uniform(10, 26) * rng.choice((-1, 1))
            cells = rng.uniform(5, 16)
            rotation = rng.uniform(0, math.pi)
            rotated_x = math.cos(rotation) * self._x_grid + math.sin(rotation) * self._y_grid
            if pattern == 2:
                rotated_y = math.cos(rotation) * self._y_grid - math.sin(rotation) * self._x_grid
                blend = (np.floor(cells * rotated_x) + np.floor(cells * rotated_y)) % 2
            else:
                blend = np.where(cells * rotated_x % 1 < rng.uniform(0.1, 0.3), 1, 0)
        return first + np.asarray(blend, dtype=np.float32) * (second - first)


def _build_regions(
    image_id: int, shape_attributes: list[dict[str, Any]], shape_index_map: np.ndarray
) -> tuple[Region, ...]:
    """Return the regions of a scene in drawing order."""
    masks = shape_index_map.T[None] == np.arange(len(shape_attributes), dtype=np.int8)[:, None, None]
    encoded = rle.encode(np.asfortranarray(np.ascontiguousarray(masks).view(np.uint8).T))
    regions = []
    for index, (attributes, mask, mask_rle) in enumerate(zip(shape_attributes, masks, encoded, strict=True)):
        columns, rows = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
        box = (float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1))
        mask_rle = {"size": mask_rle["size"], "counts": mask_rle["counts"].decode()}
        regions.append(Region(image_id * 16 + index, box, mask_rle, attributes["shape"], (), attributes))
    return tuple(_add_phrases(region, regions) for region in regions)


def _add_phrases(region: Region, regions: list[Region]) -> Region:
    """Add phrases to a region, from the least to the most specific.

    The first describes the shape; the others add its relation to the second nearest and to the nearest shape, if it is
    unambiguous. The last relation is also added to the attributes.
    """
    attributes = dict(region.attributes)
    phrases = [compose_phrase(attributes)]
    others = (other for other in regions if other.id != region.id)
    nearest = sorted(others, key=lambda other: math.dist(attributes["center"], other.attributes["center"]))[:2]
    for other in reversed(nearest):
        relation, ratio = compute_relation(region, other)
        if ratio >= MIN_RELATION_RATIO:
            color, shape = other.attributes["color"], other.attributes["shape"]
            attributes |= {"relation": relation, "other_color": color, "other_shape": shape}
            phrases.append(compose_phrase(attributes))
    return replace(region, phrases=tuple(dict.fromkeys(phrases)), attributes=attributes)


def compose_phrase(attributes: Mapping[str, Any]) -> str:
    """Compose the phrase that states the size, texture, color, shape and, if any, the relation of a region."""
    phrase = f"a {attributes['size']} {attributes['texture']} {attributes['color']} {attributes['shape']}"
    if attributes.get("relation") is None:
        return phrase
    return f"{phrase} {attributes['relation']} {add_article(attributes['other_color'], attributes['other_shape'])}"


def add_article(color: str, shape: str) -> str:
    """Return a color and a shape with their indefinite article."""
    return f"{'an' if color == 'orange' else 'a'} {color} {shape}"


def _sample_color(rng: np.random.Generator, name: str) -> np.ndarray:
    """Return (3,) float32 in 0..255: the named color with jitter."""
    if name == "white":
        hue, saturation, value = rng.random(), rng.uniform(0, 0.05), rng.uniform(0.93, 1)
    else:
        mean_hue, spread = HUES[name]
        hue = (mean_hue + rng.uniform(-spread, spread)) % 360 / 360
        saturation, value = rng.uniform(0.8, 1), rng.uniform(0.82, 1)
    return np.array(colorsys.hsv_to_rgb(hue, saturation, value), dtype=np.float32) * 255


def _sample_muted_color(rng: np.random.Generator) -> np.ndarray:
    """Return (3,) float32 in 0..255: a grayish background color."""
    hue, saturation, value = rng.random(), rng.uniform(0, 0.22), rng.uniform(0.25, 0.7)
    return np.array(colorsys.hsv_to_rgb(hue, saturation, value), dtype=np.float32) * 255
