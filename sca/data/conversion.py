"""Conversion of a publisher's files into an Arrow table.

A dataset is converted once; afterwards its table is memory-mapped. A table has one row per image:

    image_id int64, file string, width int32, height int32, stamp list of int64 or null,
    regions    list of {id int64, box 4 x float64, mask string or null, name string or null, phrases, attributes}
    questions  list of {text string, answer string, region_ids list of int64, kind string, is_about_image bool}

Boxes are x1 y1 x2 y2 in pixels of the upright image, a mask is the counts of its compressed RLE, and attributes are
JSON. Width and height are those that the sources record, else those of the image file. In the second case `stamp` is
the size in bytes and the modification time of the image file, and the table is converted again once such an image has
another width or height.

A table is a folder `data/READER-SOURCE-CONTENT` in the cache folder. SOURCE is a digest of the reader's options and the
paths of its files; CONTENT also covers their sizes and modification times. The table of changed files replaces the old
one. A table has shards of `IMAGES_PER_SHARD` images. `metadata.json` contains its `hash`, its counts of images, regions
and phrases, the first sources, and the skipped records by reason.

A table is written atomically. A killed conversion resumes after its last complete shard, which is kept in a hidden
folder next to the table. The sources are read again up to that point, but nothing is checked or written again.

Requires the extra `data`.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sca_registry.contracts import JUDGE_QUESTIONS, Question
from tqdm.auto import tqdm

from sca.io.annotations.annotation import MAX_EXAMPLES, SkipCounter
from sca.io.annotations.shapes import clip_annotated_box
from sca.io.atomic import make_write_error, sync_path, write_file
from sca.io.cache import get_cache_folder
from sca.io.errors import InputError, OutputError
from sca.io.image_names import is_url, resolve_image_path
from sca.io.images import read_image_file_size
from sca.io.masks import RLE, mask_to_box

SCHEMA_VERSION = 10  # increase it when the format or a reader changes, to convert all tables again
METADATA_FILE = "metadata.json"
IMAGES_PER_SHARD = 2000  # including skipped images
BAD_IMAGE_REASONS = (  # counted against `max_bad_records`
    *("image missing", "image is a URL", "image name ambiguous"),
    *("image unreadable", "image of a different size", "image without data"),
    *("segments unreadable", "segments of a different size"),
)
COUNT_KEYS = (  # counts in the metadata
    *("shards", "entries", "images", "regions", "captioned_regions", "phrases"),
    *("questions", "images_with_questions_only"),
)
UNUSABLE_IMAGE_REASON, UNUSABLE_REGION_REASON = "unusable image", "unusable region"
UNNAMED_CATEGORY_REASON = "category without a name"


class ConvertedTable(ABC):
    """Table converted from a publisher's files.

    A subclass reads the files in `_iter_entries` and `_build_row`. Boxes are clipped to the image. These are skipped
    and counted by reason:

    - boxes outside the image, blank phrases, and regions with neither a name, a phrase, a question nor judge questions;
    - questions about regions that are skipped or do not exist;
    - images without regions and images whose file is missing;
    - records with a missing or invalid field or reference, which affect only their own region or image;
    - records that repeat an id, except the first.

    Copies of a table in other processes map the same file.

    Args:
        split: Name of the split.
        image_root: Folder that image file names are relative to.
        sources: Files to read, starting with the one that messages name.
        max_bad_records: Maximum number of unusable images, of unusable regions, and of unnamed categories.
        selection_key: Options that select records in addition to the sources.

    Attributes:
        reader: Name of the reader, which begins the names of its tables.
        metadata: Content of `metadata.json`.
        content_hash: SHA-256 of all images and regions, excluding file names: equal on every machine with the same
            data.
        attribute_values: Possible values of each region attribute, such as the class names, for auxiliary losses.
        remarks: Phrases about the choice of images, such as how many were held out.

    Raises:
        InputError: A source is missing or truncated, or more than `max_bad_records` records are unusable.
        ImportError: The extra `data` is not installed.
        OutputError: The cache folder cannot be written.
    """

    reader: str

    def __init__(
        self, split: str, image_root: Path, sources: Sequence[Path], max_bad_records: int, selection_key: str = ""
    ):
        self.split = split
        self.image_root = image_root
        self.max_bad_records = max_bad_records
        self.sources: list[Path] = list(sources)
        self._skip = SkipCounter()
        self.attribute_values: dict[str, tuple[str, ...]] = {}
        self.remarks: list[str] = []
        self._bad_image_stamps: dict[str, list[int] | None] = {}  # stamp of each unusable image
        self._empty_image_sizes: dict[str, tuple[list[int], int, int]] = {}  # stamp, width and height
        self._name_by_path_hash: dict[int, str | None] = {}  # None: the path as written
        folders = {folder: os.path.realpath(folder) for folder in {source.parent for source in self.sources}}
        paths = [f"{folders[source.parent]}/{source.name}" for source in self.sources]
        source_identity = [selection_key, os.path.realpath(image_root), *paths]
        source_key = _compute_digest(source_identity)  # independent of the state of the files
        content_key = _compute_digest([SCHEMA_VERSION, source_key, *map(_get_file_stamp, self.sources)])
        self._open_or_convert(get_cache_folder().absolute() / "data" / f"{self.reader}-{source_key}-{content_key}")
        self._check_max_bad()

    @property
    def skipped(self) -> Counter[str]:
        """Counts of skipped or changed records by reason."""
        return self._skip.counts

    @property
    def examples(self) -> dict[str, list[str]]:
        """First skipped records of each reason, each with its file, record and field."""
        return self._skip.examples

    @abstractmethod
    def _iter_entries(self, bar: tqdm[Any]) -> Iterator[Any]:
        """Yield the inputs of `_build_row` in a fixed order.

        Must be cheap, because a resumed conversion iterates over finished entries again. May set `attribute_values` and
        `remarks`, count with `_skip`, and set the total of the progress bar.
        """

    @abstractmethod
    def _build_row(self, entry: Any) -> dict[str, Any] | None:
        """Build a row with `_create_row` and `_add_region`; None, and counted, if the entry has no row."""

    def _resolve_image_path(self, name: str) -> Path:
        """Return the path of an image, which may not exist. Raises InputError for an ambiguous name or a URL."""
        return resolve_image_path(name, [self.image_root])

    def _create_row(
        self, image_id: int, name: str, width: int, height: int, is_size_recorded: bool = True
    ) -> dict[str, Any]:
        stamp = None if is_size_recorded else self._get_image_stamp(name)
        row = {"image_id": image_id, "file": name, "width": width, "height": height, "stamp": stamp}
        return {**row, "regions": [], "questions": []}

    def _add_region(
        self,
        row: dict[str, Any],
        region_id: int,
        box: Sequence[float] | None,  # x1 y1 x2 y2, may exceed the image; None: the box of the mask
        location: str,
        mask: RLE | None = None,  # of the image's size, nonempty
        name: str | None = None,
        phrases: Sequence[str] = (),
        attributes: dict[str, Any] | None = None,
        questions: Sequence[Question] = (),
        requires_text: bool = True,  # False for a region that a question of another region refers to
    ) -> None:
        """Add a region and questions about it to the row of its image, or count why it is skipped."""
        box = mask_to_box(mask) if box is None and mask else box
        assert box is not None
        clipped = clip_annotated_box(box, (row["width"], row["height"]), location, self._skip, mask)
        if clipped is None:
            return
        name, nonblank_phrases = (name or "").strip() or None, [phrase for phrase in phrases if phrase]
        has_judge_questions = bool((attributes or {}).get(JUDGE_QUESTIONS))
        if requires_text and not name and not nonblank_phrases and not questions and not has_judge_questions:
            return self._skip("region without text", location)
        for _ in range(len(phrases) - len(nonblank_phrases)):
            self._skip("blank phrase", location)
        row["regions"].append(
            {
                "id": region_id,
                "box": clipped,
                "mask": mask and mask["counts"],
                "name": name,
                "phrases": nonblank_phrases,
                "attributes": json.dumps(attributes or {}),
            }
        )
        self._add_questions(row, questions)

    def _add_questions(self, row: dict[str, Any], questions: Iterable[Question]) -> None:
        """Add questions to a row. Those about regions that it does not have in the end are dropped and counted."""
        row["questions"] += map(asdict, questions)

    def _reject_region(self, problem: str | ValueError) -> None:
        """Count an unusable region; the problem names its file, record and field."""
        self._skip(UNUSABLE_REGION_REASON, str(problem))

    @contextmanager
    def _catch_record_errors(self, reject: Callable[[ValueError], None] | None = None) -> Iterator[None]:
        """Count the record whose InputError this block raises, by default as a region, and continue."""
        try:
            yield
        except ValueError as error:
            (reject or self._reject_region)(error)

    def _reject_image(self, problem: str | ValueError) -> None:
        """Count an unusable image; the problem names its file, record and field."""
        self._skip(UNUSABLE_IMAGE_REASON, str(problem))

    def _reject_category(self, problem: ValueError) -> None:
        self._skip(UNNAMED_CATEGORY_REASON, str(problem))

    def _get_reject_callbacks(self) -> dict[str, Callable[[ValueError], None]]:
        """Return the callback for unusable records of each list of a COCO file."""
        return {
            "images": self._reject_image,
            "annotations": self._reject_region,
            "categories": self._reject_category,
        }

    def _skip_image(self, reason: str, name: str, example: str, stop: bool = True) -> None:
        """Count an unusable image once; with `stop`, raise InputError if it exceeds `max_bad_records`."""
        if name not in self._bad_image_stamps:
            self._bad_image_stamps[name] = self._get_image_stamp(name)
            self._skip(reason, example)
            if stop:
                self._check_max_bad()

    def _check_max_bad(self) -> None:
        num_bad_images = len(self._bad_image_stamps) + self.skipped[UNUSABLE_IMAGE_REASON]
        if num_bad_images > self.max_bad_records:
            raise InputError(
                f"{num_bad_images} images of {self.sources[0]} cannot be used, more than "
                f"max_bad_records={self.max_bad_records}; {self._summarize_skipped()}. Check the images in "
                f"{self.image_root}"
            )
        for reason, noun in ((UNUSABLE_REGION_REASON, "regions"), (UNNAMED_CATEGORY_REASON, "categories")):
            if self.skipped[reason] > self.max_bad_records:
                raise InputError(
                    f"{self.skipped[reason]} {noun} of {self.sources[0]} cannot be used, more than "
                    f"max_bad_records={self.max_bad_records}; {self._summarize_skipped(reason)}. Correct them, or "
                    "increase max_bad_records"
                )

    def _summarize_skipped(self, *reasons: str) -> str:
        reasons = reasons or (*BAD_IMAGE_REASONS, UNUSABLE_IMAGE_REASON)
        examples_by_reason = {reason: self.examples[reason] for reason in reasons if self.skipped[reason]}
        return "; ".join(
            f"{reason}: {self.skipped[reason]}, such as {', '.join(e)}" for reason, e in examples_by_reason.items()
        )

    def _open_or_convert(self, folder: Path) -> None:
        """Open the table in `folder`; if it does not exist, one process converts it and the others wait."""
        try:
            import datasets  # noqa: F401
            from filelock import FileLock
        except ImportError as error:
            message = f"{self.reader} requires `datasets` ({error}); pip install 'segment-caption-anything[data]'"
            raise ImportError(message, name=error.name) from error
        if self._try_open_table(folder):
            return
        lock = FileLock(folder.with_name(f"{folder.name}.lock"))
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            lock_guard = lock.acquire()
        except OSError as error:
            raise OutputError(
                f"cannot write {folder}: {error.strerror or error}; set SCA_CACHE to another folder"
            ) from error
        with lock_guard:
            if not self._try_open_table(folder):
                shutil.rmtree(folder, ignore_errors=True)  # outdated
                self._convert_sources(folder)
                assert self._try_open_table(folder)

    def _try_open_table(self, folder: Path) -> bool:
        """Open a current table and return True; False if there is none, or if an image has changed."""
        from datasets import Dataset, concatenate_datasets

        metadata = self._read_metadata(folder)
        if metadata is None:
            return False
        self.metadata: dict[str, Any] = metadata
        self.content_hash: str = str(metadata["hash"])
        self._restore_counts(metadata)
        shards = [Dataset.from_file(str(folder / _format_shard_name(number))) for number in range(metadata["shards"])]
        self._table = concatenate_datasets(shards)
        return True

    def _convert_sources(self, folder: Path) -> None:
        """Convert the sources into a table in `folder`.

        An interrupted conversion keeps its complete shards in a hidden folder next to `folder`. An invalid source
        leaves nothing.
        """
        draft = folder.with_name(f".{folder.name}")
        try:
            metadata = self._read_metadata(draft)
            if metadata is None:
                shutil.rmtree(draft, ignore_errors=True)
                draft.mkdir()
                metadata = {"sources": list(map(str, self.sources[:MAX_EXAMPLES])), "hash": "", "is_complete": False}
                metadata |= dict.fromkeys(COUNT_KEYS, 0)
                metadata["class_names"] = []
            if not metadata["is_complete"]:
                with tqdm(desc=self.reader, unit=" images", leave=False, disable=None) as bar:
                    self._write_shards(draft, metadata, bar)
            os.rename(draft, folder)
        except OutputError:
            raise
        except OSError as error:
            raise make_write_error(folder, error) from error
        except Exception:
            shutil.rmtree(draft, ignore_errors=True)
            raise
        old_table_pattern = f"{folder.name.rpartition('-')[0]}-*"  # tables of earlier versions of the files
        for old_folder in (*folder.parent.glob(old_table_pattern), *folder.parent.glob(f".{old_table_pattern}")):
            if old_folder != folder and old_folder.is_dir():
                shutil.rmtree(old_folder, ignore_errors=True)

    def _write_shards(self, draft: Path, metadata: dict[str, Any], bar: tqdm[Any]) -> None:
        """Append shards to those in `metadata` until no entries are left."""
        from datasets import Dataset
        from datasets.arrow_writer import ArrowWriter

        entries = iter(self._iter_entries(bar))
        for _ in itertools.islice(entries, metadata["entries"]):
            bar.update()
        if metadata["entries"]:
            self._restore_counts(metadata)
            for number in range(metadata["shards"]):
                for name in Dataset.from_file(str(draft / _format_shard_name(number)))["file"]:
                    with suppress(InputError):
                        self._register_file_name(self._resolve_image_path(name), name)
        class_names = dict.fromkeys(metadata["class_names"])
        has_more = True
        while has_more:
            path, entries_before = draft / _format_shard_name(metadata["shards"]), metadata["entries"]
            with ArrowWriter(features=_build_features(), path=str(path), writer_batch_size=500) as writer:
                for entry in itertools.islice(entries, IMAGES_PER_SHARD):
                    metadata["entries"] += 1
                    if (record := self._try_build_row(entry)) is not None:
                        writer.write(record)
                        metadata["hash"] = hashlib.sha256(
                            metadata["hash"].encode() + _encode_row_content(record)
                        ).hexdigest()
                        metadata["images"] += 1
                        metadata["regions"] += len(record["regions"])
                        metadata["captioned_regions"] += sum(bool(region["phrases"]) for region in record["regions"])
                        class_names |= dict.fromkeys(region["name"] for region in record["regions"] if region["name"])
                        metadata["phrases"] += sum(len(region["phrases"]) for region in record["regions"])
                        metadata["questions"] += len(record["questions"])
                        has_text = any(region["name"] or region["phrases"] for region in record["regions"])
                        metadata["images_with_questions_only"] += not has_text
                    bar.update()
                writer.finalize()
            has_more = metadata["entries"] - entries_before == IMAGES_PER_SHARD
            metadata |= {"shards": metadata["shards"] + 1, "skipped": self.skipped, "examples": self.examples}
            metadata |= {"attributes": self.attribute_values, "remarks": self.remarks, "class_names": list(class_names)}
            metadata |= {"bad_images": self._bad_image_stamps, "empty_images": self._empty_image_sizes}
            metadata["is_complete"] = not has_more
            sync_path(path)
            write_file(draft / METADATA_FILE, json.dumps(metadata, indent=1))
        self._name_by_path_hash.clear()

    def _try_build_row(self, entry: Any) -> dict[str, Any] | None:
        """Build the row of an entry; None, and counted, if it is unusable, has no image file or no regions."""
        row = None
        with self._catch_record_errors(self._reject_image):
            row = self._build_row(entry)
        if row is None:
            return None
        if self._find_image_file(row["file"]) is None:
            return None
        self._drop_unanswerable_questions(row)
        if not row["regions"]:
            if row["stamp"]:
                self._empty_image_sizes[row["file"]] = row["stamp"], row["width"], row["height"]
            self._skip("image without regions", row["file"])
            return None
        return row

    def _drop_unanswerable_questions(self, row: dict[str, Any]) -> None:
        """Drop, and count, the questions about regions that the row does not have."""
        region_ids = {region["id"] for region in row["regions"]}
        for question in row["questions"]:
            if missing := [region_id for region_id in question["region_ids"] if region_id not in region_ids]:
                self._skip(
                    "question about a missing region", f"{row['file']} ({question['text']!r:.60}, id {missing[0]})"
                )
        row["questions"] = [each for each in row["questions"] if region_ids.issuperset(each["region_ids"])]
        used_ids = {region_id for question in row["questions"] for region_id in question["region_ids"]}
        row["regions"] = [each for each in row["regions"] if each["id"] in used_ids or _has_text(each)]

    def _find_image_file(self, name: str) -> Path | None:
        """Return the file of an image; None, and counted, if it does not exist or has two names."""
        try:
            path = self._resolve_image_path(name)
        except InputError as error:
            reason = "image is a URL" if is_url(name) else "image name ambiguous"
            self._skip_image(reason, name, str(error), stop=False)
            return None
        if not os.path.isfile(path):
            self._skip_image("image missing", name, name, stop=False)
            return None
        if (other_name := self._register_file_name(path, name)) is not None:
            message = f"{name!r} and {other_name!r} both refer to {path}; write paths relative to {self.image_root}"
            self._skip_image("image name ambiguous", name, message, stop=False)
            return None
        return path

    def _register_file_name(self, path: Path, name: str) -> str | None:
        """Register the name of a file, and return a conflicting name of the same file.

        Names that exist as written do not conflict: they may be links to one file.
        """
        written_name = None if path == self.image_root / name else name
        other_name = self._name_by_path_hash.setdefault(hash(os.path.realpath(path)), written_name)
        if other_name == written_name:
            return None
        return other_name or os.path.relpath(path, self.image_root)

    def _get_image_stamp(self, name: str) -> list[int] | None:
        try:
            return _get_file_stamp(self._resolve_image_path(name))
        except InputError:
            return None

    def _read_metadata(self, folder: Path) -> dict[str, Any] | None:
        """Read the metadata of a complete or partial table; None if there is none or it is outdated."""
        try:
            metadata = json.loads((folder / METADATA_FILE).read_text("utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            return None
        return metadata if self._is_current(folder, metadata) else None

    def _is_current(self, folder: Path, metadata: dict[str, Any]) -> bool:
        """Return whether unusable images are unchanged and measured images still have the same size."""
        from datasets import Dataset

        if any(self._get_image_stamp(name) != stamp for name, stamp in metadata["bad_images"].items()):
            return False
        if not all(self._has_size(name, *size) for name, size in metadata["empty_images"].items()):
            return False
        for number in range(metadata["shards"]):
            shard = Dataset.from_file(str(folder / _format_shard_name(number))).data
            if shard["stamp"].null_count < len(shard):
                columns = (shard[name].to_pylist() for name in ("file", "stamp", "width", "height"))
                if not all(self._has_size(*row) for row in zip(*columns, strict=True)):
                    return False
        return True

    def _has_size(self, name: str, stamp: list[int] | None, width: int, height: int) -> bool:
        """Return whether an image file still has its measured size; True if not measured, or deleted."""
        if stamp is None or self._get_image_stamp(name) in (stamp, None):
            return True
        with suppress(InputError):  # counted when the image is read
            return read_image_file_size(self._resolve_image_path(name)) == (width, height)
        return True

    def _restore_counts(self, metadata: dict[str, Any]) -> None:
        self._skip, self._bad_image_stamps = (
            SkipCounter(metadata["skipped"], metadata["examples"]),
            metadata["bad_images"],
        )
        self.attribute_values = {name: tuple(values) for name, values in metadata["attributes"].items()}
        self.remarks, self._empty_image_sizes = metadata["remarks"], metadata["empty_images"]


def _has_text(region_row: dict[str, Any]) -> bool:
    """Return whether a region has a name, a phrase or questions for a judge."""
    return bool(
        region_row["name"] or region_row["phrases"] or json.loads(region_row["attributes"]).get(JUDGE_QUESTIONS)
    )


def _build_features() -> Any:
    from datasets import Features, List, Value

    integer, text = Value("int64"), Value("string")
    region = {"id": integer, "box": List(Value("float64"), length=4), "mask": text, "name": text}
    region |= {"phrases": List(text), "attributes": text}
    sides = {"width": Value("int32"), "height": Value("int32"), "stamp": List(integer)}
    question = {
        "text": text,
        "answer": text,
        "region_ids": List(integer),
        "kind": text,
        "is_about_image": Value("bool"),
    }
    lists = {"regions": List(region), "questions": List(question)}
    return Features({"image_id": integer, "file": text, **sides, **lists})


def _format_shard_name(number: int) -> str:
    return f"table-{number:05d}.arrow"


def _encode_row_content(row: dict[str, Any]) -> bytes:
    """Encode the content of a row as one line, without the name of its image file."""
    regions = [list(region.values()) for region in row["regions"]]
    questions = [list(question.values()) for question in row["questions"]]
    content = [row["image_id"], row["width"], row["height"], regions, *([questions] if questions else [])]
    return json.dumps(content).encode() + b"\n"


def _compute_digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def _get_file_stamp(path: Path) -> list[int] | None:
    """Return the size in bytes and the modification time of a file; None if it does not exist."""
    try:
        file_stat = path.stat()
    except (OSError, ValueError):  # ValueError: an invalid file name
        return None
    return [file_stat.st_size, file_stat.st_mtime_ns]
