"""An in-process engine beside the oracle, and a record of every forward it runs."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import EOS_ID, MASK_ID, VOCABULARY
from oracle import Blocks, OracleResult, generate
from oracle_model import OracleModel
from oracle_sampling import GREEDY, Sampling, logprobs
from vllm import LLM, CompletionOutput, RequestOutput, SamplingParams
from vllm.config import VllmConfig
from vllm.sampling_params import RequestOutputKind

# The context ends inside a page and inside a block, whatever the block length.
KV_PAGE = 32
MAX_MODEL_LEN = 250
SMALL_ENGINE = {
    "dtype": "float32",
    "max_model_len": MAX_MODEL_LEN,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 512,
    "block_size": KV_PAGE,
    "num_gpu_blocks_override": 80,
    "disable_log_stats": False,
    "seed": 0,
}


@contextmanager
def small_environment() -> Iterator[None]:
    """Engines start in this process, with little memory and one thread.

    It is left as soon as an engine has started: other tests run what users run, as they do.
    """
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


def prompt(length: int, seed: int = 0) -> tuple[int, ...]:
    """Random letters, no special tokens; equal seeds share their beginning."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(5, 150, (MAX_MODEL_LEN,), generator=generator).tolist()[:length])


@dataclass(frozen=True)
class Ask:
    """One request, greedy unless `sampling` says otherwise.

    `None` leaves an option to the server's default.
    """

    prompt: tuple[int, ...]
    max_tokens: int = 24
    threshold: float | None = 0.6
    max_steps: int | None = None
    ignore_eos: bool = True
    stop_token_ids: tuple[int, ...] = ()
    sampling: Sampling = GREEDY
    reveal: str | None = None
    canvas_length: int | None = None
    logprobs: int | None = None

    def sampling_params(self) -> SamplingParams:
        options = {
            "diffusion_threshold": self.threshold,
            "diffusion_max_steps": self.max_steps,
            "diffusion_reveal": self.reveal,
            "diffusion_canvas_length": self.canvas_length,
        }
        return SamplingParams(
            **vars(self.sampling)
            | {
                "logit_bias": dict(self.sampling.logit_bias) or None,
                "allowed_token_ids": list(self.sampling.allowed_token_ids) or None,
                "bad_words": [spelt(word) for word in self.sampling.bad_words],
            },
            max_tokens=self.max_tokens,
            ignore_eos=self.ignore_eos,
            stop_token_ids=list(self.stop_token_ids),
            logprobs=self.logprobs,
            extra_args={key: value for key, value in options.items() if value is not None},
        )


def spelt(word: Sequence[int]) -> str:
    """The text that vLLM's bad_words must hold to mean these token ids and no others."""
    text = "".join(VOCABULARY[token] for token in word)
    assert text == text.lstrip(), "vLLM drops spaces before a bad word"
    return text


@dataclass(frozen=True)
class Served:
    """What the server's options make of a request that names none."""

    block_length: int
    prompt_attention: str
    threshold: float | None = None
    max_steps: int | None = None
    reveal: str = "confidence"
    token_shift: bool = False
    logprobs_mode: str = "raw_logprobs"

    def threshold_of(self, ask: Ask) -> float | None:
        """The server's threshold is the default of the server's rule only."""
        if ask.threshold is not None or ask.reveal not in (None, self.reveal):
            return ask.threshold
        return self.threshold


@dataclass(frozen=True)
class Visit:
    """A request that comes before the step `arrival` and may be aborted before a later one."""

    ask: Ask
    arrival: int = 0
    abort: int | None = None


@dataclass
class Step:
    """One forward: query tokens per request, and the requests preempted before it."""

    num_tokens: dict[str, int]
    num_drafts: dict[str, int]
    preempted: set[str]


