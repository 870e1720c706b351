"""`edlm eval`: what a converted model can do, measured on the model as vLLM serves it."""
