"""Conversion of a publisher's files into an Arrow table, once; afterwards the table is memory-mapped.

A table has a row an image:

    image_id int64, file string, width int32, height int32, stamp list of int64 or null,
    regions  list of {id int64, box 4 x float64, mask string or null, name string or null, phrases, attributes}

Width and height are those that the sources record, or else those of the image file, whose bytes and time of change are
then the stamp: a table of which such an image has another size now is made again. Boxes are x1 y1 x2 y2 in pixels of
an upright image of that size, a mask is the counts of its compressed RLE, and
attributes are JSON. A table is a folder `data/READER-ASKED-KEY` in the cache folder: ASKED stands for the reader's
options and the paths of its files, KEY for their sizes and times as well; a table of files that have changed gives way
to the new one. It appears whole or not at all, in shards of `IMAGES_PER_SHARD` images. `about.json` beside them has
the `hash` of the table, the numbers of images, regions and phrases, the first sources, and what was left out and why.
Needs the extra `data`.

A conversion that is killed goes on after its last whole shard, which is kept in a hidden folder beside the table's.
Until there the sources are read again, but nothing is checked, drawn or written again.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from sca.io.annotations.annotation import MAX_EXAMPLES, SkipCounter
from sca.io.annotations.shapes import clip_annotated_box
from sca.io.atomic import make_write_error, sync_path, write_file
from sca.io.cache import get_cache_folder
from sca.io.errors import InputError, OutputError
from sca.io.image_names import is_url, resolve_image_path
from sca.io.images import read_image_file_size
from sca.io.masks import RLE, mask_to_box

SCHEMA_VERSION = 7  # of the tables and of what readers put into them; another one converts everything anew
IMAGES_PER_SHARD = 2000  # images, with those that are left out
BAD_IMAGE_REASONS = (
    *("image missing", "image is a URL", "image name ambiguous"),
    *("image unreadable", "image of another size", "image without data"),
    *("segments unreadable", "segments of another size"),
)  # see `max_bad`
UNUSABLE_IMAGE_REASON, UNUSABLE_REGION_REASON = "unusable image", "unusable region"  # of which nothing can be made
UNNAMED_CATEGORY_REASON = "category without a name"


class ConvertedTable:
    """A table made from a publisher's files by a reader, whose `_iter_entries` and `_build_row` read them.

    Boxes are clipped to the image, and left out if nothing remains, and so are blank phrases, and regions with neither
    a name nor a phrase; images that have no region left, or whose file is missing, are left out. A record that lacks a
    field, has a wrong one or leads nowhere costs its own region, or its own image, and no other. All are counted by
    reason in `skipped`, the first of each named in `examples` with file, record and field; more than `max_bad` bad
    images, or that many bad regions, is an InputError, and so is a file that is missing or cut off. Of records with the
    same id the first counts.

    `remarks` are phrases about the choice of images, such as how many were held out.
    `hash` is a SHA-256 over all that the table says of images and regions, their files' names apart: equal wherever the
    same data lies. `about` is what `about.json` says. `attributes` has the names of the classes, which auxiliary losses
    may ask for. Copies in other processes map the same table. Raises ImportError if the extra `data` is not installed,
    and OutputError if the cache folder cannot be written.
    """

    reader: str  # what its tables are called

    def __init__(self, split: str, images: Path, sources: Sequence[Path], max_bad: int, selection_key: str = ""):
        """`images`: the folder that file names are relative to; `sources`: the files that are read, the one that
        messages name first; `selection_key`: what else decides over the records.
        """
        self.split, self.images, self.max_bad = split, images, max_bad
        self.sources = list(sources)
        self._skip = SkipCounter()
        self.attributes: dict[str, tuple[str, ...]] = {}
        self.remarks: list[str] = []
        self._bad_image_stamps: dict[str, list[int] | None] = {}  # unusable images, each with its file's stamp
        self._empty_image_sizes: dict[str, tuple[list[int], int, int]] = {}  # images without regions: stamp and size
        self._name_by_path_hash: dict[int, str | None] = {}  # hash of a file's path -> its name, None if as written
        folders = {folder: os.path.realpath(folder) for folder in {source.parent for source in self.sources}}
        paths = [f"{folders[source.parent]}/{source.name}" for source in self.sources]
        source_identity = [selection_key, os.path.realpath(images), *paths]
        source_key = _compute_digest(source_identity)  # whatever state the files are in
        content_key = _compute_digest([SCHEMA_VERSION, source_key, *map(_get_file_stamp, self.sources)])
        self._open_or_convert(get_cache_folder().absolute() / "data" / f"{self.reader}-{source_key}-{content_key}")
        self._check_max_bad()

    @property
    def skipped(self) -> Counter[str]:
        """How many were left out or changed, by reason."""
        return self._skip.counts

    @property
    def examples(self) -> dict[str, list[str]]:
        """The first of each reason, by name."""
        return self._skip.examples

    # what readers say and use

    def _iter_entries(self, bar: tqdm) -> Iterator[Any]:
        """What `_build_row` makes a row of, always in the same order, and cheap: a conversion that goes on runs through
        those that were done. May set `attributes` and `remarks`, count with `_skip`, and tell the bar how many there
        are in all.
        """
        raise NotImplementedError

    def _build_row(self, entry: Any) -> dict[str, Any] | None:
        """A row made by `_create_row` and filled by `_add_region`; None where there is none, which was counted."""
        raise NotImplementedError

    def _resolve_image_path(self, name: str) -> Path:
        """Where the picture that a table calls `name` lies, or should. Raises InputError."""
        return resolve_image_path(name, [self.images])

    def _create_row(
        self, image_id: int, name: str, width: int, height: int, is_size_recorded: bool = True
    ) -> dict[str, Any]:
        stamp = None if is_size_recorded else self._get_image_stamp(name)
        return {"image_id": image_id, "file": name, "width": width, "height": height, "stamp": stamp, "regions": []}

    def _add_region(
        self,
        row: dict[str, Any],
        region_id: int,
        box: Sequence[float] | None,  # x1 y1 x2 y2, which may reach over the edges; None for that of the mask
        location: str,
        mask: RLE | None = None,  # of the image's size, not empty
        name: str | None = None,
        phrases: Sequence[str] = (),
        attributes: dict[str, Any] | None = None,
    ) -> None:
        """Puts a region into its image, or counts why it is left out."""
        box = mask_to_box(mask) if box is None and mask else box
        assert box is not None
        clipped = clip_annotated_box(box, (row["width"], row["height"]), location, self._skip, mask)
        if clipped is None:
            return
        name, nonblank_phrases = (name or "").strip() or None, [phrase for phrase in phrases if phrase]
        if not name and not nonblank_phrases:
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

    def _reject_region(self, problem: str | InputError) -> None:
        """Count a region whose record is unusable; the problem names file, record and field."""
        self._skip(UNUSABLE_REGION_REASON, str(problem))

    @contextmanager
    def _catch_record_errors(self, reject: Callable[[InputError], None] | None = None) -> Iterator[None]:
        """Count the record that raises InputError in this block, by default as a region; the next one is read."""
        try:
            yield
        except ValueError as error:
            (reject or self._reject_region)(error)

    def _reject_image(self, problem: str | InputError) -> None:
        """Count an image whose record is unusable, as `_reject_region` does a region."""
        self._skip(UNUSABLE_IMAGE_REASON, str(problem))

    def _reject_category(self, problem: InputError) -> None:
        self._skip(UNNAMED_CATEGORY_REASON, str(problem))

    def _get_reject_callbacks(self) -> dict[str, Callable[[InputError], None]]:
        """For each list of COCO's format what counts its unusable records."""
        return {
            "images": self._reject_image,
            "annotations": self._reject_region,
            "categories": self._reject_category,
        }

    def _skip_image(self, reason: str, name: str, example: str, stop: bool = True) -> None:
        """A picture met twice counts once. With `stop`, one too many is an InputError at once."""
        if name not in self._bad_image_stamps:
            self._bad_image_stamps[name] = self._get_image_stamp(name)
            self._skip(reason, example)
            if stop:
                self._check_max_bad()

    def _check_max_bad(self) -> None:
        num_bad_images = len(self._bad_image_stamps) + self.skipped[UNUSABLE_IMAGE_REASON]
        if num_bad_images > self.max_bad:
            raise InputError(
                f"{num_bad_images} images of {self.sources[0]} cannot be used, more than max_bad={self.max_bad}; "
                f"{self._summarize_skipped()}. Are the pictures in {self.images} whole and the right ones?"
            )
        for reason, noun in ((UNUSABLE_REGION_REASON, "regions"), (UNNAMED_CATEGORY_REASON, "categories")):
            if self.skipped[reason] > self.max_bad:
                raise InputError(
                    f"{self.skipped[reason]} {noun} of {self.sources[0]} cannot be used, more than "
                    f"max_bad={self.max_bad}; {self._summarize_skipped(reason)}. Correct them, or give a larger max_bad"
                )

    def _summarize_skipped(self, *reasons: str) -> str:
        reasons = reasons or (*BAD_IMAGE_REASONS, UNUSABLE_IMAGE_REASON)
        examples_by_reason = {reason: self.examples[reason] for reason in reasons if self.skipped[reason]}
        return "; ".join(
            f"{reason}: {self.skipped[reason]}, such as {', '.join(e)}" for reason, e in examples_by_reason.items()
        )

    # the store

    def _open_or_convert(self, folder: Path) -> None:
        """Opens the table in `folder`, which one process makes if it is not there, and the others wait for."""
        try:
            import datasets  # noqa: F401
            from filelock import FileLock
        except ImportError as error:
            message = (
                f"{self.reader} needs `datasets` ({error}). Install it: pip install 'segment-caption-anything[data]'"
            )
            raise ImportError(message, name=error.name) from error
        if self._try_open_table(folder):
            return
        lock = FileLock(folder.with_name(f"{folder.name}.lock"))
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            lock_guard = lock.acquire()
        except OSError as error:
            raise OutputError(f"cannot write {folder}: {error.strerror or error}; SCA_CACHE names another") from error
        with lock_guard:
            if not self._try_open_table(folder):
                shutil.rmtree(folder, ignore_errors=True)  # out of date
                self._convert_sources(folder)
                assert self._try_open_table(folder)

    def _try_open_table(self, folder: Path) -> bool:
        """Whether there is a table, and pictures that it lacks are still as they were; then it is opened."""
        from datasets import Dataset, concatenate_datasets

        metadata = self._read_metadata(folder)
        if metadata is None:
            return False
        self.about, self.hash = metadata, str(metadata["hash"])
        self._restore_counts(metadata)
        shards = [Dataset.from_file(str(folder / _format_shard_name(number))) for number in range(metadata["shards"])]
        self._table = concatenate_datasets(shards)
        return True

    def _convert_sources(self, folder: Path) -> None:
        """Makes the table in `folder`. What is whole when it is killed is in a hidden folder beside it, and is taken up
        there; a mistake in the sources leaves nothing.
        """
        draft = folder.with_name(f".{folder.name}")
        try:
            metadata = self._read_metadata(draft)
            if metadata is None:
                shutil.rmtree(draft, ignore_errors=True)
                draft.mkdir()
                metadata = {"sources": list(map(str, self.sources[:MAX_EXAMPLES])), "hash": "", "whole": False}
                metadata |= dict.fromkeys(("shards", "entries", "images", "regions", "captioned", "phrases"), 0)
                metadata["names"] = []
            if not metadata["whole"]:
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
        old_table_pattern = f"{folder.name.rpartition('-')[0]}-*"  # of the files as they were
        for old_folder in (*folder.parent.glob(old_table_pattern), *folder.parent.glob(f".{old_table_pattern}")):
            if old_folder != folder and old_folder.is_dir():
                shutil.rmtree(old_folder, ignore_errors=True)

    def _write_shards(self, draft: Path, metadata: dict[str, Any], bar: tqdm) -> None:
        """Adds shards to those that `about` tells of, until there are no entries left."""
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
        names = dict.fromkeys(metadata["names"])
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
                        metadata["captioned"] += sum(bool(region["phrases"]) for region in record["regions"])
                        names |= dict.fromkeys(region["name"] for region in record["regions"] if region["name"])
                        metadata["phrases"] += sum(len(region["phrases"]) for region in record["regions"])
                    bar.update()
                writer.finalize()
            has_more = metadata["entries"] - entries_before == IMAGES_PER_SHARD
            metadata |= {"shards": metadata["shards"] + 1, "skipped": self.skipped, "examples": self.examples}
            metadata |= {"attributes": self.attributes, "remarks": self.remarks, "names": list(names)}
            metadata |= {"bad": self._bad_image_stamps, "measured": self._empty_image_sizes, "whole": not has_more}
            sync_path(path)
            write_file(draft / "about.json", json.dumps(metadata, indent=1))
        self._name_by_path_hash.clear()

    def _try_build_row(self, entry: Any) -> dict[str, Any] | None:
        """The row of an entry; None, and counted, where its record is unusable or has neither a file nor regions."""
        row = None
        with self._catch_record_errors(self._reject_image):
            row = self._build_row(entry)
        if row is None:
            return None
        if self._find_image_file(row["file"]) is None:
            return None
        if not row["regions"]:
            if row["stamp"]:
                self._empty_image_sizes[row["file"]] = row["stamp"], row["width"], row["height"]
            return self._skip("image without regions", row["file"])
        return row

    def _find_image_file(self, name: str) -> Path | None:
        """The file of an image; None, and counted, where the name leads to none, or to one that another name has."""
        try:
            path = self._resolve_image_path(name)
        except InputError as error:
            reason = "image is a URL" if is_url(name) else "image name ambiguous"
            return self._skip_image(reason, name, str(error), stop=False)
        if not os.path.isfile(path):
            return self._skip_image("image missing", name, name, stop=False)
        if (other_name := self._register_file_name(path, name)) is not None:
            message = f"{name!r} and {other_name!r} both lead to {path}; write paths relative to {self.images}"
            return self._skip_image("image name ambiguous", name, message, stop=False)
        return path

    def _register_file_name(self, path: Path, name: str) -> str | None:
        """Note the name of a file, and return another name of the same file that one of the two must be mistaken for.

        Names that exist as they are written are no mistake: they may be links to one file.
        """
        written_name = None if path == self.images / name else name
        other_name = self._name_by_path_hash.setdefault(hash(os.path.realpath(path)), written_name)
        if other_name == written_name:
            return None
        return other_name or os.path.relpath(path, self.images)

    def _get_image_stamp(self, name: str) -> list[int] | None:
        try:
            return _get_file_stamp(self._resolve_image_path(name))
        except InputError:
            return None

    def _read_metadata(self, folder: Path) -> dict[str, Any] | None:
        """What is known of a table or of the beginning of one, if there is one that is up to date."""
        try:
            metadata = json.loads((folder / "about.json").read_text("utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            return None
        return metadata if self._is_current(folder, metadata) else None

    def _is_current(self, folder: Path, metadata: dict[str, Any]) -> bool:
        """Whether images that could not be used are unchanged, and measured ones have the size that they had."""
        from datasets import Dataset

        if any(self._get_image_stamp(name) != stamp for name, stamp in metadata["bad"].items()):
            return False
        if not all(self._has_size(name, *measured) for name, measured in metadata["measured"].items()):
            return False
        for number in range(metadata["shards"]):
            shard = Dataset.from_file(str(folder / _format_shard_name(number))).data
            if shard["stamp"].null_count < len(shard):
                columns = (shard[name].to_pylist() for name in ("file", "stamp", "width", "height"))
                if not all(self._has_size(*row) for row in zip(*columns, strict=True)):
                    return False
        return True

    def _has_size(self, name: str, stamp: list[int] | None, width: int, height: int) -> bool:
        """Whether an image file still has the size that was measured; True if it was not measured, or is gone."""
        if stamp is None or self._get_image_stamp(name) in (stamp, None):
            return True
        with suppress(InputError):  # which is counted when it is read
            return read_image_file_size(self._resolve_image_path(name)) == (width, height)
        return True

    def _restore_counts(self, metadata: dict[str, Any]) -> None:
        """Takes over what was counted."""
        self._skip, self._bad_image_stamps = SkipCounter(metadata["skipped"], metadata["examples"]), metadata["bad"]
        self.attributes = {name: tuple(values) for name, values in metadata["attributes"].items()}
        self.remarks, self._empty_image_sizes = metadata["remarks"], metadata["measured"]


def _build_features() -> Any:
    from datasets import Features, List, Value

    integer, text = Value("int64"), Value("string")
    region = {"id": integer, "box": List(Value("float64"), length=4), "mask": text, "name": text}
    region |= {"phrases": List(text), "attributes": text}
    sides = {"width": Value("int32"), "height": Value("int32"), "stamp": List(integer)}
    return Features({"image_id": integer, "file": text, **sides, "regions": List(region)})


def _format_shard_name(number: int) -> str:
    return f"table-{number:05d}.arrow"


def _encode_row_content(row: dict[str, Any]) -> bytes:
    """A line that says what a row says, whatever its file is called and wherever it lies."""
    regions = [list(region.values()) for region in row["regions"]]
    return json.dumps([row["image_id"], row["width"], row["height"], regions]).encode() + b"\n"


def _compute_digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def _get_file_stamp(path: Path) -> list[int] | None:
    """What tells that a file was changed: its size and time; None if it is not there."""
    try:
        file_stat = path.stat()
    except (OSError, ValueError):  # the latter for a name that no file can have
        return None
    return [file_stat.st_size, file_stat.st_mtime_ns]
