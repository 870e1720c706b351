#!/usr/bin/env bash
# Serve a block-diffusion checkpoint behind the OpenAI API. Further arguments go to vLLM.
#   examples/serve.sh                                  the committed tiny-math model
#   examples/serve.sh nvidia/Efficient-DLM-8B          a released model, on a GPU
# With an API key (VLLM_API_KEY, or vLLM's --api-key) every route but /health asks for it.
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
model="$here/checkpoints/tiny-math"
if [ $# -gt 0 ] && [ "${1#-}" = "$1" ]; then
    model="$1"
    shift
fi
vllm="$here/../.venv/bin/vllm"
[ -x "$vllm" ] || vllm=vllm
# glibc would keep freed tensors in its heap, which grows for good by whatever comes to lie between
# them. From this size on, in bytes, they go back. Other allocators, such as tcmalloc, ignore it.
export MALLOC_MMAP_THRESHOLD_="${MALLOC_MMAP_THRESHOLD_:-1048576}"
# exec: signals reach vLLM itself, which ends by SIGTERM.
exec "$vllm" serve "$model" --served-model-name "$(basename "$model")" \
    --middleware vllm_edlm.api_key.RequireApiKey "$@"
