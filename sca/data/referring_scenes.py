"""Synthetic scenes with referring expressions in the style of RefCOCO, RefCOCO+ and RefCOCOg.

A scene contains several similar shapes. A referring expression is true of exactly one of them:

    refcoco     [LOCATION] [SIZE] [TEXTURE] [COLOR] SHAPE                                     left red circle
                [SIZE] [TEXTURE] [COLOR] SHAPE PREPOSITION the LOCATION                       star at the top right
    refcoco+    [SIZE] [TEXTURE] [COLOR] SHAPE                                                striped red circle
    refcocog    the SIZE TEXTURE COLOR SHAPE RELATION a COLOR SHAPE
                                                       the small striped red circle to the left of a blue square

`sca.data.scenes.parse_statement` parses an expression, and `is_statement_true` checks it. The module does not import
torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any, ClassVar

import numpy as np
from sca_registry.contracts import Region, Sample

from sca.data.scenes import (
    MIN_RELATION_RATIO,
    SHAPE_NAMES,
    Scenes,
    Statement,
    add_article,
    compute_relation,
    is_relation_true,
)
from sca.io.errors import InputError

COLLECTION_SPLITS = {
    "refcoco": ("train", "val", "testA", "testB"),
    "refcoco+": ("train", "val", "testA", "testB"),
    "refcocog": ("train", "val", "test"),
}
TEST_A_SHAPE = "circle"  # shape of the referents of testA, which are people in RefCOCO

ATTRIBUTES = ("size", "texture", "color", "shape")  # in the order of a phrase
DISTRACTOR_ATTRIBUTES = (*ATTRIBUTES, "center", "location")
SIMILAR_PROBABILITY = 0.8  # probability that a shape after the second resembles an earlier one
CHANGE_PROBABILITIES = (0.3, 0.45, 0.25)  # of 0, 1 and 2 attributes that are sampled again for a similar shape
MAX_EXPRESSIONS = {"refcoco": 3, "refcoco+": 3, "refcocog": 2}  # per region
RELATION_PHRASES = {"left of": "to the left of", "right of": "to the right of", "above": "above", "below": "below"}


def is_statement_true(statement: Statement, region: Region, regions: Sequence[Region]) -> bool:
    """Return whether everything that a statement states is true of a region.

    Args:
        statement: Parsed caption or referring expression.
        region: Region of a scene of `ReferringScenes`.
        regions: All regions of the scene.

    Returns:
        True if all stated attributes, the location and the relation are true of the region.
    """
    return _matches_attributes(statement, region) and (
        statement.relation is None or is_relation_true(statement, region, regions)
    )


def _matches_attributes(statement: Statement, region: Region) -> bool:
    stated_location, location = statement.location or "", region.attributes["location"]
    return all(getattr(statement, name) in (None, region.attributes[name]) for name in ATTRIBUTES) and (
        set(stated_location.split()) <= set(location.split())
    )


class ReferringScenes(Scenes):
    """Synthetic scenes of three to five shapes, most of them similar, with referring expressions as phrases.

    A similar shape has at least two of the attributes size, texture, color and shape of an earlier one. As in RefCOCO,
    a region has expressions only if another region of its scene has the same name. In testA the referents are circles,
    and in testB all other shapes. The scenes of a split are the same for all collections.

    An expression is true of its region only, and clearly so: the region is in the outer third of the image in the
    stated direction, and no other region that matches the other words is in that half or quadrant; relations are not
    close to a diagonal. For RefCOCO and RefCOCO+, expressions are minimal: without one of its words, an expression is
    not clear. A region without a clear expression has no phrases.

    The `attributes` of a region are those of `Scenes`; `location`, the quadrant that contains its center, such as "top
    left"; and `distractors`, the id, color, shape, size, texture, center and location of each other region.

    Args:
        split: "train" or "val"; "testA" or "testB" of RefCOCO and RefCOCO+; or "test" of RefCOCOg.
        collection: Style of the expressions: "refcoco" (short, with locations), "refcoco+" (short, without locations)
            or "refcocog" (long, with a relation).
        num_images: Number of scenes. Default: 100,000 in train, 500 in the other splits.
        image_size: Side of the square image in pixels, at least 32. All lengths scale with it.
        seed: Random seed.

    Raises:
        InputError: The collection is unknown, it has no such split, or the size is too small.
    """

    split_sizes: ClassVar[dict[str, int]] = {**Scenes.split_sizes, "testA": 500, "testB": 500}
    num_shapes_range: ClassVar[tuple[int, int]] = (3, 5)

    def __init__(
        self,
        split: str,
        collection: str = "refcoco",
        num_images: int | None = None,
        image_size: int = 128,
        seed: int = 0,
    ):
        if collection not in COLLECTION_SPLITS:
            raise InputError(f"unknown collection {collection!r}; choose from {', '.join(COLLECTION_SPLITS)}")
        if split not in COLLECTION_SPLITS[collection]:
            raise InputError(
                f"the collection {collection!r} has no split {split!r}; choose from "
                f"{', '.join(COLLECTION_SPLITS[collection])}"
            )
        super().__init__(split, num_images, image_size, seed)
        self.collection = collection
        self.referent_shapes: tuple[str, ...] = {
            "testA": (TEST_A_SHAPE,),
            "testB": tuple(shape for shape in SHAPE_NAMES if shape != TEST_A_SHAPE),
        }.get(split, SHAPE_NAMES)

    def __getitem__(self, index: int) -> Sample:
        sample = super().__getitem__(index)
        # `Scenes` draws the image with the first three numbers.
        rng = np.random.default_rng([self.seed, self._split_index, int(index), 1])
        regions = _add_scene_attributes(sample.regions, self.image_size)
        return sample._replace(
            regions=tuple(replace(region, phrases=self._sample_expressions(rng, region, regions)) for region in regions)
        )

    def _sample_attributes(self, rng: np.random.Generator, earlier_shapes: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Sample the attributes of the next shape. The first two are similar referents of the same shape."""
        attributes = super()._sample_attributes(rng, earlier_shapes)
        if not earlier_shapes:
            return attributes | {"shape": self.referent_shapes[rng.integers(len(self.referent_shapes))]}
        if len(earlier_shapes) > 1 and rng.random() >= SIMILAR_PROBABILITY:
            return attributes
        similar_shape = earlier_shapes[int(rng.integers(len(earlier_shapes)))]
        num_changes = rng.choice(len(CHANGE_PROBABILITIES), p=CHANGE_PROBABILITIES)
        changed = rng.permutation(ATTRIBUTES if len(earlier_shapes) > 1 else ATTRIBUTES[:-1])[:num_changes]
        return {name: attributes[name] if name in changed else similar_shape[name] for name in ATTRIBUTES}

    def _sample_expressions(
        self, rng: np.random.Generator, region: Region, regions: Sequence[Region]
    ) -> tuple[str, ...]:
        """Return expressions that refer to a region, the shortest first."""
        num_same_shapes = sum(other.name == region.name for other in regions)
        if region.name not in self.referent_shapes or num_same_shapes < 2:
            return ()
        if self.collection == "refcocog":
            candidates = [*_iter_relational_statements(region, regions)]
        else:
            locations = _find_clear_locations(region, self.image_size) if self.collection == "refcoco" else []
            candidates = [*_iter_minimal_statements(region, regions, [None, *locations])]
        chosen = rng.permutation(len(candidates))[: MAX_EXPRESSIONS[self.collection]]
        expressions = [_write_expression(candidates[number], bool(rng.integers(2))) for number in chosen]
        return tuple(sorted(expressions, key=len))


