"""Speed and memory of a conversion, against plain AR fine-tuning of the same model."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from rich.progress import track
from torch import Tensor
from torch.utils.data import IterableDataset
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from vllm_edlm.bench.engine import Engine
from vllm_edlm.bench.machine import synchronize
from vllm_edlm.bench.memory_use import resident
from vllm_edlm.bench.report import Row, Table
from vllm_edlm.bench.rounds import running
from vllm_edlm.bench.settings import TINY_MATH, Settings
from vllm_edlm.bench.shapes import TINY, Shape, write_config
from vllm_edlm.train.attention import implementation
from vllm_edlm.train.documents import Document
from vllm_edlm.train.model import BlockDiffusionLM
from vllm_edlm.train.objective import Objective
from vllm_edlm.train.packing import PackedRows
from vllm_edlm.train.trainer import ConversionTrainer

AR = "AR fine-tuning"
CONVERSION = "conversion"
BLOCK_LENGTH = 16
# Optimizer steps that a round measures; one more comes before them.
STEPS = 4
DOCUMENTS = 64
MIB = 2**20

NOTES = [
    "Data tokens: those of the rows, each of which the model learns from once. A conversion runs "
    "a noisy and a clean copy of them, so it has about twice as many tokens to compute.",
    "Both train the same random weights by AdamW in bf16 autocast, with eager torch, on the same "
    "rows: documents of random tokens, each as long as a row, all in the loss. AR fine-tuning is "
    "`transformers.Trainer` with `AutoModelForCausalLM`.",
    f"Block length {BLOCK_LENGTH}, position-dependent noise, `--attention auto`. Time is that of "
    f"{STEPS} whole steps, data and optimizer included, after one that does not count.",
    "Figures are medians over rounds, which alternate between the two processes; the ratio is "
    "taken in each round, then the median.",
    "Idle: what the process holds with its weights, before it trains. Extra peak: the most that "
    "it holds while it trains, over idle. On a CPU resident memory, on a GPU what torch has "
    "allocated.",
]


@dataclass(frozen=True)
class Job:
    """What is trained on: a model's shape and rows.

    Attributes:
        rows: of a step.
    """

    name: str
    shape: Shape
    row_length: int
    rows: int


@dataclass(frozen=True)
class Run:
    """A few steps of one trainer; `peak` in bytes, since the process began."""

    tokens_per_second: float
    peak: int


class Training:
    """A model and how it is trained, in a process of its own.

    Attributes:
        idle: bytes held before any training.
    """

    def __init__(self, job: Job, kind: str, folder: Path) -> None:
        self._job = job
        self._folder = folder
        self._start = {AR: self._fine_tuning, CONVERSION: self._conversion}[kind]
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        config = AutoConfig.from_pretrained(write_config(job.shape, folder / kind, None))
        attention = "sdpa" if kind == AR else implementation("auto", device)
        self._causal_lm = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, attn_implementation=attention
        ).to(device)
        self.idle = _memory("VmRSS", torch.cuda.memory_allocated)

    def run(self) -> Run:
        """Train for one step, then for those that are measured."""
        clock = _Clock()
        trainer = self._start()
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(clock)
        trainer.train()
        tokens = STEPS * self._job.rows * self._job.row_length
        peak = _memory("VmHWM", torch.cuda.max_memory_allocated)
        return Run(tokens / (clock.ends[-1] - clock.ends[0]), peak)

    def _fine_tuning(self) -> Trainer:
        rows = _CausalRows(_rows(self._job))
        return Trainer(self._causal_lm, self._arguments(), train_dataset=rows)

    def _conversion(self) -> Trainer:
        mask_token_id = self._job.shape.vocabulary - 1
        objective = Objective(BLOCK_LENGTH, mask_token_id)
        model = BlockDiffusionLM(self._causal_lm, objective)
        rows = _rows(self._job)
        return ConversionTrainer(
            model, self._arguments(), rows, objective, row_length=self._job.row_length
        )

    def _arguments(self) -> TrainingArguments:
        return TrainingArguments(
            output_dir=str(self._folder / "trainer"),
            max_steps=1 + STEPS,
            per_device_train_batch_size=self._job.rows,
            learning_rate=1e-5,
            bf16=True,
            use_cpu=not torch.cuda.is_available(),
            logging_strategy="no",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )


class _Clock(TrainerCallback):
    """Notes when each step has ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        synchronize()
        self.ends.append(perf_counter())


