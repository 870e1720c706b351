#!/usr/bin/env bash
# Serve a block-diffusion checkpoint behind the OpenAI API. Further arguments go to vLLM.
#   examples/serve.sh                                  the committed tiny-math model
#   examples/serve.sh nvidia/Efficient-DLM-8B          a released model, on a GPU
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
model="$here/checkpoints/tiny-math"
if [ $# -gt 0 ] && [ "${1#-}" = "$1" ]; then
    model="$1"
    shift
fi
vllm="$here/../.venv/bin/vllm"
[ -x "$vllm" ] || vllm=vllm
exec "$vllm" serve "$model" --served-model-name "$(basename "$model")" "$@"
