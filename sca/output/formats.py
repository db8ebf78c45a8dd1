"""Writing captions image after image: JSON lines, COCO, Parquet, GeoJSON, for labeling tools, pictures and pages.

    with Writers("out", ("jsonl", "png"), model="sam-vit-b+query+gpt2-large") as writers:
        for path, image, captions in ...:
            writers.add(path, image, captions)

Whatever ends the run, an interrupt or a full disk, the images that are done stay written and no file is left half
written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, TextIO

from PIL import Image
from sca_registry.contracts import Caption

from sca.io.atomic import create_writable_folder
from sca.io.errors import OutputError
from sca.output.coco import CocoWriter
from sca.output.geojson import GeoJsonWriter
from sca.output.html import HtmlWriter
from sca.output.jsonl import JsonlWriter, StreamSink
from sca.output.label_studio import LabelStudioWriter
from sca.output.labelme import LabelMeWriter
from sca.output.parquet import ParquetWriter
from sca.output.png import PngWriter

__all__ = ["OUTPUT_FORMATS", "MultiFormatWriter", "OutputError", "list_output_patterns"]


class Writer(Protocol):
    def add(self, path: str, image: Image.Image, captions: Sequence[Caption]) -> None: ...

    def close(self, finished: bool = True) -> None: ...


LABEL_STUDIO = "label-studio"
_FORMAT_INFO: dict[str, tuple[str, str, Callable[..., Writer]]] = {  # where it goes, and its files
    "jsonl": ("captions.jsonl", "captions.jsonl", JsonlWriter),
    "coco": ("coco.json", "coco.json", CocoWriter),
    "parquet": ("captions.parquet", "captions.parquet", ParquetWriter),
    "geojson": ("captions.geojson", "captions.geojson", GeoJsonWriter),
    LABEL_STUDIO: ("label-studio.json", "label-studio.json", LabelStudioWriter),
    "labelme": ("labelme", "labelme/*.json", LabelMeWriter),
    "png": (".", "*.captions.png", PngWriter),
    "html": ("captions.html", "captions.html", HtmlWriter),
}
OUTPUT_FORMATS = tuple(_FORMAT_INFO)
DRAWN_FORMATS = ("png", "html")  # for which the pictures themselves are needed


def list_output_patterns(formats: Iterable[str]) -> tuple[str, ...]:
    """Patterns of the files that `MultiFormatWriter` writes into its folder."""
    return tuple(_FORMAT_INFO[name][1] for name in formats)


class MultiFormatWriter:
    """One or several formats in one folder, which is made. `ValueError` for a format that is not in `OUTPUT_FORMATS`.

    `paths` says where each format goes: `captions.jsonl`, `coco.json`, `captions.parquet`, `captions.geojson`,
    `label-studio.json`, `captions.html`; and for labelme and png a folder, in which each image has a file `STEM.json`
    or `STEM.captions.png`. image_prefix: for Label Studio, which opens images by URL; see `add_image_prefix`.
    """

    def __init__(
        self, folder: str | Path, formats: Iterable[str] = ("jsonl",), model: str | None = None, image_prefix: str = ""
    ):
        formats = tuple(dict.fromkeys(formats))
        unknown = [name for name in formats if name not in _FORMAT_INFO]
        if unknown:
            raise ValueError(f"no output format named '{unknown[0]}'; there are: {', '.join(OUTPUT_FORMATS)}")
        folder = Path(folder)
        create_writable_folder(folder)
        self.paths = {name: folder / _FORMAT_INFO[name][0] for name in formats}
        self._writers: list[Writer] = []
        try:
            for name, path in self.paths.items():
                options = {"image_prefix": image_prefix} if name == LABEL_STUDIO else {}
                self._writers.append(_FORMAT_INFO[name][2](path, model, **options))
        except BaseException:
            self.close(finished=False)
            raise

    @classmethod
    def from_stream(cls, stream: TextIO | Any, model: str | None = None) -> MultiFormatWriter:
        """JSON lines on a text stream, such as standard output; it is flushed after each image and never closed."""
        writers = cls.__new__(cls)
        writers.paths = {}
        writers._writers = [JsonlWriter(StreamSink(stream), model)]
        return writers

    def add(self, path: str | Path, image: Image.Image, captions: Sequence[Caption]) -> None:
        """Writes the captions of one image, given as RGB and by the path that the records shall name."""
        for writer in self._writers:
            writer.add(str(path), image, captions)

    def close(self, finished: bool = True) -> None:
        """Completes every format; the first `OutputError` is raised when all have had their turn.

        A run that is not `finished` and has no image leaves older files as they are.
        """
        writers, self._writers = self._writers, []
        failures = []
        for writer in writers:
            try:
                writer.close(finished)
            except OutputError as error:
                failures.append(error)
        if failures:
            raise failures[0]

    def __enter__(self) -> MultiFormatWriter:
        return self

    def __exit__(
        self, exception_type: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self.close(finished=error is None)
        except OutputError:
            if error is None:
                raise
