"""Run folders, which record the run that wrote them, and checks that outputs never overwrite inputs.

All commands follow one rule: replace and delete only files that the same kind of run wrote into the folder, as its
marker `sca-run.json` records, and never an input. Anything else is rejected with a one-line error that names the
options.

A marker is untrusted, like any other file. The code, not the marker, defines the files that a kind of run can write, by
`sca.io.output_patterns`. A marker lists these patterns, or exact names that match one. Any other entry is ignored.
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

from sca.io.atomic import create_writable_folder, remove_drafts, translate_output_errors, write_file
from sca.io.errors import DifferentRunError, InputError, OutputError
from sca.io.file_lock import hold_lock
from sca.io.images import format_path
from sca.io.json import read_json
from sca.io.output_patterns import (
    find_output_folders,
    find_outputs,
    is_declared_pattern,
    is_output,
    iter_parents_between,
)

MARKER_FILE, LOCK_FILE = "sca-run.json", ".sca-lock"


@dataclass(frozen=True)
class RunRecord:
    """One kind of run in a folder, as recorded in the marker.

    Attributes:
        settings: Settings that determine the results, as plain JSON.
        outputs: Patterns of the files that the run writes.
        finished: Whether the run finished.
        version: Version of this package.
    """

    settings: Mapping[str, Any]
    outputs: tuple[str, ...]
    finished: bool = False
    version: str = ""


class RunFolder:
    """Folder that one command writes: locked while open, and marked with the run that wrote it.

    Example:
        >>> with RunFolder("out", "caption", OUTPUTS) as folder:
        ...     folder.begin_run(settings, outputs=("captions.jsonl",), inputs=images)
        ...     folder.finish()

    Args:
        folder: Path; created if missing.
        kind: Command, such as "caption".
        patterns: Patterns of all files that this kind of run can write.

    Raises:
        LockedError: Another process writes the folder.
        OutputError: The folder or its lock file cannot be written.
    """

    def __init__(self, folder: str | Path, kind: str, patterns: Iterable[str] = ()):
        self.path: Path = Path(folder)
        self.kind: str = kind
        self.patterns: frozenset[str] = frozenset(patterns)
        self.earlier_run_path: Path | None = None
        self._exit_stack = ExitStack()

    def __enter__(self) -> RunFolder:
        create_writable_folder(self.path)
        with translate_output_errors(self.path / LOCK_FILE):
            self._exit_stack.enter_context(hold_lock(self.path / LOCK_FILE, format_path(self.path)))
        for folder in find_output_folders(self.path, self.patterns):
            remove_drafts(folder)
        return self

    def __exit__(self, *_: object) -> None:
        self._exit_stack.close()

    @property
    def last_run(self) -> RunRecord | None:
        """Last run of this kind; None without one."""
        run = read_runs(self.path).get(self.kind)
        return run and replace(
            run, outputs=tuple(each for each in run.outputs if is_declared_pattern(each, self.patterns))
        )

    def begin_run(
        self,
        settings: Mapping[str, Any],
        outputs: Iterable[str],
        inputs: Iterable[str | Path] = (),
        *,
        overwrite: bool = False,
        rename_earlier: bool = False,
        ignored_settings: Iterable[str] = (),
    ) -> RunRecord | None:
        """Check that a run may write to the folder, and mark the folder with it.

        Args:
            settings: Settings that determine the results, as plain JSON.
            outputs: Subset of `patterns` that the run will write, or exact names that match one (`make_exact_pattern`).
            inputs: Files and folders that the command reads.
            overwrite: Delete the outputs of an earlier run with other settings.
            rename_earlier: Rename the folder of an earlier run with other settings to `NAME-1`, or the next free
                number. `earlier_run_path` is its new path.
            ignored_settings: Settings that may differ from those of the earlier run.

        Returns:
            The earlier run if this run continues or repeats it, else None.

        Raises:
            DifferentRunError: The folder contains a run with other settings.
            OutputError: An output is an input, or was not written by this kind of run.
        """
        settings, outputs, inputs = _convert_to_json_values(settings), tuple(outputs), tuple(inputs)
        assert all(is_declared_pattern(each, self.patterns) for each in outputs), (
            f"{self.kind} declares other files: {outputs}"
        )
        earlier = self.last_run
        earlier_outputs = earlier.outputs if earlier else ()
        changes = _describe_changes(earlier.settings, settings, set(ignored_settings)) if earlier else []
        check_not_inputs(find_outputs(self.path, {*outputs, *(earlier_outputs if changes else ())}), inputs, self.path)
        earlier_files = set(find_outputs(self.path, earlier_outputs))
        unknown_files = [path for path in find_outputs(self.path, outputs) if path not in earlier_files]
        if unknown_files:
            raise OutputError(
                f"{format_path(unknown_files[0])} exists and was not written by `sca {self.kind}`; choose another "
                "folder, or move it"
            )
        if changes and not (overwrite or rename_earlier):
            raise _make_other_run_error(self.path, changes)
        if changes:
            if overwrite:
                self.delete_outputs()
            else:
                self._rename_earlier_run()
            earlier, earlier_outputs = None, ()
        self._write_marker(
            RunRecord(settings, tuple(dict.fromkeys((*earlier_outputs, *outputs))), False, _get_package_version())
        )
        return earlier

    def finish(self) -> None:
        """Mark the run as finished."""
        run = self.last_run
        assert run is not None, "a run that has not begun"
        self._write_marker(RunRecord(run.settings, run.outputs, True, run.version))

    def delete_outputs(self, outputs: Iterable[str] | None = None) -> None:
        """Delete the files of the last run of this kind, and folders that become empty.

        Args:
            outputs: Patterns of the files to delete. Defaults to all.
        """
        earlier_outputs = self.last_run.outputs if self.last_run else ()
        for path in find_outputs(
            self.path, earlier_outputs if outputs is None else [each for each in outputs if each in earlier_outputs]
        ):
            path.unlink(missing_ok=True)
            for parent in iter_parents_between(path, self.path):
                with suppress(OSError):  # not empty
                    parent.rmdir()

    def _rename_earlier_run(self) -> None:
        candidates = (self.path.with_name(f"{self.path.name}-{number}") for number in count(1))
        self.earlier_run_path = next(path for path in candidates if not os.path.lexists(path))
        with translate_output_errors(self.earlier_run_path):
            os.rename(self.path, self.earlier_run_path)
            (self.earlier_run_path / LOCK_FILE).unlink(missing_ok=True)
        self._exit_stack.close()
        self.__enter__()

    def _write_marker(self, run: RunRecord) -> None:
        runs = {kind: asdict(each) for kind, each in {**read_runs(self.path), self.kind: run}.items()}
        write_file(self.path / MARKER_FILE, f"{json.dumps({'format': 1, 'runs': runs}, indent=1, sort_keys=True)}\n")


def check_same_run(
    path: Path, earlier: Mapping[str, Any], settings: Mapping[str, Any], ignored_settings: Iterable[str] = ()
) -> None:
    """Check that a file belongs to this run, so that it can be resumed.

    Args:
        path: File.
        earlier: Settings that determined its results, as plain JSON.
        settings: Settings of this run.
        ignored_settings: Names of settings that may differ.

    Raises:
        DifferentRunError: The file belongs to a different run; the message names the differences.
    """
    if changes := _describe_changes(earlier, _convert_to_json_values(settings), set(ignored_settings)):
        raise _make_other_run_error(path, changes)


def _make_other_run_error(path: Path, changes: Iterable[str]) -> DifferentRunError:
    return DifferentRunError(
        f"{format_path(path)} contains a different run ({'; '.join(changes)}); choose a different folder, or replace "
        "the run"
    )


def read_runs(folder: Path) -> dict[str, RunRecord]:
    """Read the runs recorded in the marker of a folder, by kind.

    Args:
        folder: Run folder.

    Returns:
        Runs by kind; empty without a marker.

    Raises:
        InputError: The marker is damaged.
    """
    path = folder / MARKER_FILE
    try:
        runs = read_json(path)["runs"]
        return {
            kind: RunRecord(
                dict(run["settings"]), tuple(map(str, run["outputs"])), run["finished"] is True, run["version"]
            )
            for kind, run in runs.items()
        }
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{format_path(path)} is damaged; choose another folder, or remove the file") from error


class OutputFilter:
    """Detects files that runs wrote into their folders, so that a command does not read its own outputs.

    `skipped_paths` lists the outputs among the checked paths. Each marker is read once.

    Args:
        patterns: Patterns of the outputs. Any other pattern in a marker is ignored.
    """

    def __init__(self, patterns: Iterable[str]) -> None:
        self.skipped_paths: list[Path] = []
        self._patterns = frozenset(patterns)
        self._read_runs = cache(read_runs)

    def __call__(self, path: Path) -> bool:
        folders = list(path.parents)[:2]  # an output is in its run folder or one folder below
        runs = [(folder, run) for folder in folders for run in self._read_runs(folder).values()]
        is_run_output = any(is_output(path, folder, self._patterns.intersection(run.outputs)) for folder, run in runs)
        self.skipped_paths += [path] if is_run_output else []
        return is_run_output


def check_not_inputs(
    outputs: Iterable[str | Path], inputs: Iterable[str | Path], folder: str | Path | None = None
) -> None:
    """Check that no output is an input under any name: a link, a hard link or another spelling.

    Args:
        outputs: Files and folders that will be written; missing ones cannot be inputs.
        inputs: Files and folders that are read.
        folder: Run folder; an input folder below it must not receive outputs.

    Raises:
        OutputError: An output is an input, contains one, or is in an input folder below `folder`.
    """
    existing = [(Path(path), file_id) for path in outputs if (file_id := _get_file_id(path))]
    if not existing:
        return
    root = Path(folder).resolve() if folder is not None else None
    input_by_file: dict[tuple[int, int] | str, str | Path] = {}
    input_by_parent: dict[str, str | Path] = {}
    for input_path in inputs:
        identity = _get_file_id(input_path)
        if identity is None:
            continue
        path = Path(input_path).resolve()
        input_by_file[identity] = input_path
        for parent in path.parents:
            input_by_parent.setdefault(str(parent), input_path)
        if root is not None and root in path.parents and path.is_dir():
            input_by_file[str(path)] = input_path
    for output, identity in existing:
        path = output.resolve()
        matching_input = input_by_file.get(identity) or input_by_parent.get(str(path))
        matching_input = matching_input or next(
            (input_by_file[str(each)] for each in path.parents if str(each) in input_by_file), None
        )
        if matching_input is not None:
            raise OutputError(
                f"{format_path(output)} would be overwritten and is an input of this command "
                f"({format_path(matching_input)}); choose another output path"
            )


def compute_file_hash(path: str | Path) -> str | None:
    """Return the SHA-256 of a file that a run reads, for its settings; None for a pipe, which can be read only once."""
    if not Path(path).is_file():
        return None
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def iter_existing_paths(values: Any) -> Iterator[Path]:
    """Yield the texts in plain settings, at any depth, that name an existing file or folder."""
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
        yield from iter_existing_paths(each)


def _get_file_id(path: str | Path) -> tuple[int, int] | None:
    """Return the device and inode of a file; None if it does not exist."""
    try:
        file_stat = os.stat(path)
    except (OSError, ValueError):
        return None
    return file_stat.st_dev, file_stat.st_ino


def _describe_changes(earlier: Mapping[str, Any], settings: Mapping[str, Any], ignored_settings: set[str]) -> list[str]:
    """Describe each setting that differs."""
    changes = []
    for name in {**earlier, **settings}:
        before, after = earlier.get(name), settings.get(name)
        if name in ignored_settings or before == after:
            continue
        if isinstance(before, dict) and isinstance(after, dict):  # report only the differences
            before, after = _select_differences(before, after), _select_differences(after, before)
        changes.append(f"{name}: {json.dumps(before)[:80]} there, {json.dumps(after)[:80]} now")
    return changes


def _select_differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in one.items() if name not in other or other[name] != value}


def _convert_to_json_values(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings after a round trip through JSON, such as lists in place of tuples."""
    return json.loads(json.dumps(settings, default=str))


def _get_package_version() -> str:
    return version("segment-caption-anything")
