"""Metrics: what is counted, how it travels, and that other models see nothing of it."""

from collections.abc import Iterator, Sequence

import pytest
from checkpoints import CheckpointFactory, CheckpointSpec
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import REGISTRY
from vllm import EngineArgs
from vllm.config import VllmConfig
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.metrics.loggers import AggregateStatLoggerBase, StatLoggerManager
from vllm.v1.metrics.prometheus import unregister_vllm_metrics
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder
from vllm.v1.spec_decode.metrics import SpecDecodingStats

from vllm_edlm.compat.stat_loggers import install_stat_logger
from vllm_edlm.metrics import KINDS, Counts, ForwardCounter, forward_kinds, reported
from vllm_edlm.metrics_logger import power_buckets, ratio_buckets

M = 9  # the mask token of these tests
B = 4
STOCK = CheckpointSpec(architecture="Qwen3ForCausalLM", layout="plain", seed=3)


def new_stats() -> SpecDecodingStats:
    return SpecDecodingStats.new(B)


@pytest.mark.parametrize(
    ("start", "num_open", "first_block", "open_block", "kinds"),
    [
        (0, 0, 8, 4, ["prefill"]),  # a chunk of the prompt
        (0, 0, 0, 0, ["prefill"]),  # a prompt shorter than a block, alone
        (8, 0, 8, 8, ["prefill"]),  # the end of a prompt, alone
        (0, 4, 8, 8, ["prefill", "denoise"]),  # a prompt and the block after it
        (0, 3, 0, 0, ["denoise"]),  # a prompt within the open block
        (8, 2, 8, 8, ["denoise"]),
        (8, 4, 8, 12, ["denoise", "commit"]),  # the block completed last and the next one
        (8, 0, 8, 12, ["commit"]),
        (0, 3, 8, 16, ["prefill", "denoise", "commit"]),  # all again, after a preemption
        (16, 0, 8, 16, ["prefill"]),  # the known part of an open block, alone
    ],
)
def test_kinds(
    start: int, num_open: int, first_block: int, open_block: int, kinds: list[str]
) -> None:
    assert forward_kinds(start, num_open, first_block, open_block) == kinds


COUNTS = st.builds(
    Counts,
    steps=st.integers(0, 9),
    forwards=st.fixed_dictionaries({kind: st.integers(0, 99) for kind in KINDS}),
    open_blocks=st.integers(0, 9),
    reveals=st.lists(st.integers(1, B)),
    finished=st.lists(st.tuples(st.integers(0, 99), st.integers(1, 99))),
)


@given(COUNTS)
def test_counts_survive_as_integers(counts: Counts) -> None:
    assert Counts.from_ints(counts.to_ints()) == counts


class Scheduler:
    """One request with the prompt [0, 4) and blocks of 4, told of as a scheduler does."""

    def __init__(self) -> None:
        self.counter = ForwardCounter(M)

    def run(self, start: int, end: int, num_open: int) -> None:
        block = (end - num_open) // B * B
        self.counter.begin_step(end - start)
        self.counter.add("a", start, end, num_open, first_block=4, open_block=block)

    def denoise(self, start: int, end: int, num_open: int, canvas: Sequence[int]) -> None:
        self.run(start, end, num_open)
        self.counter.reveal("a", canvas)

    def counts(self) -> Counts:
        counts = reported(self.counter.report(None, new_stats))
        assert counts is not None
        return counts


@pytest.fixture
def scheduler() -> Scheduler:
    return Scheduler()


def test_a_request_from_its_prompt_to_its_end(scheduler: Scheduler) -> None:
    scheduler.denoise(0, 8, 4, [M, 1, M, M])  # revealed out of order: nothing is emitted
    scheduler.denoise(4, 8, 4, [1, 1, M, M])
    scheduler.denoise(4, 8, 2, [1, 1, 1, 1])
    assert scheduler.counts() == Counts(
        steps=3,
        forwards={"prefill": 1, "denoise": 3, "commit": 0},
        open_blocks=1,
        reveals=[1, 1, 2],
    )
    scheduler.run(4, 12, 4)
    scheduler.counter.finish("a", num_tokens=5, num_denoises=4)
    scheduler.counter.reveal("a", [1, 1, M, M])
    assert scheduler.counts() == Counts(
        steps=1,
        forwards={"prefill": 0, "denoise": 1, "commit": 1},
        open_blocks=0,
        reveals=[2],
        finished=[(5, 4)],
    )


