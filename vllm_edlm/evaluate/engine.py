"""vLLM's engine, started for an evaluation and stopped after it."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from vllm import LLM, RequestOutput, SamplingParams

# Its process is killed then.
STOP_SECONDS = 60.0
IN_PROCESS = "VLLM_ENABLE_V1_MULTIPROCESSING"


@dataclass(frozen=True)
class Usage:
    """What answers took.

    Attributes:
        requests: answers.
        tokens: emitted tokens.
        forwards: denoise forwards; of an AR model one a token. The prompts' prefill is in neither.
    """

    requests: int = 0
    tokens: int = 0
    forwards: int = 0

    @classmethod
    def of(cls, outputs: Sequence[RequestOutput]) -> "Usage":
        """Sum over finished requests with one answer each."""
        tokens = [len(output.outputs[0].token_ids) for output in outputs]
        forwards = [denoise_forwards(output) for output in outputs]
        counts = [
            count if count is not None else one_each
            for count, one_each in zip(forwards, tokens, strict=True)
        ]
        return cls(len(outputs), sum(tokens), sum(counts))

    def __add__(self, other: "Usage") -> "Usage":
        return Usage(
            self.requests + other.requests,
            self.tokens + other.tokens,
            self.forwards + other.forwards,
        )


def denoise_forwards(output: RequestOutput) -> int | None:
    """Forwards that denoised a finished request; None if it was not decoded by block diffusion."""
    metrics = output.outputs[0].spec_decode_metrics
    return None if metrics is None else sum(metrics.histogram)


@contextmanager
def serving(model: str, **engine_args: Any) -> Iterator[LLM]:
    """An engine that ends with the context.

    Args:
        model: a folder or a hub name.
        engine_args: vLLM's.
    """
    llm = LLM(model=model, **engine_args)
    try:
        yield llm
    finally:
        stop(llm)


def stop(llm: LLM) -> None:
    """Give back what an engine holds, so that another one can start."""
    llm.llm_engine.engine_core.shutdown(STOP_SECONDS)


@contextmanager
def in_this_process() -> Iterator[None]:
    """Engines started in this context run in this process, where they can be looked into."""
    before = os.environ.get(IN_PROCESS)
    os.environ[IN_PROCESS] = "0"
    try:
        yield
    finally:
        if before is None:
            del os.environ[IN_PROCESS]
        else:
            os.environ[IN_PROCESS] = before


def ask(
    llm: LLM,
    prompts: Sequence[str],
    max_tokens: int,
    extra_args: dict[str, Any] | None,
    *,
    chat: bool | None = None,
) -> list[RequestOutput]:
    """Answer all prompts greedily.

    Args:
        max_tokens: of an answer at most.
        extra_args: options of each request; None for an AR model.
        chat: prompts go through the chat template; None: if the tokenizer has one.
    """
    params = SamplingParams(temperature=0, max_tokens=max_tokens, extra_args=extra_args)
    tokenizer: Any = llm.get_tokenizer()
    if chat if chat is not None else tokenizer.chat_template is not None:
        chats: Any = [[{"role": "user", "content": prompt}] for prompt in prompts]
        return llm.chat(chats, params)
    return llm.generate(list(prompts), params)
