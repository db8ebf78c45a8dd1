"""Conversion of a publisher's files into an Arrow table, once; afterwards the table is memory-mapped.

A table has a row an image:

    image_id int64, file string, width int32, height int32, stamp list of int64 or null,
    regions  list of {id int64, box 4 x float64, mask string or null, name string or null, phrases, attributes}

Width and height are those that the sources record, or else those of the image file, whose bytes and time of change are
then the stamp: a table of which such an image has another size now is made again. Boxes are x1 y1 x2 y2 in pixels of
an upright image of that size, a mask is the counts of its compressed RLE, and
attributes are JSON. A table is a folder `data/READER-ASKED-KEY` in the cache folder: ASKED stands for the reader's
options and the paths of its files, KEY for their sizes and times as well; a table of files that have changed gives way
to the new one. It appears whole or not at all, and lies in shards of `SHARD` images. `about.json` beside them has the
`hash` of the table, the numbers of images, regions and phrases, the first sources, and what was left out and why. Needs
the extra `data`.

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

from sca.io.annotations.annotation import EXAMPLES, SkipCounter
from sca.io.annotations.shapes import fit_box
from sca.io.atomic import sync, write_file
from sca.io.cache import cache_folder
from sca.io.errors import InputError, OutputError
from sca.io.image_names import find_image, is_url
from sca.io.images import measure_image
from sca.io.masks import RLE, box_of

SCHEMA = 7  # of the tables and of what readers put into them; another one converts everything anew
SHARD = 2000  # images, with those that are left out
BAD_IMAGES = (
    *("image missing", "image is a URL", "image name ambiguous"),
    *("image unreadable", "image of another size", "image without data"),
    *("segments unreadable", "segments of another size"),
)  # see `max_bad`
BAD_IMAGE, BAD_REGION = "unusable image", "unusable region"  # of which nothing can be made
UNNAMED = "category without a name"


class ConvertedTable:
    """A table made from a publisher's files by a reader, which says which `_entries` they have and what `_record` each
    of them is.

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

    def __init__(self, split: str, images: Path, sources: Sequence[Path], max_bad: int, choice: str = ""):
        """`images`: the folder that file names are relative to; `sources`: the files that are read, the one that
        messages name first; `choice`: what else decides over the records.
        """
        self.split, self.images, self.max_bad = split, images, max_bad
        self.sources = list(sources)
        self._skip = SkipCounter()
        self.attributes: dict[str, tuple[str, ...]] = {}
        self.remarks: list[str] = []
        self._bad: dict[str, list[int] | None] = {}  # images that cannot be used, each with its file's stamp
        self._measured: dict[str, tuple[list[int], int, int]] = {}  # images without regions: stamp and size
        self._files: dict[int, str | None] = {}  # hash of a file's path -> its name, None if it is as written
        folders = {folder: os.path.realpath(folder) for folder in {source.parent for source in self.sources}}
        paths = [f"{folders[source.parent]}/{source.name}" for source in self.sources]
        described = [choice, os.path.realpath(images), *paths]
        asked = _digest(described)  # whatever state the files are in
        key = _digest([SCHEMA, asked, *map(_stamp, self.sources)])
        self._obtain(cache_folder().absolute() / "data" / f"{self.reader}-{asked}-{key}")
        self._stop_if_too_many()

    @property
    def skipped(self) -> Counter[str]:
        """How many were left out or changed, by reason."""
        return self._skip.skipped

    @property
    def examples(self) -> dict[str, list[str]]:
        """The first of each reason, by name."""
        return self._skip.examples

    # what readers say and use

    def _entries(self, bar: tqdm) -> Iterator[Any]:
        """What `_record` makes a row of, always in the same order, and cheap: a conversion that goes on runs through
        those that were done. May set `attributes` and `remarks`, count with `_skip`, and tell the bar how many there
        are in all.
        """
        raise NotImplementedError

    def _record(self, entry: Any) -> dict[str, Any] | None:
        """A row made by `_image` and filled by `_keep`; None where there is none, which was counted."""
        raise NotImplementedError

    def _path(self, name: str) -> Path:
        """Where the picture that a table calls `name` lies, or should. Raises InputError."""
        return find_image(name, [self.images])

    def _image(
        self, image_id: int, name: str, width: int, height: int, is_size_recorded: bool = True
    ) -> dict[str, Any]:
        stamp = None if is_size_recorded else self._stamp(name)
        return {"image_id": image_id, "file": name, "width": width, "height": height, "stamp": stamp, "regions": []}

    def _keep(
        self,
        image: dict[str, Any],
        identity: int,
        box: Sequence[float] | None,  # x1 y1 x2 y2, which may reach over the edges; None for that of the mask
        place: str,
        mask: RLE | None = None,  # of the image's size, not empty
        name: str | None = None,
        phrases: Sequence[str] = (),
        attributes: dict[str, Any] | None = None,
    ) -> None:
        """Puts a region into its image, or counts why it is left out."""
        box = box_of(mask) if box is None and mask else box
        assert box is not None
        clipped = fit_box(box, (image["width"], image["height"]), place, self._skip, mask)
        if clipped is None:
            return
        name, told = (name or "").strip() or None, [phrase for phrase in phrases if phrase]
        if not name and not told:
            return self._skip("region without text", place)
        for _ in range(len(phrases) - len(told)):
            self._skip("blank phrase", place)
        image["regions"].append(
            {
                "id": identity,
                "box": clipped,
                "mask": mask and mask["counts"],
                "name": name,
                "phrases": told,
                "attributes": json.dumps(attributes or {}),
            }
        )

    def _reject(self, problem: str | InputError) -> None:
        """Count a region whose record is unusable; the problem names file, record and field."""
        self._skip(BAD_REGION, str(problem))

    @contextmanager
    def _rejecting(self, reject: Callable[[InputError], None] | None = None) -> Iterator[None]:
        """Count the record that raises InputError in this block, by default as a region; the next one is read."""
        try:
            yield
        except ValueError as error:
            (reject or self._reject)(error)

    def _reject_image(self, problem: str | InputError) -> None:
        """Count an image whose record is unusable, as `_reject` does a region."""
        self._skip(BAD_IMAGE, str(problem))

    def _reject_category(self, problem: InputError) -> None:
        self._skip(UNNAMED, str(problem))

    def _rejects(self) -> dict[str, Callable[[InputError], None]]:
        """For each list of COCO's format what counts its unusable records."""
        return {
            "images": self._reject_image,
            "annotations": self._reject,
            "categories": self._reject_category,
        }

    def _skip_image(self, reason: str, name: str, what: str, stop: bool = True) -> None:
        """A picture met twice counts once. With `stop`, one too many is an InputError at once."""
        if name not in self._bad:
            self._bad[name] = self._stamp(name)
            self._skip(reason, what)
            if stop:
                self._stop_if_too_many()

    def _stop_if_too_many(self) -> None:
        images = len(self._bad) + self.skipped[BAD_IMAGE]
        if images > self.max_bad:
            raise InputError(
                f"{images} images of {self.sources[0]} cannot be used, more than max_bad={self.max_bad}; "
                f"{self._account()}. Are the pictures in {self.images} whole and the right ones?"
            )
        for reason, what in ((BAD_REGION, "regions"), (UNNAMED, "categories")):
            if self.skipped[reason] > self.max_bad:
                raise InputError(
                    f"{self.skipped[reason]} {what} of {self.sources[0]} cannot be used, more than "
                    f"max_bad={self.max_bad}; {self._account(reason)}. Correct them, or give a larger max_bad"
                )

    def _account(self, *reasons: str) -> str:
        reasons = reasons or (*BAD_IMAGES, BAD_IMAGE)
        found = {reason: self.examples[reason] for reason in reasons if self.skipped[reason]}
        return "; ".join(f"{reason}: {self.skipped[reason]}, such as {', '.join(e)}" for reason, e in found.items())

    # the store

    def _obtain(self, folder: Path) -> None:
        """Opens the table in `folder`, which one process makes if it is not there, and the others wait for."""
        try:
            import datasets  # noqa: F401
            from filelock import FileLock
        except ImportError as error:
            message = (
                f"{self.reader} needs `datasets` ({error}). Install it: pip install 'segment-caption-anything[data]'"
            )
            raise ImportError(message, name=error.name) from error
        if self._open(folder):
            return
        lock = FileLock(folder.with_name(f"{folder.name}.lock"))
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            held = lock.acquire()
        except OSError as error:
            raise OutputError(f"cannot write {folder}: {error.strerror or error}; SCA_CACHE names another") from error
        with held:
            if not self._open(folder):
                shutil.rmtree(folder, ignore_errors=True)  # out of date
                self._convert(folder)
                assert self._open(folder)

    def _open(self, folder: Path) -> bool:
        """Whether there is a table, and pictures that it lacks are still as they were; then it is opened."""
        from datasets import Dataset, concatenate_datasets

        about = self._about(folder)
        if about is None:
            return False
        self.about, self.hash = about, str(about["hash"])
        self._recall(about)
        shards = [Dataset.from_file(str(folder / _shard(number))) for number in range(about["shards"])]
        self._table = concatenate_datasets(shards)
        return True

    def _convert(self, folder: Path) -> None:
        """Makes the table in `folder`. What is whole when it is killed is in a hidden folder beside it, and is taken up
        there; a mistake in the sources leaves nothing.
        """
        draft = folder.with_name(f".{folder.name}")
        try:
            about = self._about(draft)
            if about is None:
                shutil.rmtree(draft, ignore_errors=True)
                draft.mkdir()
                about = {"sources": list(map(str, self.sources[:EXAMPLES])), "hash": "", "whole": False}
                about |= dict.fromkeys(("shards", "entries", "images", "regions", "captioned", "phrases"), 0)
                about["names"] = []
            if not about["whole"]:
                with tqdm(desc=self.reader, unit=" images", leave=False, disable=None) as bar:
                    self._write(draft, about, bar)
            os.rename(draft, folder)
        except OSError as error:
            raise OutputError(f"cannot write {folder}: {error.strerror or error}") from error
        except Exception:
            shutil.rmtree(draft, ignore_errors=True)
            raise
        alike = f"{folder.name.rpartition('-')[0]}-*"  # of the files as they were
        for old in (*folder.parent.glob(alike), *folder.parent.glob(f".{alike}")):
            if old != folder and old.is_dir():
                shutil.rmtree(old, ignore_errors=True)

    def _write(self, draft: Path, about: dict[str, Any], bar: tqdm) -> None:
        """Adds shards to those that `about` tells of, until there are no entries left."""
        from datasets import Dataset
        from datasets.arrow_writer import ArrowWriter

        entries = iter(self._entries(bar))
        for _ in itertools.islice(entries, about["entries"]):
            bar.update()
        if about["entries"]:
            self._recall(about)
            for number in range(about["shards"]):
                for name in Dataset.from_file(str(draft / _shard(number)))["file"]:
                    with suppress(InputError):
                        self._register(self._path(name), name)
        names = dict.fromkeys(about["names"])
        more = True
        while more:
            path, before = draft / _shard(about["shards"]), about["entries"]
            with ArrowWriter(features=_features(), path=str(path), writer_batch_size=500) as writer:
                for entry in itertools.islice(entries, SHARD):
                    about["entries"] += 1
                    if (record := self._row(entry)) is not None:
                        writer.write(record)
                        about["hash"] = hashlib.sha256(about["hash"].encode() + _logical(record)).hexdigest()
                        about["images"] += 1
                        about["regions"] += len(record["regions"])
                        about["captioned"] += sum(bool(region["phrases"]) for region in record["regions"])
                        names |= dict.fromkeys(region["name"] for region in record["regions"] if region["name"])
                        about["phrases"] += sum(len(region["phrases"]) for region in record["regions"])
                    bar.update()
                writer.finalize()
            more = about["entries"] - before == SHARD
            about |= {"shards": about["shards"] + 1, "skipped": self.skipped, "examples": self.examples}
            about |= {"attributes": self.attributes, "remarks": self.remarks, "names": list(names)}
            about |= {"bad": self._bad, "measured": self._measured, "whole": not more}
            sync(path)
            write_file(draft / "about.json", json.dumps(about, indent=1))
        self._files.clear()

    def _row(self, entry: Any) -> dict[str, Any] | None:
        """The row of an entry; None, and counted, where its record is unusable or has neither a file nor regions."""
        record = None
        with self._rejecting(self._reject_image):
            record = self._record(entry)
        if record is None:
            return None
        if self._find(record["file"]) is None:
            return None
        if not record["regions"]:
            if record["stamp"]:
                self._measured[record["file"]] = record["stamp"], record["width"], record["height"]
            return self._skip("image without regions", record["file"])
        return record

    def _find(self, name: str) -> Path | None:
        """The file of an image; None, and counted, where the name leads to none, or to one that another name has."""
        try:
            path = self._path(name)
        except InputError as error:
            reason = "image is a URL" if is_url(name) else "image name ambiguous"
            return self._skip_image(reason, name, str(error), stop=False)
        if not os.path.isfile(path):
            return self._skip_image("image missing", name, name, stop=False)
        if (other := self._register(path, name)) is not None:
            told = f"{name!r} and {other!r} both lead to {path}; write paths relative to {self.images}"
            return self._skip_image("image name ambiguous", name, told, stop=False)
        return path

    def _register(self, path: Path, name: str) -> str | None:
        """Note the name of a file, and return another name of the same file that one of the two must be mistaken for.

        Names that exist as they are written are no mistake: they may be links to one file.
        """
        written = None if path == self.images / name else name
        other = self._files.setdefault(hash(os.path.realpath(path)), written)
        if other == written:
            return None
        return other or os.path.relpath(path, self.images)

    def _stamp(self, name: str) -> list[int] | None:
        try:
            return _stamp(self._path(name))
        except InputError:
            return None

    def _about(self, folder: Path) -> dict[str, Any] | None:
        """What is known of a table or of the beginning of one, if there is one that is up to date."""
        try:
            about = json.loads((folder / "about.json").read_text("utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            return None
        return about if self._is_current(folder, about) else None

    def _is_current(self, folder: Path, about: dict[str, Any]) -> bool:
        """Whether images that could not be used are unchanged, and measured ones have the size that they had."""
        from datasets import Dataset

        if any(self._stamp(name) != stamp for name, stamp in about["bad"].items()):
            return False
        if not all(self._has_size(name, *measured) for name, measured in about["measured"].items()):
            return False
        for number in range(about["shards"]):
            shard = Dataset.from_file(str(folder / _shard(number))).data
            if shard["stamp"].null_count < len(shard):
                columns = (shard[name].to_pylist() for name in ("file", "stamp", "width", "height"))
                if not all(self._has_size(*row) for row in zip(*columns, strict=True)):
                    return False
        return True

    def _has_size(self, name: str, stamp: list[int] | None, width: int, height: int) -> bool:
        """Whether an image file still has the size that was measured; True if it was not measured, or is gone."""
        if stamp is None or self._stamp(name) in (stamp, None):
            return True
        with suppress(InputError):  # which is counted when it is read
            return measure_image(self._path(name)) == (width, height)
        return True

    def _recall(self, about: dict[str, Any]) -> None:
        """Takes over what was counted."""
        self._skip, self._bad = SkipCounter(about["skipped"], about["examples"]), about["bad"]
        self.attributes = {name: tuple(values) for name, values in about["attributes"].items()}
        self.remarks, self._measured = about["remarks"], about["measured"]


def _features() -> Any:
    from datasets import Features, List, Value

    integer, text = Value("int64"), Value("string")
    region = {"id": integer, "box": List(Value("float64"), length=4), "mask": text, "name": text}
    region |= {"phrases": List(text), "attributes": text}
    sides = {"width": Value("int32"), "height": Value("int32"), "stamp": List(integer)}
    return Features({"image_id": integer, "file": text, **sides, "regions": List(region)})


def _shard(number: int) -> str:
    return f"table-{number:05d}.arrow"


def _logical(record: dict[str, Any]) -> bytes:
    """A line that says what a row says, whatever its file is called and wherever it lies."""
    regions = [list(region.values()) for region in record["regions"]]
    return json.dumps([record["image_id"], record["width"], record["height"], regions]).encode() + b"\n"


def _digest(told: Any) -> str:
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]


def _stamp(path: Path) -> list[int] | None:
    """What tells that a file was changed: its size and time; None if it is not there."""
    try:
        found = path.stat()
    except (OSError, ValueError):  # the latter for a name that no file can have
        return None
    return [found.st_size, found.st_mtime_ns]
