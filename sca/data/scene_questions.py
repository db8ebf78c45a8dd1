"""Questions about synthetic scenes, with exact answers.

Each kind of question has ten wordings. The splits "val" and "test" use the last three, which "train" does not contain.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from sca_registry.contracts import Question, Region

NUM_TRAINING_WORDINGS = 7
NONE_ANSWER = "none of these"
NUMBERS = ("zero", "one", "two", "three", "four", "five")
RELATIONS = ("left of", "right of", "above", "below")

WORDINGS: dict[str, tuple[str, ...]] = {
    "color": (
        "what color is it?",
        "which color does it have?",
        "what is its color?",
        "name its color.",
        "color?",
        "what color is this object?",
        "tell me the color of this shape.",
        "which color is this?",
        "what color does this object have?",
        "name the color of it.",
    ),
    "shape": (
        "what shape is it?",
        "which shape does it have?",
        "what is its shape?",
        "name its shape.",
        "shape?",
        "what shape is this object?",
        "tell me the shape of this.",
        "which shape is this?",
        "what shape does this object have?",
        "name the shape of it.",
    ),
    "size": (
        "what size is it?",
        "how large is it?",
        "what is its size?",
        "name its size.",
        "size?",
        "how large is this object?",
        "tell me the size of this shape.",
        "which size is this?",
        "what size does this object have?",
        "name the size of it.",
    ),
    "texture": (
        "what texture is it?",
        "which texture does it have?",
        "what is its texture?",
        "name its texture.",
        "texture?",
        "what texture is this object?",
        "tell me the texture of this shape.",
        "which texture is this?",
        "what texture does this object have?",
        "name the texture of it.",
    ),
    "count": (
        "how many {shape} shapes are there?",
        "how many shapes are a {shape}?",
        "count every {shape}.",
        "how often is there a {shape}?",
        "number of {shape} shapes?",
        "what is the number of {shape} shapes?",
        "how many {shape} objects does the image have?",
        "how many {shape} shapes does the image have?",
        "what is the number of {shape} objects?",
        "count the {shape} shapes.",
    ),
    "relation": (
        "where is <region 1> from <region 2>?",
        "where is <region 1> relative to <region 2>?",
        "seen from <region 2>, where is <region 1>?",
        "on which side of <region 2> is <region 1>?",
        "in which direction from <region 2> is <region 1>?",
        "position of <region 1> relative to <region 2>?",
        "tell me where <region 1> is from <region 2>.",
        "where is <region 1> seen from <region 2>?",
        "from <region 2>, in which direction is <region 1>?",
        "tell me the position of <region 1> relative to <region 2>.",
    ),
    "yes-no": (
        "is it {value}?",
        "is this {value}?",
        "is this object {value}?",
        "would you call it {value}?",
        "{value}, yes or no?",
        "is the shape {value}?",
        "does this look {value}?",
        "is this shape {value}?",
        "does it look {value}?",
        "would you call this {value}?",
    ),
    "relation-yes-no": (
        "is <region 1> {relation} <region 2>?",
        "is it true that <region 1> is {relation} <region 2>?",
        "<region 1> is {relation} <region 2>, yes or no?",
        "do you see <region 1> {relation} <region 2>?",
        "{relation} <region 2>: is <region 1> there?",
        "would you say that <region 1> is {relation} <region 2>?",
        "can <region 1> be found {relation} <region 2>?",
        "is <region 1> to be found {relation} <region 2>?",
        "do you see that <region 1> is {relation} <region 2>?",
        "is it true: <region 1> {relation} <region 2>?",
    ),
    "choice": (
        "is it {options}?",
        "which is it: {options}?",
        "{options}?",
        "what is it: {options}?",
        "choose: {options}.",
        "is this {options}?",
        "does it look {options}?",
        "which is this: {options}?",
        "is this object {options}?",
        "choose what it is: {options}.",
    ),
}
ATTRIBUTE_KINDS = ("color", "shape", "size", "texture")


def make_questions(
    regions: Sequence[Region],
    attribute_values: Mapping[str, Sequence[str]],
    compute_relation: Callable[[Region, Region], str | None],
    rng: np.random.Generator,
    use_held_out_wordings: bool,
) -> tuple[Question, ...]:
    """Create questions about every region of a scene.

    Args:
        regions: Regions with the attributes of `ATTRIBUTE_KINDS`.
        attribute_values: Possible values of each attribute.
        compute_relation: Returns the direction from the second region to the first one; None if it is ambiguous.
        rng: Generator of all random choices.
        use_held_out_wordings: Use only the last three wordings of each kind instead of the first seven.

    Returns:
        The questions, at least one of every kind per region; those about relations only if a relation is unambiguous.
    """

    def make_question(kind: str, answer: str, region_ids: tuple[int, ...], **values: str) -> Question:
        wordings = (
            WORDINGS[kind][NUM_TRAINING_WORDINGS:] if use_held_out_wordings else WORDINGS[kind][:NUM_TRAINING_WORDINGS]
        )
        text = wordings[rng.integers(len(wordings))].format(**values)
        return Question(text, answer, region_ids, kind, is_about_image=kind == "count")

    questions: list[Question] = []
    for region in regions:
        for kind in ATTRIBUTE_KINDS:
            questions.append(make_question(kind, region.attributes[kind], (region.id,)))
        for kind in map(str, rng.permutation(ATTRIBUTE_KINDS)[:2]):
            value, is_true = region.attributes[kind], rng.random() < 0.5
            stated = value if is_true else rng.choice(_exclude_value(attribute_values[kind], value))
            questions.append(
                make_question("yes-no", "yes" if is_true else "no", (region.id,), value=_format_value(kind, stated))
            )
        questions.append(_make_choice(region, attribute_values, rng, make_question))
        counted = str(rng.choice(attribute_values["shape"]))
        if rng.random() < 0.5:  # often one that exists
            counted = regions[int(rng.integers(len(regions)))].attributes["shape"]
        number = sum(other.attributes["shape"] == counted for other in regions)
        questions.append(make_question("count", NUMBERS[number], (region.id,), shape=counted))
        others = [other for other in regions if other is not region and compute_relation(region, other)]
        if others:
            other = others[int(rng.integers(len(others)))]
            relation = compute_relation(region, other)
            assert relation is not None  # see `others`
            ids = (region.id, other.id)
            questions.append(make_question("relation", relation, ids))
            is_true = rng.random() < 0.5
            stated = relation if is_true else str(rng.choice(_exclude_value(RELATIONS, relation)))
            questions.append(make_question("relation-yes-no", "yes" if is_true else "no", ids, relation=stated))
    return tuple(questions)


def _make_choice(
    region: Region,
    attribute_values: Mapping[str, Sequence[str]],
    rng: np.random.Generator,
    make_question: Callable[..., Question],
) -> Question:
    """Create a question about which of three values an attribute has; for a third of the questions, none of them."""
    kind = str(rng.choice([kind for kind in ATTRIBUTE_KINDS if len(attribute_values[kind]) > 3]))
    value, is_listed = region.attributes[kind], rng.random() < 2 / 3
    others = rng.permutation(_exclude_value(attribute_values[kind], value)).tolist()
    options = rng.permutation([value, *others[:2]] if is_listed else others[:3]).tolist()
    first, second, third = (_format_value(kind, option) for option in options)
    return make_question(
        "choice", value if is_listed else NONE_ANSWER, (region.id,), options=f"{first}, {second} or {third}"
    )


def _exclude_value(values: Sequence[str], excluded: str) -> list[str]:
    return [value for value in values if value != excluded]


def _format_value(kind: str, value: str) -> str:
    return f"a {value}" if kind == "shape" else str(value)