def test_what_was_not_accepted_is_revealed_again(scheduler: Scheduler) -> None:
    scheduler.denoise(0, 8, 4, [1, 1, 1, M])  # emitted, but the first one alone accepted
    scheduler.denoise(4, 8, 3, [1, 1, 1, M])
    scheduler.denoise(4, 8, 1, [1, 1, 1, 1])
    assert scheduler.counts().reveals == [3, 2, 1]
    scheduler.denoise(4, 12, 4, [1, 1, 1, 1])  # a whole block, likewise
    scheduler.denoise(8, 12, 3, [1, 1, 1, 1])
    assert scheduler.counts().reveals == [4, 3]


def test_a_canvas_counts_where_it_is_open(scheduler: Scheduler) -> None:
    """Known entries and those behind the block's end may hold anything."""
    scheduler.counter.begin_step(4)
    scheduler.counter.add("a", 4, 7, 2, first_block=4, open_block=4)
    scheduler.counter.reveal("a", [M, 1, 1, M])
    assert scheduler.counts().reveals == [2]


def test_a_preempted_request_takes_its_block_up(scheduler: Scheduler) -> None:
    scheduler.denoise(0, 8, 4, [M, M, 1, M])
    scheduler.run(0, 4, 0)  # preempted; its prompt again, and a canvas nobody asked for
    scheduler.counter.reveal("a", [M, M, 1, M])
    scheduler.denoise(4, 8, 4, [1, 1, 1, 1])
    counts = scheduler.counts()
    assert counts.reveals == [1, 3]
    assert counts.forwards == {"prefill": 2, "denoise": 2, "commit": 0}


def test_an_aborted_request_leaves_nothing_behind(scheduler: Scheduler) -> None:
    scheduler.denoise(0, 8, 4, [M, M, 1, M])
    assert scheduler.counts().open_blocks == 1
    scheduler.counter.finish("a", num_tokens=0, num_denoises=1)
    scheduler.counter.begin_step(0)
    assert scheduler.counts() == Counts(finished=[(0, 1)])
    scheduler.denoise(0, 8, 4, [M, 1, 1, M])  # the id is free again
    assert scheduler.counts().reveals == [2]


def test_a_request_without_a_denoise_step_has_no_ratio(scheduler: Scheduler) -> None:
    scheduler.run(0, 4, 0)
    scheduler.counter.finish("a", num_tokens=0, num_denoises=0)
    assert scheduler.counts().finished == []


def test_nothing_to_report() -> None:
    counter, stats = ForwardCounter(M), new_stats()
    counter.begin_step(0)
    assert counter.report(None, new_stats) is None
    assert counter.report(stats, new_stats) is stats
    assert stats == new_stats()
    assert reported(stats) is reported(None) is None


def test_counts_reach_another_process_beside_vllms_own(scheduler: Scheduler) -> None:
    """By vLLM's own serialisation; the entries of the list that are vLLM's stay."""
    stats = new_stats()
    stats.observe_draft(num_draft_tokens=3, num_accepted_tokens=1)
    scheduler.denoise(0, 8, 4, [M, 1, 1, M])
    sent = SchedulerStats(spec_decoding_stats=scheduler.counter.report(stats, new_stats))
    data = MsgpackEncoder().encode(EngineCoreOutputs(scheduler_stats=sent))
    got = MsgpackDecoder(EngineCoreOutputs).decode(data).scheduler_stats.spec_decoding_stats
    assert got.num_draft_tokens_per_pos[:B] == [1, 1, 1, 0]
    assert (got.num_drafts, got.num_draft_tokens, got.num_accepted_tokens) == (1, 3, 1)
    assert reported(got) == Counts(1, {"prefill": 1, "denoise": 1, "commit": 0}, 1, [2])


