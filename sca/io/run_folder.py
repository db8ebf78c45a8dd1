"""What a command may write where: run folders, which know what made them, and outputs that are never inputs.

The rule, for every command: replace and delete only what the same kind of run wrote into the folder, as its marker
`sca-run.json` records, and never an input. Anything else is refused in one line that names the ways out.

A marker may come from elsewhere, like any other file. So the code, not the marker, defines which files a kind of run
can write, by `sca.io.output_patterns`. A marker lists these patterns, or exact names that match one; anything else in
it is ignored.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, replace
from functools import cache
from importlib.metadata import version
from itertools import count
from pathlib import Path
from typing import Any

from sca.io.atomic import open_folder, output_errors, remove_drafts, write_file
from sca.io.errors import InputError, DifferentRunError, OutputError
from sca.io.images import show
from sca.io.json import read_json
from sca.io.lock import held_lock
from sca.io.output_patterns import between, find_folders, find_outputs, is_declared, is_one_of

MARKER, LOCK = "sca-run.json", ".sca-lock"


@dataclass(frozen=True)
class Run:
    """One kind of run in a folder, as the marker records it.

    Args:
        settings: What determines the results, as plain JSON.
        outputs: Patterns of the files that the run writes.
        finished: Whether it came to its end.
        version: Of this package.
    """

    settings: Mapping[str, Any]
    outputs: tuple[str, ...]
    finished: bool = False
    version: str = ""


class RunFolder:
    """A folder that one command writes: locked while it is open, and marked with what made it.

        with RunFolder("out", "caption", OUTPUTS) as folder:
            folder.begin(settings, outputs=("captions.jsonl",), inputs=images)
            ...
            folder.finish()

    Args:
        folder: Made if absent.
        kind: The command, such as "caption".
        patterns: Patterns of all files that this kind of run can write.

    Raises:
        LockedError: Another process writes it.
        OutputError: The folder or its lock file cannot be written.
    """

    def __init__(self, folder: str | Path, kind: str, patterns: Iterable[str] = ()):
        self.path, self.kind, self.patterns = Path(folder), kind, frozenset(patterns)
        self.moved_to: Path | None = None
        self._open = ExitStack()

    def __enter__(self) -> RunFolder:
        open_folder(self.path)
        with output_errors(self.path / LOCK):
            self._open.enter_context(held_lock(self.path / LOCK, show(self.path)))
        for folder in find_folders(self.path, self.patterns):
            remove_drafts(folder)
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    @property
    def run(self) -> Run | None:
        """The last run of this kind, None if there was none."""
        run = read_runs(self.path).get(self.kind)
        return run and replace(run, outputs=tuple(each for each in run.outputs if is_declared(each, self.patterns)))

    def begin(
        self,
        settings: Mapping[str, Any],
        outputs: Iterable[str],
        inputs: Iterable[str | Path] = (),
        *,
        overwrite: bool = False,
        set_aside: bool = False,
        loose: Iterable[str] = (),
    ) -> Run | None:
        """Check that a run may write here, and mark the folder as its own.

        Args:
            settings: What determines the results, as plain JSON.
            outputs: Those of `patterns` that the run will write, or exact names that match one (`exact_pattern`).
            inputs: Files and folders that the command reads.
            overwrite: Delete what an earlier run with other settings wrote.
            set_aside: Rename the folder of an earlier run with other settings to `NAME-1`, or the next free number;
                `moved_to` is its new path.
            loose: Settings that may differ from those of the earlier run.

        Returns:
            The earlier run if this one continues or repeats it, else None.

        Raises:
            OtherRunError: The folder contains a run with other settings.
            OutputError: An output is an input, or was not written by this kind of run.
        """
        settings, outputs, inputs = _plain(settings), tuple(outputs), tuple(inputs)
        assert all(is_declared(each, self.patterns) for each in outputs), f"{self.kind} declares other files: {outputs}"
        earlier = self.run
        own = earlier.outputs if earlier else ()
        changed = _changed(earlier.settings, settings, set(loose)) if earlier else []
        check_not_inputs(find_outputs(self.path, {*outputs, *(own if changed else ())}), inputs, self.path)
        written = set(find_outputs(self.path, own))
        foreign = [path for path in find_outputs(self.path, outputs) if path not in written]
        if foreign:
            raise OutputError(
                f"{show(foreign[0])} exists and was not written by `sca {self.kind}`; choose another folder, or move it"
            )
        if changed and not (overwrite or set_aside):
            raise _other_run(self.path, changed)
        if changed:
            if overwrite:
                self.delete_outputs()
            else:
                self._set_aside()
            earlier, own = None, ()
        self._mark(Run(settings, tuple(dict.fromkeys((*own, *outputs))), False, _version()))
        return earlier

    def finish(self) -> None:
        """Record that the run came to its end."""
        run = self.run
        assert run is not None, "a run that has not begun"
        self._mark(Run(run.settings, run.outputs, True, run.version))

    def delete_outputs(self, outputs: Iterable[str] | None = None) -> None:
        """Delete the files that the last run of this kind wrote, and folders that are empty afterwards.

        Args:
            outputs: Patterns of a part of these files.
        """
        own = self.run.outputs if self.run else ()
        for path in find_outputs(self.path, own if outputs is None else [each for each in outputs if each in own]):
            path.unlink(missing_ok=True)
            for parent in between(path, self.path):
                with suppress(OSError):  # not empty
                    parent.rmdir()

    def _set_aside(self) -> None:
        free = (self.path.with_name(f"{self.path.name}-{number}") for number in count(1))
        self.moved_to = next(path for path in free if not os.path.lexists(path))
        with output_errors(self.moved_to):
            os.rename(self.path, self.moved_to)
            (self.moved_to / LOCK).unlink(missing_ok=True)
        self._open.close()
        self.__enter__()

    def _mark(self, run: Run) -> None:
        runs = {kind: asdict(each) for kind, each in {**read_runs(self.path), self.kind: run}.items()}
        write_file(self.path / MARKER, f"{json.dumps({'format': 1, 'runs': runs}, indent=1, sort_keys=True)}\n")


def check_same_run(path: Path, earlier: Mapping[str, Any], run: Mapping[str, Any], loose: Iterable[str] = ()) -> None:
    """Check that a file is of this run, so that it can be continued.

    Args:
        path: The file.
        earlier: What determined its results, as plain JSON.
        run: What determines the results now.
        loose: Names of what may differ.

    Raises:
        OtherRunError: It is of another run; names what differs.
    """
    if changed := _changed(earlier, _plain(run), set(loose)):
        raise _other_run(path, changed)


def _other_run(path: Path, changed: Iterable[str]) -> DifferentRunError:
    return DifferentRunError(
        f"{show(path)} contains another run ({'; '.join(changed)}); choose another folder, or replace the run"
    )


def read_runs(folder: Path) -> dict[str, Run]:
    """The runs that the marker of a folder records, by kind.

    Raises:
        InputError: The marker is damaged.
    """
    path = folder / MARKER
    try:
        runs = read_json(path)["runs"]
        return {
            kind: Run(dict(run["settings"]), tuple(map(str, run["outputs"])), run["finished"] is True, run["version"])
            for kind, run in runs.items()
        }
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{show(path)} is damaged; choose another folder, or remove the file") from error


class OutputFilter:
    """Tell which files runs wrote into their folders, so that a command does not read its own outputs.

    `skipped` lists the outputs among the checked paths. Each marker is read once.

    Args:
        patterns: Patterns of the outputs; any other pattern in a marker is ignored.
    """

    def __init__(self, patterns: Iterable[str]) -> None:
        self.skipped: list[Path] = []
        self._patterns = frozenset(patterns)
        self._runs = cache(read_runs)

    def __call__(self, path: Path) -> bool:
        folders = list(path.parents)[:2]  # an output is in its run folder, or one folder below
        runs = [(folder, run) for folder in folders for run in self._runs(folder).values()]
        found = any(is_one_of(path, folder, self._patterns.intersection(run.outputs)) for folder, run in runs)
        self.skipped += [path] if found else []
        return found


def check_not_inputs(
    outputs: Iterable[str | Path], inputs: Iterable[str | Path], folder: str | Path | None = None
) -> None:
    """Refuse to write what the same command reads, whatever it is called: a link, a hard link or another spelling.

    Args:
        outputs: Files and folders that will be written; absent ones are no input.
        inputs: Files and folders that are read.
        folder: The run folder; an input folder below it must not receive outputs.

    Raises:
        OutputError: An output is an input, contains one, or lies in an input folder below `folder`.
    """
    existing = [(Path(path), known) for path in outputs if (known := _identity(path))]
    if not existing:
        return
    root = Path(folder).resolve() if folder is not None else None
    files, above = {}, {}
    for given in inputs:
        identity = _identity(given)
        if identity is None:
            continue
        path = Path(given).resolve()
        files[identity] = given
        for parent in path.parents:
            above.setdefault(str(parent), given)
        if root is not None and root in path.parents and path.is_dir():
            files[str(path)] = given
    for output, identity in existing:
        path = output.resolve()
        found = files.get(identity) or above.get(str(path))
        found = found or next((files[str(each)] for each in path.parents if str(each) in files), None)
        if found is not None:
            raise OutputError(
                f"{show(output)} would be overwritten and is an input of this command ({show(found)}); choose another "
                "output path"
            )


def file_hash(path: str | Path) -> str | None:
    """The SHA-256 of a file that a run reads, for its settings; None for a pipe, which can be read only once."""
    if not Path(path).is_file():
        return None
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def existing_paths(values: Any) -> Iterator[Path]:
    """Those texts in plain settings, at any depth, that name an existing file or folder."""
    if isinstance(values, Mapping):
        values = values.values()
    elif isinstance(values, str | Path):
        with suppress(OSError, ValueError):  # too long for a name, or with a zero byte
            path = os.path.expanduser(values)
            if path and os.path.lexists(path):
                yield Path(path)
        return
    elif not isinstance(values, list | tuple):
        return
    for each in values:
        yield from existing_paths(each)


def _identity(path: str | Path) -> tuple[int, int] | None:
    """The device and inode of a file, None if it does not exist."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return None
    return found.st_dev, found.st_ino


def _changed(earlier: Mapping[str, Any], settings: Mapping[str, Any], loose: set[str]) -> list[str]:
    """A text for every setting that differs."""
    changed = []
    for name in {**earlier, **settings}:
        before, now = earlier.get(name), settings.get(name)
        if name in loose or before == now:
            continue
        if isinstance(before, dict) and isinstance(now, dict):  # only what differs
            before, now = _difference(before, now), _difference(now, before)
        changed.append(f"{name}: {json.dumps(before)[:80]} there, {json.dumps(now)[:80]} now")
    return changed


def _difference(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in one.items() if name not in other or other[name] != value}


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings after a round trip through JSON, such as lists in place of tuples."""
    return json.loads(json.dumps(settings, default=str))


def _version() -> str:
    return version("segment-caption-anything")
