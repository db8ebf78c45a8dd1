"""What a run over many images has done, so that the same command goes on after whatever ended it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image
from sca_registry.contracts import Caption

from sca.io import journal
from sca.io.atomic import open_folder, unwritable
from sca.io.errors import InputError
from sca.io.images import show
from sca.output.jsonl import record
from sca.output.read import Captioned, captioned

NAME = "captions.journal"


class Journal:
    """`captions.journal` in a run folder: its first line is the run, and each other line an image that is captioned.

    It is removed when the run has finished. `done` contains the images of the journal that is continued, by name.

    Args:
        folder: The run folder.
        run: Options that the captions depend on.
        resume: Continue with the journal that exists, instead of replacing it.

    Raises:
        ValueError: The journal to resume is damaged, or of a run with other options.
    """

    def __init__(self, folder: Path, run: Mapping[str, str], resume: bool):
        open_folder(folder)
        self._path, self._run, self._resume = folder / NAME, run, resume
        self.done: dict[str, Captioned] = {}
        self._file: journal.Journal | None = None
        if resume:
            self._read()

    @property
    def is_begun(self) -> bool:
        """Whether an image has been added."""
        return self._file is not None

    def add(self, path: str, image: Image.Image, captions: Sequence[Caption]) -> None:
        if path in self.done:
            return
        if self._file is None:  # until there is something new, an older journal stays
            self._open()
        records = [record(path, image, caption) for caption in captions]
        self._file.append({"image": path, "width": image.width, "height": image.height, "captions": records})

    def close(self, finished: bool) -> None:
        if self._file is not None:
            self._file.close()
        if finished:
            try:
                self._path.unlink(missing_ok=True)
            except OSError as error:
                raise unwritable(self._path, error) from error

    def _open(self) -> None:
        if not self._resume:
            self._path.unlink(missing_ok=True)
        self._file = journal.Journal(self._path)
        if self._file.is_empty:
            self._file.append(self._run)

    def _read(self) -> None:
        """The images of a journal that is there."""
        try:
            for number, entry in enumerate(journal.read_journal(self._path), 1):
                if number == 1:
                    self._check(entry)
                else:
                    told = captioned(entry, f"{show(self._path)}, line {number}")
                    self.done[told.image] = told
        except InputError as error:
            raise ValueError(f"{error}; or start over with --overwrite") from error

    def _check(self, other: Mapping[str, str]) -> None:
        if other != self._run:
            names = sorted(name for name in {**self._run, **other} if other.get(name) != self._run.get(name))
            raise ValueError(
                f"{show(self._path)} is of a run with other options ({', '.join(names)}): give those, choose "
                "another --out, or start over with --overwrite"
            )


def count_images(folder: Path) -> int:
    """The number of images that an unfinished run in a folder has captioned."""
    return max(0, sum(1 for _ in journal.read_journal(folder / NAME)) - 1)
