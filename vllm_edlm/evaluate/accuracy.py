"""Accuracy against tokens per forward, both of the served model."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from vllm import LLM

from vllm_edlm.bench.report import Plot, Row, Table
from vllm_edlm.evaluate.engine import Usage, ask, serving
from vllm_edlm.evaluate.grid import Cell, columns_of
from vllm_edlm.evaluate.questions import Grader, Question

AR, DIFFUSION = "AR", "diffusion"


@dataclass(frozen=True)
class Result:
    """One figure.

    Attributes:
        task: what was asked.
        metric: how it was graded.
        accuracy: from 0 to 1.
        usage: what the answers took.
    """

    task: str
    metric: str
    accuracy: float
    usage: Usage


class Examinee(Protocol):
    """A served model that can be asked everything again with other options."""

    def sit(self, extra_args: dict[str, Any] | None) -> list[Result]:
        """Answer and be graded; None for the options of an AR model."""


class Exam(Protocol):
    """Questions and how they are graded."""

    @property
    def notes(self) -> list[str]:
        """What a reader of the figures has to know."""

    def examinee(self, model: str, engine_args: dict[str, Any]) -> AbstractContextManager[Examinee]:
        """Serve a model; its engine ends with the context."""


@dataclass(frozen=True)
class QuestionExam:
    """Questions with known answers.

    Attributes:
        task: their name.
        metric: the grader's name.
        max_tokens: of an answer at most.
        chat: as `engine.ask` takes it.
    """

    task: str
    metric: str
    questions: Sequence[Question]
    grader: Grader
    max_tokens: int
    chat: bool | None = None

    @property
    def notes(self) -> list[str]:
        """What a reader of the figures has to know."""
        return [
            f"{len(self.questions)} questions, answered greedily, at most {self.max_tokens} tokens."
        ]

    @contextmanager
    def examinee(self, model: str, engine_args: dict[str, Any]) -> Iterator["Served"]:
        """Serve a model; its engine ends with the context."""
        with serving(model, **engine_args) as llm:
            yield Served(llm, self)

    def grade(self, answers: Sequence[str], usage: Usage) -> Result:
        """The share of right answers, one for each question."""
        right = [
            self.grader.is_right(answer, question.answer)
            for answer, question in zip(answers, self.questions, strict=True)
        ]
        return Result(self.task, self.metric, sum(right) / len(right), usage)


@dataclass(frozen=True)
class Served:
    """A model that answers the questions of an exam."""

    llm: LLM
    exam: QuestionExam

    def sit(self, extra_args: dict[str, Any] | None) -> list[Result]:
        """Answer all questions."""
        prompts = [question.prompt for question in self.exam.questions]
        outputs = ask(self.llm, prompts, self.exam.max_tokens, extra_args, chat=self.exam.chat)
        answers = [output.outputs[0].text for output in outputs]
        return [self.exam.grade(answers, Usage.of(outputs))]


def accuracy_table(
    exam: Exam,
    model: str,
    ar: str | None,
    cells: Sequence[Cell],
    block_length: int,
    engine_args: dict[str, Any],
) -> Table:
    """Measure a model in every cell, on one engine, and its AR parent before it.

    Args:
        ar: the AR parent; None to leave it out.
        block_length: what the engine is started with; cells may have shorter blocks.
        engine_args: vLLM's, for both models.
    """
    rows = []
    if ar is not None:
        with exam.examinee(ar, engine_args) as parent:
            rows += [_row(AR, None, result) for result in parent.sit(None)]
    diffusion = {"canvas_length": block_length, "max_denoising_steps": block_length}
    with exam.examinee(model, {"diffusion_config": diffusion} | engine_args) as converted:
        for cell in cells:
            results = converted.sit(cell.extra_args)
            rows += [_row(DIFFUSION, cell, result) for result in results]
    return _table(rows, exam.notes)


def _row(model: str, cell: Cell | None, result: Result) -> Row:
    usage = result.usage
    return {
        "model": model,
        "task": result.task,
        "metric": result.metric,
        **columns_of(cell),
        "accuracy": result.accuracy,
        "tokens per forward": usage.tokens / usage.forwards if usage.forwards else None,
        "tokens per answer": usage.tokens / usage.requests if usage.requests else None,
    }


def _table(rows: list[Row], notes: list[str]) -> Table:
    return Table(
        name="accuracy",
        title="Accuracy against tokens per forward, as served",
        rows=rows,
        notes=[
            "Tokens per forward: emitted tokens over denoise forwards, each request for itself; "
            "an AR forward emits one token. Prefill is not counted.",
            *notes,
        ],
        plot=Plot(
            x="tokens per forward",
            y="accuracy",
            series=("model", "reveal", "block length", "max steps"),
            panels=("task", "metric"),
            from_zero=False,
        ),
    )
