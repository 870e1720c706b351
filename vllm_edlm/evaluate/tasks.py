"""lm-evaluation-harness tasks as an exam, graded as the harness grades them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager

from vllm_edlm.evaluate.accuracy import Result
from vllm_edlm.evaluate.engine import Usage, stop
from vllm_edlm.evaluate.harness import ServedLM


@dataclass(frozen=True)
class TaskExam:
    """Tasks that generate answers.

    Attributes:
        names: of tasks or groups.
        manager: knows them.
        options: of the harness' `simple_evaluate`.
    """

    names: Sequence[str]
    manager: TaskManager
    options: dict[str, Any]

    @classmethod
    def load(
        cls, names: Sequence[str], include_path: Path | None = None, **options: Any
    ) -> "TaskExam":
        """Find tasks and load their data.

        Args:
            include_path: folder with tasks of one's own.
            options: of the harness' `simple_evaluate`.

        Raises:
            ValueError: a task that is unknown or that generates nothing, so that how tokens are
                revealed does not matter for it.
        """
        manager = TaskManager(include_path=str(include_path) if include_path else None)
        for name in names:
            if name not in manager.all_tasks:
                raise ValueError(f"unknown task {name!r}: `lm_eval ls tasks` lists those there are")
            for task_name, task in manager.load([name])["tasks"].items():
                _check_generates(task_name, task.OUTPUT_TYPE)
        return cls(names, manager, options)

    @property
    def notes(self) -> list[str]:
        """What a reader of the figures has to know."""
        options = ", ".join(f"{key} {value}" for key, value in self.options.items() if value)
        return [f"lm-evaluation-harness tasks ({options or 'their own options'})."]

    @contextmanager
    def examinee(self, model: str, engine_args: dict[str, Any]) -> Iterator["TaskExaminee"]:
        """Serve a model; its engine ends with the context."""
        lm = ServedLM(model, batch_size="auto", **engine_args)
        try:
            yield TaskExaminee(lm, self)
        finally:
            stop(lm.model)


def _check_generates(name: str, output_type: str) -> None:
    if output_type != "generate_until":
        raise ValueError(
            f"task {name!r} asks for {output_type}, for which reveal rules do not matter: measure "
            "it with the harness' model `edlm`"
        )


@dataclass(frozen=True)
class TaskExaminee:
    """A model that answers the tasks of an exam."""

    lm: ServedLM
    exam: TaskExam

    def sit(self, extra_args: dict[str, Any] | None) -> list[Result]:
        """Answer all tasks."""
        self.lm.request_options = extra_args or {}
        return [result for name in self.exam.names for result in self._sit(name)]

    def _sit(self, name: str) -> list[Result]:
        self.lm.usage = Usage()
        report = simple_evaluate(
            model=self.lm,
            tasks=[name],
            task_manager=self.exam.manager,
            log_samples=False,
            bootstrap_iters=0,
            **self.exam.options,
        )
        results = report["results"].items()
        return [
            result for task, found in results for result in _results(task, found, self.lm.usage)
        ]


def _results(task: str, found: dict[str, Any], usage: Usage) -> Iterator[Result]:
    """One for each metric; errors and names stand among them."""
    for metric, value in found.items():
        if "," in metric and "_stderr" not in metric and isinstance(value, (int, float)):
            yield Result(task, metric, float(value), usage)
