"""Osprey-724K (arXiv 2312.10032): masks of an image with descriptions, or with a conversation about them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from sca_registry.contracts import list_region_references

from sca.data.conversations import make_question, read_turns
from sca.data.record_parsing import parse_mask, parse_phrases
from sca.data.record_table import RecordTable
from sca.io.annotations.coco import parse_bbox
from sca.io.errors import InputError
from sca.io.image_names import resolve_image_path
from sca.io.validation import check_object, read_field, read_image_name, require_recorded_size

REGION_TAG_PATTERN = re.compile(r"<region ?(\d{1,4})>")
DESCRIPTION_PATTERN = re.compile(r"^<[^>]*>:\s*")  # begins a description
COCO_2014_PATTERN = re.compile(r"COCO_\w+2014_")  # begins the file names of COCO 2014, but not those of COCO 2017


class OspreyJson(RecordTable):
    r"""Osprey-724K: a JSON list of images, each with masks, and either descriptions or a conversation.

        {"file_name": "a.jpg", "height": 480, "width": 640, "annotation": [{"segmentation": MASK}, ...],
         "description": ["<region1>: TEXT", ...]}
        {"file_name": "a.jpg", "height": 480, "width": 640, "annotation": [{"segmentation": MASK}, ...],
         "conversations": [{"from": "human", "value": "PROMPT"}, {"from": "gpt", "value": "TEXT"}]}

    A description is a phrase of its region. A prompt is a question: `<region1>` refers to the first region of the
    record. Each turn is a question of its own, which training uses with `train.question_prob`. A prompt about several
    regions that refers to none of them is skipped and counted. Images of COCO 2014 are also read under their names in
    COCO 2017. The fields are those that the publisher's code reads (github.com/CircleRadon/Osprey, osprey/datasets).
    Takes the arguments of `RecordTable`.
    """

    reader = "osprey-json"

    def _resolve_image_path(self, name: str) -> Path:
        path = super()._resolve_image_path(name)
        short_name = COCO_2014_PATTERN.sub("", name)
        return path if short_name == name or path.is_file() else resolve_image_path(short_name, [self.image_root])

    def _read_image_name(self, record: dict[str, Any], location: str) -> str:
        return read_image_name(record, "file_name", location)

    def _read_image_size(self, record: dict[str, Any], location: str) -> tuple[int, int]:
        return require_recorded_size(record, location)

    def _count_regions(self, record: dict[str, Any], location: str) -> int:
        return len(read_field(record, "annotation", list, location))

    def _add_record(self, row: dict[str, Any], record: dict[str, Any], first_region_id: int, location: str) -> None:
        annotations = read_field(record, "annotation", list, location)
        region_ids = range(first_region_id, first_region_id + len(annotations))
        phrases = self._read_descriptions(record, len(annotations), location)
        questions = []
        if record.get("conversations"):
            for prompt, answer, place in read_turns(record, location):
                prompt, answer = (
                    REGION_TAG_PATTERN.sub(r"<region \1>", prompt),
                    REGION_TAG_PATTERN.sub(r"region \1", answer),
                )
                if len(annotations) > 1 and not list_region_references(prompt):
                    self._skip("question that refers to none of several regions", place)
                    continue
                with self._catch_record_errors():
                    questions.append(make_question(prompt, answer, region_ids, place))
        self._add_questions(row, questions)
        for index, (region_id, annotation) in enumerate(zip(region_ids, annotations, strict=True)):
            with self._catch_record_errors():
                place = f"{location}: annotation[{index}]"
                annotation = check_object(annotation, place)
                mask = parse_mask(
                    annotation.get("segmentation"), "segmentation", row["width"], row["height"], place, self._skip
                )
                box = None if mask else parse_bbox(annotation.get("bbox"), f"{place}: bbox")
                if mask is None and box is None:
                    raise InputError(f"{place}: no segmentation and no bbox; set one of them")
                self._add_region(
                    row,
                    region_id,
                    box,
                    place,
                    mask=mask,
                    phrases=phrases[index],
                    requires_text=not questions,
                )

    def _read_descriptions(self, record: dict[str, Any], count: int, location: str) -> list[list[str]]:
        """Return the descriptions of each region, without their tags. Raises InputError if their number differs."""
        descriptions = record.get("description") or []
        if not isinstance(descriptions, list) or len(descriptions) not in (0, count):
            raise InputError(f"{location}: description is {descriptions!r:.60}; expected a list of {count} texts")
        texts = [parse_phrases(each, "description", location) for each in descriptions]
        return [[DESCRIPTION_PATTERN.sub("", text, count=1) for text in each] for each in texts] or [[]] * count
