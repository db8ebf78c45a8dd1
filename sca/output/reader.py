"""Read captions from the formats of `sca.output` and from exports of labeling tools.

The formats are JSON Lines, COCO, Parquet, GeoJSON, Label Studio and LabelMe. Fields that a format cannot store are
lost: COCO has no prompts, and labeling tools have no predicted IoU.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from sca.io.annotations import label_studio, labelme
from sca.io.annotations.annotation import SkipCounter
from sca.io.errors import InputError, RejectCallback, raise_error
from sca.io.images import format_path
from sca.io.json import is_json_lines_file, open_regular_file, parse_json, parse_json_lines
from sca.output.captioned_image import CaptionedImage, merge_images
from sca.output.coco import read_coco
from sca.output.geojson import read_geojson_records
from sca.output.label_studio import read_label_studio
from sca.output.labelme import read_labelme
from sca.output.parquet import read_parquet_records
from sca.output.records import group_records_by_image

PARQUET_MAGIC = b"PAR1"  # first bytes of a Parquet file


def read_captions(
    path: str | Path,
    skip: SkipCounter | None = None,
    roots: Sequence[Path] | None = None,
    reject: RejectCallback = raise_error,
) -> Iterator[CaptionedImage]:
    """Read a file, or a folder of LabelMe files, image by image. Suffix and content determine the format.

    Args:
        path: File or folder, or a pipe such as /dev/stdin, as typed by a person.
        skip: Counts contents that cannot be kept. Defaults to a warning at the end.
        roots: Folders that image names may start from. Defaults to the current directory and the folder of the file.
            Images are opened only if the file does not record their size.
        reject: Called with an error for each damaged record. Raises it by default.

    Yields:
        An image with its captions.

    Raises:
        InputError: The file has an unsupported format, or a record is damaged.
    """
    path, counter = Path(path), SkipCounter() if skip is None else skip
    roots = (Path(), path.parent) if roots is None else roots
    try:
        if path.is_dir():
            yield from read_labelme(labelme.list_labelme_files(path), path, counter, reject)
        else:
            with open_regular_file(path, require_seekable=True, allow_pipe=True) as file:
                is_parquet = path.suffix.lower() == ".parquet" or file.read(len(PARQUET_MAGIC)) == PARQUET_MAGIC
                file.seek(0)
                if is_parquet:
                    yield from group_records_by_image(read_parquet_records(file, path), counter, reject)
                elif is_json_lines_file(path, file, "image"):
                    yield from group_records_by_image(
                        parse_json_lines(file, format_path(path), reject), counter, reject
                    )
                else:
                    yield from _read_json(file, path, counter, roots, reject)
    except OSError as error:
        raise InputError(f"cannot read {format_path(path)}: {error.strerror or error}; check the name") from error
    if skip is None and (summary := counter.summarize()):
        warnings.warn(f"{format_path(path)}: {summary}", stacklevel=2)


def _read_json(
    file: BinaryIO, path: Path, skip: SkipCounter, roots: Sequence[Path], reject: RejectCallback
) -> Iterator[CaptionedImage]:
    content = parse_json(file.read(), format_path(path), allow_surrogates=True)
    if isinstance(content, list) or label_studio.is_task(content):
        yield from merge_images(read_label_studio(content, path, skip, roots, reject), roots, reject).values()
    elif isinstance(content, dict) and content.get("type") == "FeatureCollection":
        yield from group_records_by_image(read_geojson_records(content, path, reject), skip, reject)
    elif isinstance(content, dict) and "shapes" in content:
        yield from read_labelme([path], path.parent, skip, reject)
    elif isinstance(content, dict) and "annotations" in content:
        yield from merge_images(read_coco(content, path, skip, roots, reject), roots, reject).values()
    else:
        raise InputError(
            f"{format_path(path)} is not a captions file; supported are JSON lines (.jsonl), COCO, Parquet, GeoJSON, "
            "Label Studio and LabelMe"
        )
