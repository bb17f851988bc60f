"""Reads Parquet in bounded memory: the size that a column chunk states is checked before the chunk is decoded."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from tiphys.dataio.convert.infer import texts
from tiphys.dataio.convert.limits import EPISODE_BYTES, RECORD_BYTES, check_shape
from tiphys.dataio.convert.source import Source, SourceUnavailable
from tiphys.dataio.episode import DataError

_BATCH_ROWS = 4096  # rows decoded at a time


@contextmanager
def open_parquet(source: Source, path: str) -> Iterator[Any]:
    """A pyarrow ParquetFile. Raises DataError if the file is not Parquet or states sizes over the limits."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with source.open(path) as stream:
        try:
            file = pq.ParquetFile(stream, thrift_string_size_limit=RECORD_BYTES, thrift_container_size_limit=10_000_000)
            _check_sizes(file.metadata, source.where(path))
            _ = file.schema_arrow.names
        except SourceUnavailable:
            raise
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise DataError(f"{source.where(path)}: not a readable Parquet file ({_one_line(error)})") from None
        yield file


def _check_sizes(metadata: Any, where: str) -> None:
    for group in range(metadata.num_row_groups):
        for column in range(metadata.row_group(group).num_columns):
            chunk = metadata.row_group(group).column(column)
            if max(chunk.total_uncompressed_size, chunk.num_values * 8) > EPISODE_BYTES or chunk.num_values < 0:
                raise DataError(
                    f"{where}, row group {group}, column {chunk.path_in_schema}: {chunk.num_values:,} values in "
                    f"{chunk.total_uncompressed_size:,} bytes; the limit is {EPISODE_BYTES:,} bytes"
                )


def batches(file: Any, columns: Sequence[str], where: str, rows: int = _BATCH_ROWS) -> Iterator[Any]:
    """Record batches of these columns, at most `rows` rows each, in the order of the file."""
    import pyarrow as pa

    try:
        yield from file.iter_batches(batch_size=rows, columns=list(columns), use_threads=False)
    except SourceUnavailable:
        raise
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{where}: the Parquet data is damaged ({_one_line(error)})") from None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def read_columns(source: Source, path: str, columns: Sequence[str] | None = None) -> dict[str, list[Any]]:
    """A small metadata table as Python lists. Names in `columns` that the file does not have are ignored."""
    with open_parquet(source, path) as file:
        have = list(file.schema_arrow.names)
        names = have if columns is None else [c for c in columns if c in have]
        out: dict[str, list[Any]] = {n: [] for n in names}
        for batch in batches(file, names, source.where(path)):
            for name in names:
                out[name] += values(batch.column(batch.schema.get_field_index(name)), f"{source.where(path)}, {name}")
    return out


def is_text(kind: Any) -> bool:
    """Whether the values of an Arrow type are texts, in any of the forms that Arrow stores texts in."""
    import pyarrow as pa

    if isinstance(kind, pa.BaseExtensionType):
        return is_text(kind.storage_type)
    if pa.types.is_dictionary(kind) or pa.types.is_run_end_encoded(kind):
        return is_text(kind.value_type)
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def plain(column: Any, where: str) -> Any:
    """An Arrow array without extension types, dictionaries and run-end encoding."""
    import pyarrow as pa
    import pyarrow.compute as pc

    try:
        while True:
            kind = column.type
            if isinstance(column, pa.ExtensionArray):
                column = column.storage
            elif pa.types.is_dictionary(kind):
                column = column.dictionary_decode()
            elif pa.types.is_run_end_encoded(kind):
                column = pc.run_end_decode(column)
            else:
                return column
    except pa.ArrowException as error:
        raise DataError(f"{where}: Arrow type {column.type} cannot be read ({_one_line(error)})") from None


def values(column: Any, where: str) -> list[Any]:
    """An Arrow array as Python values. Raises DataError if a text is not UTF-8."""
    import pyarrow as pa

    try:
        return list(column.to_pylist())
    except (UnicodeDecodeError, ValueError, OverflowError, pa.ArrowException) as error:
        raise DataError(f"{where}: some values cannot be read ({_one_line(error)})") from None


def to_rows(column: Any, where: str, shape: Sequence[int] | None = None) -> np.ndarray:
    """An Arrow array of numbers, texts or (nested) lists of numbers as a NumPy array [rows, *shape].

    Raises DataError if values are missing or if lists have different lengths.
    """
    import pyarrow as pa

    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    if isinstance(column, pa.ChunkedArray):  # it has no chunk, or is too large for one
        column = pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)
    column = plain(column, where)
    if column.null_count:
        raise DataError(f"{where}: {column.null_count} values are missing (null)")
    if is_text(column.type):
        return texts(values(column, where), where)
    rows, inner = len(column), []
    while _is_list(column.type):
        size = _list_size(column, where)
        column = plain(column.flatten(), where)
        inner.append(size)
        if column.null_count:
            raise DataError(f"{where}: values inside the lists are missing (null)")
    if not (pa.types.is_integer(column.type) or pa.types.is_floating(column.type) or pa.types.is_boolean(column.type)):
        raise DataError(f"{where}: Arrow type {column.type} cannot be read; numbers, texts and lists of numbers can")
    array = column.to_numpy(zero_copy_only=False)
    target = tuple(inner) if shape is None else tuple(shape)
    check_shape((rows, *target), array.dtype.itemsize, where)
    if rows * math.prod(target) != array.size:
        raise DataError(f"{where}: {array.size} values do not make {rows} rows of shape {target}")
    return array.reshape((rows, *target))


def _is_list(kind: Any) -> bool:
    import pyarrow.types as of

    return bool(
        of.is_list(kind)
        or of.is_large_list(kind)
        or of.is_fixed_size_list(kind)
        or of.is_list_view(kind)
        or of.is_large_list_view(kind)
    )


def _list_size(column: Any, where: str) -> int:
    """The length of the lists of a column. Raises DataError if they differ."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if pa.types.is_fixed_size_list(column.type):
        return int(column.type.list_size)
    if not len(column):
        return 0
    sizes = pc.list_value_length(column)
    low, high = pc.min(sizes).as_py(), pc.max(sizes).as_py()
    if low != high:
        raise DataError(f"{where}: lists have {low} to {high} values; all rows must have the same number")
    return int(low)
