"""The part of a batch that runs in Ray's actors: vLLM's engine over the rows of shards."""

import asyncio
import itertools
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm import AsyncEngineArgs, RequestOutput, SamplingParams
from vllm.renderers import ChatParams
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

from examples.batch.formats import FORMATS, Row
from examples.batch.output import shard_name, write_whole
from examples.batch.rows import Request, Result, request_of
from vllm_edlm.evaluate.engine import denoise_forwards


@dataclass(frozen=True)
class Job:
    """What every replica knows.

    Attributes:
        suffix: of the input's name, and so its format.
        defaults: options of rows that do not name them.
        engine_args: vLLM's.
        prefix: stands before the names of what is added to rows.
    """

    model: str
    suffix: str
    output: Path
    defaults: dict[str, Any]
    engine_args: dict[str, Any]
    prefix: str


class Replica:
    """One engine. It has rows of several shards at a time, so that a shard's end idles nothing."""

    def __init__(self, job: Job) -> None:
        self.job, self.format = job, FORMATS[job.suffix]
        self.engine = AsyncLLM.from_engine_args(AsyncEngineArgs(model=job.model, **job.engine_args))
        self.request_ids = map(str, itertools.count())

    async def __call__(self, shard: Row) -> Row:
        """Answer and write a shard.

        Args:
            shard: `first` (number of its first input row) and `rows` (bytes).

        Returns:
            What it came to. `failure` says why it could not be written, and is empty if it was.
        """
        rows = self.format.rows(shard["rows"], self.job.prefix)
        results = await asyncio.gather(*map(self._result, rows))
        content = self.format.written(shard["rows"], results, self.job.prefix)
        path = self.job.output / shard_name(shard["first"], len(rows), self.job.suffix)
        return _summary(results) | {"failure": await asyncio.to_thread(_write, path, content)}

    async def _result(self, row: Row | ValueError) -> Result:
        try:
            if isinstance(row, ValueError):
                raise row
            return _answered(await self._output(request_of(row, self.job.defaults)))
        except EngineDeadError:
            # Ray starts this process again and gives it its shards again; what is lost with it was
            # not written yet.
            print("The engine has died, and this process with it.", file=sys.stderr, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
            raise
        except EngineGenerateError as error:
            return Result(error=f"vLLM could not answer: {error.__cause__!r}")
        except Exception as error:
            # Checks, templates and tokenizers raise what they like. It is this row's fault,
            # whatever it is, and must not end the job.
            return Result(error=str(error) or repr(error))

    async def _output(self, request: Request) -> RequestOutput:
        prompt, sampling = await self._rendered(request), dict(request.sampling)
        # More would change nothing, but a length that is no integer of 32 bits is refused.
        longest = self.engine.model_config.max_model_len
        sampling["max_tokens"] = min(sampling["max_tokens"], longest)
        params = SamplingParams(**sampling, output_kind=RequestOutputKind.FINAL_ONLY)
        (output,) = [
            output async for output in self.engine.generate(prompt, params, next(self.request_ids))
        ]
        return output

    async def _rendered(self, request: Request) -> Any:
        renderer: Any = self.engine.renderer
        if request.messages is None:
            (prompt,) = await renderer.render_cmpl_async([{"prompt": request.prompt}])
        else:
            chat = ChatParams(chat_template_kwargs={"add_generation_prompt": True})
            _, (prompt,) = await renderer.render_chat_async([request.messages], chat)
        return prompt


def _answered(output: RequestOutput) -> Result:
    answer = output.outputs[0]
    if answer.finish_reason not in ("stop", "length"):
        raise ValueError(f"vLLM ended the answer with {answer.finish_reason!r}")
    forwards = denoise_forwards(output)
    return Result(answer.text, answer.finish_reason, len(answer.token_ids), forwards)


def _summary(results: Sequence[Result]) -> dict[str, int]:
    return {
        "rows": len(results),
        "errors": sum(result.error is not None for result in results),
        "tokens": sum(result.tokens or 0 for result in results),
        "forwards": sum(result.forwards or 0 for result in results),
    }


def _write(path: Path, content: bytes) -> str:
    try:
        write_whole(path, content)
    except OSError as error:
        return f"cannot write {path}: {error}"
    return ""
