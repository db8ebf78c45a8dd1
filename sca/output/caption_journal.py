"""Journal of a run over many images, so that the same command resumes after any interruption."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sca_registry.contracts import Caption

from sca.io import journal
from sca.io.atomic import create_writable_folder, translate_output_errors
from sca.io.errors import OutputError
from sca.io.images import format_path
from sca.io.run_folder import RunFolder, check_same_run
from sca.output.captioned_image import CaptionedImage, ImageOrSize
from sca.output.formats import OUTPUT_FORMATS, list_output_patterns
from sca.output.jsonl import caption_to_record
from sca.output.records import parse_image

CAPTION_JOURNAL_NAME = "captions.journal"


class CaptionJournal:
    """Journal `captions.journal` in a run folder.

    Its first line describes the run; each other line is a captioned image. The file is removed when the run has
    finished. `completed` contains the images of a resumed journal, by name.

    Args:
        folder: Run folder.
        run_options: Options that the captions depend on.
        resume: Continue with the existing journal instead of replacing it.

    Raises:
        InputError: The journal to resume is damaged.
        DifferentRunError: The journal belongs to a run with other options.
    """

    def __init__(self, folder: Path, run_options: Mapping[str, str], resume: bool):
        create_writable_folder(folder)
        self._path, self._run_options, self._resume = folder / CAPTION_JOURNAL_NAME, run_options, resume
        self.completed: dict[str, CaptionedImage] = {}
        self._file: journal.Journal | None = None
        if resume:
            self._read_entries()

    @property
    def has_new_images(self) -> bool:
        """Whether an image has been added."""
        return self._file is not None

    def add(self, path: str, image: ImageOrSize, captions: Sequence[Caption]) -> None:
        if path in self.completed:
            return
        if self._file is None:  # keep an older journal until there is a new image
            self._file = self._open_file()
        records = [caption_to_record(path, image, caption) for caption in captions]
        self._file.append({"image": path, "width": image.width, "height": image.height, "captions": records})

    def close(self, finished: bool) -> None:
        if self._file is not None:
            self._file.close()
        if finished:
            self._remove()

    def _remove(self) -> None:
        with translate_output_errors(self._path):
            self._path.unlink(missing_ok=True)

    def _open_file(self) -> journal.Journal:
        if not self._resume:
            self._remove()
        file = journal.Journal(self._path)
        if file.is_empty:
            file.append(self._run_options)
        return file

    def _read_entries(self) -> None:
        """Read the images of the existing journal."""
        for line_number, entry in enumerate(journal.read_journal(self._path), 1):
            if line_number == 1:
                check_same_run(self._path, entry, self._run_options)
            else:
                image = parse_image(entry, f"{format_path(self._path)}, line {line_number}")
                self.completed[image.image] = image


def count_journal_images(folder: Path) -> int:
    """Return the number of images captioned by an unfinished run in a folder."""
    return max(0, sum(1 for _ in journal.read_journal(folder / CAPTION_JOURNAL_NAME)) - 1)


@contextmanager
def open_caption_journal(
    path: Path,
    settings: dict[str, Any],
    formats: Sequence[str],
    inputs: Sequence[str | Path],
    *,
    resume: bool,
    overwrite: bool,
) -> Iterator[CaptionJournal]:
    """Open the folder of a captioning run and its journal, which is removed when the run has finished.

    Args:
        path: Folder.
        settings: Settings that determine the captions. A resumed run may have other `images`.
        formats: Output formats.
        inputs: Files that the run reads.
        resume: Resume an unfinished run.
        overwrite: Replace an earlier run.

    Yields:
        The journal.

    Raises:
        OutputError: The folder must not be written.
        InputError: The journal to resume is damaged.
        DifferentRunError: The folder contains a run with other settings.
    """
    with RunFolder(path, "caption", (*list_output_patterns(OUTPUT_FORMATS), CAPTION_JOURNAL_NAME)) as folder:
        previous_run = folder.last_run
        num_unfinished = count_journal_images(path) if previous_run and not (previous_run.finished or overwrite) else 0
        if num_unfinished and not resume:
            raise OutputError(
                f"{format_path(path)} contains an unfinished run with {num_unfinished} images captioned; resume it "
                "with --resume, choose another --out, or replace it with --overwrite"
            )
        ignored_settings = ("images",) if resume and num_unfinished else ()
        outputs = (*list_output_patterns(formats), CAPTION_JOURNAL_NAME)
        previous_run = folder.begin(settings, outputs, inputs, overwrite=overwrite, ignored_settings=ignored_settings)
        caption_journal = CaptionJournal(
            path, {name: value for name, value in settings.items() if name != "images"}, resume
        )
        is_finished = False
        try:
            yield caption_journal
            is_finished = True
        finally:
            caption_journal.close(is_finished)
            # Without new images, the files of a finished earlier run are unchanged.
            if is_finished or (previous_run and previous_run.finished and not caption_journal.has_new_images):
                folder.finish()
