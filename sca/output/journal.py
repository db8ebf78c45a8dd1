"""What a run over many images has done, so that the same command goes on after whatever ended it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image
from sca_registry.contracts import Caption

from sca.io import journal
from sca.io.atomic import open_folder, output_errors
from sca.io.errors import OutputError
from sca.io.images import show
from sca.io.run_folder import RunFolder, check_same_run
from sca.output import FORMATS, output_patterns
from sca.output.captioned import Captioned
from sca.output.jsonl import record
from sca.output.records import read_image

NAME = "captions.journal"


class Journal:
    """`captions.journal` in a run folder: its first line is the run, and each other line an image that is captioned.

    It is removed when the run has finished. `done` contains the images of the journal that is continued, by name.

    Args:
        folder: The run folder.
        run: Options that the captions depend on.
        resume: Continue with the journal that exists, instead of replacing it.

    Raises:
        InputError: The journal to resume is damaged.
        OtherRunError: It is of a run with other options.
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
            self._remove()

    def _remove(self) -> None:
        with output_errors(self._path):
            self._path.unlink(missing_ok=True)

    def _open(self) -> None:
        if not self._resume:
            self._remove()
        self._file = journal.Journal(self._path)
        if self._file.is_empty:
            self._file.append(self._run)

    def _read(self) -> None:
        """Read the images of the journal that exists."""
        for number, entry in enumerate(journal.read_journal(self._path), 1):
            if number == 1:
                check_same_run(self._path, entry, self._run)
            else:
                image = read_image(entry, f"{show(self._path)}, line {number}")
                self.done[image.image] = image


def count_images(folder: Path) -> int:
    """The number of images that an unfinished run in a folder has captioned."""
    return max(0, sum(1 for _ in journal.read_journal(folder / NAME)) - 1)


@contextmanager
def open_journal(
    path: Path,
    settings: dict[str, Any],
    formats: Sequence[str],
    inputs: Sequence[str | Path],
    *,
    resume: bool,
    overwrite: bool,
) -> Iterator[Journal]:
    """Open the folder of a captioning run, and the journal in it, which is removed when the run has finished.

    Args:
        path: The folder.
        settings: What determines the captions. A resumed run may have other `images`.
        formats: What is written.
        inputs: Files that the run reads.
        resume: Continue an unfinished run.
        overwrite: Replace an earlier run.

    Raises:
        OutputError: The folder must not be written.
        InputError: The journal to resume is damaged.
        OtherRunError: It is of a run with other settings.
    """
    with RunFolder(path, "caption", (*output_patterns(FORMATS), NAME)) as folder:
        earlier = folder.run
        unfinished = count_images(path) if earlier and not (earlier.finished or overwrite) else 0
        if unfinished and not resume:
            raise OutputError(
                f"{show(path)} contains an unfinished run with {unfinished} images done; continue it with --resume, "
                "choose another --out, or replace it with --overwrite"
            )
        loose = ("images",) if resume and unfinished else ()
        outputs = (*output_patterns(formats), NAME)
        earlier = folder.begin(settings, outputs, inputs, overwrite=overwrite, loose=loose)
        opened = Journal(path, {name: value for name, value in settings.items() if name != "images"}, resume)
        finished = False
        try:
            yield opened
            finished = True
        finally:
            opened.close(finished)
            if finished or (earlier and earlier.finished and not opened.is_begun):  # the earlier files are unchanged
                folder.finish()
