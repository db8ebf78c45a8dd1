"""Files that are whole or not there."""

from __future__ import annotations

import errno
import os
import secrets
import tempfile
from pathlib import Path

from sca.images import show


class OutputError(OSError):
    """Captions that cannot be written; the message is one line that says where, why and what to do."""


class OutputFile:
    """A file of whole pieces: each `write` is complete, or leaves no trace and raises `OutputError`.

    It grows under a temporary name in its folder and `keep` moves it to its own; `drop` leaves what was there before.
    With `in_place` it grows under its own name, readable after every piece.
    """

    def __init__(self, path: Path, in_place: bool = False):
        if not path.name:
            raise unwritable(path, IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR)))
        self.path = path
        self._name = path if in_place else path.with_name(f".{secrets.token_hex(8)}.part")
        try:
            self._file = open(self._name, "wb" if in_place else "xb", buffering=0)  # noqa: SIM115 (closed by keep, drop)
        except OSError as error:
            raise unwritable(path, error) from error

    def write(self, piece: str | bytes) -> None:
        """Text is written as UTF-8."""
        rest = memoryview(piece.encode() if isinstance(piece, str) else piece)
        start = self._file.tell()
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except BaseException as error:
            self._file.truncate(start)
            self._file.seek(start)
            if isinstance(error, OSError):
                raise unwritable(self.path, error) from error
            raise

    def keep(self) -> None:
        """Closes the file and gives it its name."""
        try:
            self._file.close()
            if self._name != self.path:
                os.replace(self._name, self.path)
        except OSError as error:
            self.drop()
            raise unwritable(self.path, error) from error

    def drop(self) -> None:
        """Closes the file and removes what it held under the temporary name."""
        self._file.close()
        if self._name != self.path:
            self._name.unlink(missing_ok=True)


def remove_drafts(folder: Path) -> None:
    """Takes away what files of killed runs grew under."""
    for draft in folder.glob(f".{'?' * 16}.part"):
        draft.unlink(missing_ok=True)


def write_file(path: Path, content: bytes) -> None:
    """One file at once: whole, or as it was before."""
    file = OutputFile(path)
    try:
        file.write(content)
    except BaseException:
        file.drop()
        raise
    file.keep()


class Names:
    """A file name for each image: its stem, or `STEM-2` where that has been used for another image."""

    def __init__(self) -> None:
        self._used: set[str] = set()

    def of(self, path: str) -> str:
        stem = Path(path).stem.encode("utf-8", "surrogateescape")[:200].decode("utf-8", "ignore") or "image"
        name, copies = stem, 1
        while name.casefold() in self._used:
            copies += 1
            name = f"{stem}-{copies}"
        self._used.add(name.casefold())
        return name


def open_folder(folder: Path) -> None:
    """Makes the folder and finds out, before anything is computed, whether files can be made in it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise unwritable(folder, error) from error


def unwritable(path: Path | str, error: OSError) -> OutputError:
    """The system's reason on one line."""
    if isinstance(error, PermissionError):
        remedy = "choose a folder that you may write in"
    elif isinstance(error, FileExistsError | NotADirectoryError | IsADirectoryError):
        remedy = "choose another folder"
    else:
        remedy = "free some space or choose another folder"
    return OutputError(f"cannot write {show(path)}: {error.strerror or type(error).__name__}; {remedy}")
