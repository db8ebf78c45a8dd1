"""Training data of Perceive Anything (PAM, arXiv 2506.05302): JSON files with a conversation about each region."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from sca_registry.contracts import Question
from tqdm.auto import tqdm

from sca.data.custom import choose_split, make_val_fraction_key, resolve_split_path
from sca.data.json_stream import iter_list_elements
from sca.data.table import TableDataset
from sca.io.errors import InputError
from sca.io.image_names import ImageNameResolver, resolve_image_path
from sca.io.paths import expand_user, normalize_name
from sca.io.validation import check_encodable, check_object, read_field, read_number_list, xywh_to_xyxy
from sca.language_models.pam_prompts import IMAGE_TOKEN, TASK_PROMPTS

BOX_FORMAT = "x, y, width, height"
TASK_BY_PROMPT = {prompt: task for task, prompt in TASK_PROMPTS.items()}
OTHER_KIND = "question"  # kind of a question that is not the prompt of a task


class _Record(NamedTuple):
    """Record of a file, with the id of its region and its location for error messages."""

    region_id: int
    content: dict[str, Any]
    location: str


class PamJson(TableDataset):
    r"""PAM's training data: a JSON list of regions of images, each with a conversation.

        {"type": "image", "image": "a.jpg", "bbox": [x, y, width, height],
         "conversations": [{"from": "human", "value": "<image>\nPROMPT"}, {"from": "gpt", "value": "TEXT"}]}

    The prompt of the task "recognition" results in the name of the region, that of "caption" in its phrases. Any other
    prompt, such as those of the tasks "explain" and "detail", is a question, which training uses with
    `train.question_prob`. Records of videos and records without a box are skipped and counted. `points` are not read.
    See `TableDataset`.

    Args:
        split: "train" or "val", or the name of a split of the files.
        file: JSON file. `{split}` is replaced by the split.
        image_root: Folder that image names are relative to; None for that of the file.
        val_fraction: Fraction of the images of a file without splits that "val" has, see `Jsonl`.
        max_bad_records: Maximum number of unusable records of each kind, see `ConvertedTable`.
    """

    reader = "pam-json"

    def __init__(
        self,
        split: str,
        file: str | Path,
        image_root: str | Path | None = None,
        val_fraction: float = 0.0,
        max_bad_records: int = 100,
    ):
        self.val_fraction = val_fraction
        self.file: Path = resolve_split_path(str(expand_user(file)), split)
        if not self.file.is_file():
            raise InputError(f"{self.file} does not exist; set file=FILE, which may contain {{split}}")
        folder = self.file.parent if image_root is None else expand_user(image_root)
        super().__init__(split, folder, [self.file], max_bad_records, make_val_fraction_key(split, val_fraction))

    def _resolve_image_path(self, name: str) -> Path:
        return resolve_image_path(name, [self.image_root])

    def _iter_entries(self, bar: tqdm[Any]) -> Iterator[Any]:
        """Yield the index of an image, its name and its records; images in order of appearance."""
        name_resolver = ImageNameResolver(self._resolve_image_path)
        images: dict[str, list[_Record]] = {}
        for index, content in enumerate(iter_list_elements(self.file)):
            location = f"{self.file}[{index}]"
            with self._catch_record_errors():
                record = check_object(content, location)
                if record.get("type", "image") != "image":
                    self._skip(f"record of type {record['type']!r:.20}", location)
                elif record.get("bbox") is None:
                    self._skip("record without a box", location)
                else:
                    name = name_resolver.unify_spelling(normalize_name(read_field(record, "image", str, location)))
                    images.setdefault(name, []).append(_Record(index, record, location))
        bar.reset(len(images))
        split_names, remarks = choose_split(map(name_resolver.identify_file, images), self.split, self.val_fraction)
        self.remarks: list[str] = remarks
        for image_index, (name, records) in enumerate(images.items()):
            if name_resolver.identify_file(name) in split_names:
                yield image_index, name, records

    def _build_row(self, entry: Any) -> dict[str, Any] | None:
        image_id, name, records = entry
        size = self._measure_image_file(name)
        if size is None:
            return None
        row = self._create_row(image_id, name, *size, is_size_recorded=False)
        for record in records:
            with self._catch_record_errors():
                box = xywh_to_xyxy(
                    f"{record.location}: bbox", *read_number_list(record.content, "bbox", BOX_FORMAT, record.location)
                )
                names, phrases, questions = _parse_conversation(record)
                self._add_region(
                    row,
                    record.region_id,
                    box,
                    record.location,
                    name=names[0] if names else None,
                    phrases=phrases,
                    questions=questions,
                )
        return row


def _parse_conversation(record: _Record) -> tuple[list[str], list[str], list[Question]]:
    """Return the names, the phrases and the questions of a record. Raises InputError for an invalid one."""
    turns = read_field(record.content, "conversations", list, record.location)
    texts: dict[str, list[str]] = {"recognition": [], "caption": []}
    questions = []
    for number in range(0, len(turns), 2):
        location = f"{record.location}: conversations[{number}]"
        prompt = _read_turn(turns, number, "human", location).replace(IMAGE_TOKEN, "").strip()
        answer = _read_turn(turns, number + 1, "gpt", location).strip()
        if not prompt or not answer:
            raise InputError(f"{location}: a prompt or its answer is empty; set both")
        task = TASK_BY_PROMPT.get(prompt, OTHER_KIND)
        if task in texts:
            texts[task].append(answer)
            continue
        try:
            questions.append(Question(prompt, answer, (record.region_id,), kind=task))
        except ValueError as error:
            raise InputError(f"{location}: {error}") from error
    if not turns:
        raise InputError(f"{record.location}: conversations is empty; remove the record")
    return texts["recognition"], texts["caption"], questions


def _read_turn(turns: list[Any], number: int, speaker: str, location: str) -> str:
    """Read the text of a turn; raise InputError if it is missing or another speaker's."""
    turn = check_object(turns[number], location) if number < len(turns) else {}
    if turn.get("from") != speaker:
        raise InputError(f"{location}: expected a turn from 'human', then one from 'gpt'")
    text = read_field(turn, "value", str, location)
    check_encodable(location, text)
    return text
