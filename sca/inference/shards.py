"""Many pictures, a shard at a time: `sca caption --launcher NAME`.

A shard is a WebDataset (a .tar of pictures), or so many pictures of those that were named. Each is captioned by the
same command in a process of its own, wherever the launcher has room, and has a file of JSON lines of its own in --out:
`shard-00000.jsonl`, or `NAME.jsonl` for `NAME.tar`. A shard that `shards.journal` lists is not made again; the problems
of its images are in the journal, and are reported each time.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tarfile
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sca.inference.factory  # noqa: F401 (what shards are forked from has it imported)

if TYPE_CHECKING:
    from sca.io.run_folder import RunFolder

KIND = "caption --launcher"
JOURNAL = "shards.journal"
PATTERNS = (JOURNAL, "*.jsonl")  # `shards.journal`, and a file per shard
OURS = ("images", "out", "format", "launcher", "shard", "quiet", "context", "resume", "overwrite")  # not of a shard
NAME_ERRORS = (errno.ENAMETOOLONG, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.EILSEQ)  # of a file name

Content = Mapping[str, Any]


def caption_shards(
    archives: Sequence[str],
    paths: Sequence[Path],
    params: Mapping[str, Any],
    settings: Mapping[str, Any],
    read: Sequence[str | Path],
) -> int:
    """Caption archives and images in shards.

    Args:
        archives: .tar files, a shard each.
        paths: Other images.
        params: The options of `sca caption`, by their names in Python.
        settings: What determines the captions of an image.
        read: Files that say what is asked of the images.

    Returns:
        The exit status: 1 if something could not be captioned.

    Raises:
        RunFolderError: The folder must not be written.
        ValueError: The launcher is unknown, or two archives have the same name.
    """
    import sca_registry
    from sca_registry.spec import Part

    from sca.cli.options import complain
    from sca.io.atomic import write_file
    from sca.io.journal import Journal
    from sca.io.run_folder import RunFolder
    from sca.launchers.task import Task

    part = Part.parse(params["launcher"], "--launcher", "launchers")
    where = sca_registry.launchers.build(part.name, **part.options)
    shards = _shards(archives, paths, params["shard"])
    contents = {name: _fingerprint(content) for name, content in shards.items()}
    folder, quiet, flags = Path(params["out"]), params["quiet"], _flags(params)
    device = params.get("device") or "cpu"
    status = 0
    with RunFolder(folder, KIND, PATTERNS) as run_folder, tempfile.TemporaryDirectory(prefix="sca-") as logs:
        settings = {"images": params["images"], **settings}
        inputs = [*archives, *paths, *read]
        done = _begin(run_folder, settings, contents, inputs, params["overwrite"])
        missing = [name for name in shards if name not in done]
        if done and not quiet:
            complain(f"{len(shards) - len(missing)} of {len(shards)} shards are there already")
        for name, problems in done.items():
            status = max(status, _report(name, problems))
        if status:
            complain("to caption them once they are repaired, choose another --out, or start over with --overwrite")
        tasks = [
            Task(
                name,
                "sca.inference.shards:caption_shard",
                {"flags": flags, "content": shards[name], "folder": os.getcwd(), "device": device},
                str(Path(logs, name)),
                timeout=float("inf"),
                gpus=int(device.startswith("cuda")),
            )
            for name in missing
        ]
        left, ended = set(missing), set()
        with Journal(folder / JOURNAL) as journal:
            for number, (task, made) in enumerate(where.map(tasks), 1):
                ended.add(task.key)
                if made["state"] != "done":
                    complain(f"{task.key}: {made['state']}: {made['reason']}")
                    status = 1
                    continue
                write_file(folder / f"{task.key}.jsonl", made["captions"].encode())
                problems = made["problems"]
                journal.append({"shard": task.key, "content": contents[task.key], "problems": problems})
                left.remove(task.key)
                status = max(status, _report(task.key, problems))
                if not quiet:
                    complain(f"{number} of {len(tasks)}: wrote {folder / task.key}.jsonl")
        if not left:
            run_folder.finish()
    for name in sorted(left - ended):
        complain(f"{name}: its process was killed each time; if memory ran out, use fewer workers or a smaller --batch")
    if left:
        complain(f"{len(left)} shards are missing: the same command goes on with them")
    return 1 if left else status


def _report(shard: str, problems: Sequence[str]) -> int:
    """Report the problems of a shard's images; return the exit status."""
    from sca.cli.options import complain

    for line in problems:
        complain(f"{shard}: {line}")
    return 1 if problems else 0


