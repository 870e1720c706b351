"""Training data: JSONL or plain text -> documents -> packed rows of whole blocks.

A document is one token sequence whose positions start at 0, exactly as a request's do when it is
served with `prompt_attention = block_causal`: block(i) = i // B, and the prompt's tail stands,
already known, in the first block that holds answer tokens.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

# Documents are padded to whole blocks, and the pad of a row's end belongs to no document.
NO_DOCUMENT = -1


@dataclass(frozen=True)
class Document:
    """One token sequence and which of its tokens the loss may ask for."""

    tokens: list[int]
    in_loss: list[bool]

    def __post_init__(self) -> None:
        assert len(self.tokens) == len(self.in_loss), "one loss flag per token"


def read_documents(path: Path, tokenizer: Any) -> list[Document]:
    """Read `.jsonl` (prompt/response or text per line) or `.txt` (a document per blank-line block).

    Raises:
        ValueError: the file holds no document, a line is not valid, or the suffix is unknown.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no EOS token; documents could not end")
    if path.suffix == ".jsonl":
        documents = [_jsonl_document(line, where, tokenizer) for where, line in _lines(path)]
    elif path.suffix == ".txt":
        texts = path.read_text(encoding="utf-8").split("\n\n")
        documents = [_text_document(text.strip(), tokenizer) for text in texts if text.strip()]
    else:
        raise ValueError(f"{path}: unknown data format {path.suffix!r}; use .jsonl or .txt")
    if not documents:
        raise ValueError(f"{path}: no documents in it")
    return documents


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield f"{path}, line {number}", line


def _jsonl_document(line: str, where: str, tokenizer: Any) -> Document:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not valid JSON ({error})") from error
    if isinstance(row, dict) and isinstance(row.get("text"), str):
        return _text_document(row["text"], tokenizer)
    if not isinstance(row, dict) or not all(
        isinstance(row.get(key), str) for key in ("prompt", "response")
    ):
        raise ValueError(f"{where}: expected the keys 'prompt' and 'response', or 'text'")
    return _chat_document(row["prompt"], row["response"], where, tokenizer)


def _text_document(text: str, tokenizer: Any) -> Document:
    tokens = [*tokenizer(text).input_ids, tokenizer.eos_token_id]
    return Document(tokens, [True] * len(tokens))


def _chat_document(prompt: str, response: str, where: str, tokenizer: Any) -> Document:
    """A chat turn through the model's own template; the loss is on the response and its EOS."""
    ask = [{"role": "user", "content": prompt}]
    answer = [{"role": "assistant", "content": response}]
    head = _render(tokenizer, ask, add_generation_prompt=True)
    full = _render(tokenizer, ask + answer, add_generation_prompt=False)
    if full[: len(head)] != head:
        raise ValueError(f"{where}: the chat template changes the prompt once it is answered")
    # Served requests end at EOS, so what a template writes after it is never generated.
    body = full[len(head) :]
    eos = tokenizer.eos_token_id
    body = body[: body.index(eos) + 1] if eos in body else [*body, eos]
    return Document(head + body, [False] * len(head) + [True] * len(body))


def _render(tokenizer: Any, messages: list[dict[str, str]], **options: bool) -> list[int]:
    if tokenizer.chat_template is None:
        raise ValueError("prompt/response data needs a tokenizer with a chat template")
    text = tokenizer.apply_chat_template(messages, tokenize=False, **options)
    return list(tokenizer(text, add_special_tokens=False).input_ids)


def fill_last_block(document: Document, block_length: int, eos_token_id: int) -> Document:
    """Fill the document up to whole blocks with EOS that is in the loss.

    A served block is always denoised as a whole, so the model has to know what follows an end.
    """
    missing = -len(document.tokens) % block_length
    return Document(document.tokens + [eos_token_id] * missing, document.in_loss + [True] * missing)


def pack(lengths: Sequence[int], row_length: int) -> list[list[int]]:
    """First-fit packing in order: rows of document indices, none longer than `row_length` tokens.

    Order is kept so that a row depends only on the data file, never on a shuffle.

    Raises:
        ValueError: a document is longer than a row; it is named by its index.
    """
    rows: list[list[int]] = []
    free = 0
    for index, length in enumerate(lengths):
        if length > row_length:
            raise ValueError(f"document {index} has {length} tokens; a row holds {row_length}")
        if not rows or length > free:
            rows.append([])
            free = row_length
        rows[-1].append(index)
        free -= length
    return rows


class PackedRows(Dataset[dict[str, Tensor]]):
    """Rows of `row_length` tokens made of whole documents on the block grid.

    An item holds, each of shape [L]: `tokens`, `in_loss` (bool), `position_ids` (from 0 in every
    document) and `document_ids` (`NO_DOCUMENT` on the pad), and the scalar `sample`: the row's
    index, which keys its noise.
    """

    def __init__(
        self, documents: Sequence[Document], row_length: int, block_length: int, eos_token_id: int
    ) -> None:
        if block_length < 1:
            raise ValueError(f"block length must be at least 1, got {block_length}")
        if row_length % block_length:
            raise ValueError(
                f"row length {row_length} is not a multiple of the block length {block_length}"
            )
        self._documents = [fill_last_block(d, block_length, eos_token_id) for d in documents]
        self._rows = pack([len(d.tokens) for d in self._documents], row_length)
        self._row_length = row_length
        self._pad = eos_token_id

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row: dict[str, list[int]] = {"tokens": [], "in_loss": [], "position_ids": []}
        ids: list[int] = []
        for number, document_index in enumerate(self._rows[index]):
            document = self._documents[document_index]
            row["tokens"] += document.tokens
            row["in_loss"] += document.in_loss
            row["position_ids"] += range(len(document.tokens))
            ids += [number] * len(document.tokens)
        missing = self._row_length - len(ids)
        row["tokens"] += [self._pad] * missing
        row["in_loss"] += [False] * missing
        row["position_ids"] += range(missing)
        ids += [NO_DOCUMENT] * missing
        tensors = {name: torch.tensor(values) for name, values in row.items()}
        tensors["in_loss"] = tensors["in_loss"].bool()
        return tensors | {"document_ids": torch.tensor(ids), "sample": torch.tensor(index)}
