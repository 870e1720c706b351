#!/usr/bin/env bash
# Measures tiny-math beside its AR parent, as vLLM serves both, on 1,000 held-out questions.
# Usage: examples/convert/evaluate.sh [model] [AR model] [output directory]
# PYTHON names the interpreter.
set -euo pipefail
cd "$(dirname "$0")/../.."
model=${1:-examples/checkpoints/tiny-math}
ar=${2:-runs/tiny-math/ar}
output=${3:-$model/evaluation}
python=${PYTHON:-.venv/bin/python}
questions=runs/tiny-math/heldout.jsonl
# A small KV cache: vLLM would take half of the machine's memory for so small a model.
engine='{"dtype": "bfloat16", "kv_cache_memory_bytes": 268435456, "max_num_seqs": 64}'

"$python" -m examples.convert.word_problems "$questions" --split heldout --seed 1 --count 1000
"$python" -m vllm_edlm.cli eval accuracy "$model" --ar "$ar" --data "$questions" \
    --match regex --pattern '####\s*(-?\d+)\s*$' --max-tokens 64 \
    --threshold 1.0 --threshold 0.9 --threshold 0.7 --threshold 0.5 \
    --engine-args "$engine" --output "$output"
"$python" -m vllm_edlm.cli eval order "$model" --data "$questions" --max-tokens 64 \
    --threshold 1.0 --threshold 0.9 --engine-args "$engine" --output "$output"
"$python" -m vllm_edlm.cli eval drift "$model" --ar "$ar" --output "$output"
