"""Questions about scenes: true answers, wordings that are held out, and scenes that do not change."""

import re
from collections import Counter

import numpy as np
import pytest

from sca.data.scene_questions import ATTRIBUTE_KINDS, NONE_ANSWER, NUM_TRAINING_WORDINGS, NUMBERS, RELATIONS, WORDINGS
from sca.data.scenes import (
    COLORS,
    MIN_RELATION_RATIO,
    SHAPE_NAMES,
    SIZE_NAMES,
    TEXTURES,
    Scenes,
    compute_relation,
)

WORD_PATTERN = re.compile(r"[a-z]+")


VALUE = rf"(?:a )?(?:{'|'.join((*COLORS, *SHAPE_NAMES, *SIZE_NAMES, *TEXTURES))})"
VALUES = {
    "value": VALUE,
    "shape": VALUE,
    "options": f"{VALUE}, {VALUE} or {VALUE}",
    "relation": "|".join(RELATIONS),
}


def make_pattern(wording):
    """Return a pattern that matches the questions with a wording and captures its values."""
    pattern = re.escape(wording)
    for name, values in VALUES.items():
        pattern = pattern.replace(rf"\{{{name}\}}", f"(?P<{name}>{values})")
    return re.compile(pattern)


def match_question(question):
    """Return the match of a question with the first of its kind's wordings that fits, and the index of the wording."""
    for index, wording in enumerate(WORDINGS[question.kind]):
        match = make_pattern(wording).fullmatch(question.text)
        if match:
            return match, index
    raise AssertionError(question)


def strip_article(text):
    return text.removeprefix("a ")


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_answers_are_true(split):
    kinds = Counter()
    for sample in (Scenes(split, num_images=60, questions=True)[index] for index in range(60)):
        regions = {region.id: region for region in sample.regions}
        for question in sample.questions:
            first, *others = (regions[region_id] for region_id in question.region_ids)
            attributes = {kind: first.attributes[kind] for kind in ATTRIBUTE_KINDS}
            values = match_question(question)[0].groupdict()
            kinds[question.kind] += 1
            if question.kind in attributes:
                expected = attributes[question.kind]
            elif question.kind == "count":
                expected = NUMBERS[sum(region.attributes["shape"] == values["shape"] for region in sample.regions)]
            elif question.kind == "yes-no":
                is_true = strip_article(values["value"]) in attributes.values()
                expected = "yes" if is_true else "no"
            elif question.kind == "choice":
                options = [strip_article(option) for option in re.split(", | or ", values["options"])]
                assert len(set(options)) == 3
                expected = next((option for option in options if option in attributes.values()), NONE_ANSWER)
            else:
                relation, ratio = compute_relation(first, others[0])
                assert ratio >= MIN_RELATION_RATIO
                expected = relation
                if question.kind == "relation-yes-no":
                    expected = "yes" if values["relation"] == relation else "no"
            assert question.answer == expected, question
    assert kinds.keys() == WORDINGS.keys()


def test_wordings_of_training_are_not_used_for_evaluation_and_have_all_words():
    used = {}
    for split in ("train", "val", "test"):
        scenes = Scenes(split, num_images=150, questions=True)
        questions = [question for index in range(150) for question in scenes[index].questions]
        used[split] = {(each.kind, match_question(each)[1]) for each in questions}
    assert used["train"] == {(kind, index) for kind in WORDINGS for index in range(NUM_TRAINING_WORDINGS)}
    held_out = {(kind, index) for kind in WORDINGS for index in range(NUM_TRAINING_WORDINGS, 10)}
    assert used["val"] == used["test"] == held_out
    training_text = " ".join(" ".join(wordings[:NUM_TRAINING_WORDINGS]) for wordings in WORDINGS.values())
    for wordings in WORDINGS.values():
        assert len(set(wordings)) == 10
        assert set(WORD_PATTERN.findall(" ".join(wordings))) <= set(WORD_PATTERN.findall(training_text))


def test_answers_are_balanced():
    scenes = Scenes("train", num_images=200, questions=True)
    answers = Counter((each.kind, each.answer) for index in range(200) for each in scenes[index].questions)
    for kind in ("yes-no", "relation-yes-no"):
        assert 0.45 < answers[kind, "yes"] / (answers[kind, "yes"] + answers[kind, "no"]) < 0.55
    num_choices = sum(count for (kind, _), count in answers.items() if kind == "choice")
    assert 0.25 < answers["choice", NONE_ANSWER] / num_choices < 0.42


def test_questions_do_not_change_scenes_and_are_deterministic():
    plain, with_questions = Scenes("test", num_images=3), Scenes("test", num_images=3, questions=True)
    for index in range(3):
        assert np.array_equal(np.asarray(plain[index].image), np.asarray(with_questions[index].image))
        assert plain[index].regions == with_questions[index].regions
        assert plain[index].questions == ()
        assert with_questions[index].questions == with_questions[index].questions
    assert Scenes("test", num_images=3, questions=True, seed=1)[0].questions != with_questions[0].questions
