"""What a conversion will take, before it starts: `edlm convert --dry-run`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from itertools import islice
from typing import Any

import torch
from rich.filesize import decimal
from rich.table import Table
from torch import Tensor, nn

from vllm_edlm.train.memory import Memory, count, memory
from vllm_edlm.train.packing import NO_DOCUMENT
from vllm_edlm.train.step_cost import StepCost, measure
from vllm_edlm.train.trainer import ConversionTrainer

_SAMPLED_ROWS = 256
_SHARDS = (2, 4, 8)


@dataclass(frozen=True)
class DataSample:
    """The first rows of the data.

    Attributes:
        rows: how many.
        tokens_per_document: mean, filled up to whole blocks.
        in_loss: share of the rows' tokens.
        pad: share of the rows' tokens.
    """

    rows: int
    tokens_per_document: float
    in_loss: float
    pad: float


def sample(rows: Iterable[dict[str, Tensor]], count: int = _SAMPLED_ROWS) -> DataSample:
    """Look at the first `count` rows, from `PackedRows`."""
    seen = list(islice(rows, count))
    documents = torch.stack([row["document_ids"] for row in seen])
    in_loss = torch.stack([row["in_loss"] for row in seen]).float().mean()
    used = (documents != NO_DOCUMENT).float().mean()
    number = int((documents.max(dim=1).values + 1).sum())
    per_document = documents.numel() * float(used) / number
    return DataSample(len(seen), per_document, float(in_loss), 1 - float(used))


@dataclass(frozen=True)
class Plan:
    """What is going to happen; `render` says where each figure comes from.

    Attributes:
        learning_rates: by step, counted from 1.
        rows_per_step: of all processes and accumulated batches.
    """

    model: str
    parameters: int
    trainable: int
    data: DataSample
    steps: int
    row_length: int
    batch_size: int
    accumulation: int
    processes: int
    learning_rates: dict[int, float]
    checkpointed: bool
    memory: Memory
    cost: StepCost

    @property
    def rows_per_step(self) -> int:
        return self.batch_size * self.accumulation * self.processes

    @property
    def tokens_per_step(self) -> int:
        return self.rows_per_step * self.row_length

    @property
    def seconds_per_step(self) -> float:
        return self.cost.seconds * self.accumulation


def plan(trainer: ConversionTrainer) -> Plan:
    """Look at the data's first rows and run the first batch; weights and files stay untouched.

    Raises:
        ValueError: the data does not fit, or a batch does not fit into memory.
    """
    args, causal_lm = trainer.args, trainer.model.causal_lm
    data = sample(trainer.train_dataset)
    cost = measure(trainer)
    return Plan(
        model=causal_lm.config.name_or_path,
        parameters=count(causal_lm),
        trainable=count(causal_lm, trained=True),
        data=data,
        steps=args.max_steps,
        row_length=trainer.row_length,
        batch_size=args.train_batch_size,
        accumulation=args.gradient_accumulation_steps,
        processes=args.world_size,
        learning_rates=learning_rates(trainer),
        checkpointed=causal_lm.is_gradient_checkpointing,
        memory=memory(trainer, cost),
        cost=cost,
    )


def learning_rates(trainer: ConversionTrainer) -> dict[int, float]:
    """The schedule at its start, at the peak, at every quarter and at the end."""
    args = trainer.args
    optimizer = torch.optim.SGD([nn.Parameter(torch.empty(0))], lr=args.learning_rate)
    scheduler: Any = trainer.create_scheduler(args.max_steps, optimizer)
    rate = scheduler.lr_lambdas[0]
    peak = args.get_warmup_steps(args.max_steps) + 1
    steps = {1, peak, *(args.max_steps * quarter // 4 for quarter in range(1, 5))}
    return {s: args.learning_rate * rate(s - 1) for s in sorted(steps) if 1 <= s <= args.max_steps}


def render(plan: Plan) -> Table:
    """The plan as a table; the last column says where a figure comes from."""
    table = Table("", "", "from", title=f"Conversion of {plan.model}", title_justify="left")
    for row in [*_what(plan), *_how_much_memory(plan), *_how_long(plan)]:
        table.add_row(*row)
    return table


Row = tuple[str, str, str]


def _what(plan: Plan) -> list[Row]:
    data, seen = plan.data, f"the first {plan.data.rows} rows"
    batches = f"{plan.batch_size} a batch x {plan.accumulation} accumulated"
    rates = ", ".join(f"{rate:.2g} at {step:,}" for step, rate in plan.learning_rates.items())
    total = plan.steps * plan.tokens_per_step
    return [
        ("parameters", f"{plan.parameters:,}, {plan.trainable:,} of them trained", "the model"),
        ("tokens per document", f"{data.tokens_per_document:,.0f}", f"{seen}, whole blocks"),
        ("tokens in the loss", f"{data.in_loss:.0%}", seen),
        ("pad", f"{data.pad:.0%}", seen),
        (
            "rows per step",
            f"{plan.rows_per_step:,} of {plan.row_length:,} tokens",
            f"{batches} x {plan.processes} processes",
        ),
        ("tokens", f"{plan.tokens_per_step:,} a step, {total:,} in all", f"{plan.steps:,} steps"),
        ("tokens with pad left out", f"{total * (1 - data.pad):,.0f}", seen),
        ("learning rate", rates, "the schedule, by step"),
    ]


def _how_much_memory(plan: Plan) -> list[Row]:
    memory, cost = plan.memory, plan.cost
    plain, checkpointed = decimal(cost.activations), decimal(cost.activations_checkpointed)
    sharded = ", ".join(f"{decimal(memory.fsdp(n))} on {n}" for n in _SHARDS)
    rows = [
        ("weights", decimal(memory.weights), "fp32, 4 bytes a parameter"),
        ("gradients", decimal(memory.gradients), "fp32, of what is trained"),
        ("optimizer", decimal(memory.optimizer), "AdamW: two moments in fp32"),
        (
            "activations",
            f"{plain}, with gradient checkpointing {checkpointed}",
            "one batch: what autograd kept",
        ),
        ("logits", decimal(memory.logits), "a slice of masked tokens, three times in fp32"),
        ("memory of one process", decimal(memory.alone), _setting(plan)),
        ("each of several (DDP)", decimal(memory.ddp), "and the gradients again, in buckets"),
        ("each of several (FSDP)", sharded, "a share, and two layers, embeddings and head whole"),
    ]
    if memory.teacher:
        rows.insert(3, ("teacher", decimal(memory.teacher), "its weights"))
    return rows


def _setting(plan: Plan) -> str:
    with_or_without = "with" if plan.checkpointed else "without"
    return (
        f"the sum, {with_or_without} gradient checkpointing; the allocator's reserve comes on top"
    )


def _how_long(plan: Plan) -> list[Row]:
    cost, seconds = plan.cost, plan.seconds_per_step
    rate = plan.tokens_per_step / seconds
    source = (
        f"a forward and backward pass of {cost.joint_tokens:,} tokens, measured here; without "
        "optimizer and communication"
    )
    return [
        ("time per step", f"{seconds:.3g} s, {rate:,.0f} tokens/s", source),
        ("time in all", str(timedelta(seconds=round(plan.steps * seconds))), "times the steps"),
    ]
