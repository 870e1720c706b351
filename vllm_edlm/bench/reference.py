"""The plain transformers loop: the reference decoder of Efficient-DLM, one request at a time.

The prompt is prefilled once and sees itself whole; each step runs the open block against the
cached KV, which the block's own is cut off again; a complete block is run once more, so that its
KV is kept (arXiv 2512.14067; the released decoder's order of forwards). The head is applied in
denoise steps alone, and the mask token is never chosen; the rest is left as plain as it is.

Shapes: B block length, V vocabulary.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, Qwen3Config, Qwen3ForCausalLM

from vllm_edlm.bench.load import Forward, Load, Round, Trace

DEFAULT_THRESHOLD = 0.9
# Released checkpoints' names under transformers' own.
RELEASED_NAMES = {r"^encoder\.": "model.", r"^diffusion_head\.": "lm_head."}


@dataclass(frozen=True)
class _Options:
    """How a request is decoded; the names and defaults are the server's."""

    block_length: int
    max_steps: int
    threshold: float
    eos_token_ids: frozenset[int]

    @classmethod
    def of(cls, load: Load, config: Qwen3Config) -> "_Options":
        block_length = load.options.get("diffusion_canvas_length", config.block_size)
        return cls(
            block_length,
            load.options.get("diffusion_max_steps", block_length),
            load.options.get("diffusion_threshold", DEFAULT_THRESHOLD),
            frozenset() if load.ignore_eos else _eos_token_ids(config),
        )

    def end(self, tokens: Sequence[int]) -> int | None:
        """Length of the tokens up to their first EOS, itself among them; None without one."""
        return next((i for i, t in enumerate(tokens, start=1) if t in self.eos_token_ids), None)


def _eos_token_ids(config: Qwen3Config) -> frozenset[int]:
    ids = config.eos_token_id
    return frozenset([ids] if isinstance(ids, int) else ids or ())


class Reference:
    """Serves a load with transformers, requests one after another.

    Of a load's options it takes `diffusion_threshold`, `diffusion_max_steps` and
    `diffusion_canvas_length`.
    """

    def __init__(self, model: Qwen3ForCausalLM) -> None:
        """Take a model whose configuration names `block_size` and `mask_token_id`.

        It is moved to the GPU if there is one.
        """
        self.model = model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
        self.mask_token_id: int = model.config.mask_token_id
        self._forwards: list[Forward] = []

    @classmethod
    def random(cls, folder: Path) -> "Reference":
        """Random weights of the shape that the folder's config.json describes."""
        config = Qwen3Config.from_pretrained(folder)
        return cls(AutoModelForCausalLM.from_config(config))

    @classmethod
    def load(cls, folder: Path) -> "Reference":
        """A checkpoint in either layout of names, in its own dtype."""
        return cls(
            Qwen3ForCausalLM.from_pretrained(folder, key_mapping=RELEASED_NAMES, dtype="auto")
        )

    @torch.inference_mode()
    def measure(self, load: Load) -> Round:
        """Serve the load once.

        A request comes when a closed loop of the load's concurrency would send it; then it waits.
        """
        options = _Options.of(load, self.model.config)
        prompts = load.prompt_tokens(self.model.config.vocab_size)
        traces: list[Trace] = []
        self._forwards.clear()
        begin = time.perf_counter()
        for i, prompt in enumerate(prompts):
            makes_room = i - load.concurrency
            traces.append(Trace(traces[makes_room].times[-1] if makes_room >= 0 else begin))
            self._serve(prompt, load.output_length, options, traces[-1])
        return Round(time.perf_counter() - begin, tuple(self._forwards), tuple(traces))

    def _serve(self, prompt: list[int], limit: int, options: _Options, trace: Trace) -> None:
        """Prefill, then block after block; a block's tokens come when it is complete."""
        cache = DynamicCache(config=self.model.config)
        self._run(torch.tensor(prompt, device=self.model.device), cache)
        while len(trace.tokens) < limit:
            canvas = self._denoise(cache, options, trace)
            tokens = canvas.tolist()
            end = options.end(self._known(tokens))
            trace.take(tokens[:end][: limit - len(trace.tokens)], time.perf_counter())
            if end is not None:
                return
            self._run(canvas, cache)

    def _denoise(self, cache: DynamicCache, options: _Options, trace: Trace) -> Tensor:
        """The next block [B], complete or known up to an EOS."""
        size = (options.block_length,)
        canvas = torch.full(size, self.mask_token_id, device=self.model.device)
        final = cache.get_seq_length()
        for steps_left in range(options.max_steps, 0, -1):
            known = self._known(canvas.tolist())
            if len(known) == len(canvas) or options.end(known) is not None:
                break
            logits = self._run(canvas, cache, logits=True)
            cache.crop(final)
            canvas = reveal(canvas, logits, self.mask_token_id, options.threshold, steps_left)
            trace.denoise_steps += 1
        return canvas

    def _known(self, tokens: list[int]) -> list[int]:
        """The tokens before the first masked position."""
        if self.mask_token_id not in tokens:
            return tokens
        return tokens[: tokens.index(self.mask_token_id)]

    def _run(self, tokens: Tensor, cache: DynamicCache, *, logits: bool = False) -> Tensor:
        """One forward of tokens [T] that see all cached ones and each other.

        Returns:
            logits [T, V] if asked for, else hidden states.
        """
        kv_length = cache.get_seq_length() + len(tokens)
        mask = tokens.new_zeros((1, 1, len(tokens), kv_length), dtype=self.model.dtype)
        run = self.model if logits else self.model.model
        output = run(tokens[None], attention_mask=mask, past_key_values=cache, use_cache=True)
        rows = len(tokens)
        self._forwards.append(Forward((rows,), (kv_length,), rows if logits else 0))
        return output[0][0]


def reveal(
    canvas: Tensor, logits: Tensor, mask_token_id: int, threshold: float, steps_left: int
) -> Tensor:
    """The canvas after one denoise step.

    Args:
        canvas: [B] token ids, the mask token where masked.
        logits: [B, V].
        threshold: masked positions at least so confident are revealed, but never fewer than the
            steps left need.
        steps_left: denoise steps the block may still take, this one included.

    Returns:
        [B] token ids; revealed ones are the likeliest but for the mask token.
    """
    masked = canvas == mask_token_id
    probability = logits.float().softmax(-1)
    probability[:, mask_token_id] = -1
    confidence, token = probability.max(-1)
    confidence = confidence.masked_fill(~masked, -1)
    least = -(-int(masked.sum()) // steps_left)
    revealed = confidence >= threshold
    revealed[confidence.argsort(descending=True, stable=True)[:least]] = True
    return torch.where(revealed, token, canvas)
