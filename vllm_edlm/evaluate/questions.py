"""Questions with known answers, and how answers to them are graded."""

import re
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from decimal import Decimal
from enum import StrEnum
from itertools import islice
from pathlib import Path
from typing import Any

from vllm_edlm.jsonl import read_jsonl

# Training data calls it a response.
ANSWER_KEYS = ("answer", "response")
# A minus that follows a word or a number is an operator.
_NUMBER = re.compile(r"(?:(?<!\w)-)?\d[\d,]*(?:\.\d+)?")


@dataclass(frozen=True)
class Question:
    """A prompt and the answer that is right."""

    prompt: str
    answer: str


def read_questions(path: Path, limit: int | None = None) -> list[Question]:
    """Read JSONL lines of `prompt` and `answer` (or `response`).

    Args:
        limit: questions at most, the first ones.

    Raises:
        ValueError: there is no such file, no question in it, or a line is not valid; the message
            names the file and the line.
    """
    if not path.is_file():
        raise ValueError(f"question file {path} does not exist")
    questions = list(islice(_read(path), limit))
    if not questions:
        raise ValueError(f"{path}: no questions in it")
    return questions


def _read(path: Path) -> Iterator[Question]:
    try:
        for place, row in read_jsonl(path):
            yield _question(row, place)
    except ValueError as error:
        raise ValueError(f"{path}, {error}") from error


def _question(row: Any, place: str) -> Question:
    prompt, answer = _text(row, ("prompt",)), _text(row, ANSWER_KEYS)
    if prompt is None or answer is None:
        raise ValueError(f"{place}: expected texts under the keys 'prompt' and 'answer'")
    return Question(prompt, answer)


def _text(row: Any, keys: tuple[str, ...]) -> str | None:
    """The text under the first of the keys that the row has."""
    values = [row[key] for key in keys if key in row] if isinstance(row, dict) else []
    return values[0] if values and isinstance(values[0], str) else None


class Match(StrEnum):
    """What of an answer has to equal the right one."""

    exact = "exact"
    last_number = "last_number"
    regex = "regex"


@dataclass(frozen=True)
class Grader:
    """Grades answers by what `extract` finds in them.

    Attributes:
        extract: what counts of a text; None where the text has no such thing.
    """

    extract: Callable[[str], Hashable | None]

    @classmethod
    def of(cls, match: Match, pattern: str | None = None) -> "Grader":
        """The grader of a kind of match.

        Args:
            pattern: regular expression for `Match.regex`: of its last match in a text, the first
                group counts, or the whole match where it has no group.

        Raises:
            ValueError: a pattern that is missing, not valid, or for a match that takes none.
        """
        if (match is Match.regex) != (pattern is not None):
            takes = "needs a pattern" if match is Match.regex else "takes no pattern"
            raise ValueError(f"match {match.value!r} {takes}, got {pattern!r}")
        if pattern is None:
            return cls(str.strip if match is Match.exact else last_number)
        try:
            compiled = re.compile(pattern)
        except re.error as error:
            raise ValueError(f"pattern {pattern!r} is no regular expression: {error}") from error
        return cls(lambda text: _last_group(compiled, text))

    def check(self, questions: list[Question]) -> None:
        """Refuse right answers in which there is nothing to compare.

        Raises:
            ValueError: the first such answer.
        """
        for number, question in enumerate(questions, start=1):
            if self.extract(question.answer) is None:
                raise ValueError(
                    f"question {number}: nothing to match in its answer {question.answer!r}"
                )

    def is_right(self, text: str, answer: str) -> bool:
        """Whether a text says the same as the right answer."""
        found = self.extract(text)
        return found is not None and found == self.extract(answer)


def last_number(text: str) -> Decimal | None:
    """The last number in a text; commas inside it are dropped."""
    numbers = _NUMBER.findall(text)
    return Decimal(numbers[-1].replace(",", "")) if numbers else None


def _last_group(pattern: re.Pattern[str], text: str) -> str | None:
    matches = list(pattern.finditer(text))
    if not matches:
        return None
    return str(matches[-1].group(1 if pattern.groups else 0)).strip()
