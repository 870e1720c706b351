"""JSONL and Parquet of a batch: cut into shards and written, no row changes or goes missing."""

import json
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from examples.batch.formats import ADDED, FORMATS, unfinished_shards
from examples.batch.rows import Result

JSONL, PARQUET = FORMATS[".jsonl"], FORMATS[".parquet"]


def results(rows: Sequence[object]) -> list[Result]:
    return [
        Result(error=str(row)) if isinstance(row, ValueError) else Result("yes", "stop", 1, 1)
        for row in rows
    ]


def jsonl(folder: Path, *lines: bytes) -> Path:
    (path := folder / "in.jsonl").write_bytes(b"\n".join(lines))
    return path


def test_jsonl_shards(tmp_path: Path) -> None:
    lines = [json.dumps({"id": i}).encode() for i in range(7)]
    path = jsonl(tmp_path, *lines[:3], b"", b"  \r", *lines[3:])
    assert JSONL.count(path, "") == 7
    shards = list(JSONL.shards(path, 3))
    assert [len(JSONL.rows(shard, "")) for shard in shards] == [3, 3, 1]
    assert b"\n".join(shards) == b"\n".join(lines)
    todo = unfinished_shards({"source": str(path)}, done={0, 6}, num_rows=3)
    assert list(todo) == [{"first": 3, "rows": shards[1]}]


def test_jsonl_lines_that_are_no_rows() -> None:
    lines = [b'{"id": 0}', b'{"id":', b"[1]", b'"\xff"', b'{"answer": 4}', b"[" * 100_000]
    shard = b"\n".join(lines)
    rows = JSONL.rows(shard, "")
    written = [json.loads(line) for line in JSONL.written(shard, results(rows), "").splitlines()]
    assert written[0] == {"id": 0} | Result("yes", "stop", 1, 1).named("")
    texts = ["not valid JSON", "not an object: [1]", "not valid JSON", "'answer'", "not valid JSON"]
    for line, row, text in zip(lines[1:], written[1:], texts, strict=True):
        assert row["line"] == line.decode(errors="replace")
        assert row["answer"] is None
        assert text in row["error"]


def test_jsonl_names_are_refused_at_once(tmp_path: Path) -> None:
    path = jsonl(tmp_path, b'{"prompt": "a", "answer": 4}')
    with pytest.raises(ValueError, match="'answer'"):
        JSONL.count(path, "")
    assert JSONL.count(path, "my_") == 1
    assert JSONL.count(jsonl(tmp_path), "") == 0


def parquet(folder: Path, num_rows: int, row_group: int) -> pa.Table:
    table = pa.table(
        {
            "id": pa.array(range(num_rows), pa.int16()),
            "messages": [[{"role": "user", "content": str(i)}] for i in range(num_rows)],
            "seed": pa.array([i if i % 2 else None for i in range(num_rows)], pa.int64()),
        }
    )
    pq.write_table(table, folder / "in.parquet", row_group_size=row_group)
    return table


@given(st.integers(1, 20), st.integers(1, 20), st.integers(1, 20))
def test_parquet_shards(
    tmp_path_factory: pytest.TempPathFactory, num_rows: int, row_group: int, per_shard: int
) -> None:
    folder = tmp_path_factory.mktemp("parquet")
    table = parquet(folder, num_rows, row_group)
    assert PARQUET.count(folder / "in.parquet", "") == num_rows
    written = []
    for shard in PARQUET.shards(folder / "in.parquet", per_shard):
        rows = PARQUET.rows(shard, "my_")
        written.append(pq.read_table(pa.BufferReader(PARQUET.written(shard, results(rows), "my_"))))
    sizes = [part.num_rows for part in written]
    assert all(size == per_shard for size in sizes[:-1])
    whole = pa.concat_tables(written)
    assert whole.select(table.column_names).equals(table)
    assert whole.column_names == [*table.column_names, *("my_" + name for name in ADDED)]
    assert whole["my_answer"].to_pylist() == ["yes"] * num_rows
    assert whole["my_error"].to_pylist() == [None] * num_rows


def test_parquet_refused(tmp_path: Path) -> None:
    (path := tmp_path / "in.parquet").write_bytes(b"PAR1 not")
    with pytest.raises(ValueError, match="not valid Parquet"):
        PARQUET.count(path, "")
    pq.write_table(pa.table({"error": [1]}), path)
    with pytest.raises(ValueError, match="'error'"):
        PARQUET.count(path, "")
