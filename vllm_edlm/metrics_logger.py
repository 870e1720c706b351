"""The counts of `metrics` as Prometheus metrics, on /metrics beside vLLM's."""

from itertools import pairwise
from typing import TypeVar

from prometheus_client import Counter, Gauge, Histogram
from vllm.config import VllmConfig
from vllm.v1.metrics.loggers import AggregateStatLoggerBase, PrometheusStatLogger
from vllm.v1.metrics.stats import IterationStats, MultiModalCacheStats, SchedulerStats

from vllm_edlm.metrics import KINDS, reported

LABELS = ["model_name", "engine"]
MetricT = TypeVar("MetricT", Counter, Gauge, Histogram)


def power_buckets(largest: int) -> list[float]:
    """Upper bounds 1, 2, 4, ... of a histogram of counts up to `largest`, which is the last."""
    return [*(2**k for k in range((largest - 1).bit_length())), largest]


def ratio_buckets(largest: int) -> list[float]:
    """As `power_buckets`, with one more bound half-way between each two."""
    powers = power_buckets(largest)
    return sorted({*powers, *((low + high) / 2 for low, high in pairwise(powers))})


class BlockDiffusionStatLogger(AggregateStatLoggerBase):
    """Shows `metrics.Counts` of every engine, in the registry and with the labels of vLLM's own.

    The metrics' classes are those of vLLM's logger, which under Ray are Ray's. A later engine of
    the process takes these metrics out of the registry, as it does with all that vLLM has there.
    """

    def __init__(
        self,
        vllm_config: VllmConfig,
        engine_indexes: list[int],
        prometheus: PrometheusStatLogger,
    ) -> None:
        self._prometheus = prometheus
        self._make_counters()
        self._make_histograms(vllm_config.num_speculative_tokens)

    def _per_engine(self, metric: MetricT, *more: str) -> dict[int, MetricT]:
        """The metric's child for each engine; `more` are the values of labels of its own."""
        values = self._prometheus.per_engine_labelvalues
        return {engine: metric.labels(*labels, *more) for engine, labels in values.items()}

    def _make_counters(self) -> None:
        steps = self._prometheus._counter_cls(
            name="vllm:edlm_engine_steps",
            documentation="Engine steps that ran any token.",
            labelnames=LABELS,
        )
        forwards = self._prometheus._counter_cls(
            name="vllm:edlm_forwards",
            documentation="Requests' parts of engine steps by kind; one may be of several kinds.",
            labelnames=[*LABELS, "kind"],
        )
        open_blocks = self._prometheus._gauge_cls(
            name="vllm:edlm_open_blocks",
            documentation="Blocks in flight: one for each request that has begun to denoise.",
            multiprocess_mode="mostrecent",
            labelnames=LABELS,
        )
        self._steps = self._per_engine(steps)
        self._forwards = {kind: self._per_engine(forwards, kind) for kind in KINDS}
        self._open_blocks = self._per_engine(open_blocks)

    def _make_histograms(self, canvas_length: int) -> None:
        reveal_size = self._prometheus._histogram_cls(
            name="vllm:edlm_reveal_size",
            documentation="Positions that one denoise step of a request reveals.",
            buckets=power_buckets(canvas_length),
            labelnames=LABELS,
        )
        tokens_per_forward = self._prometheus._histogram_cls(
            name="vllm:edlm_tokens_per_forward",
            documentation="Of each finished request, emitted tokens over denoise forwards.",
            buckets=ratio_buckets(canvas_length),
            labelnames=LABELS,
        )
        self._reveal_size = self._per_engine(reveal_size)
        self._tokens_per_forward = self._per_engine(tokens_per_forward)

    def record(
        self,
        scheduler_stats: SchedulerStats | None,
        iteration_stats: IterationStats | None,
        mm_cache_stats: MultiModalCacheStats | None = None,
        engine_idx: int = 0,
    ) -> None:
        """Add what the engine's scheduler reported with a step."""
        stats = scheduler_stats.spec_decoding_stats if scheduler_stats is not None else None
        if (counts := reported(stats)) is None:
            return
        self._steps[engine_idx].inc(counts.steps)
        for kind, number in counts.forwards.items():
            self._forwards[kind][engine_idx].inc(number)
        for size in counts.reveals:
            self._reveal_size[engine_idx].observe(size)
        for num_tokens, num_denoises in counts.finished:
            self._tokens_per_forward[engine_idx].observe(num_tokens / num_denoises)
        self._open_blocks[engine_idx].set(counts.open_blocks)

    def log_engine_initialized(self) -> None:
        """Nothing to log."""
