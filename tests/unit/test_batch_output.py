"""The output folder of a batch: files there whole or not at all, and never those of two jobs."""

import errno
import os
from pathlib import Path

import pytest

from examples.batch.output import (
    MANIFEST,
    digest,
    done_shards,
    open_output,
    shard_name,
    write_whole,
)


def test_names_say_what_is_done(tmp_path: Path) -> None:
    open_output(tmp_path / "out", {"rows": 10})
    for first, num_rows in ((0, 4), (8, 2)):
        write_whole(tmp_path / "out" / shard_name(first, num_rows, ".jsonl"), b"")
    (tmp_path / "out" / (shard_name(4, 4, ".jsonl") + ".1.tmp")).touch()
    assert done_shards(tmp_path / "out") == {0: 4, 8: 2}


def test_same_job_goes_on(tmp_path: Path) -> None:
    open_output(tmp_path, {"rows": 1})
    (tmp_path / "rows.1.tmp").touch()
    (tmp_path / "rows-0-0.jsonl").touch()
    open_output(tmp_path, {"rows": 1})
    assert {path.name for path in tmp_path.iterdir()} == {MANIFEST, "rows-0-0.jsonl"}


def test_other_folders_are_refused(tmp_path: Path) -> None:
    open_output(tmp_path / "a", {"rows": 1, "prefix": ""})
    with pytest.raises(ValueError, match="another job: prefix is '' there, 'x' here"):
        open_output(tmp_path / "a", {"rows": 1, "prefix": "x"})
    (tmp_path / "a" / MANIFEST).write_text("{")
    with pytest.raises(ValueError, match=r"manifest\.json is not valid JSON"):
        open_output(tmp_path / "a", {"rows": 1})
    with pytest.raises(ValueError, match="neither empty nor the output of a batch"):
        open_output(tmp_path, {"rows": 1})


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_full_disk_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    write_whole(tmp_path / "file", b"before")
    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OSError, match="No space left"):
        write_whole(tmp_path / "file", b"after")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_bytes() == b"before"


def test_digest_of_a_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    before = digest(tmp_path)
    (tmp_path / "README.md").write_text("words")
    (tmp_path / "evaluation").mkdir()
    assert digest(tmp_path) == before
    (tmp_path / "config.json").write_text("[]")
    assert digest(tmp_path) != before
