"""Questions of GAR-Bench (Grasp Any Region, arXiv 2510.18876): multiple-choice questions, and requests for captions."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sca_registry.contracts import Question
from tqdm.auto import tqdm

from sca.data.coco import read_region_annotation
from sca.data.conversations import make_question
from sca.data.record_parsing import check_benchmark_split, read_dataset_json
from sca.data.table import TableDataset
from sca.io.errors import InputError
from sca.io.paths import expand_user
from sca.io.validation import check_choice, check_list, check_type, read_field, read_image_name

SPLIT = "test"
FILE_NAMES = {  # by part of the benchmark
    "vqa": "GAR-Bench-VQA.json",
    "simple": "GAR-Bench-Caption-Simple.json",
    "detailed": "GAR-Bench-Caption-Detailed.json",
}
REFERENCE_PATTERN = re.compile(r"<Prompt(\d{1,3})>")  # reference to a mask, counted from 0
INSTRUCTION = "Respond with the letter of the correct option."
DETAILED_REQUEST = "Describe <Prompt0> in detail, including the relationship with <Prompt1>."


class GarBenchQuestions(TableDataset):
    """Questions of GAR-Bench: a JSON list of questions, each about one or several masks of an image.

    Records of the parts "vqa", "simple" and "detailed":

        {"image": "images/vqa_0.png", "mask_rles": [{"size": [480, 640], "counts": "..."}, ...],
         "question": "What is the relationship between <Prompt0> and <Prompt1>?",
         "choices": ["A. <Prompt0> is behind <Prompt1>", ...], "answer": "A", "type": "relation"}
        {"image": "...", "mask_rles": [...], "question": "...", "answer": "..."}
        {"image": "...", "mask_rles": [...], "subject_name": "dog", "predicate_name": "chasing", "object_name": "cat"}

    Every question is a sample of its own, whose regions are the masks in order. Its text contains references such as
    "<region 1>", and the options in the part "vqa", whose answer is a letter. The question of the part "detailed" is
    the request of its authors, and the answer the subject, the predicate and the object. The kind is the type, or the
    name of the part. The layout is that of `evaluation/GAR-Bench` in
    https://github.com/Haochen-Wang409/Grasp-Any-Region. See `TableDataset`.

    Args:
        split: "test".
        root: Folder with the file of the part and the images, or with the folder `annotations` that contains them.
        part: "vqa", multiple-choice questions; "simple", captions of relations; or "detailed", detailed captions.
        max_bad_records: Maximum number of unusable records of each kind: a benchmark is complete by default.
    """

    reader = "gar-bench-questions"

    def __init__(self, split: str, root: str | Path, part: str = "vqa", max_bad_records: int = 0):
        check_benchmark_split(split, SPLIT)
        check_choice("part", part, FILE_NAMES)
        self.part = part
        file_name = FILE_NAMES[part]
        folders = [expand_user(root), expand_user(root) / "annotations"]
        folder = next((each for each in folders if (each / file_name).is_file()), None)
        if folder is None:
            raise InputError(f"no {file_name} in {' or '.join(map(str, folders))}; set root=FOLDER")
        self.file: Path = folder / file_name
        super().__init__(split, folder, [self.file], max_bad_records)

    def _iter_entries(self, bar: tqdm[Any]) -> Iterator[Any]:
        """Yield the index of a question, its record and its location."""
        records = read_dataset_json(self.file)
        check_type(str(self.file), records, list, InputError)
        bar.reset(len(records))
        for index, record in enumerate(records):
            yield index, record, f"{self.file}[{index}]"

    def _build_row(self, entry: Any) -> dict[str, Any]:
        index, record, location = entry
        masks = read_field(record, "mask_rles", list, location)
        if not masks:
            raise InputError(f"{location}: mask_rles is empty; remove the question")
        height, width = _read_mask_size(masks[0], location)
        row = self._create_row(index, read_image_name(record, "image", location), width, height)
        question = _parse_question(record, self.part, len(masks), location)
        for number, mask in enumerate(masks):
            place = f"{location}: mask_rles[{number}]"
            annotation = read_region_annotation({"segmentation": mask}, place, row, self._skip)
            if annotation is None:
                raise InputError(f"{place} is empty; remove the question")
            self._add_region(row, number, annotation.box, place, mask=annotation.mask, requires_text=False)
        row["questions"].append(asdict(question))
        return row


def _read_mask_size(mask: Any, location: str) -> tuple[int, int]:
    size = read_field(mask, "size", list, f"{location}: mask_rles[0]")
    if len(size) != 2 or not all(isinstance(side, int) and side > 0 for side in size):
        raise InputError(f"{location}: mask_rles[0] has the size {size!r:.60}; expected its height and width")
    return size[0], size[1]


def _parse_question(record: dict[str, Any], part: str, num_masks: int, location: str) -> Question:
    """Return a question whose references are those of this package. Raises InputError for an invalid one."""

    def read_text(field: str) -> str:
        return read_field(record, field, str, location)

    match part:
        case "vqa":
            choices = read_field(record, "choices", list, location)
            check_list(f"{location}, 'choices'", choices, str, minimum=2)
            text = " ".join((read_text("question"), "Options:", *choices, INSTRUCTION))
            answer, kind = read_text("answer"), read_text("type")
        case "simple":
            text, answer, kind = read_text("question"), read_text("answer"), part
        case _:
            relation = [read_text(f"{field}_name").strip() for field in ("subject", "predicate", "object")]
            if not all(relation):
                raise InputError(f"{location}: the subject, predicate or object is empty; remove the record")
            text, answer, kind = DETAILED_REQUEST, " ".join(relation), part
    text = REFERENCE_PATTERN.sub(lambda match: f"<region {int(match[1]) + 1}>", text)
    return make_question(text, answer, range(num_masks), location, kind)
