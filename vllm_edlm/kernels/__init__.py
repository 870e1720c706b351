"""Reductions over rows of logits, each as a Triton kernel for GPUs and in torch elsewhere."""
