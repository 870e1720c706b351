"""Offline generation with vLLM's `LLM`: questions in, answers with tokens per forward out.

Usage: python -m examples.offline [--model DIR] [--threshold T] [QUESTION ...]
"""

import argparse
from pathlib import Path

from vllm import LLM, RequestOutput, SamplingParams

from vllm_edlm.evaluate.engine import denoise_forwards

TINY_MATH = Path(__file__).parent / "checkpoints" / "tiny-math"
QUESTIONS = (
    "Tom has 35 coins. Tom buys 27 more and gives 18 to Eva. How many coins does Tom have now?",
    "Ana has 6 boxes with 7 pens in each and finds 23 more. How many pens is that in all?",
)


def tokens_per_forward(output: RequestOutput) -> float:
    """Tokens emitted per denoise forward; the prompt's prefill is not counted."""
    forwards = denoise_forwards(output)
    if forwards is None:
        raise ValueError(f"request {output.request_id} was not decoded by block diffusion")
    return len(output.outputs[0].token_ids) / forwards


def main() -> None:
    """Answer the questions of the command line, or a built-in one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("questions", nargs="*", default=QUESTIONS)
    parser.add_argument("--model", default=str(TINY_MATH))
    parser.add_argument("--threshold", type=float, default=0.9)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--kv-cache-gib", type=float, default=1.0)
    args = parser.parse_args()
    llm = LLM(model=args.model, kv_cache_memory_bytes=int(args.kv_cache_gib * 2**30))
    params = SamplingParams(
        temperature=0,
        max_tokens=args.max_tokens,
        extra_args={"diffusion_threshold": args.threshold},
    )
    conversations = [[{"role": "user", "content": question}] for question in args.questions]
    outputs = llm.chat(conversations, params, use_tqdm=True)  # type: ignore[arg-type]
    for question, output in zip(args.questions, outputs, strict=True):
        print(f"Q: {question}\nA: {output.outputs[0].text}")
        print(f"   {tokens_per_forward(output):.2f} tokens per forward\n")


if __name__ == "__main__":
    main()
