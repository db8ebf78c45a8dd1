"""Conversations about regions in the records of publishers: turns, questions and references to regions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from sca_registry.contracts import Question

from sca.io.errors import InputError
from sca.io.validation import check_encodable, check_object, read_field

SPEAKERS = ("human", "gpt")  # values of the field "from", as in LLaVA's data


def read_turns(record: dict[str, Any], location: str) -> Iterator[tuple[str, str, str]]:
    """Read the turns of a conversation in LLaVA's format.

    Args:
        record: Record with `conversations`, a list of `{"from": "human", "value": TEXT}` and
            `{"from": "gpt", "value": TEXT}` in turn.
        location: File and record for error messages.

    Yields:
        Each text of the human, the response to it, and the location of both.

    Raises:
        InputError: There are no turns, or a turn has the wrong speaker or no text.
    """
    turns = read_field(record, "conversations", list, location)
    if not turns:
        raise InputError(f"{location}: conversations is empty; remove the record")
    for number in range(0, len(turns), 2):
        place = f"{location}: conversations[{number}]"
        prompt, answer = (
            _read_turn_text(turns, number + offset, speaker, place) for offset, speaker in enumerate(SPEAKERS)
        )
        yield prompt, answer, place


def _read_turn_text(turns: list[Any], number: int, speaker: str, location: str) -> str:
    """Read the text of a turn; raise InputError if it is missing or another speaker's."""
    turn = check_object(turns[number], location) if number < len(turns) else {}
    if turn.get("from") != speaker:
        raise InputError(f"{location}: expected a turn from {SPEAKERS[0]!r}, then one from {SPEAKERS[1]!r}")
    text = read_field(turn, "value", str, location)
    check_encodable(location, text)
    return text


def make_question(
    text: str, answer: str, region_ids: Sequence[int], location: str, kind: str = Question.kind
) -> Question:
    """Build a question; see `Question`. Raises InputError, which names its record, for an invalid one."""
    try:
        return Question(text.strip(), answer.strip(), tuple(region_ids), kind)
    except ValueError as error:
        raise InputError(f"{location}: {error}") from error
