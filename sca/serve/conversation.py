"""The messages of a chat request: which image and which region its last turn is about."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

from sca.prompts import PromptError
from sca.serve.problems import ApiError
from sca.serve.schema import PromptIn
from sca.serve.text_region import find_region

MAX_TEXT = 2**16  # characters, of the messages that may contain the region
TEXT_PARTS = ("text", "input_text", "output_text")
IMAGE_PARTS = ("image_url", "input_image")
REGION_FIELD = re.compile(r"(?:.*_)?(?:b?box(?:es)?|points?|masks?|regions?|rois?)(?:_.*|\d?d?)", re.IGNORECASE)


class ImageUrl(BaseModel):
    model_config = ConfigDict(extra="allow")

    url: Annotated[str, Field(description="a data: URL")]


class TextPart(BaseModel):
    model_config = ConfigDict(extra="allow")

    type: Literal["text", "input_text", "output_text"]
    text: str | None = None


class ImagePart(BaseModel):
    model_config = ConfigDict(extra="allow")

    type: Literal["image_url", "input_image"]
    image_url: ImageUrl | str

    @property
    def url(self) -> str:
        return self.image_url if isinstance(self.image_url, str) else self.image_url.url


class OtherPart(BaseModel):
    """Neither text nor an image; it may be in the history, and not in the turn that is answered."""

    model_config = ConfigDict(extra="allow")

    type: str


def _kind_of_part(part: Any) -> str:
    kind = part.get("type") if isinstance(part, dict) else getattr(part, "type", None)
    return "text" if kind in TEXT_PARTS else "image" if kind in IMAGE_PARTS else "other"


Part = Annotated[
    Annotated[TextPart, Tag("text")] | Annotated[ImagePart, Tag("image")] | Annotated[OtherPart, Tag("other")],
    Discriminator(_kind_of_part),
]


class Message(BaseModel):
    """One message. Fields that say nothing of the image, such as `name` and `tool_call_id`, are left alone."""

    model_config = ConfigDict(extra="allow")

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[Part] | None = None
    tool_calls: Any = None
    function_call: Any = None

    @property
    def parts(self) -> list[TextPart | ImagePart | OtherPart]:
        if isinstance(self.content, str):
            return [TextPart(type="text", text=self.content)]
        return self.content or []

    @property
    def text(self) -> str:
        return "\n".join(part.text or "" for part in self.parts if isinstance(part, TextPart))

    @property
    def urls(self) -> list[str]:
        return [part.url for part in self.parts if isinstance(part, ImagePart)]

    @property
    def is_answer(self) -> bool:
        """Whether this message ends a turn: the assistant has answered, and does not wait for a tool."""
        return self.role == "assistant" and not (self.tool_calls or self.function_call)


def split_turns(messages: Sequence[Message]) -> list[list[Message]]:
    """Split messages into turns, each up to an answer of the assistant."""
    turns: list[list[Message]] = [[]]
    for message in messages:
        turns[-1].append(message)
        if message.is_answer:
            turns.append([])
    return [turn for turn in turns if turn]


def find_image(turns: Sequence[Sequence[Message]]) -> tuple[str, int]:
    """Find the image that the last turn is about: the last one there is.

    Returns:
        Its URL, and the number of its turn.

    Raises:
        ApiError: If there is no image, or its turn has several.
    """
    for number in reversed(range(len(turns))):
        urls = list(dict.fromkeys(url for message in turns[number] for url in message.urls))
        if len(urls) > 1:
            raise ApiError(
                422,
                f"{len(urls)} images are sent for one answer and a request has one; send one request for each",
                param="messages",
            )
        if urls:
            return urls[0], number
    raise ApiError(
        422,
        "no message has an image: send one as {'type': 'image_url', 'image_url': {'url': ...}}",
        param="messages",
    )


def find_text_region(turns: Sequence[Sequence[Message]], image_turn: int) -> PromptIn:
    """Find the region in the text of the user's messages about an image.

    The last turn with a region counts, so that a region holds for further questions. Turns before that of the image are
    about it as well if none of them has an image.

    Args:
        turns: Messages, see `split_turns`.
        image_turn: Number of the turn that has the image.

    Returns:
        The region; an empty prompt if there is none.

    Raises:
        ApiError: If there is more text than may be searched, or if only a message of another role has coordinates.
        PromptError: If the region cannot be read, or there are several.
    """
    has_other_image = any(message.urls for turn in turns[:image_turn] for message in turn)
    about = turns[image_turn:] if has_other_image else turns
    searched = 0
    for turn in reversed(about):
        text = "\n".join(message.text for message in turn if message.role == "user")
        searched = _count_searched(searched, text)
        region = find_region(text)
        if region is not None:
            return PromptIn(box=region.box, points=list(region.points) or None)
    others = [message for turn in about for message in turn if message.role in ("tool", "function")]
    others += [message for turn in turns for message in turn if message.role in ("system", "developer")]
    for message in others:
        searched = _count_searched(searched, message.text)
        if _looks_like_region(message.text):
            raise ApiError(
                422,
                f"only a message of the role {message.role!r} has coordinates; write the region in the user's message, "
                "or give it as box, points or mask",
                param="messages",
            )
    return PromptIn()


def check_parts(turns: Sequence[Sequence[Message]]) -> None:
    """Refuse what the last turn contains and cannot be answered.

    Raises:
        ApiError: For a part that is neither text nor an image, and for a region in a field that is not read.
    """
    for message in turns[-1]:
        for part in message.parts:
            if message.role == "user" and isinstance(part, OtherPart) and part.type != "refusal":
                raise ApiError(
                    422,
                    f"a part of the type {part.type[:40]!r} cannot be answered; send parts of the types text and "
                    "image_url",
                    "unsupported_parameter",
                    "messages",
                )
    for message in (message for turn in turns for message in turn if message.role == "user"):
        for name in _extra_fields(message):
            if REGION_FIELD.fullmatch(name[:100]):
                raise ApiError(
                    422,
                    f"the field {name[:40]!r} of a message is not read; give box, points or mask beside messages",
                    "unsupported_parameter",
                    "messages",
                )


def _extra_fields(message: Message) -> Iterator[str]:
    yield from message.model_extra or ()
    for part in message.parts:
        if not isinstance(part, OtherPart):
            yield from part.model_extra or ()
        if isinstance(part, ImagePart) and isinstance(part.image_url, ImageUrl):
            yield from part.image_url.model_extra or ()


def _count_searched(searched: int, text: str) -> int:
    """Add the length of a text to what has been searched; ApiError for too much."""
    searched += len(text)
    if searched > MAX_TEXT:
        raise ApiError(
            413,
            f"the messages have {searched:,} characters, and {MAX_TEXT:,} are allowed where their text may contain the "
            "region; give the region as box, points or mask",
            param="messages",
        )
    return searched


def _looks_like_region(text: str) -> bool:
    try:
        return find_region(text) is not None
    except PromptError:
        return True