@pytest.mark.parametrize("largest", [1, 2, 3, 8, 12, 32])
def test_buckets_end_with_the_largest_value(largest: int) -> None:
    for buckets in (power_buckets(largest), ratio_buckets(largest)):
        assert buckets == sorted(set(buckets))
        assert (buckets[0], buckets[-1]) == (1, largest)
    assert set(power_buckets(largest)) <= set(ratio_buckets(largest))


@pytest.fixture
def registry() -> Iterator[None]:
    """Nothing of vLLM's in the process's registry, before and after."""
    unregister_vllm_metrics()
    yield
    unregister_vllm_metrics()


def config(path: CheckpointFactory, spec: CheckpointSpec) -> VllmConfig:
    args = EngineArgs(model=str(path(spec)), dtype="float32", max_model_len=128)
    return args.create_engine_config()


def loggers(vllm_config: VllmConfig, engines: Sequence[int] = (0,)) -> StatLoggerManager:
    install_stat_logger()
    install_stat_logger()
    return StatLoggerManager(vllm_config, list(engines))


def kinds_of(manager: StatLoggerManager) -> list[type[AggregateStatLoggerBase]]:
    return [type(logger) for logger in manager.stat_loggers]


def ours() -> set[str]:
    return {metric.name for metric in REGISTRY.collect() if "edlm" in metric.name}


def sample(name: str, **labels: str) -> float | None:
    return REGISTRY.get_sample_value(name, labels)


@pytest.mark.usefixtures("registry")
def test_other_models_have_the_loggers_they_had(checkpoint: CheckpointFactory) -> None:
    stock = config(checkpoint, STOCK)
    with_plugin = loggers(stock)
    without_plugin = object.__new__(StatLoggerManager)
    StatLoggerManager.__init__._edlm_original(without_plugin, stock)  # type: ignore[attr-defined]
    assert kinds_of(with_plugin) == kinds_of(without_plugin)
    assert ours() == set()


@pytest.mark.usefixtures("registry")
def test_our_model_shows_its_counts_for_each_engine(checkpoint: CheckpointFactory) -> None:
    vllm_config = config(checkpoint, CheckpointSpec())
    vllm_config.model_config.served_model_name = "name"
    manager = loggers(vllm_config, engines=(0, 3))
    counts = Counts(2, {"prefill": 1, "denoise": 2, "commit": 0}, 1, [1, 3], [(6, 4)])
    length = vllm_config.num_speculative_tokens
    stats = SpecDecodingStats.new(length)
    stats.num_draft_tokens_per_pos += counts.to_ints()
    for _ in range(2):
        manager.record(SchedulerStats(spec_decoding_stats=stats), None, engine_idx=3)
    manager.record(SchedulerStats(), None, engine_idx=3)
    manager.record(None, None, engine_idx=3)
    manager.log()  # what rides on vLLM's statistics does not upset its log
    labels = {"model_name": "name", "engine": "3"}
    assert sample("vllm:edlm_engine_steps_total", **labels) == 4
    for kind, number in counts.forwards.items():
        assert sample("vllm:edlm_forwards_total", **labels, kind=kind) == 2 * number
    assert sample("vllm:edlm_open_blocks", **labels) == 1
    assert sample("vllm:edlm_reveal_size_sum", **labels) == 8
    assert sample("vllm:edlm_reveal_size_bucket", **labels, le="2.0") == 2
    assert sample("vllm:edlm_tokens_per_forward_bucket", **labels, le="1.0") == 0
    assert sample("vllm:edlm_tokens_per_forward_bucket", **labels, le="1.5") == 2
    assert sample("vllm:edlm_engine_steps_total", **labels | {"engine": "0"}) == 0


@pytest.mark.usefixtures("registry")
def test_engines_may_follow_each_other_in_a_process(checkpoint: CheckpointFactory) -> None:
    vllm_config = config(checkpoint, CheckpointSpec())
    loggers(vllm_config)
    loggers(vllm_config)
    assert len(ours()) == 5
    loggers(config(checkpoint, STOCK))
    assert ours() == set()
