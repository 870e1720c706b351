"""The runner's warm-up on a GPU sends batches that no scheduler would; they must do no harm."""

from typing import Any

import pytest
from harness import Ask, Engine, prompt
from vllm import SamplingParams
from vllm.v1.worker.gpu.warmup import run_mixed_prefill_decode_warmup, warmup_kernels


def worker_of(engine: Engine) -> Any:
    """vLLM's worker in this process."""
    return engine.core.model_executor.driver_worker.worker


def test_gpu_warmup_batches(compiled: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    # The sampling parameters of the warm-up want log-probabilities, whose kernels need Triton.
    greedy = SamplingParams(temperature=0, max_tokens=16)
    monkeypatch.setattr(SamplingParams, "for_sampler_warmup", lambda: greedy)
    worker = worker_of(compiled)
    runner = worker.model_runner
    # The runner hears of finished requests with the next step: free their slots.
    worker.execute_model(compiled.core.scheduler.schedule())
    steps = (worker.execute_model, worker.sample_tokens)
    warmup_kernels(runner, *steps)
    assert run_mixed_prefill_decode_warmup(runner, *steps, num_tokens=20)
    assert not runner.req_states.req_id_to_index
    # The warm-up wrote over KV pages behind the scheduler's back.
    compiled.llm.reset_prefix_cache()
    compiled.assert_exact([Ask(prompt(5 + 9 * i, seed=80 + i)) for i in range(4)])
