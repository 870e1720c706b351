"""What the capacity page says around its tables; names in braces are filled in."""

MEASURED = """\
# Capacity

Written by `edlm capacity` from `benchmarks/results`. The first half is measured, the second \
computed.

## Measured: what a step costs on a CPU

{shape}: {weights:.2f} GB of weights, {kv:.0f} KiB of KV per token. {cpu}, {cores} cores, with a \
measured {bandwidth:.0f} GB/s and {matmul:.0f} GFLOP/s, by `{command}` at commit {commit}. \
Prompt 64, output 64; all requests of a load go in step with each other, and their prompts are in \
the mean step.

*Least* is the larger of bytes over bandwidth and operations over matrix rate, for the rows, KV \
and logits that such a step must run. *Predicted* is {overhead:.0f} ms and {factor:.2f} times the \
least, fitted to all {cells} cells: measured steps differ from it by {error:.0%} in the mean and \
by {worst:.0%} at most.
"""

CONTEXT = """
By length of the context, one request, blocks of 16 with 4 tokens per forward, measured in another \
run. From 2,048 tokens on vLLM ran the prompt in several forwards, which *least* does not know.
"""

COMPUTED = """
## Computed: an 8B on H100s

**Nothing from here on is measured**: no GPU was at hand. It rests on these assumptions:

- Model: the shape of Efficient-DLM-8B in bf16, {weights:.2f} GB of weights, {kv:.0f} KiB of KV \
per token. Blocks of 32; tokens per forward, 2.74 and 3.27, are the paper's (arXiv 2512.14067; \
batch 1, average accuracy 70.93 and 70.65, that of AR 71.58).
- GPU: {gpu} by NVIDIA's data sheet: {memory:.0f} GB, {bandwidth:.2f} TB/s, {matmul:.0f} TFLOP/s \
in dense bf16.
- Request: prompt {prompt}, none of it cached; output {output}. So many requests are running at \
any time, at unrelated stages.
- *Limit* is the roofline: no engine can be faster. *Planned* is {fraction:g} of it, a number to \
plan with that is chosen and not measured. What a CPU reaches of its roofline says nothing about \
a GPU: kernels, launch times and the ratio of arithmetic to bandwidth are others. For comparison: \
the paper's own figures at batch 1 on an H100 ({paper_ar} tokens/s of AR, {paper_blocks} at 3.27 \
tokens per forward) are {paper_ar_share:.2f} and {paper_blocks_share:.2f} of this limit; others \
report {served_ar:g} tokens/s of AR from a serving engine, {served_ar_share:.2f} of it. \
`edlm bench` measures it on the machine to be used.
- Not counted: norms, activations, row statistics, sampling, scheduling, the network. \
`adaptive_canvas` is off: what the 8B keeps of its tokens per forward with shorter blocks is not \
published.
- Memory: vLLM takes {utilisation:.0%} of it, {reserve:g} GB of that for activations and graphs. \
What is left beside the weights holds the KV of {most} requests at full length \
(`--max-num-seqs` must allow them).

Tokens/s of one H100, limit:
"""

SCALE = """
Blocks pay while reading weights takes the time. Blocks of 32 fill the arithmetic of an H100 at \
about {few} requests; from then on more requests only make each slower. Up to 16 requests blocks \
serve more than AR, from 32 on less; the paper too finds gains up to batch 16 and none at 32. So \
give block diffusion few requests per GPU, where each is fast, or shorten blocks under load \
(`adaptive_canvas`). Where requests are many and only their total counts, AR serves more.

By scale, with {few} requests on each GPU and with as many as its memory holds. Every GPU runs an \
engine of its own (`--data-parallel-size`, Ray Serve, replicas): the 8B fits on one and they share \
nothing, so figures are multiples of one GPU's, if the router keeps up and spreads load evenly.
"""
