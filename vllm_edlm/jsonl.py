"""Reading JSON that people write: JSONL, with the number of every line, and objects as options."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def read_jsonl(path: Path) -> Iterator[tuple[str, Any]]:
    """The values of a UTF-8 file, read as they are asked for; blank lines are passed over.

    Yields:
        where the value stands, such as "line 3", and the value.

    Raises:
        ValueError: a line is neither blank nor JSON; the message names the line.
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            place = f"line {number}"
            # Some editors begin a file with a byte order mark.
            if text := _decode(line, place).strip():
                yield place, _parse(text, place)


def _decode(line: bytes, place: str) -> str:
    try:
        return line.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{place}: not valid UTF-8 ({error})") from error


def _parse(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place}: not valid JSON ({error})") from error


def json_object(name: str, text: str) -> dict[str, Any]:
    """The JSON object that an option of the command line holds.

    Raises:
        ValueError: it holds none; the message names the option.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} must be a JSON object: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{name} must be a JSON object, got {text}")
    return value
