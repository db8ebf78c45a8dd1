"""Drawn scenes with exact truth: what a model can learn, and be measured by, with nothing downloaded.

A scene is two to five shapes on a varied background. Each shape has a size, a texture, a colour and a form; each region
carries its visible mask, its box, its form as the name, and phrases of one fixed grammar:

    a SIZE TEXTURE COLOUR FORM [RELATION a COLOUR FORM]        a small striped red circle left of a blue square

`parse` takes a phrase apart again and `relation_holds` says whether the place it states is true, so a caption can be
scored by what it says rather than by how it is worded. Nothing here imports torch.
"""

from __future__ import annotations

import colorsys
import math
import re
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, ClassVar, NamedTuple

import numpy as np
from PIL import Image, ImageDraw
from pycocotools import mask as rle
from sca_registry.contracts import Region, Sample

from sca.io.errors import InputError

COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "white")
FORMS = ("circle", "square", "triangle", "star", "cross")
SIZES = ("small", "medium", "large")
TEXTURES = ("plain", "striped", "dotted")
RELATIONS = ("left of", "right of", "above", "below")

SPLITS = {"train": 100_000, "val": 500, "test": 500}  # the default number of scenes
CANVAS = 128  # the side that all lengths below are written for
DIAMETERS = {"small": (18, 24), "medium": (32, 40), "large": (50, 64)}  # the longer side of the upright bounding box
SIZE_SHARES = (0.4, 0.35, 0.25)
VISIBLE = 0.6  # no shape may lose more than the rest to those drawn over it
CLEAR = 1.25  # a relation is put into words if one axis outweighs the other by this
APART = 10  # least distance between two centres, along the better axis
OVERLAPS = 0.18  # how often a shape is placed so that it covers part of another
TRIES = 30
SUPERSAMPLE = 4

HUES = {  # degrees of hue, and the most that a shape may stray from it
    "red": (358, 5),
    "orange": (27, 4),
    "yellow": (54, 4),
    "green": (125, 12),
    "cyan": (183, 6),
    "blue": (228, 7),
    "purple": (284, 8),
}


def _outlines() -> dict[str, np.ndarray]:
    """Each form as a polygon (P, 2) about its centre; the longer side of its bounding box is 1, and y points down."""

    def ring(radii: Iterable[float]) -> np.ndarray:
        radii = np.asarray(tuple(radii))
        turn = 2 * np.pi * np.arange(len(radii)) / len(radii) - np.pi / 2
        return radii[:, None] * np.stack([np.cos(turn), np.sin(turn)], axis=1)

    arm = 0.19
    corner = np.array([[arm, -0.5], [arm, -arm], [0.5, -arm]])
    quarter = np.array([[0, 1], [-1, 0]])  # turns row vectors: (x, y) -> (-y, x)
    outlines = {
        "circle": ring([1] * 64),
        "square": np.array([[-0.5, -0.5], [0.5, -0.5], [0.5, 0.5], [-0.5, 0.5]]),
        "triangle": ring([1] * 3),
        "star": ring([1, 0.48] * 5),
        "cross": np.concatenate([corner @ np.linalg.matrix_power(quarter, turns) for turns in range(4)]),
    }
    return {form: outline / np.ptp(outline, axis=0).max() for form, outline in outlines.items()}


OUTLINES = _outlines()


class Statement(NamedTuple):
    """What a phrase says; None where it says nothing."""

    size: str | None = None
    texture: str | None = None
    colour: str | None = None
    form: str | None = None
    relation: str | None = None
    other_colour: str | None = None
    other_form: str | None = None


def parse_json_text(text: str) -> Statement | None:
    """What `text` states, or None if it names no attribute and no relation.

    The exact inverse of the grammar above. Words that do not belong to it are passed over, and of two words of one kind
    the first counts, so that the broken sentences of a half-trained model still give what can be had from them.
    """
    text = " ".join(re.findall("[a-z]+", text.lower()))
    head, *rest = re.split(rf"\b({'|'.join(RELATIONS)})\b", text, maxsplit=1)
    relation, tail = rest if rest else (None, "")
    statement = Statement(
        _first(head, SIZES),
        _first(head, TEXTURES),
        _first(head, COLOURS),
        _first(head, FORMS),
        relation,
        _first(tail, COLOURS),
        _first(tail, FORMS),
    )
    return statement if any(statement) else None


def _first(text: str, words: tuple[str, ...]) -> str | None:
    return next((word for word in text.split() if word in words), None)


