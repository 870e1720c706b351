"""JSONL lines come one by one, with their numbers."""

from pathlib import Path

import pytest

from vllm_edlm.jsonl import read_jsonl


def test_values_and_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes('\ufeff{"a": "ä"}\r\n \n\n[1, "\u2028"]'.encode())
    assert list(read_jsonl(path)) == [("line 1", {"a": "ä"}), ("line 4", [1, "\u2028"])]


@pytest.mark.parametrize(
    ("line", "message"),
    [(b'{"a": ', "line 2: not valid JSON"), (b'"\xff"', "line 2: not valid UTF-8 .*0xff")],
)
def test_bad_lines_are_named_when_they_are_reached(
    tmp_path: Path, line: bytes, message: str
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"1\n" + line + b"\n3\n")
    values = read_jsonl(path)
    assert next(values) == ("line 1", 1)
    with pytest.raises(ValueError, match=message):
        next(values)
