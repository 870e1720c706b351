"""Sources of documents: every format, read lazily and again, errors that name the place."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pytest
from pyarrow import parquet
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from vllm_edlm.train import documents as module
from vllm_edlm.train.documents import Source, read_documents
from vllm_edlm.train.packing import PackedRows

TEXT = {"text": "Mia has 12."}
PAIR = {"prompt": "Mia has 12 pens.", "response": "12 pens."}
CHAT = {
    "messages": [
        {"role": "user", "content": "Mia has 12 pens."},
        {"role": "assistant", "content": "12 pens."},
    ]
}


def write_jsonl(path: Path, *rows: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_parquet(path: Path, *rows: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path, row_group_size=2)
    return path


def read(path: Path | str, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """All documents, decoded."""
    return [tokenizer.decode(d.tokens) for d in read_documents(Source(str(path)), tokenizer)]


def test_paragraphs_of_text(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    path = tmp_path / "data.txt"
    path.write_text("\n \nMia has 12.\nLeo has 3.\n\n \n\nAna has 4.\n")
    first, second = read_documents(Source(str(path)), tokenizer)
    assert tokenizer.decode(first.tokens) == "Mia has 12.\nLeo has 3.<|im_end|>"
    assert tokenizer.decode(second.tokens) == "Ana has 4.<|im_end|>"
    assert all(first.in_loss)
    assert second.where == f"{path}, paragraph 2"


WRITERS = [("data.jsonl", write_jsonl), ("data.parquet", write_parquet)]


@pytest.mark.parametrize(("name", "write"), WRITERS)
def test_rows_of_three_kinds(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, name: str, write: Callable[..., Path]
) -> None:
    # In a table, every row has every column, most of them null.
    columns = dict.fromkeys(TEXT | PAIR | CHAT | {"id": 0})
    path = write(tmp_path / name, *(columns | row for row in (TEXT, PAIR, CHAT)))
    text, pair, chat = read_documents(Source(str(path)), tokenizer)
    assert tokenizer.decode(text.tokens) == "Mia has 12.<|im_end|>"
    assert all(text.in_loss)
    answer = [token for token, wanted in zip(pair.tokens, pair.in_loss, strict=True) if wanted]
    assert tokenizer.decode(answer) == "12 pens.<|im_end|>"
    assert tokenizer.decode(pair.tokens) == (
        "<|user|>Mia has 12 pens.<|assistant|>12 pens.<|im_end|>"
    )
    assert (chat.tokens, chat.in_loss) == (pair.tokens, pair.in_loss)


def test_a_chat_is_preferred_to_the_columns_beside_it(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    path = write_jsonl(tmp_path / "data.jsonl", {"prompt": "Who?"} | TEXT | CHAT)
    (only,) = read(path, tokenizer)
    assert only.startswith("<|user|>Mia has 12 pens.<|assistant|>")


def test_blank_text_is_passed_over(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "data.jsonl", {"text": ""}, TEXT, {"text": " \n"})
    assert read(path, tokenizer) == ["Mia has 12.<|im_end|>"]


def test_a_folder_is_read_in_the_order_of_its_names(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    write_parquet(tmp_path / "b.parquet", {"text": "b"}, {"text": "c"})
    write_jsonl(tmp_path / "c" / "d.jsonl", {"text": "d"})
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "README.md").write_text("not data")
    assert read(tmp_path, tokenizer) == [f"{letter}<|im_end|>" for letter in "abcd"]


@pytest.mark.parametrize(("name", "write"), WRITERS)
def test_documents_can_be_iterated_again(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, name: str, write: Callable[..., Path]
) -> None:
    path = write(tmp_path / name, *({"text": str(n)} for n in range(5)))
    documents = read_documents(Source(str(path)), tokenizer)
    assert len(list(islice(documents, 2))) == 2
    assert list(documents) == list(documents)
    assert len(list(documents)) == 5


def test_nothing_is_tokenised_before_it_is_asked_for(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    path = write_jsonl(tmp_path / "data.jsonl", TEXT, TEXT)
    with path.open("a") as file:
        file.write("{")
    documents = iter(read_documents(Source(str(path)), tokenizer))
    assert len(list(islice(documents, 2))) == 2
    with pytest.raises(ValueError, match=r"data\.jsonl: line 3: not valid JSON"):
        next(documents)


def test_a_large_file_takes_little_memory(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines_read = 0
    loads = json.loads

    def counting(line: str) -> Any:
        nonlocal lines_read
        lines_read += 1
        return loads(line)

    path = write_jsonl(tmp_path / "data.jsonl", *[TEXT] * 1000)
    monkeypatch.setattr(json, "loads", counting)
    rows = PackedRows(read_documents(Source(str(path)), tokenizer), 16, 4, 1, shuffle_buffer=10)
    next(iter(rows))
    assert lines_read < 60


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a data set of two splits with files of their own; its hub is a folder here."""
    folder = tmp_path / "hub"
    for part in range(3):
        rows = [{"text": f"{part * 300 + n} pens"} for n in range(300)]
        write_parquet(folder / "data" / f"train-0000{part}-of-00003.parquet", *rows)
    write_parquet(folder / "data" / "test-00000-of-00001.parquet", TEXT)
    load = datasets.load_dataset

    def from_folder(name: str, *args: Any, **options: Any) -> Any:
        if name != "someone/pens":
            raise FileNotFoundError(f"Dataset '{name}' doesn't exist on the Hub")
        return load(str(folder), *args, cache_dir=str(tmp_path / "cache"), **options)

    monkeypatch.setattr(module, "load_dataset", from_folder)
    return "someone/pens"


