"""vLLM's engine in this process, in a closed loop; measured processes build it."""

import gc
import time
from pathlib import Path
from typing import Any

from torch import Tensor
from vllm import EngineArgs, LLMEngine, RequestOutput, SamplingParams
from vllm.sampling_params import RequestOutputKind

from vllm_edlm.bench.load import Forward, Load, Round, Trace
from vllm_edlm.compat.vllm_api import SchedulerOutput


class VllmServer:
    """One `LLMEngine` in vLLM's default mode (compiled), and a record of its forwards."""

    def __init__(self, model: Path, **engine_args: Any) -> None:
        args = EngineArgs(model=str(model), disable_log_stats=True, **engine_args)
        self.engine = LLMEngine.from_engine_args(args)
        self.recorder = ForwardRecorder(self.engine)

    @property
    def vocabulary(self) -> int:
        """Entries of the model's vocabulary."""
        return self.engine.model_config.get_vocab_size()

    def measure(self, load: Load) -> Round:
        """Serve the load once."""
        traces: list[Trace] = []
        waiting = load.prompt_tokens(self.vocabulary)[::-1]
        running = 0
        gc.collect()
        self.recorder.clear()
        begin = time.perf_counter()
        while waiting or running:
            while waiting and running < load.concurrency:
                traces.append(self._add(str(len(traces)), waiting.pop(), load))
                running += 1
            running -= self._step(traces)
        seconds = time.perf_counter() - begin
        return Round(seconds, self.recorder.forwards(), tuple(traces))

    def _add(self, name: str, prompt: list[int], load: Load) -> Trace:
        params = SamplingParams(
            temperature=0,
            max_tokens=load.output_length,
            ignore_eos=load.ignore_eos,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
            extra_args=dict(load.options) or None,
        )
        trace = Trace(time.perf_counter())
        self.engine.add_request(name, {"prompt_token_ids": prompt}, params)
        return trace

    def _step(self, traces: list[Trace]) -> int:
        """Step once; requests that finished."""
        outputs = self.engine.step()
        now = time.perf_counter()
        for output in outputs:
            assert isinstance(output, RequestOutput)
            trace = traces[int(output.request_id)]
            trace.take(output.outputs[0].token_ids, now)
            if output.finished:
                metrics = output.outputs[0].spec_decode_metrics
                trace.denoise_steps = (
                    len(trace.tokens) if metrics is None else sum(metrics.histogram)
                )
        return sum(output.finished for output in outputs)


class ForwardRecorder:
    """Notes each forward of an engine that runs in this process."""

    def __init__(self, engine: LLMEngine) -> None:
        self._batches: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
        self._logits_rows: list[int] = []
        executor = engine.model_executor
        model = executor.driver_worker.worker.model_runner.model
        execute, compute_logits = executor.execute_model, model.compute_logits

        def recorded_execute(scheduled: SchedulerOutput, *args: Any, **kwargs: Any) -> Any:
            if scheduled.total_num_scheduled_tokens:
                rows = tuple(scheduled.num_scheduled_tokens.values())
                self._batches.append((rows, kv_lengths(scheduled)))
                self._logits_rows.append(0)
            return execute(scheduled, *args, **kwargs)

        def recorded_logits(hidden_states_TD: Tensor, *args: Any, **kwargs: Any) -> Any:
            self._logits_rows[-1] += hidden_states_TD.shape[0]
            return compute_logits(hidden_states_TD, *args, **kwargs)

        executor.execute_model = recorded_execute
        model.compute_logits = recorded_logits

    def clear(self) -> None:
        """Forget what was noted."""
        self._batches.clear()
        self._logits_rows.clear()

    def forwards(self) -> tuple[Forward, ...]:
        """The forwards since `clear`."""
        return tuple(
            Forward(rows, lengths, logits_rows)
            for (rows, lengths), logits_rows in zip(self._batches, self._logits_rows, strict=True)
        )


def kv_lengths(scheduled: SchedulerOutput) -> tuple[int, ...]:
    """For each request of a step, positions from its first to the last one that the step runs."""
    computed = {new.req_id: new.num_computed_tokens for new in scheduled.scheduled_new_reqs}
    cached = scheduled.scheduled_cached_reqs
    computed |= dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
    return tuple(
        computed[request] + tokens for request, tokens in scheduled.num_scheduled_tokens.items()
    )
