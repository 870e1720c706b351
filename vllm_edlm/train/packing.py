"""Documents packed into rows of equal length, on the grid of blocks."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import count, islice

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from vllm_edlm.train.documents import Document

logger = logging.getLogger(__name__)

NO_DOCUMENT = -1  # the document id of the pad at a row's end
_OPEN_ROWS = 32  # rows that a document may still go to


def fill_last_block(document: Document, block_length: int, eos_token_id: int) -> Document:
    """Fill the document up to whole blocks with EOS that is in the loss.

    A served block is always denoised as a whole, so the model has to know what follows an end.
    """
    missing = -len(document.tokens) % block_length
    tokens = document.tokens + [eos_token_id] * missing
    return Document(tokens, document.in_loss + [True] * missing, document.where)


def cut(document: Document, row_length: int) -> list[Document]:
    """Pieces of at most `row_length` tokens that keep every token; each is a document of its own.

    Only what is in the loss everywhere, plain text, can be cut: a piece of an answer would have
    lost its prompt.

    Raises:
        ValueError: the document is longer than a row and holds tokens that are not in the loss.
    """
    length = len(document.tokens)
    if length > row_length and not all(document.in_loss):
        raise ValueError(
            f"{document.where}: a document of {length} tokens; a row holds {row_length}, and a "
            "prompt may not be parted from its answer"
        )
    pieces = [slice(start, start + row_length) for start in range(0, length, row_length)]
    return [Document(document.tokens[p], document.in_loss[p], document.where) for p in pieces]


def shuffled(
    documents: Iterable[Document], buffer_size: int, rng: random.Random
) -> Iterator[Document]:
    """The documents, each drawn from those that wait in a buffer; size 0 keeps their order."""
    buffer: list[Document] = []
    for document in documents:
        buffer.append(document)
        if len(buffer) > buffer_size:
            place = rng.randrange(len(buffer))
            buffer[place], buffer[-1] = buffer[-1], buffer[place]
            yield buffer.pop()
    rng.shuffle(buffer)
    yield from buffer


@dataclass(eq=False)
class _OpenRow:
    free: int
    documents: list[Document] = field(default_factory=list)

    def add(self, document: Document) -> None:
        self.documents.append(document)
        self.free -= len(document.tokens)


def pack(documents: Iterable[Document], row_length: int) -> Iterator[list[Document]]:
    """First fit over a few open rows: a full row leaves at once, else the oldest makes room.

    Depends on the order and the lengths alone. No document may be longer than `row_length`.
    """
    rows: list[_OpenRow] = []
    for document in documents:
        row = next((row for row in rows if row.free >= len(document.tokens)), None)
        if row is None:
            row = _OpenRow(row_length)
            rows.append(row)
        row.add(document)
        if row.free == 0:
            rows.remove(row)
            yield row.documents
        elif len(rows) > _OPEN_ROWS:
            yield rows.pop(0).documents
    yield from (row.documents for row in rows)


class PackedRows(IterableDataset[dict[str, Tensor]]):
    """Endless rows of L tokens, whole documents on the block grid; the data begins anew at its end.

    A row holds, each of shape [L]: `tokens` (long), `in_loss` (bool), `position_ids` (from 0 in
    every document) and `document_ids` (`NO_DOCUMENT` on the pad), and the scalar `sample`: the
    running index of the row over all passes, which keys its corruption. The rows are a function of
    documents, lengths and seed alone, so whoever skips n rows goes on with row n. Of data-loader
    workers, each reads everything and yields its share of the rows.

    A prompt with its answer that is longer than a row is an error: it cannot be cut, and examples
    that vanish silently are missed by nobody. `skip_long` leaves them out and logs how many.

    Args:
        row_length: L, tokens; a multiple of `block_length`.
        block_length: tokens that documents are filled up to whole multiples of.
        shuffle_buffer: documents (long ones: pieces) held in memory to draw the next one from;
            0 keeps the order of the data.
        seed: keys the shuffle, together with the number of the pass.

    Raises:
        ValueError: a length or the buffer does not fit. While iterating: a document does not fit,
            or a pass gives no row.
    """

    def __init__(
        self,
        documents: Iterable[Document],
        row_length: int,
        block_length: int,
        eos_token_id: int,
        shuffle_buffer: int = 0,
        seed: int = 0,
        skip_long: bool = False,
    ) -> None:
        if block_length < 1:
            raise ValueError(f"block length must be at least 1, got {block_length}")
        if row_length < 1 or row_length % block_length:
            raise ValueError(
                f"row length {row_length} is not a multiple of the block length {block_length}"
            )
        if shuffle_buffer < 0:
            raise ValueError(f"shuffle buffer must be at least 0, got {shuffle_buffer}")
        self._documents = documents
        self._row_length = row_length
        self._block_length = block_length
        self._eos = eos_token_id
        self._shuffle_buffer = shuffle_buffer
        self._seed = seed
        self._skip_long = skip_long

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        worker = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        for sample, documents in islice(enumerate(self._rows()), first, None, step):
            yield self._tensors(documents) | {"sample": torch.tensor(sample)}

    def _rows(self) -> Iterator[list[Document]]:
        for number in count():
            rng = random.Random(f"{self._seed}/{number}")
            pieces = shuffled(self._pieces(), self._shuffle_buffer, rng)
            rows = pack(pieces, self._row_length)
            first = next(rows, None)
            if first is None:
                raise ValueError("a pass through the data gave no row: it has no documents left")
            yield first
            yield from rows

    def _pieces(self) -> Iterator[Document]:
        skipped = 0
        for document in self._documents:
            whole_blocks = fill_last_block(document, self._block_length, self._eos)
            try:
                yield from cut(whole_blocks, self._row_length)
            except ValueError:
                if not self._skip_long:
                    raise
                skipped += 1
        if skipped:
            logger.warning(
                "left out %d documents longer than a row of %d tokens", skipped, self._row_length
            )

    def _tensors(self, documents: list[Document]) -> dict[str, Tensor]:
        pad = self._row_length - sum(len(d.tokens) for d in documents)
        parts = [*documents, Document([self._eos] * pad, [False] * pad)]
        ids = torch.tensor([*range(len(documents)), NO_DOCUMENT])
        lengths = torch.tensor([len(part.tokens) for part in parts])
        return {
            "tokens": torch.tensor([token for part in parts for token in part.tokens]),
            "in_loss": torch.tensor([wanted for part in parts for wanted in part.in_loss]),
            "position_ids": torch.cat([torch.arange(len(part.tokens)) for part in parts]),
            "document_ids": ids.repeat_interleave(lengths),
        }
