"""Every form in which Arrow stores texts and lists is read; other types are refused by file and column."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.dataio.convert.test_convert_formats import read_all, reader
from tests.dataio.convert.test_convert_safety import problem
from tiphys.dataio.convert.parquet import to_rows
from tiphys.dataio.episode import DataError

WORDS = ["a", "b", "a"]


class Tagged(pa.ExtensionType):
    def __init__(self, storage: Any) -> None:
        super().__init__(storage, "tests.tagged")

    def __arrow_ext_serialize__(self) -> bytes:
        return b""


def texts() -> list[Any]:
    plain = pa.array(WORDS)
    return [
        plain.dictionary_encode(),
        plain.cast(pa.large_string()),
        plain.cast(pa.string_view()),
        plain.cast(pa.large_string()).dictionary_encode(),
        pa.ExtensionArray.from_storage(Tagged(pa.string()), plain),
        pa.RunEndEncodedArray.from_arrays(pa.array([1, 2, 3], pa.int32()), plain),
    ]


@pytest.mark.parametrize("column", texts(), ids=lambda c: str(c.type)[:30])
def test_texts(column: Any) -> None:
    assert to_rows(column, "x").tolist() == WORDS


@pytest.mark.parametrize("column", texts()[:4], ids=lambda c: str(c.type)[:30])
def test_a_column_of_documents(column: Any, tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    assert [e.fields["text"] for e in read_all(reader(tmp_path, "text")).values()] == WORDS


def test_a_column_without_any_value(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": pa.nulls(2)}), tmp_path / "a.parquet")
    assert problem(tmp_path, "text") == "the row has no text"
    with pytest.raises(DataError, match="x: 2 values are missing"):
        to_rows(pa.nulls(2), "x")


@pytest.mark.parametrize(
    "kind",
    [
        pa.list_(pa.float32()),
        pa.large_list(pa.float32()),
        pa.list_(pa.float32(), 2),
        pa.list_view(pa.float32()),
        pa.large_list_view(pa.float32()),
    ],
    ids=str,
)
def test_lists(kind: Any) -> None:
    column = pa.array([[9, 9], [1, 2], [3, 4]], kind)
    assert to_rows(column.slice(1), "x").tolist() == [[1, 2], [3, 4]]
    assert to_rows(pa.chunked_array([column[:1], column[1:]]), "x", (2,)).shape == (3, 2)
    wrapped = pa.ExtensionArray.from_storage(Tagged(kind), column)
    np.testing.assert_array_equal(to_rows(wrapped, "x"), to_rows(column, "x"))


def test_categories_of_numbers_and_nulls() -> None:
    assert to_rows(pa.array([5, 7, 5]).dictionary_encode(), "x").tolist() == [5, 7, 5]
    with pytest.raises(DataError, match="x: 1 values are missing"):
        to_rows(pa.array(["a", None]).dictionary_encode(), "x")


def test_other_types_are_refused_by_file_and_column(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": pa.array([[1]])}), tmp_path / "a.parquet")
    assert "a.parquet: column 'text' holds list" in problem(tmp_path, "text")
    with pytest.raises(DataError, match=r"a\.parquet, time: Arrow type date32"):
        to_rows(pa.array([1], pa.int32()).cast(pa.date32()), "a.parquet, time")
