"""What converted models answer, as vLLM serves them with this plugin.

An engine serves all models of its kind one after another: their weights are loaded into it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm import LLM

from benchmarks.findings.conversions import Conversion
from benchmarks.findings.scores import Point, Score, grade
from benchmarks.findings.task import ANSWER_TOKENS, Item
from vllm_edlm.evaluate.engine import Usage, ask, in_this_process

SERVED_BLOCK_LENGTH = 16
ENGINE_ARGS: dict[str, Any] = {
    "dtype": "float32",
    "max_model_len": 64,
    "max_num_seqs": 128,
    "kv_cache_memory_bytes": 2**26,
    "enforce_eager": True,
    # Pages of one model would be found by the next.
    "enable_prefix_caching": False,
}
DIFFUSION = {"canvas_length": SERVED_BLOCK_LENGTH, "max_denoising_steps": SERVED_BLOCK_LENGTH}


def score(llm: LLM, items: Sequence[Item], extra_args: dict[str, Any] | None) -> Score:
    """Ask everything, greedily; None for an AR model."""
    outputs = ask(llm, [item.question for item in items], ANSWER_TOKENS, extra_args)
    usage = Usage.of(outputs)
    answers = [output.outputs[0].text for output in outputs]
    return grade(answers, items, usage.tokens / usage.forwards)


@dataclass
class Engines:
    """One engine for each kind of model, started when its first model comes."""

    running: dict[tuple[bool, bool], LLM] = field(default_factory=dict)
    loaded: dict[tuple[bool, bool], Path] = field(default_factory=dict)

    def serve(self, model: Path, conversion: Conversion) -> LLM:
        """An engine with the weights of a model."""
        kind = conversion.pattern == "bidirectional", conversion.token_shift
        if kind not in self.running:
            self.running[kind] = _start(model)
        elif self.loaded[kind] != model:
            options = {"weights_path": str(model.resolve())}
            self.running[kind].collective_rpc("reload_weights", kwargs=options)
        self.loaded[kind] = model
        return self.running[kind]


def _start(model: Path) -> LLM:
    with in_this_process():
        return LLM(model=str(model), diffusion_config=DIFFUSION, **ENGINE_ARGS)


def score_parent(model: Path, items: Sequence[Item], cache: Path) -> Score:
    """What the AR parent answers; kept in a file."""
    if not cache.exists():
        with in_this_process():
            llm = LLM(model=str(model), **ENGINE_ARGS)
        _write(cache, {"AR": vars(score(llm, items, None))})
    return Score(**json.loads(cache.read_text())["AR"])


def score_model(
    engines: Engines,
    model: Path,
    conversion: Conversion,
    points: Iterable[Point],
    items: Sequence[Item],
    cache: Path,
) -> dict[Point, Score]:
    """What a model answers at each point; those in the file are not asked again."""
    known = json.loads(cache.read_text()) if cache.exists() else {}
    missing = [point for point in points if str(tuple(point)) not in known]
    if missing:
        llm = engines.serve(model, conversion)
        for point in missing:
            known[str(tuple(point))] = vars(score(llm, items, point.extra_args))
        _write(cache, known)
    return {point: Score(**known[str(tuple(point))]) for point in points}


def _write(cache: Path, content: dict[str, Any]) -> None:
    """Whole or not at all."""
    cache.parent.mkdir(parents=True, exist_ok=True)
    aside = cache.with_suffix(".part")
    aside.write_text(json.dumps(content, indent=2))
    aside.replace(cache)
