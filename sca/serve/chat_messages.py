"""Messages of a chat request: find the image and the region of the last turn."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

from sca.io.errors import InputError
from sca.serve.errors import ApiError
from sca.serve.region_parser import find_region, remove_region
from sca.serve.schema import RegionPrompt

MAX_QUESTION_MESSAGE = 4096  # characters of the messages that contain a question and its region
MAX_SEARCHED_CHARACTERS = 2**20  # characters of messages that are searched for a region
TEXT_PARTS = ("text", "input_text", "output_text")
IMAGE_PARTS = ("image_url", "input_image")
REGION_FIELD = re.compile(
    r"(?:.*[_-])?(?:b?box(?:es)?|boundingbox|(?:key)?points?|masks?|regions?|rois?|crops?|coord(?:inate)?s?|areas?"
    r"|poly(?:gon)?s?|rect(?:angle)?s?|selections?|segmentations?|xyxy|xywh|ltrb)(?:[_-].*|\d?d?)",
    re.IGNORECASE,
)
_DESCRIPTION_REQUEST = re.compile(r"(?:please\s+)?(?:describe|caption)\b[^?]*$", re.IGNORECASE)
_CAMEL_CASE_BOUNDARY = re.compile(r"(?<=[a-z])(?=[A-Z])")


class ImageUrl(BaseModel):
    """URL of an image."""

    model_config: ClassVar[ConfigDict] = ConfigDict(extra="allow")

    url: Annotated[str, Field(description="Image file as a data: URL in base64.")]


class TextPart(BaseModel):
    """Text of a message."""

    model_config: ClassVar[ConfigDict] = ConfigDict(extra="allow")

    type: Literal["text", "input_text", "output_text"]
    text: str | None = None


class ImagePart(BaseModel):
    """Image of a message."""

    model_config: ClassVar[ConfigDict] = ConfigDict(extra="allow")

    type: Literal["image_url", "input_image"]
    image_url: ImageUrl | str

    @property
    def url(self) -> str:
        """URL of the image."""
        return self.image_url if isinstance(self.image_url, str) else self.image_url.url


class OtherPart(BaseModel):
    """Other content of a message; rejected in the last turn, ignored in earlier ones."""

    model_config: ClassVar[ConfigDict] = ConfigDict(extra="allow")

    type: str


def _get_part_tag(part: Any) -> str:
    part_type = part.get("type") if isinstance(part, dict) else getattr(part, "type", None)
    return "TextPart" if part_type in TEXT_PARTS else "ImagePart" if part_type in IMAGE_PARTS else "OtherPart"


MessagePart = Annotated[
    Annotated[TextPart, Tag("TextPart")]
    | Annotated[ImagePart, Tag("ImagePart")]
    | Annotated[OtherPart, Tag("OtherPart")],
    Discriminator(_get_part_tag),
]


class ChatMessage(BaseModel):
    """Message of a conversation. Fields unrelated to the image, such as `name` and `tool_call_id`, are ignored."""

    model_config: ClassVar[ConfigDict] = ConfigDict(extra="allow")

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[MessagePart] | None = None
    tool_calls: Any = None
    function_call: Any = None

    @property
    def parts(self) -> list[TextPart | ImagePart | OtherPart]:
        """Content as a list of parts."""
        if isinstance(self.content, str):
            return [TextPart(type="text", text=self.content)]
        return self.content or []

    @property
    def text(self) -> str:
        """Text of all parts, joined by line breaks."""
        return "\n".join(part.text or "" for part in self.parts if isinstance(part, TextPart))

    @property
    def urls(self) -> list[str]:
        """URLs of the images."""
        return [part.url for part in self.parts if isinstance(part, ImagePart)]

    @property
    def ends_turn(self) -> bool:
        """Whether the message ends a turn: a response of the assistant without tool calls."""
        return self.role == "assistant" and not (self.tool_calls or self.function_call)


def split_turns(messages: Sequence[ChatMessage]) -> list[list[ChatMessage]]:
    """Split messages into turns, each of which ends with a response of the assistant."""
    turns: list[list[ChatMessage]] = [[]]
    for message in messages:
        turns[-1].append(message)
        if message.ends_turn:
            turns.append([])
    return [turn for turn in turns if turn]


def find_image_url(turns: Sequence[Sequence[ChatMessage]]) -> str:
    """Find the URL of the last image of a conversation.

    Args:
        turns: Result of `split_turns`.

    Returns:
        The URL.

    Raises:
        ApiError: No message has an image, or the last turn with images has several.
    """
    for turn in reversed(turns):
        urls = list(dict.fromkeys(_list_urls(turn)))
        if len(urls) > 1:
            raise ApiError(
                422,
                f"the last turn has {len(urls)} images; send one request per image",
                param="messages",
            )
        if urls:
            return urls[0]
    raise ApiError(
        422,
        "no message contains an image; send it as {'type': 'image_url', 'image_url': {'url': ...}}",
        param="messages",
    )


def find_text_region(turns: Sequence[Sequence[ChatMessage]], url: str) -> RegionPrompt:
    """Find the region in the text of the user messages about an image.

    The last turn with a region determines the result, so that a region applies to later turns, even if each sends the
    image again. Turns before the image are included unless they have another image.

    Args:
        turns: Result of `split_turns`.
        url: Result of `find_image_url`.

    Returns:
        The region; an empty prompt if the text contains none.

    Raises:
        ApiError: The text is too long to search (413), or only messages of other roles contain coordinates (422).
        InputError: The region cannot be parsed, or the text contains several.
    """
    relevant_turns = _select_turns_about(turns, url)
    num_searched = 0
    for turn in reversed(relevant_turns):
        text = "\n".join(message.text for message in turn if message.role == "user")
        num_searched = _add_searched_length(num_searched, text)
        region = find_region(text)
        if region is not None:
            return RegionPrompt(box=region.box, points=list(region.points) or None)
    other_messages = [
        message for turn in relevant_turns for message in turn if message.role in ("assistant", "tool", "function")
    ]
    other_messages += [message for turn in turns for message in turn if message.role in ("system", "developer")]
    for message in other_messages:
        num_searched = _add_searched_length(num_searched, message.text)
        if _looks_like_region(message.text):
            raise ApiError(
                422,
                f"only a message of the role {message.role!r} contains coordinates; write the region in a user "
                "message, or send it in the field box, points or mask",
                param="messages",
            )
    return RegionPrompt()


def find_question(turns: Sequence[Sequence[ChatMessage]], has_text_region: bool) -> str | None:
    """Find the question in the user messages of the last turn.

    Args:
        turns: Result of `split_turns`.
        has_text_region: Whether the text may contain the region, which is not part of the question.

    Returns:
        The question; None if the text requests a description, or consists of the region only.

    Raises:
        ApiError: The text is too long.
        InputError: As in `find_text_region`.
    """
    text = "\n".join(message.text for message in turns[-1] if message.role == "user")
    if len(text) > MAX_QUESTION_MESSAGE:
        raise ApiError(
            413,
            f"the last turn has {len(text):,} characters of text; shorten it to {MAX_QUESTION_MESSAGE:,}",
            param="messages",
        )
    text = remove_region(text) if has_text_region else " ".join(text.split())
    if not re.search(r"[^\W\d_]{2}", text) or _DESCRIPTION_REQUEST.match(text):
        return None
    return text


def _select_turns_about(turns: Sequence[Sequence[ChatMessage]], url: str) -> Sequence[Sequence[ChatMessage]]:
    """Return the turns after the last other image, from the first with this image; all turns if none has another."""
    other_image_turns = [index for index, turn in enumerate(turns) if any(other != url for other in _list_urls(turn))]
    if not other_image_turns:
        return turns
    first_index = other_image_turns[-1] + 1
    return turns[next(index for index in range(first_index, len(turns)) if url in _list_urls(turns[index])) :]


def _list_urls(turn: Sequence[ChatMessage]) -> list[str]:
    return [url for message in turn for url in message.urls]


def check_message_parts(turns: Sequence[Sequence[ChatMessage]]) -> None:
    """Reject unsupported content.

    Args:
        turns: Result of `split_turns`.

    Raises:
        ApiError: A user message of the last turn has a part that is neither text nor an image, or a user message has a
            region in an unsupported field.
    """
    for message in turns[-1]:
        for part in message.parts:
            if message.role == "user" and isinstance(part, OtherPart) and part.type != "refusal":
                raise ApiError(
                    422,
                    f"the content type {part.type[:40]!r} is not supported; send parts of the types text and image_url",
                    "unsupported_parameter",
                    "messages",
                )
    for message in (message for turn in turns for message in turn if message.role == "user"):
        for name in _iter_extra_fields(message):
            if REGION_FIELD.fullmatch(_CAMEL_CASE_BOUNDARY.sub("_", name[:100])):
                raise ApiError(
                    422,
                    f"the field {name[:40]!r} of a message is not supported; send the region in the field box, points "
                    "or mask of the request",
                    "unsupported_parameter",
                    "messages",
                )


def _iter_extra_fields(message: ChatMessage) -> Iterator[str]:
    """Yield the names of fields of a message, its parts and its images that are unknown and not null."""
    models: list[BaseModel] = [message]
    for part in message.parts:
        if not isinstance(part, OtherPart):
            models.append(part)
        if isinstance(part, ImagePart) and isinstance(part.image_url, ImageUrl):
            models.append(part.image_url)
    for model in models:
        yield from (name for name, value in (model.model_extra or {}).items() if value is not None)


def _add_searched_length(num_searched: int, text: str) -> int:
    """Add the length of a text to `num_searched`; raise ApiError above `MAX_TEXT`."""
    num_searched += len(text)
    if num_searched > MAX_SEARCHED_CHARACTERS:
        raise ApiError(
            413,
            f"the messages have {num_searched:,} characters; at most {MAX_SEARCHED_CHARACTERS:,} are searched for a "
            "region; send the region in the field box, points or mask",
            param="messages",
        )
    return num_searched


def _looks_like_region(text: str) -> bool:
    try:
        return find_region(text, reject_ambiguous=False) is not None
    except InputError:
        return True