def relation_holds(statement: Statement, region: Region, others: Iterable[Region]) -> bool:
    """Whether some other shape of the stated colour and form lies so that `region` is `relation` it.

    The direction is that of the larger of the two differences between the centres. `others` may include `region`
    itself, which is passed over. A statement without a relation, or with no full name for the other shape, says nothing
    that could hold: False.
    """
    return statement.relation is not None and any(
        other.id != region.id
        and other.attributes["colour"] == statement.other_colour
        and other.attributes["form"] == statement.other_form
        and _direction(region, other)[0] == statement.relation
        for other in others
    )


def _direction(region: Region, other: Region) -> tuple[str, float]:
    """Where `region` lies as seen from `other`, and by how much the larger difference outweighs the smaller."""
    (x, y), (other_x, other_y) = region.attributes["centre"], other.attributes["centre"]
    across, down = x - other_x, y - other_y
    large, small = max(abs(across), abs(down)), min(abs(across), abs(down))
    clear = large / small if small else math.inf
    if abs(across) >= abs(down):
        return ("left of" if across < 0 else "right of"), clear
    return ("above" if down < 0 else "below"), clear


class _Shape(NamedTuple):
    """A shape drawn on a patch of its own, before it has a place."""

    facts: dict[str, Any]  # colour, form, size, texture
    alpha: np.ndarray  # (h, w) float32: the share of each pixel that it covers
    solid: np.ndarray  # (h, w) bool: pixels it covers by half or more
    centre: np.ndarray  # (2,) x y from the patch's corner
    paint: np.ndarray  # (3,) or (h, w, 3) float32 in 0..255


