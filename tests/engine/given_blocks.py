"""Load-aware block lengths beside the oracle: the blocks that each request has had."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from harness import Ask, Engine, Visit
from oracle import Blocks

Prompt = tuple[int, ...]


@dataclass(frozen=True)
class GivenBlocks(Blocks):
    """Generated blocks as they were, behind a grid."""

    generated: tuple[range, ...] = ()

    def index(self, position: int) -> int:
        if position < self.generated[0].start:
            return super().index(position)
        behind = [i for i, block in enumerate(self.generated) if position >= block.start]
        return 10**6 + behind[-1]

    def open_block(self, known: int, max_model_len: int) -> range:
        return next(block for block in self.generated if known in block)

    def steps(self, block: range, asked: int) -> int:
        """As many positions a step as asked for a whole block."""
        return -(-asked * len(block) // self.block_length)


@dataclass
class AdaptiveEngine:
    """An engine with a budget, and the blocks that each prompt's request has had."""

    engine: Engine
    blocks: dict[Prompt, list[range]] = field(default_factory=lambda: defaultdict(list))

    def __post_init__(self) -> None:
        scheduler = self.engine.core.scheduler
        count_step = scheduler.blocks.count_step

        def recorded(request: Any, *args: Any) -> None:
            block = range(scheduler.blocks.start(request), scheduler.blocks.end(request))
            had = self.blocks[tuple(request.prompt_token_ids)]
            if block not in had:
                had.append(block)
            count_step(request, *args)

        scheduler.blocks.count_step = recorded

    def assert_exact(self, visits: Sequence[Visit]) -> None:
        """Every answer is the oracle's over the blocks that its request has had."""
        self.blocks.clear()
        answers = self.engine.serve_over_time(visits)
        for visit, answer in zip(visits, answers, strict=True):
            assert answer is not None
            served, asked = self.engine.served, visit.ask.prompt
            blocks = GivenBlocks(
                served.block_length, served.prompt_attention, len(asked), tuple(self.blocks[asked])
            )
            expected = self.engine.expected(visit.ask, blocks)
            self.engine.assert_answer(visit.ask, answer, expected)

    def lengths(self, ask: Ask) -> list[int]:
        return [len(block) for block in self.blocks[ask.prompt]]
