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
    assert JSONL.count(path) == 7
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


def test_jsonl_names(tmp_path: Path) -> None:
    assert JSONL.names(jsonl(tmp_path, b"", b'\xef\xbb\xbf{"prompt": "a", "id": 4}')) == [
        "prompt",
        "id",
    ]
    assert JSONL.names(jsonl(tmp_path, b"no JSON")) == []
    assert JSONL.names(jsonl(tmp_path)) == []
    assert JSONL.count(jsonl(tmp_path)) == 0


def test_jsonl_passes_through_what_it_is_given(tmp_path: Path) -> None:
    huge = b'{"id": 1e3, "n": 1%s, "deep": %s, "text": "\xc3\xa4\\u00e4", "id": 2}'
    lines = [b"{}", huge % (b"0" * 400, b"[" * 500 + b"]" * 500)]
    (shard,) = JSONL.shards(jsonl(tmp_path, b"\xef\xbb\xbf" + lines[0], lines[1]), 2)
    written = JSONL.written(shard, results(JSONL.rows(shard, "")), "").splitlines()
    added = json.dumps(Result("yes", "stop", 1, 1).named("")).encode()
    assert written == [added, lines[1][:-1] + b", " + added[1:]]
    assert JSONL.rows(shard, "")[1] == json.loads(lines[1])


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
    assert PARQUET.count(folder / "in.parquet") == num_rows
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


BEYOND_PYTHON = pa.array([0, 2**62], pa.timestamp("us"))
NO_TEXT = pa.array([b"a", b"\xff"]).view(pa.string())


def test_parquet_passes_through_what_python_has_no_type_for(tmp_path: Path) -> None:
    table = pa.table({"prompt": ["a", "b"], "when": BEYOND_PYTHON, "raw": NO_TEXT, "n": [None, 2]})
    pq.write_table(table, tmp_path / "in.parquet")
    assert PARQUET.names(tmp_path / "in.parquet") == table.column_names
    (shard,) = PARQUET.shards(tmp_path / "in.parquet", 2)
    rows = PARQUET.rows(shard, "")
    assert rows == [{"prompt": "a", "n": None}, {"prompt": "b", "n": 2}]
    written = pq.read_table(pa.BufferReader(PARQUET.written(shard, results(rows), "")))
    assert written.select(table.column_names).equals(table)


@pytest.mark.parametrize("column", [BEYOND_PYTHON, NO_TEXT])
def test_parquet_cell_that_cannot_be_read(tmp_path: Path, column: pa.Array) -> None:
    pq.write_table(pa.table({"seed": column}), tmp_path / "in.parquet")
    (shard,) = PARQUET.shards(tmp_path / "in.parquet", 2)
    good, bad = PARQUET.rows(shard, "")
    assert good == {"seed": column[0].as_py()}
    assert isinstance(bad, ValueError)
    assert "seed cannot be read" in str(bad)


def test_parquet_refused(tmp_path: Path) -> None:
    (path := tmp_path / "in.parquet").write_bytes(b"PAR1 not")
    for read in (PARQUET.names, PARQUET.count):
        with pytest.raises(ValueError, match="not valid Parquet"):
            read(path)
