"""Write and read Parquet: one row per region, for pandas, polars, DuckDB and `datasets`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from sca_registry.contracts import Caption

from sca.io.atomic import AtomicFile
from sca.io.errors import InputError, OutputError
from sca.io.images import format_path
from sca.io.json import parse_json
from sca.io.text import replace_surrogates
from sca.output.captioned_image import ImageOrSize
from sca.output.jsonl import OPTIONAL_SCORE_FIELDS, caption_to_record

ROWS_PER_GROUP = 5_000  # rows buffered before a group is written


class ParquetWriter:
    """Writer of rows with the fields of JSON Lines; `prompt` and `alternatives` are JSON text. Requires pyarrow."""

    def __init__(self, path: Path, model: str | None = None):
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError as error:
            raise OutputError("parquet requires pyarrow: pip install 'segment-caption-anything[data]'") from error
        rle = pyarrow.struct([("size", pyarrow.list_(pyarrow.int64())), ("counts", pyarrow.string())])
        self._schema = pyarrow.schema(
            [
                ("image", pyarrow.string()),
                ("width", pyarrow.int64()),
                ("height", pyarrow.int64()),
                ("region_id", pyarrow.int64()),
                ("prompt", pyarrow.string()),
                ("box", pyarrow.list_(pyarrow.float64())),
                ("mask", rle),
                ("caption", pyarrow.string()),
                ("score", pyarrow.float64()),
                ("predicted_iou", pyarrow.float64()),
                ("alternatives", pyarrow.string()),
                ("name", pyarrow.string()),
                *((field, pyarrow.float64()) for field in OPTIONAL_SCORE_FIELDS),
                ("model", pyarrow.string()),
            ]
        )
        self._file = AtomicFile(path)
        self._model, self._num_images = model, 0
        self._rows: list[dict[str, Any]] = []
        self._sink = _PyarrowSink(self._file)
        self._writer = pyarrow.parquet.ParquetWriter(self._sink, self._schema, compression="zstd")

    def add(self, path: str, image: ImageOrSize, captions: Sequence[Caption]) -> None:
        for caption in captions:
            caption_record = {**caption_to_record(path, image, caption), "model": self._model}
            caption_record["prompt"] = json.dumps(caption_record["prompt"])
            alternatives = caption_record.get("alternatives")
            caption_record["alternatives"] = None if alternatives is None else json.dumps(alternatives)
            texts = {"image": path, "caption": caption_record["caption"], "name": caption_record.get("name")}
            self._rows.append(
                {**caption_record, **{key: text and replace_surrogates(text) for key, text in texts.items()}}
            )
        self._num_images += 1
        if len(self._rows) >= ROWS_PER_GROUP:
            self._flush()

    def close(self, finished: bool = True) -> None:
        """Finish the file with the completed images. An unfinished run leaves an older file unchanged."""
        if not finished and (self._file.replaces_file or not self._num_images):
            self._discard()
            return
        try:
            self._flush()
            self._writer.close()
        except BaseException:
            self._discard()
            raise
        self._file.commit()

    def _discard(self) -> None:
        self._sink.is_kept = False
        self._file.discard()

    def _flush(self) -> None:
        import pyarrow

        self._writer.write_table(pyarrow.Table.from_pylist(self._rows, self._schema))
        self._rows = []


class _PyarrowSink:
    """File object for pyarrow; with `is_kept` False it discards the footer that pyarrow still writes."""

    closed = False
    is_kept = True

    def __init__(self, file: AtomicFile):
        self._file, self._position = file, 0

    def write(self, data: Any) -> int:
        content = bytes(data)
        if self.is_kept:
            self._file.write(content)
        self._position += len(content)
        return len(content)

    def tell(self) -> int:
        return self._position

    def flush(self) -> None:
        """Do nothing: everything is written already."""

    def close(self) -> None:
        """Do nothing: the creator closes the file."""

    def writable(self) -> bool:
        return True

    def readable(self) -> bool:
        return False

    def seekable(self) -> bool:
        return False


def read_parquet_records(file: BinaryIO, path: Path) -> Iterator[tuple[str, Any]]:
    """Yield the records of a file, each with its location for messages."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise InputError("parquet requires pyarrow: pip install 'segment-caption-anything[data]'") from error
    try:
        row_number = 0
        for batch in pyarrow.parquet.ParquetFile(file).iter_batches(1000):
            for row in batch.to_pylist():
                row_number += 1
                location = f"{format_path(path)}, row {row_number}"
                for json_column in ("prompt", "alternatives"):
                    row[json_column] = (
                        None
                        if row.get(json_column) is None
                        else parse_json(row[json_column], location, allow_surrogates=True)
                    )
                yield location, row
    except pyarrow.ArrowException as error:
        raise InputError(f"{format_path(path)} is not a valid Parquet file: {' '.join(str(error).split())}") from error
