"""Grounding data of ms-swift: boxes of an image, and messages that refer to them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from sca_registry.contracts import Question

from sca.data.conversations import make_question
from sca.data.record_table import RecordTable
from sca.io.coordinates import Box
from sca.io.errors import InputError
from sca.io.validation import (
    check_choice,
    check_encodable,
    check_image_name,
    check_numbers,
    check_object,
    read_field,
)

T = TypeVar("T")

BOX_FORMAT = "x1, y1, x2, y2"
IMAGE_TAG, BOX_TAG, NAME_TAG = "<image>", "<bbox>", "<ref-object>"
TAG_PATTERN = re.compile(f"({BOX_TAG}|{NAME_TAG})")
WORD_PATTERN = re.compile(r"\w")
BOX_TYPES = ("real", "norm1")


class SwiftJson(RecordTable):
    r"""ms-swift's data for grounding tasks: JSON Lines (or a JSON list) of messages with boxes of an image.

        {"messages": [{"role": "user", "content": "<image>What is <bbox>?"}, {"role": "assistant", "content": "TEXT"}],
         "images": ["a.jpg"], "objects": {"ref": [], "bbox": [[x1, y1, x2, y2]]}}

    Each `<bbox>` is the next box of `objects`, and each `<ref-object>` the next text of `ref`:

    - A user's message with boxes is a question about these regions. Its boxes become `<region 1>`, `<region 2>`, and so
      on. Training uses questions with `train.question_prob`. With `caption_prompt`, the response to this prompt is a
      phrase of its region instead.
    - A box after a `<ref-object>`, as in "Find the <ref-object>." and "<bbox><bbox>", has its text as a phrase.

    `bbox_type` is "real", for pixels of the image, or "norm1", for fractions of its size. Points, turns without boxes,
    and records without exactly one image are skipped and counted. The format is that of ms-swift's documentation
    (github.com/modelscope/ms-swift, docs/source_en/Customization/Custom-dataset.md, "Grounding").

    Args:
        split: "train" or "val", or the name of a split of the files.
        file: File. `{split}` is replaced by the split.
        image_root: Folder that image names are relative to; None for that of the file.
        val_fraction: Fraction of the images of a file without splits that "val" has, see `Jsonl`.
        caption_prompt: Prompt with one `<bbox>`, without `<image>`, whose response is a caption of the region.
        max_bad_records: Maximum number of unusable records of each kind, see `ConvertedTable`.

    Raises:
        InputError: The file does not exist, or `caption_prompt` does not have exactly one `<bbox>`.
    """

    reader = "swift-json"

    def __init__(
        self,
        split: str,
        file: str | Path,
        image_root: str | Path | None = None,
        val_fraction: float = 0.0,
        caption_prompt: str | None = None,
        max_bad_records: int = 100,
    ):
        if caption_prompt is not None and caption_prompt.count(BOX_TAG) != 1:
            raise InputError(f"caption_prompt is {caption_prompt!r}; expected a prompt with one {BOX_TAG}")
        self.caption_prompt: str | None = caption_prompt and _normalize_prompt(caption_prompt)
        super().__init__(split, file, image_root, val_fraction, max_bad_records)

    def _get_reading_options(self) -> str:
        return self.caption_prompt or ""

    def _read_image_name(self, record: dict[str, Any], location: str) -> str | None:
        images = record.get("images") or []
        if not isinstance(images, list) or len(images) != 1:
            self._skip("record without exactly one image", location)
            return None
        image = images[0].get("path") if isinstance(images[0], dict) else images[0]
        return check_image_name(f"{location}: images", image)

    def _count_regions(self, record: dict[str, Any], location: str) -> int:
        return len(self._read_objects(record, location)[1])

    def _add_record(self, row: dict[str, Any], record: dict[str, Any], first_region_id: int, location: str) -> None:
        names, values, box_type = self._read_objects(record, location)
        scale = (row["width"], row["height"]) if box_type == "norm1" else (1, 1)
        boxes = [self._read_box(value, scale, f"{location}: bbox[{index}]") for index, value in enumerate(values)]
        reader = _TurnReader(names, len(boxes), first_region_id, location)
        questions: list[Question] = []
        for prompt, answer in _read_messages(record, location):
            text, answer_text, region_ids = reader.read_turn(prompt, answer)
            if not region_ids:
                if BOX_TAG not in answer:
                    self._skip("turn without a box", location)
            elif BOX_TAG in answer:
                self._skip("answer with boxes to a question about boxes", location)
            elif self.caption_prompt and _normalize_prompt(prompt) == self.caption_prompt:
                reader.phrases[region_ids[0] - first_region_id].append(answer_text)
            else:
                with self._catch_record_errors():
                    questions.append(make_question(text, answer_text, region_ids, location))
        self._add_questions(row, questions)
        for index, (box, phrases) in enumerate(zip(boxes, reader.phrases, strict=True)):
            region_id = first_region_id + index
            if box is not None:
                is_referenced = any(region_id in each.region_ids for each in questions)
                place = f"{location}: bbox[{index}]"
                self._add_region(row, region_id, box, place, phrases=phrases, requires_text=not is_referenced)

    def _read_objects(self, record: dict[str, Any], location: str) -> tuple[list[str], list[Any], str]:
        """Return the texts, the boxes and the type of the boxes of a record. Raises InputError."""
        objects = check_object(record.get("objects") or {}, f"{location}: objects")
        names = read_field(objects, "ref", list, location) if objects.get("ref") else []
        boxes = read_field(objects, "bbox", list, location) if objects.get("bbox") else []
        box_type = objects.get("bbox_type") or BOX_TYPES[0]
        check_choice(f"{location}: bbox_type", box_type, BOX_TYPES)
        for name in names:
            if not isinstance(name, str):
                raise InputError(f"{location}: ref has {name!r:.60}; expected a list of texts")
            check_encodable(location, name)
        return names, boxes, box_type

    def _read_box(self, value: Any, scale: tuple[int, int], location: str) -> Box | None:
        """Return a box in pixels; None, and counted, for a point. Raises InputError."""
        if isinstance(value, list) and len(value) == 2:
            self._skip("point instead of a box", location)
            return None
        check_numbers(location, value, BOX_FORMAT)
        x1, y1, x2, y2 = value
        if x2 < x1 or y2 < y1:
            raise InputError(f"{location} is {value}, with x2 < x1 or y2 < y1; expected {BOX_FORMAT}")
        return x1 * scale[0], y1 * scale[1], x2 * scale[0], y2 * scale[1]


class _TurnReader:
    """Reader of the tags in the turns of a record, which consume its boxes and texts in order.

    Args:
        names: Texts for `<ref-object>`.
        num_boxes: Number of boxes.
        first_region_id: Id of the region of the first box.
        location: File and record for error messages.

    Attributes:
        phrases: Phrases of each box.
    """

    def __init__(self, names: Sequence[str], num_boxes: int, first_region_id: int, location: str):
        self.phrases: list[list[str]] = [[] for _ in range(num_boxes)]
        self._names, self._box_indices = iter(names), iter(range(num_boxes))
        self._first_region_id, self._location = first_region_id, location

    def read_turn(self, prompt: str, answer: str) -> tuple[str, str, list[int]]:
        """Read a turn. Boxes in an answer without texts have the last text of a prompt without boxes.

        Args:
            prompt: User's message.
            answer: Assistant's message.

        Returns:
            The prompt with references to its regions, the answer, both with their texts, and the ids of the regions of
            the prompt.

        Raises:
            InputError: The record has fewer boxes or texts than tags.
        """
        text, region_ids, name = self._read_message(prompt.replace(IMAGE_TAG, ""), None)
        answer_text, _, _ = self._read_message(answer, None if region_ids or NAME_TAG in answer else name)
        return text.strip(), answer_text.strip(), region_ids

    def _read_message(self, message: str, shared_name: str | None) -> tuple[str, list[int], str | None]:
        """Read a message whose boxes have the text directly before them, else `shared_name`.

        Returns the message with references to its regions, the ids of these regions, and its last text.
        """
        parts: list[str] = []
        region_ids: list[int] = []
        name, last_name = shared_name, None
        for part in TAG_PATTERN.split(message):
            if part == NAME_TAG:
                name = last_name = self._take_next(self._names, NAME_TAG, "texts in ref")
                parts.append(name)
            elif part == BOX_TAG:
                index = self._take_next(self._box_indices, BOX_TAG, "boxes in bbox")
                if name is not None:
                    self.phrases[index].append(name)
                region_ids.append(self._first_region_id + index)
                separator = " " if "".join(parts)[-1:].isalnum() else ""
                parts.append(f"{separator}<region {len(region_ids)}>")
            else:
                name = shared_name if WORD_PATTERN.search(part) else name
                parts.append(part)
        return "".join(parts), region_ids, last_name

    def _take_next(self, values: Iterator[T], tag: str, field: str) -> T:
        for value in values:
            return value
        raise InputError(f"{self._location}: more {tag} than {field}; add the missing ones")


def _read_messages(record: dict[str, Any], location: str) -> list[tuple[str, str]]:
    """Return the user's messages with the responses to them. Raises InputError for other roles than these."""
    messages = [check_object(each, f"{location}: messages") for each in read_field(record, "messages", list, location)]
    roles_and_texts = [
        (each.get("role"), read_field(each, "content", str, location))
        for each in messages
        if each.get("role") != "system"
    ]
    for _, text in roles_and_texts:
        check_encodable(location, text)
    if (
        not roles_and_texts
        or any(role != ("user", "assistant")[index % 2] for index, (role, _) in enumerate(roles_and_texts))
        or len(roles_and_texts) % 2
    ):
        raise InputError(f"{location}: expected messages of the roles 'user' and 'assistant' in turn")
    texts = [text for _, text in roles_and_texts]
    return list(zip(texts[::2], texts[1::2], strict=True))


def _normalize_prompt(prompt: str) -> str:
    return " ".join(prompt.replace(IMAGE_TAG, "").split())
