"""Sharded captioning: each shard of images is captioned in its own process by a launcher.

A shard is a WebDataset (a .tar of images) or a fixed number of image files. Each writes a JSON Lines file to the run
folder: `shard-00000.jsonl`, or `NAME.jsonl` for `NAME.tar`. The journal `shards.journal` lists the finished shards,
which a resumed run skips, and the problems of their images.
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

# preloaded in the fork server of the shards, with transformers, which most models need
import sca.inference.factory
import sca.language_models.hf  # noqa: F401
from sca.inference.batch import UNUSABLE_IMAGE, UNUSABLE_PROMPTS, BatchCaptioner, Failure
from sca.inference.caption_job import CaptionJob, ListedPrompts, RegionSource
from sca.io.atomic import write_file
from sca.io.images import IMAGE_SUFFIXES, format_path
from sca.io.journal import Journal, read_journal
from sca.io.json import open_regular_file
from sca.io.output_patterns import make_exact_pattern
from sca.io.run_folder import RunFolder
from sca.io.text import describe_error
from sca.launchers.task import Task
from sca.output.jsonl import JsonlWriter, StreamSink

RUN_KIND = "caption --launcher"
JOURNAL_NAME = "shards.journal"
OUTPUT_PATTERNS = (JOURNAL_NAME, "*.jsonl")
FILE_NAME_ERRORS = (errno.ENAMETOOLONG, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.EILSEQ)  # unusable file names

ShardContent = Mapping[str, Any]
ImageProblem = tuple[str, str]  # message of one line, and UNUSABLE_IMAGE or UNUSABLE_PROMPTS


class ShardResult(NamedTuple):
    """Result of a shard.

    Attributes:
        name: Name of the shard.
        path: File of its captions; None if it failed.
        problems: Images and regions that are not captioned.
        reason: Reason of the failure.
    """

    name: str
    path: Path | None
    problems: Sequence[ImageProblem]
    reason: str = ""


@contextmanager
def open_sharded_run(
    folder: Path,
    shards: Mapping[str, ShardContent],
    settings: Mapping[str, Any],
    inputs: Iterable[str | Path],
    overwrite: bool = False,
) -> Iterator[ShardedRun]:
    """Open and lock the run folder of shards, for use in a `with` statement.

    A run resumes if its finished shards contain the same images. Other shards can differ: images were added, or an
    unreadable archive was repaired.

    Args:
        folder: Run folder.
        shards: Result of `name_shards`.
        settings: Settings that determine the captions, and the image names.
        inputs: Files that the run reads.
        overwrite: Caption every shard again.

    Yields:
        The run.

    Raises:
        OutputError: The folder cannot be written, or contains a different run.
        ValueError: The journal is damaged.
    """
    fingerprints = {name: _compute_fingerprint(content) for name, content in shards.items()}
    with RunFolder(folder, RUN_KIND, OUTPUT_PATTERNS) as run_folder:
        yield ShardedRun(
            run_folder, shards, fingerprints, begin_sharded_run(run_folder, settings, fingerprints, inputs, overwrite)
        )


class ShardedRun:
    """Run of shards, opened by `open_sharded_run`.

    Args:
        folder: Run folder, locked by this process.
        shards: Content of all shards by name.
        fingerprints: Fingerprint of each shard by name.
        finished: Finished shards by name, with the problems of their images.

    Attributes:
        shards: Content of all shards by name.
        finished: Finished shards by name, with the problems of their images.
    """

    def __init__(
        self,
        folder: RunFolder,
        shards: Mapping[str, ShardContent],
        fingerprints: Mapping[str, str],
        finished: dict[str, Sequence[ImageProblem]],
    ):
        self.shards: Mapping[str, ShardContent] = shards
        self.finished: dict[str, Sequence[ImageProblem]] = finished
        self._folder, self._fingerprints = folder, fingerprints

    @property
    def missing_names(self) -> list[str]:
        """Names of the shards that are not finished."""
        return [name for name in self.shards if name not in self.finished]

    def caption_shards(self, job: CaptionJob, launcher: Launcher, region_source: RegionSource) -> Iterator[ShardResult]:
        """Caption the shards that are not finished.

        Args:
            job: Model, regions and options.
            launcher: Launcher of the processes.
            region_source: Result of `job.read_region_source`, after `match_images` with the images of all shards.
                Images in archives are matched separately.

        Yields:
            The result of each shard when it ends.
        """
        folder, job_fields = self._folder.path, asdict(job)
        image_keys = region_source.image_keys if isinstance(region_source, ListedPrompts) else {}
        with Journal(folder / JOURNAL_NAME) as journal, tempfile.TemporaryDirectory(prefix="sca-") as log_folder:
            tasks = [
                Task(
                    name,
                    "sca.inference.shards:caption_shard",
                    {
                        "job": job_fields,
                        "content": content,
                        "keys": {
                            path: image_keys[Path(path)]
                            for path in content.get("images", ())
                            if Path(path) in image_keys
                        },
                        "folder": os.getcwd(),
                        "device": job.device,
                    },
                    str(Path(log_folder, name)),
                    timeout=float("inf"),
                    num_gpus=int(job.device.startswith("cuda")),
                )
                for name, content in self.shards.items()
                if name not in self.finished
            ]
            ended_names = set()
            for task, result in launcher.run_tasks(tasks):
                ended_names.add(task.key)
                if result["state"] != "done":
                    yield ShardResult(task.key, None, (), f"{result['state']}: {result['reason']}")
                    continue
                path, problems = folder / f"{task.key}.jsonl", result["problems"]
                write_file(path, result["captions"].encode())
                journal.append({"shard": task.key, "content": self._fingerprints[task.key], "problems": problems})
                self.finished[task.key] = problems
                yield ShardResult(task.key, path, problems)
        killed_reason = "its process was killed repeatedly; if memory ran out, use fewer workers or smaller batches"
        yield from (ShardResult(name, None, (), killed_reason) for name in sorted({*self.missing_names} - ended_names))
        if not self.missing_names:
            self._folder.finish()


def caption_shard(config: Mapping[str, Any], folder: str) -> dict[str, Any]:
    """Caption one shard; the function that a launcher runs.

    Args:
        config: Table with `job` (fields of a `CaptionJob`), `content` (of the shard), `keys` (names of the images in
            the prompts file), `folder` (current directory) and `device`.
        folder: Folder of the task, unused.

    Returns:
        A dict with `state`, `reason`, and for state "done" `captions` (JSON Lines) and `problems`.
    """
    if Path(config["folder"]).is_dir():
        os.chdir(config["folder"])
    job, content = replace(CaptionJob(**config["job"]), device=config["device"]), config["content"]
    text = io.StringIO()
    with tempfile.TemporaryDirectory(prefix="sca-") as unpack_folder:
        try:
            image_paths, unpack_problems = (
                _unpack_images(content["tar"], unpack_folder) if "tar" in content else (content["images"], [])
            )
            problems = [(line, UNUSABLE_IMAGE) for line in unpack_problems]
            keys = None if "tar" in content else {Path(path): key for path, key in config["keys"].items()}
            problems += _write_captions(job, [Path(name) for name in image_paths], keys, text) if image_paths else []
        except (ValueError, OSError) as error:
            return {"state": "failed", "reason": describe_error(error)}
        captions = text.getvalue()
        if "tar" in content:
            captions = captions.replace(json.dumps(f"{unpack_folder}/")[:-1], json.dumps(f"{content['tar']}/")[:-1])
            problems = [(line.replace(f"{unpack_folder}/", f"{content['tar']}/"), kind) for line, kind in problems]
    if not captions and any(kind == UNUSABLE_PROMPTS for _, kind in problems):
        remaining_count = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        return {"state": "failed", "reason": f"{problems[0][0]}{remaining_count}"}
    return {"state": "done", "reason": "", "captions": captions, "problems": problems}


def _write_captions(
    job: CaptionJob, paths: Sequence[Path], image_keys: Mapping[Path, str] | None, stream: io.StringIO
) -> list[ImageProblem]:
    """Write the captions of images as JSON lines; return the problems."""
    region_source = job.read_region_source()
    if isinstance(region_source, ListedPrompts) and image_keys is not None:
        region_source.image_keys = image_keys
    else:
        region_source.match_images(paths)
    writer, problems = JsonlWriter(StreamSink(stream), job.model), list[ImageProblem]()
    for result in BatchCaptioner(job, region_source).iter_results(paths):
        if isinstance(result, Failure):
            problems.append((result.reason, result.kind))
        else:
            writer.add(str(result.path), result.image, result.captions)
    writer.close()
    return problems


def name_shards(archives: Iterable[str], paths: Sequence[Path], size: int) -> dict[str, ShardContent]:
    """Split the images of a run into named shards.

    Args:
        archives: WebDataset archives; each is a shard with the name of its file.
        paths: Image files, in shards named "shard-00000" and so on. Names of archives are skipped.
        size: Image files per shard.

    Returns:
        The content of each shard by name: {"tar": path} or {"images": [path, ...]}.

    Raises:
        ValueError: Two archives have the same name.
    """
    archives_by_name: dict[str, str] = {}
    for archive in sorted(archives):
        name = Path(archive).stem
        if name in archives_by_name:
            raise ValueError(
                f"{archive} and {archives_by_name[name]} would both be written to {name}.jsonl; use two output folders"
            )
        archives_by_name[name] = archive
    shards: dict[str, ShardContent] = {
        name: {"tar": os.path.abspath(archive)} for name, archive in archives_by_name.items()
    }
    free_names = (name for number in count() if (name := f"shard-{number:05d}") not in archives_by_name)
    for start in range(0, len(paths), size):
        shards[next(free_names)] = {"images": [str(path) for path in paths[start : start + size]]}
    return shards


def _compute_fingerprint(content: ShardContent) -> str:
    """Hash the paths of the images of a shard, or the path, size and modification time of its archive.

    Archives are too large to hash their content.
    """
    file_state = None
    if "tar" in content and os.path.exists(content["tar"]):
        file_stat = os.stat(content["tar"])
        file_state = [file_stat.st_size, file_stat.st_mtime_ns]
    return hashlib.sha256(json.dumps([content, file_state]).encode()).hexdigest()[:16]


def begin_sharded_run(
    folder: RunFolder,
    settings: Mapping[str, Any],
    fingerprints: Mapping[str, str],
    inputs: Iterable[str | Path],
    overwrite: bool,
) -> dict[str, Sequence[ImageProblem]]:
    """Begin or resume a run of shards in its folder.

    Args:
        folder: Locked run folder.
        settings: Settings that determine the captions, and the image names.
        fingerprints: Fingerprint of each shard.
        inputs: Files that the run reads.
        overwrite: Caption every shard again.

    Returns:
        The finished shards by name, with the problems of their images.

    Raises:
        OutputError: The folder cannot be written, or contains a different run.
        ValueError: The journal is damaged.
    """
    entries = list(read_journal(folder.path / JOURNAL_NAME)) if folder.last_run and not overwrite else []
    finished = {str(entry.get("shard")): entry.get("content") for entry in entries}
    problems = {str(entry.get("shard")): _parse_problems(entry.get("problems")) for entry in entries}
    loose_settings = ("images", "shards") if not overwrite and finished.items() <= fingerprints.items() else ()
    outputs = [JOURNAL_NAME, *map(_make_output_pattern, fingerprints)]
    folder.begin_run(
        {**settings, "shards": fingerprints}, outputs, inputs, overwrite=overwrite, ignored_settings=loose_settings
    )
    kept_outputs = set() if overwrite else {JOURNAL_NAME, *map(_make_output_pattern, finished)}
    folder.delete_outputs(set(folder.last_run.outputs if folder.last_run else ()) - kept_outputs)
    return {name: problems[name] for name in finished if (folder.path / f"{name}.jsonl").is_file()}


def _parse_problems(value: Any) -> list[ImageProblem]:
    """Parse the problems of a journal entry, and ignore malformed ones."""
    pairs = value if isinstance(value, list) else []
    return [(str(line), kind) for line, kind in filter(_is_pair, pairs) if kind in (UNUSABLE_IMAGE, UNUSABLE_PROMPTS)]


def _is_pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2


def _make_output_pattern(name: str) -> str:
    return make_exact_pattern(f"{name}.jsonl")


def _unpack_images(archive: str, folder: str) -> tuple[list[str], list[str]]:
    """Extract the images of an archive; return their paths, and a line for each image that cannot be extracted."""
    paths, problems = [], []
    try:
        with open_regular_file(archive) as file, tarfile.open(fileobj=file) as tar:
            for member in tar:
                if not member.isfile() or Path(member.name).suffix.lower() not in IMAGE_SUFFIXES:
                    continue
                try:
                    safe_member = tarfile.data_filter(member, folder)
                    tar.extract(safe_member, folder, filter="data")
                except (tarfile.FilterError, OSError, ValueError) as error:
                    if isinstance(error, OSError) and error.errno not in FILE_NAME_ERRORS:  # such as disk full
                        raise ValueError(f"cannot unpack {format_path(archive)}: {error.strerror or error}") from error
                    reason = " ".join(str(error).split())
                    problems.append(
                        f"{format_path(member.name)} of {format_path(archive)} cannot be unpacked ({reason}); rename it"
                    )
                else:
                    paths.append(str(Path(folder, safe_member.name)))
    except (OSError, tarfile.TarError) as error:
        raise ValueError(f"cannot read {format_path(archive)}: {error}") from error
    if not paths and not problems:
        raise ValueError(f"{format_path(archive)} contains no images; looked for {' '.join(IMAGE_SUFFIXES)}")
    return paths, problems
