"""Serve a stock checkpoint in a process of its own and print what came out, as JSON.

Usage: serve_stock.py CHECKPOINT [DIFFUSION_CHECKPOINT]. With the second one a block-diffusion
engine is configured first, so that whatever the plugin changes in vLLM has been changed.
"""

import json
import sys

from harness import SMALL_ENGINE, prompt, small_environment
from vllm import LLM, EngineArgs, ModelRegistry, SamplingParams

REQUESTS = [
    (prompt(40), {"temperature": 0, "logprobs": 2, "prompt_logprobs": 1}),
    (prompt(9, seed=1), {"temperature": 0.8, "seed": 5, "top_p": 0.9, "min_p": 0.01}),
    (prompt(70, seed=2), {"temperature": 0, "repetition_penalty": 1.3, "min_tokens": 4}),
    (prompt(3, seed=3), {"temperature": 0, "logit_bias": {9: 4.0}, "bad_words": ["a"]}),
]


def main(checkpoint: str, *diffusion: str) -> None:
    for path in diffusion:
        EngineArgs(model=path, **SMALL_ENGINE).create_engine_config()
    llm = LLM(model=checkpoint, enforce_eager=True, **SMALL_ENGINE)
    prompts = [{"prompt_token_ids": list(ids)} for ids, _ in REQUESTS]
    params = [SamplingParams(max_tokens=20, ignore_eos=True, **p) for _, p in REQUESTS]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    core = llm.llm_engine.engine_core.engine_core
    result = {
        "plugin": "EfficientDLM" in ModelRegistry.get_supported_archs(),
        "tokens": [list(output.outputs[0].token_ids) for output in outputs],
        "v2_runner": llm.llm_engine.vllm_config.use_v2_model_runner,
        "runner": type(core.model_executor.driver_worker.worker.model_runner).__name__,
        "scheduler": type(core.scheduler).__name__,
    }
    print("\n" + json.dumps(result))


if __name__ == "__main__":
    with small_environment():
        main(*sys.argv[1:])
