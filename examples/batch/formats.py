"""Formats of a batch: how rows are read, cut into shards, and written with what is added to them.

A shard travels as bytes: rows need no common schema on their way, and those of Parquet keep theirs.
"""

import io
import json
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from examples.batch.rows import Result, check_names
from vllm_edlm.options import shown

Row = dict[str, Any]
# The key in the output of a line of JSONL that is no row.
LINE = "line"
ADDED = {
    "answer": pa.string(),
    "finish_reason": pa.string(),
    "tokens": pa.int64(),
    "forwards": pa.int64(),
    "error": pa.string(),
}


class Format(Protocol):
    """One format; `prefix` stands before the names of what is added to rows."""

    def count(self, path: Path, prefix: str) -> int:
        """Rows of a file.

        Raises:
            ValueError: it cannot be read, or its rows have names of what is added.
        """

    def shards(self, path: Path, num_rows: int) -> Iterator[bytes]:
        """The rows of a file, `num_rows` at a time; the last shard may have fewer."""

    def rows(self, shard: bytes, prefix: str) -> list[Row | ValueError]:
        """The rows of a shard; an error in place of what is none."""

    def written(self, shard: bytes, results: Sequence[Result], prefix: str) -> bytes:
        """The output file of a shard: its rows, each with its result."""


class Jsonl:
    """A JSON object a line; empty lines are skipped."""

    def count(self, path: Path, prefix: str) -> int:
        with path.open("rb") as file:
            lines = _lines(file)
            if (first := next(lines, None)) is None:
                return 0
            # Any later row with such names is an error row.
            if isinstance(row := _row(first), dict):
                check_names(row, prefix)
            return 1 + sum(1 for _ in lines)

    def shards(self, path: Path, num_rows: int) -> Iterator[bytes]:
        with path.open("rb") as file:
            lines = _lines(file)
            while shard := list(islice(lines, num_rows)):
                yield b"\n".join(shard)

    def rows(self, shard: bytes, prefix: str) -> list[Row | ValueError]:
        return [_named_row(line, prefix) for line in shard.split(b"\n")]

    def written(self, shard: bytes, results: Sequence[Result], prefix: str) -> bytes:
        lines = shard.split(b"\n")
        rows = zip(lines, self.rows(shard, prefix), results, strict=True)
        return b"".join(_written(line, row, result.named(prefix)) for line, row, result in rows)


def _lines(file: BinaryIO) -> Iterator[bytes]:
    return (stripped for line in file if (stripped := line.strip()))


def _row(line: bytes) -> Row | ValueError:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        return ValueError(f"not valid JSON: {error}")
    return row if isinstance(row, dict) else ValueError(f"not an object: {shown(row)}")


def _named_row(line: bytes, prefix: str) -> Row | ValueError:
    row = _row(line)
    try:
        check_names(row if isinstance(row, dict) else (), prefix)
    except ValueError as error:
        return error
    return row


def _written(line: bytes, row: Row | ValueError, added: Row) -> bytes:
    kept = row if isinstance(row, dict) else {LINE: line.decode(errors="replace")}
    return json.dumps(kept | added).encode() + b"\n"


class Parquet:
    """A row group or many; the output has the input's schema and what is added."""

    def count(self, path: Path, prefix: str) -> int:
        try:
            with pq.ParquetFile(path) as file:
                check_names(file.schema_arrow.names, prefix)
                return int(file.metadata.num_rows)
        except pa.ArrowInvalid as error:
            raise ValueError(f"not valid Parquet: {error}") from error

    def shards(self, path: Path, num_rows: int) -> Iterator[bytes]:
        with pq.ParquetFile(path) as file:
            schema, held, missing = file.schema_arrow, [], num_rows
            # Batches end with a row group, shards do not.
            for batch in file.iter_batches(batch_size=num_rows):
                while batch.num_rows:
                    held.append(batch.slice(0, missing))
                    batch = batch.slice(held[-1].num_rows)
                    missing -= held[-1].num_rows
                    if not missing:
                        yield _ipc(pa.Table.from_batches(held, schema))
                        held, missing = [], num_rows
            if held:
                yield _ipc(pa.Table.from_batches(held, schema))

    def rows(self, shard: bytes, prefix: str) -> list[Row | ValueError]:
        return list(_table(shard).to_pylist())

    def written(self, shard: bytes, results: Sequence[Result], prefix: str) -> bytes:
        table = _table(shard)
        for name, kind in ADDED.items():
            values = [getattr(result, name) for result in results]
            table = table.append_column(prefix + name, pa.array(values, kind))
        pq.write_table(table, sink := io.BytesIO())
        return sink.getvalue()


def _ipc(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    return sink.getvalue()


def _table(shard: bytes) -> pa.Table:
    return pa.ipc.open_stream(shard).read_all()


FORMATS: dict[str, Format] = {".jsonl": Jsonl(), ".parquet": Parquet()}


def unfinished_shards(item: Row, done: set[int], num_rows: int) -> Iterator[Row]:
    """The shards of a file that are not done, read as Ray Data asks for them.

    Args:
        item: `source`, the file.
        done: first rows of the shards that are done.
        num_rows: of a shard.
    """
    source = Path(item["source"])
    for i, shard in enumerate(FORMATS[source.suffix].shards(source, num_rows)):
        if i * num_rows not in done:
            yield {"first": i * num_rows, "rows": shard}
