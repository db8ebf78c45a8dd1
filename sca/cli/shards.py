"""Many pictures, a shard at a time: `sca caption --launcher NAME`.

A shard is a WebDataset (a .tar of pictures), or so many pictures of those that were named. Each is captioned by the
same command in a process of its own, wherever the launcher has room, and has a file of JSON lines of its own in --out:
`shard-00000.jsonl`, or `NAME.jsonl` for `NAME.tar`. What is there is not made again.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tarfile
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import sca.captioners.door  # noqa: F401 (what shards are forked from has it imported)

MANIFEST = "shards.json"
OURS = ("images", "out", "format", "launcher", "shard", "quiet", "context")  # options that shards are not given


def caption_shards(
    images: Sequence[str], params: Mapping[str, Any], out: str, launcher: str, size: int, quiet: bool
) -> int:
    """Captions what `images` name; the exit status is 1 if something could not be captioned.

    params: the other options of `sca caption`, by their names in Python. launcher: "NAME [key=value]...". size:
    pictures of a shard.

    ValueError if `out` has the shards of another run.
    """
    import sca_registry
    from sca_registry.spec import Part

    from sca.cli.options import complain
    from sca.io.atomic import open_folder, write_file
    from sca.launchers.task import Task

    part = Part.parse(launcher, "--launcher")
    where = sca_registry.launchers.build(part.name, **part.options)
    folder = Path(out)
    open_folder(folder)
    flags = _flags(params)
    shards = dict(_shards(images, size, complain))
    keys = {name: _key(flags, content) for name, content in shards.items()}
    _check(folder, keys)
    missing = [name for name in shards if not (folder / f"{name}.jsonl").is_file()]
    if len(missing) < len(shards) and not quiet:
        complain(f"{len(shards) - len(missing)} of {len(shards)} shards are there already")
    device = params.get("device") or "cpu"
    status = 0
    with tempfile.TemporaryDirectory(prefix="sca-") as logs:
        tasks = [
            Task(
                name,
                "sca.cli.shards:caption_shard",
                {"flags": flags, "content": shards[name], "folder": os.getcwd(), "device": device},
                str(Path(logs, name)),
                timeout=float("inf"),
                gpus=int(device.startswith("cuda")),
            )
            for name in missing
        ]
        left, ended = set(missing), set()
        for number, (task, made) in enumerate(where.map(tasks), 1):
            ended.add(task.key)
            if made["state"] != "done":
                complain(f"{task.key}: {made['state']}: {made['reason']}")
                status = 1
                continue
            left.remove(task.key)
            write_file(folder / f"{task.key}.jsonl", made["captions"].encode())
            for line in made["problems"]:
                complain(f"{task.key}: {line}")
                status = 1
            if not quiet:
                complain(f"{number} of {len(tasks)}: wrote {folder / task.key}.jsonl")
    for name in sorted(left - ended):
        complain(f"{name}: its process was killed each time; if memory ran out, use fewer workers or a smaller --batch")
    if left:
        complain(f"{len(left)} shards are missing: the same command goes on with them")
    return 1 if left else status


def caption_shard(config: Mapping[str, Any], folder: str) -> dict[str, Any]:
    """The job of one shard: captions it as the command line does, and gives the lines."""
    import contextlib
    import io

    from sca.cli import run

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
        captions = lines.read_text("utf-8") if lines.is_file() else ""
        if "tar" in content:
            captions = captions.replace(json.dumps(f"{unpacked}/")[:-1], json.dumps(f"{content['tar']}/")[:-1])
            said = io.StringIO(said.getvalue().replace(f"{unpacked}/", f"{content['tar']}/"))
    problems += [line.removeprefix("sca: ") for line in said.getvalue().splitlines()]
    if status not in (0, 1):
        return {"state": "failed", "reason": "; ".join(problems) or f"exit status {status}"}
    return {"state": "done", "reason": "", "captions": captions, "problems": problems}


def _shards(images: Sequence[str], size: int, complain: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """The name of each shard, and its pictures or its archive."""
    from sca.images import find_images

    archives = sorted(each for each in images if each.endswith(".tar"))
    names: dict[str, str] = {}
    for archive in archives:
        name = Path(archive).stem
        if name in names:
            raise ValueError(f"{archive} and {names[name]} would both be {name}.jsonl: caption them into two folders")
        names[name] = archive
        yield name, {"tar": os.path.abspath(archive)}
    rest = [each for each in images if not each.endswith(".tar")]
    paths, problems = find_images(rest) if rest else ([], [])
    for problem in problems:
        complain(problem)
    for number, start in enumerate(range(0, len(paths), size)):
        yield f"shard-{number:05d}", {"images": [str(path) for path in paths[start : start + size]]}


def _unpack(archive: str, folder: str) -> tuple[list[str], list[str]]:
    """Extract the images of an archive; return their paths, all inside the folder, and a line for each that is not.

    Raises:
        ValueError: If the archive cannot be read or contains no images.
    """
    from sca.images import SUFFIXES, show
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


def _key(flags: Sequence[str], content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps([flags, content]).encode()).hexdigest()


def _check(folder: Path, keys: Mapping[str, str]) -> None:
    """Writes down what the shards are of, or finds that they are of something else."""
    from sca.io.atomic import write_file
    from sca.io.json import read_json

    path = folder / MANIFEST
    try:
        known = read_json(path)
    except FileNotFoundError:
        known = {}
    if not isinstance(known, dict):
        raise ValueError(f"{path} is not an object: choose another folder for --out")
    for name, key in keys.items():
        if known.get(name, key) != key and (folder / f"{name}.jsonl").is_file():
            raise ValueError(
                f"{folder / name}.jsonl was made from other pictures or with other options: choose another --out"
            )
    write_file(path, f"{json.dumps({**known, **keys}, indent=1)}\n".encode())
