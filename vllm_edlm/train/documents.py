"""Where documents come from: text, JSONL and Parquet files, folders of them, hub data sets.

A document is one token sequence whose positions start at 0, exactly as a request's do when it is
served with `prompt_attention = block_causal`: block(i) = i // B, and the prompt's tail stands,
already known, in the first block that holds answer tokens.

Everything is read and tokenised when it is asked for, and anew on every pass, so memory holds one
document at a time (of Parquet, one row group), however large the data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain, groupby
from pathlib import Path
from typing import Any

from datasets import IterableDataset, load_dataset
from pyarrow.parquet import ParquetFile

from vllm_edlm.jsonl import read_jsonl
from vllm_edlm.train.chat import chat_tokens

_BATCH = 256  # rows that are turned from columns into dictionaries at a time

Row = tuple[str, Any]  # the place where it stands, for messages; what stands there


@dataclass(frozen=True)
class Source:
    """A file or folder (.txt, .jsonl, .parquet), or a hub data set's name.

    Attributes:
        split, subset: of a hub data set; a local folder is read whole.
    """

    data: str
    split: str = "train"
    subset: str | None = None


@dataclass(frozen=True)
class Document:
    """One token sequence, which of its tokens the loss may ask for, and where it was read."""

    tokens: list[int]
    in_loss: list[bool]
    where: str = ""

    def __post_init__(self) -> None:
        assert len(self.tokens) == len(self.in_loss), "one loss flag per token"


def read_documents(source: Source, tokenizer: Any) -> Iterable[Document]:
    """The documents of a source, in its order; every iteration begins anew.

    A paragraph of a .txt file is a document; blank lines divide paragraphs. A row of the other
    formats holds one of these, and other columns are left alone:
      - "messages": a chat through the tokenizer's template, with the loss on what the assistant
        says (`chat_tokens`);
      - "prompt" and "response": the same, of a chat of these two;
      - "text": plain text, all of it in the loss; blank text is passed over.
    Every document ends with EOS, which is in the loss.

    Raises:
        ValueError: the source does not exist, has an unknown format or cannot be loaded, or the
            tokenizer has no EOS. While iterating: a row is not as above, or does not suit the
            tokenizer's chat template (with file and line or row); no document is in the source.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no EOS token; documents could not end")
    return _Documents(source.data, _open(source), tokenizer)


@dataclass(frozen=True)
class _Documents(Iterable[Document]):
    name: str
    rows: Callable[[], Iterator[Row]]
    tokenizer: Any

    def __iter__(self) -> Iterator[Document]:
        empty = True
        for where, row in self.rows():
            document = self._document(where, row)
            if document.tokens:
                empty = False
                yield document
        if empty:
            raise ValueError(f"{self.name}: no documents in it")

    def _document(self, where: str, row: Any) -> Document:
        try:
            tokens, in_loss = _tokens(row, self.tokenizer)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        return Document(tokens, in_loss, where)


def _open(source: Source) -> Callable[[], Iterator[Row]]:
    """A function that reads the rows of a source from the beginning."""
    path = Path(source.data)
    if not path.exists() and path.suffix not in _READERS:
        return partial(_hub_rows, source.data, _load(source))
    if source.split != "train" or source.subset is not None:
        raise ValueError(
            f"{path} is not a hub data set: it has no split {source.split!r} and no subset "
            f"{source.subset!r} to choose"
        )
    return partial(_local_rows, _files(path))


def _files(path: Path) -> list[Path]:
    formats = ", ".join(_READERS)
    if not path.exists():
        raise ValueError(f"data file {path} does not exist")
    if path.is_file() and path.suffix not in _READERS:
        raise ValueError(f"{path}: unknown data format {path.suffix!r}; allowed: {formats}")
    files = sorted(p for p in path.rglob("*") if p.suffix in _READERS) if path.is_dir() else [path]
    if not files:
        raise ValueError(f"{path}: no file of a known format in it; allowed: {formats}")
    return files


def _local_rows(files: list[Path]) -> Iterator[Row]:
    for path in files:
        try:
            for place, row in _READERS[path.suffix](path):
                yield f"{path}, {place}", row
        except (OSError, ValueError) as error:  # not readable, UTF-8, JSON, Parquet
            raise ValueError(f"{path}: {error}") from error


def _text_rows(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig") as file:
        paragraphs = ("".join(lines) for blank, lines in groupby(file, str.isspace) if not blank)
        for number, paragraph in enumerate(paragraphs, start=1):
            yield f"paragraph {number}", {"text": paragraph.strip()}


def _parquet_rows(path: Path) -> Iterator[Row]:
    with ParquetFile(path) as file:
        batches = file.iter_batches(batch_size=_BATCH)
        rows = chain.from_iterable(batch.to_pylist() for batch in batches)
        for number, row in enumerate(rows):
            yield f"row {number}", row


_READERS = {".jsonl": read_jsonl, ".parquet": _parquet_rows, ".txt": _text_rows}


def _load(source: Source) -> IterableDataset:
    try:
        return load_dataset(source.data, source.subset, split=source.split, streaming=True)
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"{source.data} is no file or folder here, nor a data set that can be loaded with "
            f"split {source.split!r} and subset {source.subset!r}: {error}"
        ) from error


def _hub_rows(name: str, dataset: IterableDataset) -> Iterator[Row]:
    # By batches, since iter(dataset) would give a data-loader worker that worker's files alone;
    # rows are divided between workers after they are packed.
    batches = dataset.iter(batch_size=_BATCH)
    rows = (
        dict(zip(batch, values, strict=True))
        for batch in batches
        for values in zip(*batch.values(), strict=True)
    )
    for number, row in enumerate(rows):
        yield f"{name}, row {number}", row


def _tokens(row: Any, tokenizer: Any) -> tuple[list[int], list[bool]]:
    match row:
        case {"messages": list(messages)}:
            return chat_tokens(messages, tokenizer)
        case {"prompt": str(prompt), "response": str(response)}:
            ask = {"role": "user", "content": prompt}
            answer = {"role": "assistant", "content": response}
            return chat_tokens([ask, answer], tokenizer)
        case {"text": str(text)}:
            tokens = _text_tokens(text, tokenizer) if text.strip() else []
            return tokens, [True] * len(tokens)
    found = f"the keys {sorted(row)}" if isinstance(row, dict) else f"a {type(row).__name__}"
    raise ValueError(
        "expected the keys 'messages' (a list), 'prompt' and 'response' (text), or 'text', "
        f"got {found}"
    )


def _text_tokens(text: str, tokenizer: Any) -> list[int]:
    # Not verbose: text longer than the model's context is no fault, packing cuts it.
    tokens: list[int] = tokenizer(text, verbose=False).input_ids
    eos = tokenizer.eos_token_id
    return tokens if tokens[-1:] == [eos] else [*tokens, eos]
