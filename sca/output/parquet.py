"""Parquet: a row a region, for pandas, polars, DuckDB and `datasets`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image
from sca_registry.contracts import Caption

from sca.io.atomic import AtomicFile
from sca.io.errors import InputError, OutputError
from sca.io.images import show
from sca.io.json import parse_json
from sca.output.jsonl import record

ROWS = 5_000  # of a group: what is held before it is written


class Parquet:
    """The columns are the fields of a line of JSON lines; `prompt` and `others` are JSON text. Needs pyarrow."""

    def __init__(self, path: Path, model: str | None = None):
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError as error:
            raise OutputError("parquet needs pyarrow: pip install 'segment-caption-anything[data]'") from error
        rle = pyarrow.struct([("size", pyarrow.list_(pyarrow.int64())), ("counts", pyarrow.string())])
        self._schema = pyarrow.schema(
            [
                ("image", pyarrow.string()),
                ("width", pyarrow.int64()),
                ("height", pyarrow.int64()),
                ("region", pyarrow.int64()),
                ("prompt", pyarrow.string()),
                ("box", pyarrow.list_(pyarrow.float64())),
                ("mask", rle),
                ("caption", pyarrow.string()),
                ("score", pyarrow.float64()),
                ("iou", pyarrow.float64()),
                ("others", pyarrow.string()),
                ("model", pyarrow.string()),
            ]
        )
        self._file = AtomicFile(path)
        self._model, self._rows, self._images = model, [], 0
        self._sink = _Sink(self._file)
        self._writer = pyarrow.parquet.ParquetWriter(self._sink, self._schema, compression="zstd")

    def add(self, path: str, image: Image.Image, captions: Sequence[Caption]) -> None:
        for caption in captions:
            plain = {**record(path, image, caption), "model": self._model}
            plain["prompt"] = json.dumps(plain["prompt"])
            plain["others"] = json.dumps(plain["others"]) if "others" in plain else None
            self._rows.append({**plain, "image": _text(path), "caption": _text(plain["caption"])})
        self._images += 1
        if len(self._rows) >= ROWS:
            self._flush()

    def close(self, finished: bool = True) -> None:
        """Keep the images that are done. A run that did not finish leaves an older file unchanged."""
        if not finished and (self._file.replaces or not self._images):
            self._drop()
            return
        try:
            self._flush()
            self._writer.close()
        except BaseException:
            self._drop()
            raise
        self._file.keep()

    def _drop(self) -> None:
        self._sink.kept = False
        self._file.drop()

    def _flush(self) -> None:
        import pyarrow

        self._writer.write_table(pyarrow.Table.from_pylist(self._rows, self._schema))
        self._rows = []


class _Sink:
    """What pyarrow writes to; nothing is `kept` of the end that it still writes to a file that was dropped."""

    closed = False
    kept = True

    def __init__(self, file: AtomicFile):
        self._file, self._place = file, 0

    def write(self, piece: Any) -> int:
        content = bytes(piece)
        if self.kept:
            self._file.write(content)
        self._place += len(content)
        return len(content)

    def tell(self) -> int:
        return self._place

    def flush(self) -> None:
        """All is written already."""

    def close(self) -> None:
        """The file is closed by who made it."""

    def writable(self) -> bool:
        return True

    def readable(self) -> bool:
        return False

    def seekable(self) -> bool:
        return False


def _text(value: str) -> str:
    """Without halves of letters, which UTF-8 does not have."""
    return value.encode("utf-8", "replace").decode()


def read_rows(file: BinaryIO, path: Path) -> Iterator[tuple[str, Any]]:
    """Read the records of a file, each with its place for messages."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise InputError("parquet needs pyarrow: pip install 'segment-caption-anything[data]'") from error
    try:
        number = 0
        for batch in pyarrow.parquet.ParquetFile(file).iter_batches(1000):
            for row in batch.to_pylist():
                number += 1
                where = f"{show(path)}, row {number}"
                for name in ("prompt", "others"):
                    row[name] = None if row.get(name) is None else parse_json(row[name], where, surrogates=True)
                yield where, row
    except pyarrow.ArrowException as error:
        raise InputError(f"{show(path)} is not a whole Parquet file: {' '.join(str(error).split())}") from error