def caption_shard(config: Mapping[str, Any], folder: str) -> dict[str, Any]:
    """The job of one shard: captions it as the command line does, and gives the lines."""
    import contextlib
    import io

    from sca.cli import run
    from sca.output.journal import NAME

    if Path(config["folder"]).is_dir():
        os.chdir(config["folder"])
    flags = list(config["flags"])
    if str(config["device"]).startswith("cuda"):  # the launcher has chosen one
        flags.append(f"--device={config['device']}")
    content, made = config["content"], Path(folder, "captions")
    shutil.rmtree(made, ignore_errors=True)  # of a process that was killed
    said = io.StringIO()
    with tempfile.TemporaryDirectory(prefix="sca-") as unpacked, contextlib.redirect_stderr(said):
        try:
            named, problems = _unpack(content["tar"], unpacked) if "tar" in content else (content["images"], [])
        except ValueError as error:
            return {"state": "failed", "reason": str(error)}
        options = [*flags, f"--out={made}", "--quiet"]
        status = run(["caption", *options, "--", *named], exact_images=True) if named else 0
        lines = made / "captions.jsonl"
        finished = lines.is_file() and not (made / NAME).exists()  # also where some prompts could not be used
        captions = lines.read_text("utf-8") if lines.is_file() else ""
        if "tar" in content:
            captions = captions.replace(json.dumps(f"{unpacked}/")[:-1], json.dumps(f"{content['tar']}/")[:-1])
            said = io.StringIO(said.getvalue().replace(f"{unpacked}/", f"{content['tar']}/"))
    problems += [line.removeprefix("sca: ") for line in said.getvalue().splitlines()]
    if status not in (0, 1) and not finished:
        return {"state": "failed", "reason": "; ".join(problems) or f"exit status {status}"}
    return {"state": "done", "reason": "", "captions": captions, "problems": problems}


def _shards(archives: Iterable[str], paths: Sequence[Path], size: int) -> dict[str, Content]:
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


def _begin(
    folder: RunFolder,
    settings: Mapping[str, Any],
    contents: Mapping[str, str],
    inputs: Iterable[str | Path],
    overwrite: bool,
) -> dict[str, Sequence[str]]:
    """Begin a run of shards in its folder.

    As long as the finished shards are of the same images, there may be others than before: more images, or an archive
    that could not be read and has been repaired.

    Args:
        folder: The locked folder.
        settings: What determines the captions, and the names of the images.
        contents: The fingerprint of each shard.
        inputs: Files that the command reads.
        overwrite: Make every shard again.

    Returns:
        The finished shards by name, with the problems of their images.

    Raises:
        RunFolderError: The folder must not be written.
        ValueError: The journal is damaged.
    """
    from sca.io.journal import read_journal

    entries = list(read_journal(folder.path / JOURNAL)) if folder.run and not overwrite else []
    done = {str(entry.get("shard")): entry.get("content") for entry in entries}
    problems = {str(entry.get("shard")): list(map(str, entry.get("problems") or ())) for entry in entries}
    loose = ("images", "shards") if not overwrite and done.items() <= contents.items() else ()
    outputs = [JOURNAL, *map(_output, contents)]
    folder.begin({**settings, "shards": contents}, outputs, inputs, overwrite=overwrite, loose=loose)
    kept = set() if overwrite else {JOURNAL, *map(_output, done)}
    folder.delete_outputs(set(folder.run.outputs if folder.run else ()) - kept)
    return {name: problems[name] for name in done if (folder.path / f"{name}.jsonl").is_file()}


def _output(name: str) -> str:
    """The pattern of the file of a shard."""
    from sca.io.run_folder import exact_pattern

    return exact_pattern(f"{name}.jsonl")


def _unpack(archive: str, folder: str) -> tuple[list[str], list[str]]:
    """Extract the images of an archive; return their paths, all inside the folder, and a line for each that is not.

    Raises:
        ValueError: If the archive cannot be read or unpacked, or contains no images.
    """
    from sca.io.images import SUFFIXES, show
    from sca.io.json import open_regular_file

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


def _flags(params: Mapping[str, Any]) -> list[str]:
    """The options as they are written on a command line."""
    flags = []
    for name, value in params.items():
        flag = f"--{name.replace('_', '-')}"
        if name in OURS or value is None or value is False or value == [] or (name == "device" and "cuda" in value):
            continue
        for each in value if isinstance(value, list | tuple) else [value]:
            flags.append(flag if each is True else f"{flag}={each}")
    return flags
