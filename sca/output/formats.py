"""Write captions image by image: JSON Lines, COCO, Parquet, GeoJSON, labeling tools, dataset tools, images and HTML.

Example:
    >>> with MultiFormatWriter("out", ("jsonl", "png"), model="sam-vit-b+query+gpt2-large") as writer:
    ...     for path, image, captions in results:
    ...         writer.add(path, image, captions)

If an interrupt or a full disk ends the run, the completed images stay written and no file is left incomplete.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, TextIO

from sca_registry.contracts import Caption

from sca.io.atomic import create_writable_folder
from sca.io.errors import OutputError
from sca.output.captioned_image import ImageOrSize
from sca.output.coco import CocoWriter
from sca.output.cvat import CvatWriter
from sca.output.fiftyone import FiftyOneWriter
from sca.output.geojson import GeoJsonWriter
from sca.output.html import HtmlWriter
from sca.output.jsonl import JsonlWriter, StreamSink
from sca.output.label_studio import LabelStudioWriter
from sca.output.labelme import LabelMeWriter
from sca.output.parquet import ParquetWriter
from sca.output.png import PngWriter
from sca.output.yolo import YoloWriter

__all__ = ["OUTPUT_FORMATS", "MultiFormatWriter", "OutputError", "list_output_patterns"]


class Writer(Protocol):
    def add(self, path: str, image: ImageOrSize, captions: Sequence[Caption]) -> None: ...

    def close(self, finished: bool = True) -> None: ...


LABEL_STUDIO = "label-studio"
_FORMAT_INFO: dict[str, tuple[str, tuple[str, ...], Callable[..., Writer]]] = {  # output path, file patterns and writer
    "jsonl": ("captions.jsonl", ("captions.jsonl",), JsonlWriter),
    "coco": ("coco.json", ("coco.json",), CocoWriter),
    "parquet": ("captions.parquet", ("captions.parquet",), ParquetWriter),
    "geojson": ("captions.geojson", ("captions.geojson",), GeoJsonWriter),
    LABEL_STUDIO: ("label-studio.json", ("label-studio.json",), LabelStudioWriter),
    "labelme": ("labelme", ("labelme/*.json",), LabelMeWriter),
    "cvat": ("cvat.xml", ("cvat.xml",), CvatWriter),
    "fiftyone": ("fiftyone", ("fiftyone/samples.json", "fiftyone/metadata.json"), FiftyOneWriter),
    "yolo": ("yolo", ("yolo/data.yaml", "yolo/images/*.png", "yolo/labels/*.txt"), YoloWriter),
    "png": (".", ("*.captions.png",), PngWriter),
    "html": ("captions.html", ("captions.html",), HtmlWriter),
}
OUTPUT_FORMATS = tuple(_FORMAT_INFO)
PIXEL_FORMATS = ("png", "html", "yolo")  # formats that need the image pixels


def list_output_patterns(formats: Iterable[str]) -> tuple[str, ...]:
    """List the patterns of the files that `MultiFormatWriter` writes into its folder."""
    return tuple(pattern for name in formats for pattern in _FORMAT_INFO[name][1])


class MultiFormatWriter:
    """Writer of one or more formats into a folder, which is created.

    `paths` maps each format to its output: `captions.jsonl`, `coco.json`, `captions.parquet`, `captions.geojson`,
    `label-studio.json`, `cvat.xml` or `captions.html`. For labelme and png it is a folder with one file per image,
    `STEM.json` or `STEM.captions.png`; for fiftyone and yolo it is the folder of a dataset.

    Args:
        folder: Output folder.
        formats: Names in `OUTPUT_FORMATS`.
        model: Name of the model to record.
        image_prefix: URL prefix of images for Label Studio, see `add_image_prefix`.

    Raises:
        ValueError: A format is unknown.
        OutputError: The folder or a file cannot be written.
    """

    def __init__(
        self, folder: str | Path, formats: Iterable[str] = ("jsonl",), model: str | None = None, image_prefix: str = ""
    ):
        formats = tuple(dict.fromkeys(formats))
        unknown = [name for name in formats if name not in _FORMAT_INFO]
        if unknown:
            raise ValueError(f"unknown output format {unknown[0]!r}; choose from {', '.join(OUTPUT_FORMATS)}")
        folder = Path(folder)
        create_writable_folder(folder)
        self.paths: dict[str, Path] = {name: folder / _FORMAT_INFO[name][0] for name in formats}
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
        """Create a writer of JSON Lines to a text stream, which is flushed after each image and never closed."""
        writers = cls.__new__(cls)
        writers.paths = {}
        writers._writers = [JsonlWriter(StreamSink(stream), model)]
        return writers

    def add(self, path: str | Path, image: ImageOrSize, captions: Sequence[Caption]) -> None:
        """Write the captions of one image.

        Args:
            path: Image path as it appears in the records.
            image: RGB image; its size is enough without `PIXEL_FORMATS`.
            captions: Captions of its regions.
        """
        for writer in self._writers:
            writer.add(str(path), image, captions)

    def close(self, finished: bool = True) -> None:
        """Finish every format.

        Args:
            finished: Whether the run finished. An unfinished run leaves older files unchanged.

        Raises:
            OutputError: A file cannot be written; raised after all formats were closed.
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
