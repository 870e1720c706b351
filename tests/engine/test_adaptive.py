"""Load-aware block lengths: any blocks that the load makes are decoded exactly."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
from checkpoints import CheckpointFactory, CheckpointSpec
from harness import MAX_MODEL_LEN, Ask, Engine, Served, Visit, prompt
from oracle import Blocks
from oracle_sampling import Sampling

FULL_LENGTH, BUDGET = 16, 32
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
    blocks: dict[Prompt, list[range]]

    def record(self) -> None:
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


@pytest.fixture(scope="module", params=["block_causal", "bidirectional"])
def adaptive(request: pytest.FixtureRequest, checkpoint: CheckpointFactory) -> Iterator[Any]:
    spec = CheckpointSpec(block_length=FULL_LENGTH, prompt_attention=request.param, seed=6)
    engine = AdaptiveEngine(
        Engine.start(
            checkpoint(spec),
            Served(FULL_LENGTH, request.param),
            enforce_eager=True,
            additional_config={"edlm": {"adaptive_canvas": BUDGET}},
        ),
        defaultdict(list),
    )
    engine.record()
    return engine


def test_alone_blocks_have_their_full_length(adaptive: AdaptiveEngine) -> None:
    ask = Ask(prompt(45, seed=800), max_tokens=50)
    expected = adaptive.engine.expected(ask)
    adaptive.assert_exact([Visit(ask)])
    (output,) = adaptive.engine.generate([ask])
    assert list(output.outputs[0].token_ids) == expected.token_ids
    blocks = {
        "block_causal": [range(32, 48), range(48, 64), range(64, 80), range(80, 96)],
        "bidirectional": [range(45, 61), range(61, 77), range(77, 93), range(93, 109)],
    }
    assert adaptive.blocks[ask.prompt] == blocks[adaptive.engine.served.prompt_attention]


@pytest.mark.parametrize(("num_requests", "length"), [(3, 8), (8, 4)])
def test_together_blocks_are_shorter(
    adaptive: AdaptiveEngine, num_requests: int, length: int
) -> None:
    # Prompts that end at borders of every length.
    asks = [Ask(prompt(32, seed=810 + i), max_tokens=32) for i in range(num_requests)]
    adaptive.assert_exact([Visit(ask) for ask in asks])
    assert all(adaptive.lengths(ask)[0] == length for ask in asks)


@pytest.mark.parametrize(("max_steps", "length"), [(1, 16), (2, 8), (4, 4), (16, 4)])
def test_tokens_per_step_stay_as_asked(
    adaptive: AdaptiveEngine, max_steps: int, length: int
) -> None:
    asks = [
        Ask(prompt(32, seed=820 + i), max_tokens=48, threshold=1.0, max_steps=max_steps)
        for i in range(8)
    ]
    adaptive.assert_exact([Visit(ask) for ask in asks])
    assert adaptive.lengths(asks[0]) == [length] * (48 // length)
    denoises = [step for step in adaptive.engine.forwards if step.num_drafts]
    assert len(denoises) == 48 // 16 * max_steps


@pytest.mark.parametrize("seed", range(3))
def test_as_the_load_comes_and_goes(adaptive: AdaptiveEngine, seed: int) -> None:
    visits = [
        Visit(
            Ask(
                prompt(1 + (37 * i + 11 * seed) % 120, seed=830 + 20 * seed + i),
                max_tokens=10 + (29 * i) % 70,
                threshold=(0.3, 0.6, 0.9)[i % 3],
                max_steps=(None, 2, 5)[i % 3],
                sampling=Sampling(temperature=1.0, seed=i) if i % 4 == 1 else Sampling(),
            ),
            arrival=(5 * i) % 40,
        )
        for i in range(12)
    ]
    adaptive.assert_exact(visits)
    assert {len(b) for blocks in adaptive.blocks.values() for b in blocks} == {4, 8, 16}


def test_to_the_end_of_the_context(adaptive: AdaptiveEngine) -> None:
    visits = [
        Visit(Ask(prompt(MAX_MODEL_LEN - room, seed=860 + room), max_tokens=99), arrival=room)
        for room in (1, 2, 3, 7, 11, 18)
    ]
    adaptive.assert_exact(visits)
