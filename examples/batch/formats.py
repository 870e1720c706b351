"""Formats of a batch: how rows are read, cut into shards, and written with what is added to them.

A shard travels as bytes: rows need no common schema on their way, and those of Parquet keep theirs.
What is passed through is written as it was read, whatever it is.
"""

import codecs
import io
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from examples.batch.rows import Result, check_names, is_read
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

    def names(self, path: Path) -> list[str]:
        """Names that all rows of a file have, or else the first one.

        Raises:
            ValueError: it cannot be read.
        """

    def count(self, path: Path) -> int:
        """Rows of a file.

        Raises:
            ValueError: it cannot be read.
        """

    def shards(self, path: Path, num_rows: int) -> Iterator[bytes]:
        """The rows of a file, `num_rows` at a time; the last shard may have fewer."""

    def rows(self, shard: bytes, prefix: str) -> list[Row | ValueError]:
        """What is read of the rows of a shard; an error in place of what cannot be."""

    def written(self, shard: bytes, results: Sequence[Result], prefix: str) -> bytes:
        """The output file of a shard: its rows, each with its result."""


class Jsonl:
    """A JSON object a line; empty lines are skipped."""

    def names(self, path: Path) -> list[str]:
        with path.open("rb") as file:
            row = _row(next(_lines(file), b"{}"))
        return list(row) if isinstance(row, dict) else []

    def count(self, path: Path) -> int:
        with path.open("rb") as file:
            return sum(1 for _ in _lines(file))

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
    # Some editors begin a file with a byte order mark.
    return (stripped for line in file if (stripped := line.removeprefix(codecs.BOM_UTF8).strip()))


def _row(line: bytes) -> Row | ValueError:
    try:
        row = json.loads(line.decode())
        return row if isinstance(row, dict) else ValueError(f"not an object: {shown(row)}")
    except (ValueError, RecursionError) as error:
        return ValueError(f"not valid JSON: {error}")


def _named_row(line: bytes, prefix: str) -> Row | ValueError:
    row = _row(line)
    try:
        check_names(row if isinstance(row, dict) else (), prefix)
    except ValueError as error:
        return error
    return row


def _written(line: bytes, row: Row | ValueError, added: Row) -> bytes:
    if isinstance(row, ValueError):
        return json.dumps({LINE: line.decode(errors="replace")} | added).encode() + b"\n"
    # The row's own text, with more before its last brace.
    return line[:-1] + (b", " if row else b"") + json.dumps(added).encode()[1:] + b"\n"


class Parquet:
    """A row group or many; the output has the input's schema and what is added."""

    def names(self, path: Path) -> list[str]:
        with _parquet(path) as file:
            return list(file.schema_arrow.names)

    def count(self, path: Path) -> int:
        with _parquet(path) as file:
            return int(file.metadata.num_rows)

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
        table = _table(shard)
        names = [name for name in table.column_names if is_read(name)]
        return [_cells(table, names, i) for i in range(table.num_rows)]

    def written(self, shard: bytes, results: Sequence[Result], prefix: str) -> bytes:
        table = _table(shard)
        for name, kind in ADDED.items():
            values = [getattr(result, name) for result in results]
            table = table.append_column(prefix + name, pa.array(values, kind))
        pq.write_table(table, sink := io.BytesIO())
        return sink.getvalue()


@contextmanager
def _parquet(path: Path) -> Iterator[pq.ParquetFile]:
    try:
        with pq.ParquetFile(path) as file:
            yield file
    except pa.ArrowInvalid as error:
        raise ValueError(f"not valid Parquet: {error}") from error


def _cells(table: pa.Table, names: Sequence[str], i: int) -> Row | ValueError:
    row = {}
    for name in names:
        try:
            row[name] = table[name][i].as_py()
        except Exception as error:
            # Arrow has values that Python has not, and many errors to say so.
            return ValueError(f"{name} cannot be read: {type(error).__name__}: {error}")
    return row


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
