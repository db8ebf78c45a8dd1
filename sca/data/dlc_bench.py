"""DLC-Bench (arXiv 2504.16072) and ParaDLC-Bench (arXiv 2606.19534): masks, class names, and questions for a judge."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from sca_registry.contracts import JUDGE_QUESTIONS, JudgeQuestion
from tqdm.auto import tqdm

from sca.data.coco import find_coco_files, read_region_annotation
from sca.data.record_parsing import check_benchmark_split, iter_identified_records, read_dataset_json
from sca.data.table import TableDataset
from sca.io.errors import InputError
from sca.io.validation import check_object, is_finite_number, read_field, require_recorded_size

SPLIT = "test"
LAYOUTS = (  # annotation file and image folder in `root`
    ("annotations.json", "images"),
    ("annotations/annotations.json", "annotations/images"),
    ("annotations/annotations.json", "images"),
)
QUESTIONS_FILE, CLASS_NAMES_FILE = "qa.json", "class_names.json"  # next to the annotations


class _BenchmarkRegion(NamedTuple):
    """Region of an image.

    Attributes:
        key: Key of the region in the files of questions and class names.
        region_id: Id of the region in its image.
        record: Annotation in COCO's form.
        location: File and record for error messages.
    """

    key: str
    region_id: int
    record: dict[str, Any]
    location: str


class DlcBench(TableDataset):
    """Files of DLC-Bench or ParaDLC-Bench: `annotations.json`, `qa.json`, `class_names.json` and the folder `images`.

    `annotations.json` of DLC-Bench has COCO's format; its regions are those of an annotation id. That of ParaDLC-Bench
    is a list of images with several regions each, whose keys are the id of the image and the index of the region:

        [{"image_id": "1592437", "file_name": "a.jpg", "height": 480, "width": 640,
          "annotations": [{"index": 0, "mask_rle": {"size": [480, 640], "counts": "..."}}]}]

    `qa.json` lists the questions of each region by its key, which become its attribute `judge_questions`:

        {"1592437_0": [{"question": "...", "choices": [["an option", 1], ["another", -1]], "type": "positive"}]}

    Regions without questions or with an empty mask, and questions without a region, are unusable records. The layouts
    are those of https://github.com/NVlabs/describe-anything, https://github.com/Haochen-Wang409/Grasp-Any-Region and
    https://github.com/MSALab-PKU/PerceptionDLM. See `TableDataset`.

    Args:
        split: "test".
        root: Folder with the files, or with the folder `annotations` that contains them.
        max_bad_records: Maximum number of unusable records of each kind: a benchmark is complete by default.
    """

    reader = "dlc-bench"

    def __init__(self, split: str, root: str | Path, max_bad_records: int = 0):
        check_benchmark_split(split, SPLIT)
        self.annotations, image_root = find_coco_files(LAYOUTS, split, root)
        sources = [self.annotations, *(self.annotations.with_name(name) for name in (QUESTIONS_FILE, CLASS_NAMES_FILE))]
        for source in sources:
            if not source.is_file():
                raise InputError(f"no {source.name} next to {self.annotations}; copy it from the benchmark")
        super().__init__(split, image_root, sources, max_bad_records)

    def _iter_entries(self, bar: tqdm[Any]) -> Iterator[Any]:
        """Yield the id, file name and size of an image, its regions, and the questions and class names of all."""
        content = read_dataset_json(self.annotations)
        iter_images = self._iter_listed_images if isinstance(content, list) else self._iter_coco_images
        questions, class_names = (check_object(read_dataset_json(source), str(source)) for source in self.sources[1:])
        images = list(iter_images(content))
        keys = {region.key for *_, regions in images for region in regions}
        for key in questions.keys() - keys:
            self._reject_region(f"{self.sources[1]}: {key} is not a region of {self.annotations}")
        bar.reset(len(images))
        for image_id, name, size, regions in images:
            yield image_id, name, size, regions, questions, class_names

    def _iter_coco_images(self, content: Any) -> Iterator[tuple[int, str, tuple[int, int], list[_BenchmarkRegion]]]:
        """Yield the images of DLC-Bench's annotations."""
        images, annotations = (
            read_field(content, key, list, str(self.annotations)) for key in ("images", "annotations")
        )
        regions: dict[int, list[_BenchmarkRegion]] = {}
        reject = self._get_reject_callbacks()
        location = f"{self.annotations}: annotations"
        for record, place in iter_identified_records(annotations, location, reject=reject["annotations"]):
            with self._catch_record_errors():
                image_id = read_field(record, "image_id", int, place)
                region = _BenchmarkRegion(str(record["id"]), record["id"], record, place)
                regions.setdefault(image_id, []).append(region)
        for record, place in iter_identified_records(images, f"{self.annotations}: images", reject=reject["images"]):
            with self._catch_record_errors(self._reject_image):
                name = read_field(record, "file_name", str, place)
                yield record["id"], name, require_recorded_size(record, place), regions.pop(record["id"], [])
        for image_id, image_regions in regions.items():
            self._reject_region(f"{image_regions[0].location}: image_id {image_id} is not among the images")

    def _iter_listed_images(self, content: Any) -> Iterator[tuple[int, str, tuple[int, int], list[_BenchmarkRegion]]]:
        """Yield the images of ParaDLC-Bench's annotations."""
        for number, image in enumerate(content):
            location = f"{self.annotations}[{number}]"
            with self._catch_record_errors(self._reject_image):
                image_id = read_field(image, "image_id", str, location)
                if not image_id.isdecimal():
                    raise InputError(f"{location}, 'image_id' is {image_id!r:.60}; expected the digits of a number")
                regions = []
                for index, record in enumerate(read_field(image, "annotations", list, location)):
                    place = f"{location}: annotations[{index}]"
                    region_id = read_field(record, "index", int, place)
                    mask = {"segmentation": read_field(record, "mask_rle", dict, place)}
                    regions.append(_BenchmarkRegion(f"{image_id}_{region_id}", region_id, mask, place))
                name = read_field(image, "file_name", str, location)
                yield int(image_id), name, require_recorded_size(image, location), regions

    def _build_row(self, entry: Any) -> dict[str, Any]:
        image_id, name, size, regions, questions, class_names = entry
        row = self._create_row(image_id, name, *size)
        for region in regions:
            with self._catch_record_errors():
                self._add_benchmark_region(row, region, questions, class_names)
        return row

    def _add_benchmark_region(
        self, row: dict[str, Any], region: _BenchmarkRegion, questions: dict[str, Any], class_names: dict[str, Any]
    ) -> None:
        _, questions_file, class_names_file = self.sources
        if not questions.get(region.key):
            raise InputError(f"{region.location}: {questions_file} has no questions of {region.key}")
        location = f"{questions_file}: {region.key}"
        judge_questions = [
            asdict(_parse_question(question, f"{location}[{index}]"))
            for index, question in enumerate(read_field(questions, region.key, list, str(questions_file)))
        ]
        annotation = read_region_annotation(region.record, region.location, row, self._skip)
        if annotation is None:
            raise InputError(f"{region.location}: the mask is empty")
        self._add_region(
            row,
            region.region_id,
            annotation.box,
            region.location,
            mask=annotation.mask,
            name=read_field(class_names, region.key, str, str(class_names_file)),
            attributes={JUDGE_QUESTIONS: judge_questions},
        )


def _parse_question(question: Any, location: str) -> JudgeQuestion:
    """Return a question of the publishers' form. Raises InputError for another form."""
    choices = read_field(question, "choices", list, location)
    for choice in choices:
        is_pair = isinstance(choice, list) and len(choice) == 2
        if not is_pair or not isinstance(choice[0], str) or not is_finite_number(choice[1]):
            raise InputError(f"{location}: choice {choice!r:.60} is not a list of a text and a score")
    try:
        return JudgeQuestion(
            read_field(question, "question", str, location),
            tuple(text for text, _ in choices),
            tuple(score for _, score in choices),
            read_field(question, "type", str, location),
        )
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"{location}: {error}") from error