class Scenes:
    """Dataset: `Scenes("train")[i]` -> `Sample`, drawn when asked for and always the same for a seed, split and index.

    `size` is the side of the square picture in pixels (every length grows with it) and `count` the number of scenes
    (by default 100,000 to train, 500 each in val and test). Splits draw from separate random streams. Image and region
    ids are unique over all splits. Each region's `attributes` are its colour, form, size, texture, `centre` (x, y),
    `visible`, the share of it that no other shape covers, and, where its most telling phrase states one, the `relation`
    with `other_colour` and `other_form`.
    """

    attributes: ClassVar[dict[str, tuple[str, ...]]] = {
        "colour": COLOURS,
        "form": FORMS,
        "size": SIZES,
        "texture": TEXTURES,
        "relation": RELATIONS,
        "other_colour": COLOURS,
        "other_form": FORMS,
    }
    between: ClassVar[tuple[str, ...]] = (
        "relation",
        "other_colour",
        "other_form",
    )  # not to be seen in the shape itself

    def __init__(self, split: str, count: int | None = None, size: int = CANVAS, seed: int = 0):
        if split not in SPLITS:
            raise InputError(f"no split {split!r} in scenes; there are: {', '.join(SPLITS)}")
        if size < 32:
            raise InputError(f"scenes of {size} pixels are too small to tell the shapes apart; the least is 32")
        self.split, self.size, self.seed = split, size, seed
        self.count = SPLITS[split] if count is None else count
        self._stream = list(SPLITS).index(split)
        self._scale = size / CANVAS
        places = (np.arange(size, dtype=np.float32) + 0.5) / size - 0.5
        self._across, self._down = places[None, :, None], places[:, None, None]  # -0.5..0.5

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < self.count:
            raise IndexError(f"scene {index} of {self.count}")
        random = np.random.default_rng([self.seed, self._stream, int(index)])
        canvas = self._background(random)
        owner = np.full((self.size, self.size), -1, dtype=np.int8)  # the topmost shape of each pixel
        placed = self._place(random, canvas, owner)

        canvas *= 1 + random.uniform(-0.25, 0.25) * self._across + random.uniform(-0.25, 0.25) * self._down
        canvas += random.uniform(1, 5) * random.standard_normal(canvas.shape, dtype=np.float32)
        image = Image.fromarray(np.clip(canvas, 0, 255, out=canvas).astype(np.uint8))
        image_id = int(index) * len(SPLITS) + self._stream
        return Sample(image, image_id, _regions(image_id, placed, owner))

    def _place(self, random: np.random.Generator, canvas: np.ndarray, owner: np.ndarray) -> list[dict[str, Any]]:
        """Draws two to five shapes, later ones over earlier ones, and gives their facts in that order."""
        placed: list[dict[str, Any]] = []
        areas = np.zeros(0, dtype=int)
        visible = areas
        wanted = int(random.integers(2, 6))
        while len(placed) < wanted:
            shape = self._shape(random)
            found = self._spot(random, shape, placed, areas, visible, owner)
            if found is None:
                if len(placed) >= 2:
                    break
                continue
            left, top, covered = found
            height, width = shape.solid.shape
            window = slice(top, top + height), slice(left, left + width)
            alpha = shape.alpha[..., None]
            canvas[window] += alpha * (shape.paint - canvas[window])
            owner[window][shape.solid] = len(placed)
            areas = np.append(areas, shape.solid.sum())
            visible = np.append(visible - covered, areas[-1])
            x, y = shape.centre + np.array((left, top))
            placed.append({**shape.facts, "centre": (float(x), float(y))})
        return [{**facts, "visible": share} for facts, share in zip(placed, (visible / areas).tolist(), strict=True)]

    def _spot(
        self,
        random: np.random.Generator,
        shape: _Shape,
        placed: list[dict[str, Any]],
        areas: np.ndarray,
        visible: np.ndarray,
        owner: np.ndarray,
    ) -> tuple[int, int, np.ndarray] | None:
        """A corner for the shape's patch and how many pixels of each earlier shape it covers there, or None.

        It lies wholly on the canvas, leaves enough of every earlier shape in sight, keeps its centre away from theirs
        and covers none of its own colour, whose edge could not be seen.
        """
        height, width = shape.solid.shape
        centres = np.array([facts["centre"] for facts in placed]).reshape(-1, 2)
        alike = np.array([facts["colour"] == shape.facts["colour"] for facts in placed], dtype=bool)
        overlap = random.random() < OVERLAPS
        fallback = None
        corners = random.integers(0, (self.size - width + 1, self.size - height + 1), size=(TRIES, 2))
        for left, top in corners.tolist():
            if (np.abs(centres - shape.centre - (left, top)).max(axis=1) < APART * self._scale).any():
                continue
            under = owner[top : top + height, left : left + width][shape.solid]
            covered = np.bincount(under + 1, minlength=len(placed) + 1)[1:]
            if covered[alike].any() or (visible - covered < VISIBLE * areas).any():
                continue
            if not placed or covered.any() == overlap:
                return left, top, covered
            fallback = fallback or (left, top, covered)
        return fallback

    def _shape(self, random: np.random.Generator) -> _Shape:
        facts = {
            "colour": COLOURS[random.integers(len(COLOURS))],
            "form": FORMS[random.integers(len(FORMS))],
            "size": SIZES[random.choice(len(SIZES), p=SIZE_SHARES)],
            "texture": TEXTURES[random.integers(len(TEXTURES))],
        }
        diameter = random.uniform(*DIAMETERS[facts["size"]]) * self._scale
        turn = math.radians(random.uniform(-20, 20))
        spin = np.array([[math.cos(turn), math.sin(turn)], [-math.sin(turn), math.cos(turn)]])
        outline = diameter * OUTLINES[facts["form"]] @ spin
        centre = random.random(2) - outline.min(axis=0)
        outline = outline + centre
        width, height = np.ceil(outline.max(axis=0)).astype(int).tolist()
        fine = Image.new("L", (SUPERSAMPLE * width, SUPERSAMPLE * height))
        ImageDraw.Draw(fine).polygon((SUPERSAMPLE * outline - 0.5).ravel().tolist(), fill=255)
        coverage = np.asarray(fine.reduce(SUPERSAMPLE))
        alpha = coverage.astype(np.float32) / 255
        paint = self._paint(random, facts, height, width, centre)
        return _Shape(facts, alpha, coverage >= 128, centre, paint)

    def _paint(
        self, random: np.random.Generator, facts: dict[str, Any], height: int, width: int, centre: np.ndarray
    ) -> np.ndarray:
        """(3,) for a plain shape; (height, width, 3) for a texture, in a light and a dark tone of the colour."""
        base = _colour(random, facts["colour"])
        if facts["texture"] == "plain":
            return base
        light, dark = base + 0.2 * (255 - base), base * 0.45
        angle = random.uniform(0, math.pi)
        x = np.arange(width, dtype=np.float32)[None] + np.float32(0.5 - centre[0])
        y = np.arange(height, dtype=np.float32)[:, None] + np.float32(0.5 - centre[1])
        along = (math.cos(angle) * x + math.sin(angle) * y) / self._scale  # pixels of the 128-pixel canvas
        if facts["texture"] == "striped":
            wave = np.sin(along * (2 * math.pi / random.uniform(5.5, 6.5)) + random.uniform(0, 2 * math.pi))
            share = np.clip(0.5 + 1.5 * wave, 0, 1)
        else:
            aside = (math.cos(angle) * y - math.sin(angle) * x) / self._scale
            pitch = random.uniform(6, 7)
            shift = random.uniform(-1, 1, size=2)  # some dot stays close to the centre of even the smallest shape
            squares = [
                np.square(place - pitch * np.round(place / pitch))
                for place in (along + np.float32(shift[0]), aside + np.float32(shift[1]))
            ]
            share = np.clip(1.7 + 0.5 - np.sqrt(squares[0] + squares[1]), 0, 1)
        return light + share[..., None] * (dark - light)

    def _background(self, random: np.random.Generator) -> np.ndarray:
        """(size, size, 3) float32 in 0..255: a gradient, soft clouds, faint checks or faint lines, never vivid."""
        first, second = (_dull(random) for _ in range(2))
        kind = random.integers(4)
        if kind == 0:
            angle = random.uniform(0, 2 * math.pi)
            share = 0.5 + 0.7 * (math.cos(angle) * self._across + math.sin(angle) * self._down)
        elif kind == 1:
            coarse = Image.fromarray(random.random([random.integers(3, 9)] * 2, dtype=np.float32))
            share = np.asarray(coarse.resize((self.size, self.size), Image.Resampling.BICUBIC))[..., None]
        else:
            second = first + random.uniform(10, 26) * random.choice((-1, 1))
            cells = random.uniform(5, 16)
            turn = random.uniform(0, math.pi)
            across = math.cos(turn) * self._across + math.sin(turn) * self._down
            if kind == 2:
                down = math.cos(turn) * self._down - math.sin(turn) * self._across
                share = (np.floor(cells * across) + np.floor(cells * down)) % 2
            else:
                share = np.where(cells * across % 1 < random.uniform(0.1, 0.3), 1, 0)
        return first + np.asarray(share, dtype=np.float32) * (second - first)


