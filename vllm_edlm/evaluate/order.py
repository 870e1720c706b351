"""In which order the served model reveals the positions of a block."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from scipy.stats import kendalltau
from vllm import LLM

from vllm_edlm.bench.report import Plot, Row, Table
from vllm_edlm.compat.vllm_api import LogprobsLists, Request
from vllm_edlm.evaluate.engine import ask, in_this_process, serving
from vllm_edlm.evaluate.grid import Cell
from vllm_edlm.open_blocks import OpenBlocks


@dataclass
class BlockOrder:
    """When the positions of one block were revealed.

    Attributes:
        start: position of the block's first entry in the text.
        known: entries that were known before its first denoise step: the end of a prompt.
        steps: denoise steps that it has had.
        revealed: for each entry behind `known` the step that revealed it, from 1; 0 if none yet.
    """

    start: int
    known: int
    steps: int = 0
    revealed: list[int] = field(default_factory=list)

    @property
    def is_complete(self) -> bool:
        """Whether every position is revealed."""
        return all(self.revealed)

    def take(self, canvas: Sequence[int], mask_token_id: int) -> None:
        """Take in the canvas that a step has left."""
        entries = canvas[self.known : self.known + len(self.revealed)]
        for index, token in enumerate(entries):
            if not self.revealed[index] and token != mask_token_id:
                self.revealed[index] = self.steps

    @property
    def left_to_right(self) -> float | None:
        """Kendall's tau-b of position and step: 1 from left to right, -1 the other way; None
        where all positions were revealed at once."""
        if len(set(self.revealed)) < 2:
            return None
        return float(kendalltau(range(len(self.revealed)), self.revealed).statistic)


class RevealLog:
    """The blocks of an engine's requests, told step by step."""

    def __init__(self, mask_token_id: int) -> None:
        self._mask_token_id = mask_token_id
        self._open: dict[str, BlockOrder] = {}
        self._under_way: set[str] = set()
        self.blocks: list[BlockOrder] = []

    def begin_step(self, request_id: str, block: range, known: int) -> None:
        """A denoise step of a block of text positions, of which those below `known` are known."""
        order = self._open.get(request_id)
        if order is None or order.start != block.start:
            order = BlockOrder(block.start, known - block.start, 0, [0] * (block.stop - known))
            self._open[request_id] = order
            self.blocks.append(order)
        order.steps += 1
        self._under_way.add(request_id)

    def end_step(self, request_id: str, canvas: Sequence[int]) -> None:
        """The canvas as the request's last step has left it; others' are ignored."""
        if request_id in self._under_way:
            self._under_way.remove(request_id)
            self._open[request_id].take(canvas, self._mask_token_id)

    def take_blocks(self) -> list[BlockOrder]:
        """The complete blocks since the last call; none may be open."""
        complete = [block for block in self.blocks if block.is_complete]
        self.blocks.clear()
        self._open.clear()
        return complete


class LoggedBlocks(OpenBlocks):
    """The scheduler's blocks, which tell a log of every denoise step."""

    def __init__(self, blocks: OpenBlocks, log: RevealLog) -> None:
        super().__init__(blocks.options, blocks.max_model_len)
        self._log = log

    def count_step(self, request: Request, logprobs: LogprobsLists | None) -> None:
        """Count a denoise step, before its tokens are appended to the request."""
        block = range(self.start(request), self.end(request))
        self._log.begin_step(request.request_id, block, request.num_tokens)
        super().count_step(request, logprobs)

    def keep_canvas(self, request_id: str, canvas: list[int]) -> None:
        """Keep a canvas as the last step has left it; that of a finished request comes, too."""
        self._log.end_step(request_id, canvas)
        super().keep_canvas(request_id, canvas)


@contextmanager
def logged_engine(model: str, **engine_args: Any) -> Iterator[tuple[LLM, RevealLog]]:
    """An engine in this process and the log of its blocks."""
    with in_this_process(), serving(model, **engine_args) as llm:
        yield llm, log_of(llm)


def log_of(llm: LLM) -> RevealLog:
    """Let an engine that runs in this process, and has served nothing yet, log its blocks."""
    scheduler: Any = llm.llm_engine.engine_core.engine_core.scheduler  # type: ignore[attr-defined]
    log = RevealLog(scheduler.options.mask_token_id)
    scheduler.blocks = LoggedBlocks(scheduler.blocks, log)
    return log


def order_table(
    model: str,
    prompts: Sequence[str],
    cells: Sequence[Cell],
    block_length: int,
    max_tokens: int,
    chat: bool | None,
    engine_args: dict[str, Any],
) -> Table:
    """Answer all prompts in every cell, on one engine, and describe the order of reveals.

    Raises:
        ValueError: no answer completed a block.
    """
    diffusion = {"canvas_length": block_length, "max_denoising_steps": block_length}
    rows, notes = [], []
    with logged_engine(model, **({"diffusion_config": diffusion} | engine_args)) as (llm, log):
        for cell in cells:
            ask(llm, prompts, max_tokens, cell.extra_args, chat=chat)
            blocks = log.take_blocks()
            rows += position_rows(cell, blocks)
            notes.append(_direction(cell, blocks))
    if not rows:
        raise ValueError(f"no block was completed within {max_tokens} tokens: ask for more")
    return _table(rows, notes)


def position_rows(cell: Cell, blocks: Sequence[BlockOrder]) -> list[Row]:
    """One row for each in-block position that a complete block began with masked."""
    rows = []
    for position in range(cell.block_length):
        steps = [
            (block.revealed[position - block.known], block.steps)
            for block in blocks
            if 0 <= position - block.known < len(block.revealed)
        ]
        if steps:
            shares = [(step - 1) / (last - 1) for step, last in steps if last > 1]
            rows.append(
                {
                    **cell.columns,
                    "position": position,
                    "blocks": len(steps),
                    "share of steps": fmean(shares) if shares else None,
                    "in the first step": fmean(step == 1 for step, _ in steps),
                }
            )
    return rows


def _direction(cell: Cell, blocks: Sequence[BlockOrder]) -> str:
    taus = [tau for block in blocks if (tau := block.left_to_right) is not None]
    options = ", ".join(
        f"{key} {value}" for key, value in cell.columns.items() if value is not None
    )
    mean = f"{fmean(taus):.3f}" if taus else "-"
    return (
        f"Kendall's tau of position and step ({options}): {mean}, mean over {len(taus)} blocks of "
        f"{len(blocks)}; the others were revealed in one step."
    )


def _table(rows: list[Row], notes: list[str]) -> Table:
    return Table(
        name="order",
        title="Order of reveals in a block, as served",
        rows=rows,
        notes=[
            "Share of steps: of the steps after a block's first one, how many it takes until the "
            "position is revealed: 0 in the first step, 1 in the last one; mean over the blocks of "
            "more than one step.",
            "In the first step: share of all blocks whose first step reveals the position.",
            "Positions that a prompt's end fills are left out, and blocks that a stop cut short.",
            *notes,
        ],
        plot=Plot(
            x="position",
            y="share of steps",
            series=("reveal", "threshold", "block length", "max steps"),
        ),
    )
