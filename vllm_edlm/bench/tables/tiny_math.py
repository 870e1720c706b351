"""Throughput of a trained model: how many tokens a forward reveals is its own doing."""

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from vllm_edlm.bench.engine import Engine
from vllm_edlm.bench.figures import NOTES, by_cell, row
from vllm_edlm.bench.load import Load, Round
from vllm_edlm.bench.reference import Reference
from vllm_edlm.bench.report import Plot, Row, Table, Value
from vllm_edlm.bench.rounds import (
    ADAPTIVE,
    AR,
    PLUGIN,
    REFERENCE,
    Cell,
    Sample,
    alternate,
    running,
    start_up,
)
from vllm_edlm.bench.settings import REPOSITORY, TINY_MATH, Settings
from vllm_edlm.bench.shapes import Shape

CONCURRENCIES = (1, 4, 8, 16)
QUICK_CONCURRENCIES = (1, 2)
REFERENCE_CONCURRENCIES = (1, 8)
THRESHOLDS = (1.0, 0.9, 0.7)
MAIN_THRESHOLD = 0.9
QUESTIONS = 64
QUICK_QUESTIONS = 4
HELDOUT_SEED = 1
# Answers have fewer than 32.
MAX_TOKENS = 64
ENGINE_ARGS: dict[str, Any] = {"kv_cache_memory_bytes": 2**26, "max_model_len": 512}


@dataclass(frozen=True)
class Exam:
    """Held-out questions of the committed checkpoint.

    Attributes:
        problems: prompt and response of each, as text.
    """

    problems: Sequence[dict[str, str]]

    @classmethod
    def write(cls, folder: Path, count: int) -> "Exam":
        """Generate that many questions by the example's own command."""
        path = folder / "heldout.jsonl"
        command = [sys.executable, "-m", "examples.convert.word_problems", path]
        options = ["--split", "heldout", "--seed", HELDOUT_SEED, "--count", count]
        subprocess.run(list(map(str, command + options)), cwd=REPOSITORY, check=True)
        return cls([json.loads(line) for line in path.read_text().splitlines()])

    @cached_property
    def tokenizer(self) -> Any:
        """That of both models."""
        return AutoTokenizer.from_pretrained(TINY_MATH)

    @cached_property
    def prompts(self) -> list[list[int]]:
        """Token ids of each question as a chat."""
        chats = [[{"role": "user", "content": item["prompt"]}] for item in self.problems]
        texts = self.tokenizer.apply_chat_template(
            chats, tokenize=False, add_generation_prompt=True
        )
        return self.tokenizer(texts, add_special_tokens=False)["input_ids"]

    def exact_match(self, round_: Round) -> float:
        """Share of the answers that end with the right result."""
        answers = self.tokenizer.batch_decode(
            [trace.tokens for trace in round_.traces], skip_special_tokens=True
        )
        right = [
            result(answer) == result(item["response"])
            for answer, item in zip(answers, self.problems, strict=True)
        ]
        return sum(right) / len(right)


def result(answer: str) -> str | None:
    """The number after `####`, which must end the answer."""
    match = re.search(r"####\s*(-?\d+)\s*$", answer)
    return match.group(1) if match else None


def tiny_math(settings: Settings) -> Table:
    """The AR model that tiny-math was converted from, tiny-math, and the reference loop.

    Raises:
        FileNotFoundError: the AR model is not there.
    """
    if not (settings.tiny_math_ar / "config.json").exists():
        raise FileNotFoundError(
            f"no AR model in {settings.tiny_math_ar}: `make tiny-math` trains it"
        )
    exam = Exam.write(settings.work, QUICK_QUESTIONS if settings.quick else QUESTIONS)
    concurrencies = QUICK_CONCURRENCIES if settings.quick else CONCURRENCIES
    with running(_starts(settings)) as engines:
        groups = [_group(concurrency, exam) for concurrency in concurrencies]
        samples = alternate(engines, groups, settings.rounds)
        notes = [*NOTES, start_up(engines)]
    return _table(settings, exam, samples, notes)


def _starts(settings: Settings) -> dict[str, Any]:
    def adaptive() -> Engine:
        options = {"edlm": {"adaptive_canvas": True}}
        return settings.serve(TINY_MATH, additional_config=options, **ENGINE_ARGS)

    return {
        AR: lambda: settings.serve(settings.tiny_math_ar, **ENGINE_ARGS),
        PLUGIN: lambda: settings.serve(TINY_MATH, **ENGINE_ARGS),
        ADAPTIVE: adaptive,
        REFERENCE: lambda: Engine(settings.environment, Reference.load, TINY_MATH),
    }


def _group(concurrency: int, exam: Exam) -> list[Cell]:
    def cell(engine: str, threshold: float | None) -> Cell:
        options = {} if threshold is None else {"diffusion_threshold": threshold}
        columns: dict[str, Value] = {"threshold": threshold, "concurrency": concurrency}
        return Cell(engine, columns, _load(concurrency, exam, options))

    engines = [ADAPTIVE, *([REFERENCE] if concurrency in REFERENCE_CONCURRENCIES else [])]
    return [
        cell(AR, None),
        *(cell(PLUGIN, threshold) for threshold in THRESHOLDS),
        *(cell(engine, MAIN_THRESHOLD) for engine in engines),
    ]


def _load(concurrency: int, exam: Exam, options: dict[str, Any]) -> Load:
    longest = max(map(len, exam.prompts))
    return Load(
        concurrency,
        num_requests=len(exam.prompts),
        prompt_length=longest,
        output_length=MAX_TOKENS,
        options=options,
        prompts=exam.prompts,
        ignore_eos=False,
    )


def _table(settings: Settings, exam: Exam, samples: list[Sample], notes: list[str]) -> Table:
    shape = Shape.of_checkpoint(TINY_MATH)

    def with_grade(group: list[Sample]) -> Row:
        grade = exam.exact_match(group[0].round)
        return row(group, shape, settings.rates) | {"exact match": grade}

    return Table(
        name="tiny_math",
        title=f"tiny-math: {len(exam.problems)} held-out questions, greedy",
        rows=[with_grade(group) for group in by_cell(samples)],
        notes=[
            *notes,
            "The reference loop lets the prompt see itself whole, which tiny-math was not "
            "trained for.",
        ],
        plot=Plot(x="concurrency", y="tokens/s", series=("engine", "threshold"), log_x=True),
    )