def _add_scene_attributes(regions: Sequence[Region], image_size: int) -> list[Region]:
    """Add the location of each region, and the attributes of the other regions."""
    located = [
        replace(region, attributes=region.attributes | {"location": _find_location(region, image_size)})
        for region in regions
    ]
    facts = [{"id": each.id, **{name: each.attributes[name] for name in DISTRACTOR_ATTRIBUTES}} for each in located]
    return [
        replace(
            region,
            attributes=region.attributes | {"distractors": [each for each in facts if each["id"] != region.id]},
        )
        for region in located
    ]


def _find_location(region: Region, image_size: int) -> str:
    """Return the quadrant that contains the center of a region, such as "top left"."""
    x, y = region.attributes["center"]
    return f"{'top' if y < image_size / 2 else 'bottom'} {'left' if x < image_size / 2 else 'right'}"


def _find_clear_locations(region: Region, image_size: int) -> list[str]:
    """Return the locations of a center in the outer third of the image: none, one side, or two sides and a corner."""
    clear_words = [
        word
        for word, center in zip(
            region.attributes["location"].split(), reversed(region.attributes["center"]), strict=True
        )
        if abs(center - image_size / 2) > image_size / 6
    ]
    return [*clear_words, " ".join(clear_words)] if len(clear_words) == 2 else clear_words


