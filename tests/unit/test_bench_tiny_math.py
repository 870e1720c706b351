"""Questions of the tiny-math table and how answers to them are graded."""

from pathlib import Path

import pytest

from vllm_edlm.bench.load import Round, Trace
from vllm_edlm.bench.tables.tiny_math import Exam, result


@pytest.mark.parametrize(
    ("answer", "expected"),
    [("3 + 4 = 7.\n#### 7", "7"), ("#### 7 \n", "7"), ("#### 7 or 8", None), ("7", None)],
)
def test_the_result_ends_the_answer(answer: str, expected: str | None) -> None:
    assert result(answer) == expected


def test_answers_are_graded_by_their_results(tmp_path: Path) -> None:
    exam = Exam.write(tmp_path, 4)
    assert len(exam.prompts) == 4
    texts = [item["response"] for item in exam.problems]
    tokens = exam.tokenizer([*texts[:3], "#### 0"], add_special_tokens=False)["input_ids"]
    traces = tuple(Trace(0.0, answer) for answer in tokens)
    assert exam.exact_match(Round(1.0, (), traces)) == 0.75
