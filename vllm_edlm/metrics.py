"""What the engine's forwards were spent on, counted where it is known: in the scheduler.

The numbers are shown by the front end, in another process. vLLM carries statistics there in
typed records, of which one list has room: `SpecDecodingStats.num_draft_tokens_per_pos` has an
entry for each position of a canvas, which nothing reads for diffusion models. The counts
travel behind those entries. Nothing here imports vLLM's code or torch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

PREFILL, DENOISE, COMMIT = KINDS = ("prefill", "denoise", "commit")


class DraftStats(Protocol):
    """The part of vLLM's `SpecDecodingStats` that is used here."""

    num_spec_tokens: int
    num_draft_tokens_per_pos: list[int]


StatsT = TypeVar("StatsT", bound=DraftStats)


@dataclass
class Counts:
    """What happened since the last report.

    Attributes:
        steps: engine steps that ran any token.
        forwards: of each kind in `KINDS`, the requests' parts of those steps.
        open_blocks: requests that have had a denoise step and are not finished, now.
        reveals: positions revealed, one entry for each denoise step of a request.
        finished: (emitted tokens, denoise steps) of each finished request that had a step.
    """

    steps: int = 0
    forwards: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    open_blocks: int = 0
    reveals: list[int] = field(default_factory=list)
    finished: list[tuple[int, int]] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.steps or self.reveals or self.finished)

    def to_ints(self) -> list[int]:
        """The counts in one list, for `from_ints`."""
        pairs = [number for pair in self.finished for number in pair]
        forwards = [self.forwards[kind] for kind in KINDS]
        return [self.steps, *forwards, self.open_blocks, len(self.reveals), *self.reveals, *pairs]

    @classmethod
    def from_ints(cls, numbers: Sequence[int]) -> "Counts":
        """Inverse of `to_ints`."""
        steps, *forwards, open_blocks, num_reveals = numbers[: len(KINDS) + 3]
        rest = numbers[len(KINDS) + 3 :]
        reveals, pairs = rest[:num_reveals], rest[num_reveals:]
        return cls(
            steps=steps,
            forwards=dict(zip(KINDS, forwards, strict=True)),
            open_blocks=open_blocks,
            reveals=list(reveals),
            finished=list(zip(pairs[::2], pairs[1::2], strict=True)),
        )


def forward_kinds(start: int, num_open: int, first_block: int, open_block: int) -> list[str]:
    """What a request's part of an engine step is; it may be several at once.

    The end of a prompt that fills no block stands in the first generated block and is no
    prompt here, except where it runs alone.

    Args:
        start: first position of the query; everything before it has final KV.
        num_open: positions at the query's end whose token is not known yet.
        first_block: start of the first generated block.
        open_block: start of the block that holds the first position not known before the step.

    Returns:
        `prefill`: it runs prompt blocks, or nothing but a part of a block that is known.
        `denoise`: it has open positions.
        `commit`: it runs a generated block that is complete.
    """
    kinds = []
    if start < first_block:
        kinds.append(PREFILL)
    if num_open:
        kinds.append(DENOISE)
    if first_block < open_block > start:
        kinds.append(COMMIT)
    return kinds or [PREFILL]


@dataclass(slots=True)
class _OpenBlock:
    """The block that a request denoises.

    Attributes:
        start: its first position, which is that of the canvas' first entry.
        opened: entries of the canvas that the latest denoise step had open: from, to.
        masked: how many of them are masked; while `under_way`, as the step found them.
        canvas: the entries after that step.
        under_way: the step has been scheduled, and its canvas has not come back.
    """

    start: int
    opened: tuple[int, int] = (0, 0)
    masked: int = 0
    canvas: Sequence[int] = ()
    under_way: bool = False


class ForwardCounter:
    """Counts forwards and reveals as the scheduler tells of them.

    In every step: `begin_step`, `add` for each request scheduled, `finish` for each one that
    is gone, `report` into the step's statistics, then `reveal` with each canvas. This is on
    the path of every engine step, so `add` and `reveal` do little in the usual case.
    """

    def __init__(self, mask_token_id: int) -> None:
        self._mask = mask_token_id
        self._counts = Counts()
        self._blocks: dict[str, _OpenBlock] = {}
        self._finished: dict[str, _OpenBlock] = {}

    def begin_step(self, num_tokens: int) -> None:
        """Start a step that runs `num_tokens` tokens, possibly none."""
        self._counts.steps += num_tokens > 0
        self._finished.clear()

    def add(
        self,
        request_id: str,
        start: int,
        end: int,
        num_open: int,
        *,
        first_block: int,
        open_block: int,
    ) -> None:
        """Count a request's part of the step, the positions `start` to `end` (exclusive).

        The other arguments are those of `forward_kinds`.
        """
        forwards = self._counts.forwards
        for kind in forward_kinds(start, num_open, first_block, open_block):
            forwards[kind] += 1
        if not num_open:
            return
        block = self._blocks.get(request_id)
        width = end - open_block
        if block is None or block.start != open_block:
            self._blocks[request_id] = block = _OpenBlock(open_block, masked=num_open)
        elif block.canvas and block.canvas[width - num_open] != self._mask:
            block.masked = self._masked_again(block.canvas[width - num_open : width])
        block.opened = width - num_open, width
        block.under_way = True

    def _masked_again(self, opened: Sequence[int]) -> int:
        """Masked positions of a canvas whose first open ones were revealed, but not accepted.

        Had they been, they would be known. Up to the first mask they are masked again.
        """
        run = opened.index(self._mask) if self._mask in opened else len(opened)
        return run + opened.count(self._mask)

    def reveal(self, request_id: str, canvas: Sequence[int]) -> None:
        """Take in the canvas of a request after the step, B token ids; finished ones too."""
        block = self._blocks.get(request_id) or self._finished.get(request_id)
        if block is None or not block.under_way:
            return
        first, end = block.opened
        masked = canvas[first:end].count(self._mask)
        self._counts.reveals.append(block.masked - masked)
        block.masked, block.canvas, block.under_way = masked, canvas, False

    def finish(self, request_id: str, num_tokens: int, num_denoises: int) -> None:
        """A request is over, whatever the reason, after so many emitted tokens and steps."""
        if (block := self._blocks.pop(request_id, None)) is not None:
            self._finished[request_id] = block
        if num_denoises:
            self._counts.finished.append((num_tokens, num_denoises))

    def report(self, stats: StatsT | None, new_stats: Callable[[], StatsT]) -> StatsT | None:
        """Put the counts since the last report into the step's statistics, if there are any."""
        if not self._counts:
            return stats
        stats = new_stats() if stats is None else stats
        self._counts.open_blocks = len(self._blocks)
        per_position = stats.num_draft_tokens_per_pos[: stats.num_spec_tokens]
        stats.num_draft_tokens_per_pos = per_position + self._counts.to_ints()
        self._counts = Counts()
        return stats


def reported(stats: DraftStats | None) -> Counts | None:
    """The counts that `ForwardCounter.report` put into a step's statistics, if any."""
    if stats is None or len(stats.num_draft_tokens_per_pos) <= stats.num_spec_tokens:
        return None
    return Counts.from_ints(stats.num_draft_tokens_per_pos[stats.num_spec_tokens :])