@dataclass
class Engine:
    """`vllm.LLM` over a random checkpoint; `steps` are the forwards since `steps.clear()`."""

    served: Served
    llm: LLM
    oracle: OracleModel
    steps: list[Step] = field(default_factory=list)
    died_of: Exception | None = None

    @classmethod
    def start(cls, path: Path, served: Served, **options: Any) -> "Engine":
        with small_environment():
            llm = LLM(model=str(path), **(SMALL_ENGINE | options))
        engine = cls(served, llm, OracleModel.load(path))
        engine._record_steps()
        engine._fail_once_dead()
        return engine

    def _record_steps(self) -> None:
        executor = self.core.model_executor
        execute = executor.execute_model

        def recorded(scheduled: Any, *args: Any, **kwargs: Any) -> Any:
            drafts = scheduled.scheduled_spec_decode_tokens
            self.steps.append(
                Step(
                    dict(scheduled.num_scheduled_tokens),
                    {request: len(tokens) for request, tokens in drafts.items()},
                    set(scheduled.preempted_req_ids or ()),
                )
            )
            return execute(scheduled, *args, **kwargs)

        executor.execute_model = recorded

    def _fail_once_dead(self) -> None:
        """A step after one that raised fails: requests of a dead engine would never finish."""
        step = self.llm.llm_engine.step

        def checked() -> list[RequestOutput]:
            assert self.died_of is None, f"the engine died in an earlier step: {self.died_of!r}"
            try:
                return step()
            except Exception as error:
                self.died_of = error
                raise

        self.llm.llm_engine.step = checked

    @property
    def core(self) -> Any:
        """vLLM's EngineCore in this process: scheduler and executor."""
        return self.llm.llm_engine.engine_core.engine_core

    @property
    def config(self) -> VllmConfig:
        return self.llm.llm_engine.vllm_config

    @property
    def forwards(self) -> list[Step]:
        """Recorded steps that ran any token."""
        return [step for step in self.steps if step.num_tokens]

    def generate(self, asks: Sequence[Ask]) -> list[RequestOutput]:
        """Serve all of `asks` at once."""
        self.steps.clear()
        prompts = [{"prompt_token_ids": list(ask.prompt)} for ask in asks]
        params = [ask.sampling_params() for ask in asks]
        return self.llm.generate(prompts, params, use_tqdm=False)

    def serve_over_time(self, visits: Sequence[Visit]) -> list[CompletionOutput | None]:
        """Step the engine while requests arrive and are aborted; what each has at its end."""
        self.steps.clear()
        core, latest = self.llm.llm_engine, dict[str, CompletionOutput]()
        last = max(visit.arrival for visit in visits)
        step = 0
        while step <= last or core.has_unfinished_requests():
            for i, visit in enumerate(visits):
                if visit.arrival == step:
                    params = visit.ask.sampling_params()
                    params.output_kind = RequestOutputKind.CUMULATIVE
                    core.add_request(f"{i}", {"prompt_token_ids": list(visit.ask.prompt)}, params)
                if visit.abort == step:
                    core.abort_request([f"{i}"])
            latest |= {output.request_id: output.outputs[0] for output in core.step()}
            step += 1
        return [latest.get(f"{i}") for i in range(len(visits))]

    def expected(
        self, ask: Ask, blocks: Blocks | None = None, model: OracleModel | None = None
    ) -> OracleResult:
        """What the oracle answers to `ask`, in blocks of one length or in those given."""
        return generate(
            model or self.oracle,
            ask.prompt,
            block_length=ask.canvas_length or self.served.block_length,
            mask_token_id=MASK_ID,
            prompt_attention=self.served.prompt_attention,
            max_tokens=ask.max_tokens,
            max_model_len=MAX_MODEL_LEN,
            sampling=ask.sampling,
            rule=ask.reveal or self.served.reveal,
            threshold=self.served.threshold_of(ask),
            max_steps=ask.max_steps or self.served.max_steps or self.served.block_length,
            token_shift=self.served.token_shift,
            eos_token_id=EOS_ID,
            stop_token_ids=ask.stop_token_ids,
            ignore_eos=ask.ignore_eos,
            blocks=blocks,
        )

    def assert_exact(self, asks: Sequence[Ask]) -> list[OracleResult]:
        """Serve `asks` at once; every answer must be the oracle's, token for token."""
        expected = [self.expected(ask) for ask in asks]
        for ask, output, oracle in zip(asks, self.generate(asks), expected, strict=True):
            self.assert_answer(ask, output.outputs[0], oracle)
        return expected

    def assert_answer(self, ask: Ask, got: CompletionOutput, oracle: OracleResult) -> None:
        """Tokens, the reason to finish and, if asked for, log-probabilities."""
        assert list(got.token_ids) == oracle.token_ids, (len(ask.prompt), ask)
        assert got.finish_reason == oracle.finish_reason, (len(ask.prompt), ask)
        if ask.logprobs is not None:
            self.assert_logprobs(got, oracle, ask.logprobs)

    def assert_logprobs(self, got: CompletionOutput, oracle: OracleResult, top: int) -> None:
        """Entries and ranks are the oracle's, values within 1e-4, in the server's mode."""
        mode = self.served.logprobs_mode
        rows = oracle.processed_logits if "processed" in mode else oracle.raw_logits
        assert got.logprobs is not None
        for token, row, entries in zip(oracle.token_ids, rows, got.logprobs, strict=True):
            scores = row if "logits" in mode else row.double().log_softmax(-1)
            expected = logprobs(scores, token, top)
            possible = [i for i, entry in expected.items() if entry.logprob > -math.inf]
            assert len(entries) == len(expected)
            assert set(possible) <= set(entries)
            assert [entries[i].rank for i in possible] == [expected[i].rank for i in possible]
            values = [expected[i].logprob for i in possible]
            assert [entries[i].logprob for i in possible] == pytest.approx(values, abs=1e-4)