class _CausalRows(IterableDataset[dict[str, Tensor]]):
    """The tokens of packed rows as inputs and labels of a causal LM."""

    def __init__(self, rows: PackedRows) -> None:
        self._rows = rows

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return ({"input_ids": row["tokens"], "labels": row["tokens"]} for row in self._rows)


def _rows(job: Job) -> PackedRows:
    """Endless rows of random tokens, the same for every trainer."""
    generator = torch.Generator().manual_seed(0)
    # The last token stands for the mask.
    size = (DOCUMENTS, job.row_length)
    tokens = torch.randint(job.shape.vocabulary - 1, size, generator=generator).tolist()
    documents = [Document(row, [True] * job.row_length) for row in tokens]
    return PackedRows(documents, job.row_length, BLOCK_LENGTH, eos_token_id=0)


def _memory(field: str, of_gpu: Callable[[], int]) -> int:
    """Bytes of this process."""
    return of_gpu() if torch.cuda.is_available() else resident(field)


def training(settings: Settings) -> Table:
    """Both trainers on every shape."""
    return Table(
        name="training",
        title=f"Training: block length {BLOCK_LENGTH}, bf16 autocast",
        rows=[row for job in _jobs(settings) for row in _measure(settings, job)],
        notes=NOTES,
    )


def _jobs(settings: Settings) -> list[Job]:
    if settings.quick:
        return [Job("tiny", TINY, row_length=32, rows=2)]
    medium = Shape(
        layers=12,
        hidden=512,
        intermediate=1536,
        heads=8,
        kv_heads=4,
        head_dim=64,
        vocabulary=32_000,
    )
    return [
        Job("tiny-math", Shape.of_checkpoint(TINY_MATH), row_length=64, rows=64),
        Job("12 layers, hidden 512, vocabulary 32,000", medium, row_length=512, rows=4),
    ]


def _measure(settings: Settings, job: Job) -> list[Row]:
    """Both trainers' rows, their rounds alternating."""

    def starts(kind: str) -> Callable[[], Engine]:
        return lambda: Engine(settings.environment, Training, job, kind, settings.work / job.name)

    runs: dict[str, list[Run]] = {AR: [], CONVERSION: []}
    with running({kind: starts(kind) for kind in runs}) as engines:
        idle = {kind: engine.call(_idle) for kind, engine in engines.items()}
        for _ in track(range(settings.rounds), job.name):
            for kind, engine in engines.items():
                runs[kind].append(engine.call(Training.run))
    return [_row(job, kind, runs[kind], runs[AR], idle[kind]) for kind in runs]


def _idle(training: Training) -> int:
    return training.idle


def _row(job: Job, kind: str, runs: list[Run], ar: list[Run], idle: int) -> Row:
    speeds = [run.tokens_per_second for run in runs]
    pairs = zip(runs, ar, strict=True)
    return {
        "training": kind,
        "model": job.name,
        "row length": job.row_length,
        "rows": job.rows,
        "data tokens/s": median(speeds),
        "data tokens/s min": min(speeds),
        "data tokens/s max": max(speeds),
        "ratio to AR": median(
            own.tokens_per_second / base.tokens_per_second for own, base in pairs
        ),
        "idle (MiB)": idle / MIB,
        "extra peak (MiB)": (max(run.peak for run in runs) - idle) / MIB,
    }
