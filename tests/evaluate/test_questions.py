"""Questions from a file, and what counts as their right answer."""

from decimal import Decimal
from pathlib import Path

import pytest

from vllm_edlm.evaluate.questions import Grader, Match, Question, last_number, read_questions


def written(folder: Path, text: str) -> Path:
    path = folder / "questions.jsonl"
    path.write_text(text, encoding="utf-8")
    return path


def test_questions_are_read_in_order(tmp_path: Path) -> None:
    lines = ['{"prompt": "1+1", "answer": "2"}', "", '{"prompt": "ä", "response": "b", "id": 7}']
    path = written(tmp_path, "\n".join(lines))
    assert read_questions(path) == [Question("1+1", "2"), Question("ä", "b")]
    assert read_questions(path, limit=1) == [Question("1+1", "2")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("\n\n", "no questions"),
        ('{"prompt": "a", "answer": "b"}\n{', r"questions\.jsonl, line 2: not valid JSON"),
        ('\n{"prompt": "a"}', r"questions\.jsonl, line 2: expected"),
        ('{"prompt": "a", "answer": 2}', "line 1: expected"),
        ('["a", "b"]', "line 1: expected"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_questions(written(tmp_path, text))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere\.jsonl does not exist"):
        read_questions(tmp_path / "nowhere.jsonl")


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so it is 12.", "12"),
        ("1,234.50 in all", "1234.50"),
        ("-3", "-3"),
        ("minus 10-5", "5"),
        ("it fell to -2 from 7, = -2", "-2"),
        ("none", None),
    ],
)
def test_last_number(text: str, number: str | None) -> None:
    assert last_number(text) == (None if number is None else Decimal(number))


@pytest.mark.parametrize(
    ("match", "pattern", "text", "right"),
    [
        (Match.exact, None, " 7 \n", True),
        (Match.exact, None, "It is 7", False),
        (Match.last_number, None, "3 + 4 = 7.0 apples", True),
        (Match.last_number, None, "7 or 8", False),
        (Match.last_number, None, "seven", False),
        (Match.regex, r"#### (\d+)$", "1\n#### 7", True),
        (Match.regex, r"#### (\d+)$", "#### 7 or so", False),
        (Match.regex, r"\d+", "8 then 7", True),
        (Match.regex, r"\d+", "7 then 8", False),
    ],
)
def test_grades(match: Match, pattern: str | None, text: str, right: bool) -> None:
    answer = "#### 7" if pattern and "#" in pattern else "7"
    assert Grader.of(match, pattern).is_right(text, answer) == right


@pytest.mark.parametrize(
    ("match", "pattern", "message"),
    [
        (Match.regex, None, "'regex' needs a pattern"),
        (Match.exact, "a", "'exact' takes no pattern, got 'a'"),
        (Match.regex, "(", "no regular expression"),
    ],
)
def test_bad_patterns_are_refused(match: Match, pattern: str | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Grader.of(match, pattern)


def test_right_answers_must_hold_what_is_compared() -> None:
    grader = Grader.of(Match.last_number)
    with pytest.raises(ValueError, match="question 2: nothing to match in its answer 'many'"):
        grader.check([Question("a", "1"), Question("b", "many")])
