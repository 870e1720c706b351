#!/usr/bin/env bash
# Reproduces tiny-math: data, AR training, conversion. Seeded; run it again to go on after a stop.
# Usage: examples/convert/tiny_math.sh [output directory]      (PYTHON names the interpreter)
set -euo pipefail
cd "$(dirname "$0")/../.."
out=${1:-runs/tiny-math}
python=${PYTHON:-.venv/bin/python}

if [ ! -f "$out/train.jsonl" ]; then
    "$python" -m examples.convert.word_problems "$out/train.jsonl.part" --count 200000 --seed 0
    mv "$out/train.jsonl.part" "$out/train.jsonl"
fi
if [ ! -f "$out/ar/model.safetensors" ]; then
    "$python" -m examples.convert.train_ar "$out/train.jsonl" "$out/ar"
fi
if [ ! -f "$out/converted/model.safetensors" ]; then
    "$python" -m vllm_edlm.cli convert "$out/ar" --data "$out/train.jsonl" \
        --output "$out/converted" --block-length 16 --half-life-ratio 0.1 \
        --row-length 64 --batch-size 64 --noise-copies 2 --steps 1200 \
        --learning-rate 1.5e-3 --min-learning-rate-ratio 0.05 --warmup-steps 100 \
        --save-steps 250 --compile
fi
echo "AR model: $out/ar"
echo "converted model: $out/converted"
