"""Tokens per forward with and without a grammar, on held-out questions.

Usage: python -m examples.structured [--model DIR] [--questions N]
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vllm import LLM, RequestOutput, SamplingParams
from vllm.sampling_params import StructuredOutputsParams

from examples.convert.word_problems import Problem, grade, problems
from vllm_edlm.evaluate.engine import denoise_forwards

TINY_MATH = Path(__file__).parent / "checkpoints" / "tiny-math"
MAX_TOKENS = 96
HELDOUT_SEED = 7
# The form of every answer: its working, then its number.
ANSWER = r"[A-Z][a-z]+( [a-z]+| [0-9]{1,2}| [+*=-]|\.| Then)+\n#### [0-9]{2}"
# The number alone, in a form that the model has never seen.
SCHEMA = {
    "type": "object",
    "properties": {"answer": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["answer"],
    "additionalProperties": False,
}
PREFIX = {"diffusion_reveal": "prefix"}
MODES = {
    "free, confidence rule": (None, None),
    "free, prefix rule": (None, PREFIX),
    "regular expression": (StructuredOutputsParams(regex=ANSWER), None),
    "JSON schema": (StructuredOutputsParams(json=SCHEMA), None),
}


@dataclass(frozen=True)
class Row:
    """What one mode cost for all questions together."""

    mode: str
    tokens: int
    forwards: int
    right: int

    def __str__(self) -> str:
        per_forward = self.tokens / self.forwards
        return (
            f"| {self.mode} | {self.tokens} | {self.forwards} | {per_forward:.2f} | {self.right} |"
        )


def measure(llm: LLM, mode: str, questions: Sequence[Problem]) -> Row:
    """Answer all questions greedily in one mode of `MODES`."""
    grammar, extra_args = MODES[mode]
    params = SamplingParams(
        temperature=0, max_tokens=MAX_TOKENS, structured_outputs=grammar, extra_args=extra_args
    )
    chats = [[{"role": "user", "content": problem.question}] for problem in questions]
    outputs = llm.chat(chats, params, use_tqdm=False)  # type: ignore[arg-type]
    return Row(
        mode,
        tokens=sum(len(output.outputs[0].token_ids) for output in outputs),
        forwards=sum(map(forwards, outputs)),
        right=sum(
            is_right(output.outputs[0].text, problem.result)
            for output, problem in zip(outputs, questions, strict=True)
        ),
    )


def is_right(text: str, result: int) -> bool:
    """Whether an answer, an object or not, has the right number at its end."""
    if text.startswith("{") and text.endswith("}"):
        return bool(json.loads(text)["answer"] == result)
    return grade(text, result)


def forwards(output: RequestOutput) -> int:
    """Denoise forwards of one answer.

    Raises:
        ValueError: the answer was not decoded by block diffusion.
    """
    count = denoise_forwards(output)
    if count is None:
        raise ValueError(f"request {output.request_id} was not decoded by block diffusion")
    return count


def main() -> None:
    """Print a table with a row per mode."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(TINY_MATH))
    parser.add_argument("--questions", type=int, default=100)
    parser.add_argument("--kv-cache-gib", type=float, default=1.0)
    args = parser.parse_args()
    llm = LLM(
        model=args.model,
        kv_cache_memory_bytes=int(args.kv_cache_gib * 2**30),
        # Else a JSON grammar allows any number of spaces, of which a small model never tires.
        structured_outputs_config={"backend": "xgrammar", "disable_any_whitespace": True},
    )
    questions = list(problems("heldout", HELDOUT_SEED, args.questions))
    rows = [measure(llm, mode, questions) for mode in MODES]
    print(f"{args.questions} held-out questions")
    print(
        "| mode | tokens | forwards | tokens per forward | right |",
        "|---|---|---|---|---|",
        sep="\n",
    )
    print(*rows, sep="\n")


if __name__ == "__main__":
    main()
