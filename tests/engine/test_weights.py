"""Checkpoints of other shapes than the shared engines have."""

from checkpoints import CheckpointFactory, CheckpointSpec
from harness import Ask, Engine, Served, prompt


def test_tied_head(checkpoint: CheckpointFactory) -> None:
    """No head in the file: the embeddings are the head."""
    spec = CheckpointSpec(layout="plain", config_overrides={"tie_word_embeddings": True})
    served = Served(spec.block_length, "block_causal")
    engine = Engine.start(checkpoint(spec), served, enforce_eager=True)
    engine.assert_exact([Ask(prompt(9 + 20 * i, seed=i)) for i in range(4)])
