"""Conversion of an AR model to a block-diffusion model (arXiv 2512.14067); needs no vLLM."""
