"""Rows of the Parquet files of a dataset. Requires the extra `data`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sca.data.record_parsing import make_read_error
from sca.io.errors import InputError

if TYPE_CHECKING:
    from pyarrow.parquet import ParquetFile


def open_parquet(path: Path, columns: Sequence[str]) -> ParquetFile:
    """Open a Parquet file.

    Args:
        path: Parquet file.
        columns: Columns that it must have.

    Returns:
        The open file.

    Raises:
        InputError: The file cannot be read, is not a Parquet file, or lacks a column.
    """
    import pyarrow
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(path)
    except OSError as error:
        raise (make_read_error(path, error) if error.errno else _make_damage_error(path, error)) from error
    except pyarrow.ArrowException as error:
        raise InputError(f"{path} is not a Parquet file: {error}") from error
    names = file.schema_arrow.names
    if missing := [name for name in columns if name not in names]:
        raise InputError(f"{path} has no column {', '.join(missing)}; it has: {', '.join(names)}")
    return file


def iter_parquet_rows(path: Path, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Iterate over the rows of a Parquet file, with one row group in memory.

    Args:
        path: Parquet file.
        columns: Columns to read.

    Yields:
        Each row by column.

    Raises:
        InputError: As for `open_parquet` and `read_row_group`.
    """
    file = open_parquet(path, columns)
    for group in range(file.num_row_groups):
        yield from read_row_group(path, file, group, columns)


def read_row_group(path: Path, file: ParquetFile, group: int, columns: Sequence[str]) -> list[dict[str, Any]]:
    """Read a row group of a Parquet file.

    Args:
        path: Parquet file, for messages.
        file: The open file.
        group: Index of the row group.
        columns: Columns to read.

    Returns:
        The rows, each by column.

    Raises:
        InputError: The row group is truncated or damaged.
    """
    import pyarrow

    try:
        return file.read_row_group(group, columns=list(columns)).to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise _make_damage_error(f"{path}, row group {group + 1}", error) from error


def _make_damage_error(subject: str | Path, error: Exception) -> InputError:
    return InputError(f"{subject} is damaged ({' '.join(str(error).split())}); copy or download it again")
