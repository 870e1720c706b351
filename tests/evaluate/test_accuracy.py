"""Tables of accuracy against tokens per forward, made with models that answer from a list."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

from vllm_edlm.evaluate.accuracy import QuestionExam, Result, accuracy_table
from vllm_edlm.evaluate.engine import Usage
from vllm_edlm.evaluate.grid import Cell
from vllm_edlm.evaluate.questions import Grader, Match, Question

QUESTIONS = [Question("1+1", "2"), Question("2+2", "4"), Question("3+3", "6"), Question("4", "8")]
EXAM = QuestionExam("sums", "last_number", QUESTIONS, Grader.of(Match.last_number), 8)
CELLS = [Cell("confidence", 0.9, 8, 8), Cell("steps", None, 16, 2)]


@dataclass
class Listed:
    """Says what it was asked; the more options, the faster and the worse."""

    served: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    asked: list[dict[str, Any] | None] = field(default_factory=list)
    ended: int = 0
    notes: tuple[str, ...] = ("four questions",)

    @contextmanager
    def examinee(self, model: str, engine_args: dict[str, Any]) -> Iterator["Listed"]:
        self.served.append((model, engine_args))
        yield self
        self.ended += 1

    def sit(self, extra_args: dict[str, Any] | None) -> list[Result]:
        self.asked.append(extra_args)
        answers = ["2", "4", "6", "8" if extra_args is None else "9"]
        return [EXAM.grade(answers, Usage(4, 40, 40 if extra_args is None else 8))]


def test_one_engine_serves_the_whole_grid() -> None:
    exam = Listed()
    table = accuracy_table(exam, "dlm", None, CELLS, 16, {"dtype": "float32"})
    diffusion = {"canvas_length": 16, "max_denoising_steps": 16}
    assert exam.served == [("dlm", {"diffusion_config": diffusion, "dtype": "float32"})]
    assert exam.asked == [cell.extra_args for cell in CELLS]
    assert exam.ended == 1
    assert [row["accuracy"] for row in table.rows] == [0.75, 0.75]
    assert [row["tokens per forward"] for row in table.rows] == [5.0, 5.0]


def test_the_ar_parent_comes_first_and_has_no_options() -> None:
    exam = Listed()
    table = accuracy_table(exam, "dlm", "ar", CELLS[:1], 16, {})
    assert [model for model, _ in exam.served] == ["ar", "dlm"]
    assert "diffusion_config" not in exam.served[0][1]
    parent, converted = table.rows
    assert (parent["model"], parent["accuracy"], parent["tokens per forward"]) == ("AR", 1.0, 1.0)
    assert parent["threshold"] is None
    assert (converted["reveal"], converted["tokens per answer"]) == ("confidence", 10.0)
    assert "four questions" in table.notes


def test_grades() -> None:
    usage = Usage(4, 20, 10)
    result = EXAM.grade(["it is 2", "5", "6.0", ""], usage)
    assert result == Result("sums", "last_number", 0.5, usage)


@dataclass(frozen=True)
class Metrics:
    histogram: list[int]


@dataclass(frozen=True)
class Completion:
    token_ids: list[int]
    spec_decode_metrics: Metrics | None


@dataclass(frozen=True)
class Output:
    outputs: list[Completion]


@pytest.mark.parametrize(
    ("metrics", "forwards"), [([Metrics([0, 2, 1]), Metrics([1, 0, 0])], 4), ([None, None], 7)]
)
def test_usage_of_requests(metrics: list[Metrics | None], forwards: int) -> None:
    outputs: list[Any] = [
        Output([Completion([1] * n, found)]) for n, found in zip((4, 3), metrics, strict=True)
    ]
    assert Usage.of(outputs) == Usage(2, 7, forwards)


def test_usage_adds_up() -> None:
    assert Usage(1, 2, 3) + Usage(10, 20, 30) == Usage(11, 22, 33)
