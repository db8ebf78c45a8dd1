"""Many images, a shard at a time, each in a process of its own, wherever a launcher has room.

A shard is a WebDataset (a .tar of images), or a number of the images that were named. Each has a file of JSON lines in
the run folder: `shard-00000.jsonl`, or `NAME.jsonl` for `NAME.tar`. A shard that `shards.journal` lists is not
captioned again; the problems of its images are in the journal.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import tarfile
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

from sca_registry.contracts import Launcher

import sca.inference.factory  # noqa: F401 (what shards are forked from has imported it)
from sca.inference.batch import IMAGE, PROMPTS, BatchCaptioner, Failure
from sca.inference.job import CaptionJob, ListedPrompts, RegionSource
from sca.io.atomic import write_file
from sca.io.images import SUFFIXES, show
from sca.io.journal import Journal, read_journal
from sca.io.json import open_regular_file
from sca.io.output_patterns import exact_pattern
from sca.io.run_folder import RunFolder
from sca.io.text import describe_error
from sca.launchers.task import Task
from sca.output.jsonl import Jsonl, Stream

KIND = "caption --launcher"
JOURNAL = "shards.journal"
PATTERNS = (JOURNAL, "*.jsonl")  # `shards.journal`, and a file per shard
NAME_ERRORS = (errno.ENAMETOOLONG, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.EILSEQ)  # of a file name

Content = Mapping[str, Any]
Problem = tuple[str, str]  # one line, and IMAGE or PROMPTS


class ShardResult(NamedTuple):
    """What became of a shard."""

    name: str
    path: Path | None  # of its captions; None if it failed
    problems: Sequence[Problem]  # of images, or regions of one, that are not captioned
    reason: str = ""  # why it failed


@contextmanager
def open_run(
    folder: Path,
    shards: Mapping[str, Content],
    settings: Mapping[str, Any],
    inputs: Iterable[str | Path],
    overwrite: bool = False,
) -> Iterator[ShardedRun]:
    """Open the run folder of shards, locked against other processes.

    As long as the finished shards are of the same images, there may be others than before: more images, or an archive
    that could not be read and has been repaired.

    Args:
        folder: The run folder.
        shards: What `name_shards` returned.
        settings: What determines the captions, and the names of the images.
        inputs: Files that the run reads.
        overwrite: Caption every shard again.

    Raises:
        OutputError: The folder must not be written.
        ValueError: The journal is damaged.
    """
    contents = {name: _fingerprint(content) for name, content in shards.items()}
    with RunFolder(folder, KIND, PATTERNS) as run_folder:
        yield ShardedRun(run_folder, shards, contents, begin_run(run_folder, settings, contents, inputs, overwrite))


class ShardedRun:
    """The shards of a run, by name: `shards` to caption, and those `finished` with the problems of their images."""

    def __init__(
        self,
        folder: RunFolder,
        shards: Mapping[str, Content],
        contents: Mapping[str, str],
        finished: dict[str, Sequence[Problem]],
    ):
        self.shards, self.finished = shards, finished
        self._folder, self._contents = folder, contents

    @property
    def missing(self) -> list[str]:
        """Names of the shards that are not finished."""
        return [name for name in self.shards if name not in self.finished]

    def caption(self, job: CaptionJob, launcher: Launcher, regions: RegionSource) -> Iterator[ShardResult]:
        """Caption the missing shards and yield each as it ends.

        Args:
            job: What to caption in each image, and how.
            launcher: Where the processes run.
            regions: What `job.read_regions` returned, after `match` with the images of all shards; those of an archive
                are matched by themselves.
        """
        folder, plain = self._folder.path, asdict(job)
        keys = regions.keys if isinstance(regions, ListedPrompts) else {}
        with Journal(folder / JOURNAL) as journal, tempfile.TemporaryDirectory(prefix="sca-") as logs:
            tasks = [
                Task(
                    name,
                    "sca.inference.shards:caption_shard",
                    {
                        "job": plain,
                        "content": content,
                        "keys": {path: keys[Path(path)] for path in content.get("images", ()) if Path(path) in keys},
                        "folder": os.getcwd(),
                        "device": job.device,
                    },
                    str(Path(logs, name)),
                    timeout=float("inf"),
                    gpus=int(job.device.startswith("cuda")),
                )
                for name, content in self.shards.items()
                if name not in self.finished
            ]
            ended = set()
            for task, made in launcher.map(tasks):
                ended.add(task.key)
                if made["state"] != "done":
                    yield ShardResult(task.key, None, (), f"{made['state']}: {made['reason']}")
                    continue
                path, problems = folder / f"{task.key}.jsonl", made["problems"]
                write_file(path, made["captions"].encode())
                journal.append({"shard": task.key, "content": self._contents[task.key], "problems": problems})
                self.finished[task.key] = problems
                yield ShardResult(task.key, path, problems)
        killed = "its process was killed each time; if memory ran out, use fewer workers or smaller batches"
        yield from (ShardResult(name, None, (), killed) for name in sorted({*self.missing} - ended))
        if not self.missing:
            self._folder.finish()


def caption_shard(config: Mapping[str, Any], folder: str) -> dict[str, Any]:
    """Caption one shard: the job of a launcher.

    Args:
        config: The fields of a `CaptionJob`, the content of the shard, what a prompts file calls its images, the
            working folder and the device.
        folder: Of the task; nothing is written there.

    Returns:
        The state, and the lines with the captions and the problems, or the reason of a failure.
    """
    if Path(config["folder"]).is_dir():
        os.chdir(config["folder"])
    job, content = replace(CaptionJob(**config["job"]), device=config["device"]), config["content"]
    text = io.StringIO()
    with tempfile.TemporaryDirectory(prefix="sca-") as unpacked:
        try:
            named, unusable = _unpack(content["tar"], unpacked) if "tar" in content else (content["images"], [])
            problems = [(line, IMAGE) for line in unusable]
            keys = None if "tar" in content else {Path(path): key for path, key in config["keys"].items()}
            problems += _caption(job, [Path(name) for name in named], keys, text) if named else []
        except (ValueError, OSError) as error:
            return {"state": "failed", "reason": describe_error(error)}
        captions = text.getvalue()
        if "tar" in content:
            captions = captions.replace(json.dumps(f"{unpacked}/")[:-1], json.dumps(f"{content['tar']}/")[:-1])
            problems = [(line.replace(f"{unpacked}/", f"{content['tar']}/"), kind) for line, kind in problems]
    if not captions and any(kind == PROMPTS for _, kind in problems):
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        return {"state": "failed", "reason": f"{problems[0][0]}{more}"}
    return {"state": "done", "reason": "", "captions": captions, "problems": problems}


def _caption(
    job: CaptionJob, paths: Sequence[Path], keys: Mapping[Path, str] | None, text: io.StringIO
) -> list[Problem]:
    """Write the captions of images as JSON lines; return the problems."""
    regions = job.read_regions()
    if isinstance(regions, ListedPrompts) and keys is not None:
        regions.keys = keys
    else:
        regions.match(paths)
    writer, problems = Jsonl(Stream(text), job.model), list[Problem]()
    for result in BatchCaptioner(job, regions).caption(paths):
        if isinstance(result, Failure):
            problems.append((result.reason, result.kind))
        else:
            writer.add(str(result.path), result.image, result.captions)
    writer.close()
    return problems


def name_shards(archives: Iterable[str], paths: Sequence[Path], size: int) -> dict[str, Content]:
    """Name the shards: archives by their files, other images by numbers that no archive has."""
    named: dict[str, str] = {}
    for archive in sorted(archives):
        name = Path(archive).stem
        if name in named:
            raise ValueError(f"{archive} and {named[name]} would both be {name}.jsonl: caption them into two folders")
        named[name] = archive
    shards: dict[str, Content] = {name: {"tar": os.path.abspath(archive)} for name, archive in named.items()}
    free = (name for number in count() if (name := f"shard-{number:05d}") not in named)
    for start in range(0, len(paths), size):
        shards[next(free)] = {"images": [str(path) for path in paths[start : start + size]]}
    return shards


def _fingerprint(content: Content) -> str:
    """Return a digest of the names of a shard's images, or of the path, size and modification time of its archive.

    Archives are too large to be read once more for a hash of their content.
    """
    state = None
    if "tar" in content and os.path.exists(content["tar"]):
        found = os.stat(content["tar"])
        state = [found.st_size, found.st_mtime_ns]
    return hashlib.sha256(json.dumps([content, state]).encode()).hexdigest()[:16]


def begin_run(
    folder: RunFolder,
    settings: Mapping[str, Any],
    contents: Mapping[str, str],
    inputs: Iterable[str | Path],
    overwrite: bool,
) -> dict[str, Sequence[Problem]]:
    """Begin a run of shards in its folder.

    Args:
        folder: The locked folder.
        settings: What determines the captions, and the names of the images.
        contents: The fingerprint of each shard.
        inputs: Files that the command reads.
        overwrite: Make every shard again.

    Returns:
        The finished shards by name, with the problems of their images.

    Raises:
        OutputError: The folder must not be written.
        ValueError: The journal is damaged.
    """
    entries = list(read_journal(folder.path / JOURNAL)) if folder.run and not overwrite else []
    done = {str(entry.get("shard")): entry.get("content") for entry in entries}
    problems = {str(entry.get("shard")): _read_problems(entry.get("problems")) for entry in entries}
    loose = ("images", "shards") if not overwrite and done.items() <= contents.items() else ()
    outputs = [JOURNAL, *map(_output, contents)]
    folder.begin({**settings, "shards": contents}, outputs, inputs, overwrite=overwrite, loose=loose)
    kept = set() if overwrite else {JOURNAL, *map(_output, done)}
    folder.delete_outputs(set(folder.run.outputs if folder.run else ()) - kept)
    return {name: problems[name] for name in done if (folder.path / f"{name}.jsonl").is_file()}


def _read_problems(listed: Any) -> list[Problem]:
    """Read the problems of a line of the journal."""
    pairs = listed if isinstance(listed, list) else []
    return [(str(line), kind) for line, kind in filter(_is_pair, pairs) if kind in (IMAGE, PROMPTS)]


def _is_pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2


def _output(name: str) -> str:
    """The pattern of the file of a shard."""
    return exact_pattern(f"{name}.jsonl")


def _unpack(archive: str, folder: str) -> tuple[list[str], list[str]]:
    """Extract the images of an archive; return their paths, all inside the folder, and a line for each that is not.

    Raises:
        ValueError: If the archive cannot be read or unpacked, or contains no images.
    """
    paths, problems = [], []
    try:
        with open_regular_file(archive) as file, tarfile.open(fileobj=file) as tar:
            for member in tar:
                if not member.isfile() or Path(member.name).suffix.lower() not in SUFFIXES:
                    continue
                try:
                    inside = tarfile.data_filter(member, folder)
                    tar.extract(inside, folder, filter="data")
                except (tarfile.FilterError, OSError, ValueError) as error:
                    if isinstance(error, OSError) and error.errno not in NAME_ERRORS:  # such as a full disk
                        raise ValueError(f"cannot unpack {show(archive)}: {error.strerror or error}") from error
                    reason = " ".join(str(error).split())
                    problems.append(f"{show(member.name)} of {show(archive)} cannot be unpacked ({reason}); rename it")
                else:
                    paths.append(str(Path(folder, inside.name)))
    except (OSError, tarfile.TarError) as error:
        raise ValueError(f"cannot read {show(archive)}: {error}") from error
    if not paths and not problems:
        raise ValueError(f"{show(archive)} contains no images; looked for {' '.join(SUFFIXES)}")
    return paths, problems