def test_a_hub_data_set_is_streamed(hub: str, tokenizer: PreTrainedTokenizerFast) -> None:
    documents = read_documents(Source(hub), tokenizer)
    texts = [tokenizer.decode(d.tokens) for d in documents]
    assert texts == [f"{n} pens<|im_end|>" for n in range(900)]
    assert [d.where for d in islice(documents, 2)] == [f"{hub}, row 0", f"{hub}, row 1"]


def test_a_split_of_a_hub_data_set(hub: str, tokenizer: PreTrainedTokenizerFast) -> None:
    (only,) = read_documents(Source(hub, split="test"), tokenizer)
    assert tokenizer.decode(only.tokens) == "Mia has 12.<|im_end|>"


def test_workers_share_the_rows_of_a_hub_data_set(
    hub: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    rows = PackedRows(read_documents(Source(hub), tokenizer), 16, 8, 1)
    expected = {int(row["sample"]): row["tokens"].tolist() for row in islice(rows, 40)}
    loader = DataLoader(rows, batch_size=None, num_workers=2)
    read = {int(row["sample"]): row["tokens"].tolist() for row in islice(loader, 40)}
    assert read == expected


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (Source("someone/else"), "someone/else is no file or folder here, nor a data set that can"),
        (Source("someone/pens", split="trian"), "with split 'trian' and subset None: .*trian"),
        (Source("someone/pens", subset="large"), "with split 'train' and subset 'large': .*large"),
    ],
)
def test_hub_data_sets_that_cannot_be_loaded(
    hub: str, tokenizer: PreTrainedTokenizerFast, source: Source, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        read_documents(source, tokenizer)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", "", r"a\.jsonl: no documents"),
        ("a.txt", "\n\n", r"a\.txt: no documents"),
        ("a.jsonl", '{"text": ""}', r"a\.jsonl: no documents"),
        ("a.jsonl", '\n{"text": ', r"a\.jsonl: line 2: not valid JSON"),
        ("a.jsonl", '{"text": "x"}\n{"prompt": "x"}', r"a\.jsonl, line 2: .* got the keys \['pr"),
        ("a.jsonl", '{"text": 3}', r"line 1: expected the keys 'messages' .* got the keys"),
        ("a.jsonl", "[1]", r"line 1: expected the keys .* got a list"),
        ("a.jsonl", '{"messages": []}', r"line 1: no message is the assistant's"),
        ("a.jsonl", b"\n\xff", r"a\.jsonl: line 2: not valid UTF-8"),
        ("a.txt", b"\xff", r"a\.txt: .*utf-8"),
        ("a.parquet", "no table", r"a\.parquet: .*[Pp]arquet"),
    ],
)
def test_bad_files_are_named(
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    name: str,
    content: str | bytes,
    message: str,
) -> None:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    documents = read_documents(Source(str(path)), tokenizer)
    with pytest.raises(ValueError, match=message):
        list(documents)


def test_a_bad_row_of_a_table_is_named(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", TEXT, TEXT, {"text": None}, TEXT)
    with pytest.raises(ValueError, match=r"a\.parquet, row 2: expected the keys"):
        read(path, tokenizer)


def test_sources_that_cannot_be_read_are_refused_at_once(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    (tmp_path / "a.csv").write_text("x")
    (tmp_path / "empty").mkdir()
    data = write_jsonl(tmp_path / "a.jsonl", TEXT)
    for source, message in [
        (Source(str(tmp_path / "none.jsonl")), r"none\.jsonl does not exist"),
        (Source(str(tmp_path / "a.csv")), r"unknown data format '\.csv'; allowed: \.jsonl, \.parq"),
        (Source(str(tmp_path / "empty")), "empty: no file of a known format in it"),
        (Source(str(data), subset="large"), "not a hub data set: .* no subset 'large'"),
        (Source(str(data), split="test"), "not a hub data set: it has no split 'test'"),
    ]:
        with pytest.raises(ValueError, match=message):
            read_documents(source, tokenizer)


def test_a_tokenizer_without_eos_is_refused(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    endless = copy.deepcopy(tokenizer)
    endless.eos_token = None
    with pytest.raises(ValueError, match="no EOS token"):
        read_documents(Source(str(write_jsonl(tmp_path / "a.jsonl", TEXT))), endless)


def test_a_chat_needs_a_template_and_text_does_not(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    plain = copy.deepcopy(tokenizer)
    plain.chat_template = None
    documents = iter(
        read_documents(Source(str(write_jsonl(tmp_path / "a.jsonl", TEXT, PAIR))), plain)
    )
    next(documents)
    with pytest.raises(ValueError, match=r"line 2: chats need a tokenizer with a chat template"):
        next(documents)
