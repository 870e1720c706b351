"""KV cache in fp8: it is used, beside weights of any dtype, and tiny-math keeps its accuracy."""

from collections.abc import Iterator

import pytest
import torch
from harness import small_environment
from vllm import LLM, SamplingParams
from vllm.platforms import CpuArchEnum, current_platform

from examples.convert.word_problems import grade, problems
from examples.offline import TINY_MATH

# The model itself is right in 99.5% of 1,000 (its evaluation/accuracy.md).
QUESTIONS = 50
LEAST_RIGHT = 46

pytestmark = pytest.mark.skipif(
    current_platform.is_cpu()
    and not (
        current_platform.get_cpu_architecture() == CpuArchEnum.X86
        and torch.cpu._is_avx512_supported()
    ),
    reason="vLLM's CPU attention takes an fp8 KV cache on x86 with AVX-512 alone",
)


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with small_environment():
        yield LLM(
            str(TINY_MATH),
            dtype="bfloat16",
            kv_cache_dtype="fp8",
            max_model_len=250,
            max_num_seqs=16,
            kv_cache_memory_bytes=1 << 26,
            enforce_eager=True,
        )


def test_the_cache_holds_one_byte_a_value(llm: LLM) -> None:
    runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
    assert {cache.element_size() for cache in runner.kv_caches} == {1}


def test_accuracy_is_kept(llm: LLM) -> None:
    asked = list(problems("heldout", seed=1, count=QUESTIONS))
    chats = [[{"role": "user", "content": problem.question}] for problem in asked]
    params = SamplingParams(temperature=0, max_tokens=64, extra_args={"diffusion_threshold": 0.9})
    texts = [output.outputs[0].text for output in llm.chat(chats, params, use_tqdm=False)]
    assert sum(grade(text, p.result) for text, p in zip(texts, asked, strict=True)) >= LEAST_RIGHT