def _regions(image_id: int, placed: list[dict[str, Any]], owner: np.ndarray) -> tuple[Region, ...]:
    """The truth of one scene, in the order of drawing."""
    masks = owner.T[None] == np.arange(len(placed), dtype=np.int8)[:, None, None]  # (K, width, height)
    encoded = rle.encode(np.asfortranarray(np.ascontiguousarray(masks).view(np.uint8).T))
    bare = []
    for place, (facts, mask, code) in enumerate(zip(placed, masks, encoded, strict=True)):
        columns, rows = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
        box = (float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1))
        code = {"size": code["size"], "counts": code["counts"].decode()}
        bare.append(Region(image_id * 16 + place, box, code, facts["form"], (), facts))
    return tuple(_told(region, bare) for region in bare)


def _told(region: Region, regions: list[Region]) -> Region:
    """With its phrases, from the plainest to the most telling: the shape by itself, then in relation to the second
    nearest and to the nearest other shape where that is clear. The last relation is among the attributes, too.
    """
    facts = dict(region.attributes)
    alone = f"a {facts['size']} {facts['texture']} {facts['colour']} {facts['form']}"
    phrases = [alone]
    others = (other for other in regions if other.id != region.id)
    nearest = sorted(others, key=lambda other: math.dist(facts["centre"], other.attributes["centre"]))[:2]
    for other in reversed(nearest):
        relation, clear = _direction(region, other)
        if clear >= CLEAR:
            colour, form = other.attributes["colour"], other.attributes["form"]
            phrases.append(f"{alone} {relation} {'an' if colour == 'orange' else 'a'} {colour} {form}")
            facts |= {"relation": relation, "other_colour": colour, "other_form": form}
    return replace(region, phrases=tuple(dict.fromkeys(phrases)), attributes=facts)


def _colour(random: np.random.Generator, name: str) -> np.ndarray:
    """(3,) float32 in 0..255: the named colour, a little off."""
    if name == "white":
        hue, saturation, value = random.random(), random.uniform(0, 0.05), random.uniform(0.93, 1)
    else:
        middle, spread = HUES[name]
        hue = (middle + random.uniform(-spread, spread)) % 360 / 360
        saturation, value = random.uniform(0.8, 1), random.uniform(0.82, 1)
    return np.array(colorsys.hsv_to_rgb(hue, saturation, value), dtype=np.float32) * 255


def _dull(random: np.random.Generator) -> np.ndarray:
    """(3,) float32: a greyish tone for the background."""
    hue, saturation, value = random.random(), random.uniform(0, 0.22), random.uniform(0.25, 0.7)
    return np.array(colorsys.hsv_to_rgb(hue, saturation, value), dtype=np.float32) * 255