def _iter_minimal_statements(
    region: Region, regions: Sequence[Region], locations: Sequence[str | None]
) -> Iterator[Statement]:
    """Yield the statements that refer to a region clearly, and no longer do without one of their words."""
    modifiers = [(name, region.attributes[name]) for name in ATTRIBUTES if name != "shape"]
    statements = [
        Statement(**dict(chosen), shape=region.attributes["shape"], location=location)
        for location in locations
        for num_chosen in range(len(modifiers) + 1)
        for chosen in combinations(modifiers, num_chosen)
    ]
    yielded_words: list[set[str]] = []
    for statement in sorted(statements, key=lambda each: len(_get_words(each))):
        words = _get_words(statement)
        if not any(shorter <= words for shorter in yielded_words) and _is_clear(statement, region, regions):
            yielded_words.append(words)
            yield statement


def _get_words(statement: Statement) -> set[str]:
    return {word for value in statement if value for word in value.split()}


def _iter_relational_statements(region: Region, regions: Sequence[Region]) -> Iterator[Statement]:
    """Yield statements of all attributes and of a relation that refer to a region clearly."""
    for other in regions:
        relation, ratio = compute_relation(region, other)
        statement = Statement(
            **{name: region.attributes[name] for name in ATTRIBUTES},
            relation=relation,
            other_color=other.attributes["color"],
            other_shape=other.attributes["shape"],
        )
        if other.id != region.id and ratio >= MIN_RELATION_RATIO and _is_clear(statement, region, regions):
            yield statement


def _is_clear(statement: Statement, region: Region, regions: Sequence[Region]) -> bool:
    """Return whether a statement is true of a region and clearly false of all others."""
    return is_statement_true(statement, region, regions) and not any(
        _matches_attributes(statement, other) and _is_relation_possible(statement, other, regions)
        for other in regions
        if other.id != region.id
    )


def _is_relation_possible(statement: Statement, region: Region, regions: Sequence[Region]) -> bool:
    """Return whether the relation, if any, is true or close to a diagonal."""
    if statement.relation is None:
        return True
    return any(
        _compute_distance(statement.relation, region, other) * MIN_RELATION_RATIO
        > np.abs(np.subtract(region.attributes["center"], other.attributes["center"])).max()
        for other in regions
        if other.id != region.id
        and (other.attributes["color"], other.attributes["shape"]) == (statement.other_color, statement.other_shape)
    )


def _compute_distance(relation: str, region: Region, other: Region) -> float:
    """Return how far a region is in the direction of a relation, in pixels; negative in the opposite direction."""
    dx, dy = np.subtract(region.attributes["center"], other.attributes["center"]).tolist()
    return {"left of": -dx, "right of": dx, "above": -dy, "below": dy}[relation]


def _write_expression(statement: Statement, puts_location_first: bool) -> str:
    subject = " ".join(filter(None, (getattr(statement, name) for name in ATTRIBUTES)))
    if statement.relation:
        other_shape = add_article(str(statement.other_color), str(statement.other_shape))
        return f"the {subject} {RELATION_PHRASES[statement.relation]} {other_shape}"
    if statement.location is None:
        return subject
    if puts_location_first:
        return f"{statement.location} {subject}"
    preposition = "on" if statement.location in ("left", "right") else "at"
    return f"{subject} {preposition} the {statement.location}"
