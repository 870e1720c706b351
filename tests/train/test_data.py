"""Documents, packing and what may stand in a data file."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from vllm_edlm.train.data import NO_DOCUMENT, Document, PackedRows, pack, read_documents

EOS = 1


def document(prompt: int, answer: int) -> Document:
    return Document(list(range(10, 10 + prompt + answer)), [False] * prompt + [True] * answer)


def test_every_document_starts_on_the_grid_at_position_0() -> None:
    rows = PackedRows([document(5, 2), document(3, 6), document(1, 1)], 16, 4, EOS)
    first, second = rows[0], rows[1]
    # 5 + 2 tokens fill two blocks of 4, so the next document (9 tokens, 12 slots) needs a new row.
    assert first["document_ids"].tolist() == [0] * 8 + [NO_DOCUMENT] * 8
    assert second["document_ids"].tolist() == [0] * 12 + [1] * 4
    assert second["position_ids"].tolist() == [*range(12), *range(4)]
    assert len(rows) == 2
    assert first["sample"].item() == 0
    assert second["sample"].item() == 1


def test_a_last_block_is_filled_with_eos_that_is_in_the_loss() -> None:
    row = PackedRows([document(5, 2)], 8, 4, EOS)[0]
    assert row["tokens"].tolist() == [*range(10, 17), EOS]
    assert row["in_loss"].tolist() == [False] * 5 + [True] * 3


def test_the_pad_of_a_row_is_not_in_the_loss() -> None:
    row = PackedRows([document(2, 2)], 12, 4, EOS)[0]
    assert row["in_loss"].tolist() == [False] * 2 + [True] * 2 + [False] * 8


def test_packing_keeps_order_and_loses_nothing() -> None:
    lengths = [4, 8, 4, 12, 16, 4]
    rows = pack(lengths, 16)
    assert [index for row in rows for index in row] == list(range(6))
    assert all(sum(lengths[i] for i in row) <= 16 for row in rows)


def test_a_too_long_document_is_named() -> None:
    with pytest.raises(ValueError, match="document 1 has 20 tokens; a row holds 16"):
        pack([4, 20], 16)


@pytest.mark.parametrize(("row_length", "block_length"), [(10, 4), (16, 0), (16, -1)])
def test_bad_lengths(row_length: int, block_length: int) -> None:
    with pytest.raises(ValueError, match=r"block length|row length"):
        PackedRows([document(1, 1)], row_length, block_length, EOS)


def test_the_loss_is_on_the_response_and_its_eos(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"prompt": "Mia has 12 pens.", "response": "12 pens."}\n\n')
    (only,) = read_documents(path, tokenizer)
    answer = [token for token, wanted in zip(only.tokens, only.in_loss, strict=True) if wanted]
    assert tokenizer.decode(answer) == "12 pens.<|im_end|>"
    assert tokenizer.decode(only.tokens).startswith("<|user|>Mia has 12 pens.<|assistant|>")


def test_plain_text(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    path = tmp_path / "data.txt"
    path.write_text("Mia has 12.\n\n\n\nLeo has 3.\n")
    first, second = read_documents(path, tokenizer)
    assert tokenizer.decode(first.tokens) == "Mia has 12.<|im_end|>"
    assert tokenizer.decode(second.tokens) == "Leo has 3.<|im_end|>"
    assert all(first.in_loss)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", "", "no documents"),
        ("a.jsonl", "{", r"line 1: not valid JSON"),
        ("a.jsonl", '{"text": "x"}\n{"prompt": "x"}', r"line 2: expected the keys"),
        ("a.jsonl", "[1]", r"line 1: expected the keys"),
        ("a.csv", "x", "unknown data format '.csv'"),
    ],
)
def test_bad_files_are_named(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, name: str, content: str, message: str
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_documents(tmp_path / name, tokenizer)
