"""The output folder of a batch: a manifest of what it holds, and a file a shard.

A shard's file has the numbers of its input rows in its name and is there whole or not at all, so
that the files say what is left to do.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

MANIFEST = "manifest.json"
TEMPORARY = ".tmp"
_SHARD = re.compile(r"rows-(\d+)-(\d+)\.\w+")


def shard_name(first: int, num_rows: int, suffix: str) -> str:
    """Name of the file with the input rows `first` to `first + num_rows - 1`, counted from 0."""
    return f"rows-{first:012d}-{first + num_rows - 1:012d}{suffix}"


def done_shards(folder: Path) -> dict[int, int]:
    """First input row and number of rows of each shard that is done."""
    found = (_SHARD.fullmatch(path.name) for path in folder.iterdir())
    return {int(m[1]): int(m[2]) - int(m[1]) + 1 for m in found if m}


def open_output(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Make the folder of a job, or check that it is that of the same job and tidy it up.

    Raises:
        ValueError: the folder is another job's, or none's.
        OSError: it cannot be made or written to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.glob(f"*{TEMPORARY}"):
        path.unlink(missing_ok=True)
    if (folder / MANIFEST).is_file():
        check_manifest(folder, manifest)
    elif any(folder.iterdir()):
        raise ValueError(f"{folder} is neither empty nor the output of a batch")
    else:
        write_whole(folder / MANIFEST, json.dumps(manifest, indent=2).encode() + b"\n")


def check_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Refuse to mix two jobs in a folder.

    Raises:
        ValueError: naming what differs.
    """
    try:
        there = json.loads((folder / MANIFEST).read_text())
    except ValueError as error:
        raise ValueError(f"{folder / MANIFEST} is not valid JSON: {error}") from error
    keys = sorted({*manifest, *there})
    differing = [key for key in keys if manifest.get(key) != there.get(key)]
    if differing:
        found = "; ".join(
            f"{key} is {there.get(key)!r} there, {manifest.get(key)!r} here" for key in differing
        )
        raise ValueError(f"{folder} is the output of another job: {found}")


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that is there whole or not at all, whatever happens.

    Raises:
        OSError: it could not be written, as on a full disk; then nothing is left of it.
    """
    temporary = path.with_name(f"{path.name}.{uuid4().hex}{TEMPORARY}")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        with suppress(OSError):
            temporary.unlink()
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def digest(path: Path) -> str:
    """Digest of a file, or of the files of a model's folder that say what it answers."""
    if path.is_dir():
        names = (f"{file.name} {digest(file)}\n" for file in _model_files(path))
        return hashlib.sha256("".join(names).encode()).hexdigest()
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _model_files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.iterdir()) if path.is_file() and path.suffix != ".md")
