"""What is asked of an engine, and what it took: `Load`, `Round`. Nothing here imports vLLM."""

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

# Low ids may be special tokens; the last one of a random shape is the mask token.
FIRST_ORDINARY_TOKEN = 2


@dataclass(frozen=True)
class Load:
    """Requests to serve in a closed loop, greedily.

    Attributes:
        concurrency: requests running at any time, until too few are left.
        num_requests: requests in all.
        prompt_length: tokens of each random prompt.
        output_length: tokens of each answer at most; exactly so many with `ignore_eos`.
        options: options of each request by name, such as `diffusion_threshold`.
        seed: of the random prompts.
        prompts: explicit prompts as token ids, in place of random ones.
        ignore_eos: answers do not end early.
    """

    concurrency: int
    num_requests: int
    prompt_length: int
    output_length: int
    options: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    prompts: Sequence[Sequence[int]] | None = None
    ignore_eos: bool = True

    def prompt_tokens(self, vocabulary: int) -> list[list[int]]:
        """Token ids of every request's prompt, for a vocabulary of that many entries."""
        if self.prompts is not None:
            return [list(self.prompts[i % len(self.prompts)]) for i in range(self.num_requests)]
        rng = random.Random(self.seed)
        return [
            rng.choices(range(FIRST_ORDINARY_TOKEN, vocabulary - 1), k=self.prompt_length)
            for _ in range(self.num_requests)
        ]


@dataclass(frozen=True)
class Forward:
    """One forward of the model.

    Attributes:
        rows: tokens that were run, for each request in it.
        kv_lengths: positions that they may attend to, for each request in it.
        logits_rows: rows of logits computed, of all requests.
    """

    rows: tuple[int, ...]
    kv_lengths: tuple[int, ...]
    logits_rows: int


@dataclass
class Trace:
    """One request: when it came, what it got when. Times in seconds on one clock.

    Attributes:
        tokens: the answer's token ids.
        times: of every output that brought tokens.
        first_count: tokens of the first output.
        denoise_steps: forwards that denoised it; for AR its tokens, as each costs one.
    """

    start: float
    tokens: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    denoise_steps: int = 0
    first_count: int = 0

    def take(self, tokens: Iterable[int], now: float) -> None:
        """Take in an output; one without tokens is none."""
        before = len(self.tokens)
        self.tokens.extend(tokens)
        if len(self.tokens) > before:
            self.times.append(now)
            self.first_count = self.first_count or len(self.tokens)

    @property
    def time_to_first_token(self) -> float:
        """Seconds from the request's arrival to its first output."""
        return self.times[0] - self.start

    @property
    def gaps(self) -> list[float]:
        """Seconds between successive outputs."""
        return [b - a for a, b in zip(self.times, self.times[1:], strict=False)]

    @property
    def time_per_token(self) -> float | None:
        """Seconds per token that came after the first output; None if there was none.

        The tokens beside the first one in its output took no time after it, so they do not
        count: else larger blocks would look faster than they are.
        """
        if len(self.times) < 2:
            return None
        return (self.times[-1] - self.times[0]) / (len(self.tokens) - self.first_count)


@dataclass(frozen=True)
class Round:
    """One `Load` served once.

    Attributes:
        seconds: from the first request's arrival to the last output.
        forwards: every forward that ran any token, in order.
        traces: the requests, in the load's order.
    """

    seconds: float
    forwards: tuple[Forward, ...]
    traces: tuple[Trace, ...]

    @property
    def tokens(self) -> int:
        """Tokens of all answers."""
        return sum(len(trace.tokens) for trace in self.traces)

    @property
    def tokens_per_second(self) -> float:
        """Tokens of all answers over the time of the whole load, prompts included."""
        return self.tokens / self.seconds

    @property
    def tokens_per_forward(self) -> float:
        """Tokens over denoise forwards, counted for each request by itself."""
        return self.tokens / sum(trace.denoise_steps for trace in self.traces)

    @property
    def time_to_first_token(self) -> list[float]:
        """Seconds, one for each request."""
        return [trace.time_to_first_token for trace in self.traces]

    @property
    def inter_token(self) -> list[float]:
        """Seconds between successive outputs of a request, of all requests."""
        return [gap for trace in self.traces for gap in trace.gaps]

    @property
    def time_per_output_token(self) -> list[float]:
        """Seconds per token after a request's first output, for requests of several outputs."""
        times = [trace.time_per_token for trace in self.traces]
        return [time for time in times if time is not None]
