"""Training data of Perceive Anything (PAM, arXiv 2506.05302): JSON files with a conversation about each region."""

from __future__ import annotations

from typing import Any

from sca_registry.contracts import Question

from sca.data.conversations import make_question, read_turns
from sca.data.record_table import RecordTable
from sca.io.validation import read_image_name, read_xywh_box
from sca.language_models.pam_prompts import IMAGE_TOKEN, TASK_PROMPTS

TASK_BY_PROMPT = {prompt: task for task, prompt in TASK_PROMPTS.items()}
OTHER_KIND = "question"  # kind of a question that is not the prompt of a task


class PamJson(RecordTable):
    r"""PAM's training data: a JSON list of regions of images, each with a conversation.

        {"type": "image", "image": "a.jpg", "bbox": [x, y, width, height],
         "conversations": [{"from": "human", "value": "<image>\nPROMPT"}, {"from": "gpt", "value": "TEXT"}]}

    The prompt of the task "recognition" results in the name of the region, that of "caption" in its phrases. Any other
    prompt, such as those of the tasks "explain" and "detail", is a question, which training uses with
    `train.question_prob`. Records of videos and records without a box are skipped and counted. `points` are not read.
    Takes the arguments of `RecordTable`.
    """

    reader = "pam-json"

    def _read_image_name(self, record: dict[str, Any], location: str) -> str | None:
        if record.get("type", "image") != "image":
            self._skip(f"record of type {record['type']!r:.20}", location)
            return None
        if record.get("bbox") is None:
            self._skip("record without a box", location)
            return None
        return read_image_name(record, "image", location)

    def _add_record(self, row: dict[str, Any], record: dict[str, Any], first_region_id: int, location: str) -> None:
        box = read_xywh_box(record, "bbox", location)
        names, phrases, questions = _parse_conversation(record, first_region_id, location)
        name = names[0] if names else None
        self._add_region(row, first_region_id, box, location, name=name, phrases=phrases, questions=questions)


def _parse_conversation(
    record: dict[str, Any], region_id: int, location: str
) -> tuple[list[str], list[str], list[Question]]:
    """Return the names, the phrases and the questions of a record. Raises InputError for an invalid one."""
    texts: dict[str, list[str]] = {"recognition": [], "caption": []}
    questions = []
    for prompt, answer, place in read_turns(record, location):
        prompt = prompt.replace(IMAGE_TOKEN, "").strip()
        task = TASK_BY_PROMPT.get(prompt, OTHER_KIND)
        if task in texts and answer.strip():
            texts[task].append(answer.strip())
        else:
            questions.append(make_question(prompt, answer, (region_id,), place, kind=task))
    return texts["recognition"], texts["caption"], questions
