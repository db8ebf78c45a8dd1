"""Read the samples that lmms-eval logs for region captioning tasks, such as those of RefCOCO, as records.

Format: `save_results_samples` in https://github.com/EvolvingLMMs-Lab/lmms-eval/blob/main/lmms_eval/loggers/evaluation_tracker.py,
one JSON object per line.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from typing import Any

from sca.io.errors import InputError
from sca.io.validation import is_int64, parse_texts, read_field

COCO_IMAGE_NAME = re.compile(r"COCO_\w+?_(\d{12})(?=_|\.|$)")


def is_sample(content: Mapping[str, Any]) -> bool:
    """Return whether a JSON object is a sample of lmms-eval."""
    return {"doc_id", "doc_hash", "target", "filtered_resps"} <= content.keys()


def sample_to_record(sample: Mapping[str, Any], location: str) -> dict[str, Any]:
    """Convert a sample to a record with a caption and its references.

    The id of the region is that of the document. The id of the image is the one in its COCO file name, else also that
    of the document.

    Args:
        sample: Sample of a captioning task. Its target is a reference, or a list of references as Python writes it.
        location: File and line, for messages.

    Returns:
        The record.

    Raises:
        InputError: A field is invalid.
    """
    doc_id = sample["doc_id"]
    if not is_int64(doc_id):
        raise InputError(f"{location}, 'doc_id' is {doc_id!r:.80}; expected an integer")
    response = sample["filtered_resps"]
    if isinstance(response, list) and len(response) == 1:  # as older versions log it
        sample = {**sample, "filtered_resps": response[0]}
    references = _parse_target(read_field(sample, "target", str, location), f"{location}, 'target'")
    media = sample.get("input_media")
    names = [str(each) for each in media] if isinstance(media, list) else []
    image_ids = [int(match[1]) for name in names if (match := COCO_IMAGE_NAME.search(name))]
    return {
        "image_id": image_ids[0] if image_ids else doc_id,
        "region_id": doc_id,
        "task": "caption",
        "caption": read_field(sample, "filtered_resps", str, location),
        "references": references,
    }


def _parse_target(text: str, subject: str) -> list[str]:
    if not text.startswith("["):
        return [text]
    try:
        return parse_texts(subject, ast.literal_eval(text))
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:  # ValueError: also InputError
        raise InputError(f"{subject} is {text!r:.80}; expected a list of references") from error
