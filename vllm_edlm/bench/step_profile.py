"""Where the steps of an engine in this process spend their time."""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from vllm import LLMEngine

from vllm_edlm.bench.load import Load, Round
from vllm_edlm.bench.machine import synchronize
from vllm_edlm.bench.stopwatch import Place, Stopwatch
from vllm_edlm.bench.vllm_server import VllmServer
from vllm_edlm.sampler import BlockDiffusionSampler


class Part(StrEnum):
    """Parts of a step; none holds another."""

    forward = "model forward"
    logits = "logits"
    statistics = "row statistics"
    sampler = "rest of sampler"
    runner = "rest of runner"
    scheduler = "scheduler"
    rest = "rest"


# What a step is for; all else is overhead.
USEFUL = (Part.forward, Part.logits, Part.statistics)


@dataclass(frozen=True)
class Profile:
    """A load served once under the stopwatch.

    Attributes:
        round: as without it.
        seconds: spent in the engine's steps, by part.
    """

    round: Round
    seconds: dict[Part, float]

    @property
    def step_seconds(self) -> float:
        """Mean time of a step."""
        return sum(self.seconds.values()) / len(self.round.forwards)

    def share(self, part: Part) -> float:
        """Share of the part in the time of all steps."""
        return self.seconds.get(part, 0.0) / sum(self.seconds.values())

    @property
    def overhead(self) -> float:
        """Share of the time outside the model's forward, its logits and their statistics."""
        return 1 - sum(map(self.share, USEFUL))


def profile(server: VllmServer, load: Load) -> Profile:
    """Serve the load once and say where the time went."""
    stopwatch = Stopwatch(synchronize)
    with stopwatch.watching(_places(server.engine)):
        round_ = server.measure(load)
    return Profile(round_, {part: stopwatch.seconds[part] for part in Part})


def _places(engine: LLMEngine) -> Iterator[Place]:
    """Methods of an in-process engine, outer ones before those that they call."""
    client: Any = engine.engine_core
    scheduler = client.engine_core.scheduler
    worker = engine.model_executor.driver_worker.worker
    runner = worker.model_runner
    yield Place(engine, "step", Part.rest)
    for method in (
        "schedule",
        "get_grammar_bitmask",
        "update_from_output",
        "update_draft_token_ids",
    ):
        yield Place(scheduler, method, Part.scheduler)
    yield Place(worker, "execute_model", Part.runner)
    yield Place(worker, "sample_tokens", Part.runner)
    yield Place(runner.model, "forward", Part.forward)
    yield Place(runner.model, "compute_logits", Part.logits)
    if hasattr(runner.model, "head"):
        # The plugin's sampler may ask for logits itself.
        yield Place(runner.model, "head", Part.logits)
    # The first version of the runner calls it otherwise.
    sample = "sample" if hasattr(runner, "sample") else "_sample"
    if isinstance(runner.sampler, BlockDiffusionSampler):
        yield Place(runner, sample, Part.sampler)
        yield Place(runner.sampler, "_choose", Part.statistics)
    else:
        # It samples in one piece.
        yield Place(runner, sample, Part.statistics)
