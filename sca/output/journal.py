"""What a run over many images has done, so that the same command goes on after whatever ended it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image
from sca_registry.contracts import Caption

from sca.images import show
from sca.output.files import OutputFile, open_folder, remove_drafts, unwritable
from sca.output.jsonl import record
from sca.output.read import Captioned, ReadError, captioned

NAME = "captions.journal"


class Journal:
    """`captions.journal` in a folder: what the run is of, and a line an image as soon as it is captioned. It goes when
    the run has come to its end.

    `done` has the images that are there by what they were called. ValueError if `resume` finds another run's journal.
    """

    def __init__(self, folder: Path, run: Mapping[str, str], resume: bool):
        open_folder(folder)
        self._path = folder / NAME
        self.done: dict[str, Captioned] = {}
        self._file: OutputFile | None = None
        self._lines = [f"{json.dumps(run)}\n".encode()]
        if resume:
            self._lines = self._read(run) or self._lines
            remove_drafts(folder)

    def add(self, path: str, image: Image.Image, captions: Sequence[Caption]) -> None:
        if path in self.done:
            return
        if self._file is None:  # until there is something new, an older journal stays
            self._file = OutputFile(self._path, in_place=True)
            self._file.write(b"".join(self._lines))
        records = [record(path, image, caption) for caption in captions]
        line = {"image": path, "width": image.width, "height": image.height, "captions": records}
        self._file.write(f"{json.dumps(line, allow_nan=False)}\n")

    def close(self, finished: bool) -> None:
        if self._file is not None:
            self._file.keep()
        if finished:
            try:
                self._path.unlink(missing_ok=True)
            except OSError as error:
                raise unwritable(self._path, error) from error

    def _read(self, run: Mapping[str, str]) -> list[bytes]:
        """The whole lines of a journal that is there; the last may have been cut off."""
        try:
            lines = self._path.read_bytes().splitlines(keepends=True)
        except FileNotFoundError:
            return []
        whole = [line for line in lines if line.endswith(b"\n")]
        try:
            content = [json.loads(line) for line in whole]
            if content and content[0] != run:
                other = sorted(name for name in run if content[0].get(name) != run[name])
                raise ValueError(
                    f"{show(self._path)} is of a run with other options ({', '.join(other)}): give those, choose "
                    "another --out, or leave --resume out to begin anew"
                )
            for number, each in enumerate(content[1:], 2):
                told = captioned(each, f"{show(self._path)}, line {number}")
                self.done[told.image] = told
        except (json.JSONDecodeError, ReadError, AttributeError) as error:
            raise ValueError(f"{show(self._path)} is damaged ({error}): leave --resume out to begin anew") from error
        return whole
