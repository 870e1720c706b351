"""Every served family: a checkpoint in its released layout, loaded by its own config.json."""

from dataclasses import dataclass, field
from typing import Any

import pytest
from checkpoints import MASK_ID, CheckpointFactory, CheckpointSpec
from harness import Ask, Engine, Served, prompt
from oracle import OracleResult

# These reveal one position a step, some, and nearly all.
THRESHOLDS = (1.0, 0.5, 0.1)


@dataclass(frozen=True)
class Release:
    """A family's random checkpoint, and what the server makes of it without any option."""

    architecture: str
    layout: str
    served: Served
    config: dict[str, object] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        shift = ["token shift"] if self.served.token_shift else []
        return "-".join([self.architecture, self.layout, self.served.prompt_attention, *shift])

    def start(self, checkpoint: CheckpointFactory) -> Engine:
        spec = CheckpointSpec(
            self.architecture, self.layout, prompt_attention=None, config_overrides=self.config
        )
        return Engine.start(checkpoint(spec), self.served, enforce_eager=True, **self.options)


BLOCK_CAUSAL = {"prompt_attention": "block_causal"}
RELEASES = [
    Release(
        "EfficientDLM",
        "plain",
        Served(8, "block_causal", token_shift=True),
        BLOCK_CAUSAL | {"token_shift": True, "dlm_type": "dream"},
    ),
    Release(
        "EfficientDLM",
        "encoder",
        Served(8, "bidirectional", token_shift=True),
        {"prompt_attention": "bidirectional", "token_shift": True, "dlm_type": "dream"},
    ),
    Release("EfficientDLM", "encoder", Served(8, "causal"), {"prompt_attention": "causal"}),
    Release(
        "EfficientDLM",
        "encoder",
        Served(8, "causal_grid", token_shift=True),
        {"prompt_attention": "causal_grid", "token_shift": True, "dlm_type": "dream"},
    ),
    Release("DiffEncoderModel", "encoder", Served(8, "bidirectional")),
    Release(
        "EfficientDLMQwen2ForCausalLM",
        "encoder",
        Served(8, "block_causal"),
        BLOCK_CAUSAL | {"tie_word_embeddings": True},
    ),
    Release("EfficientDLMLlamaForCausalLM", "plain", Served(8, "block_causal"), BLOCK_CAUSAL),
    # Its config.json names neither block length nor mask token; the vocabulary here is small.
    Release(
        "SDARForCausalLM",
        "plain",
        Served(4, "block_causal"),
        options={"hf_overrides": {"mask_token_id": MASK_ID}},
    ),
    Release(
        "Fast_dLLM_QwenForCausalLM",
        "plain",
        Served(32, "block_causal", token_shift=True),
        options={"hf_overrides": {"mask_token_id": MASK_ID}},
    ),
    Release(
        "NemotronLabsDiffusionModel",
        "encoder",
        Served(32, "causal"),
        {"mask_token_id": MASK_ID},
    ),
]


def asks(block_length: int) -> list[Ask]:
    """Prompts around whole blocks, at each threshold; answers of three blocks and a bit."""
    lengths = (1, block_length - 1, block_length, block_length + 1, 3 * block_length, 70)
    return [
        Ask(prompt(length, seed=length), max_tokens=3 * block_length + 2, threshold=threshold)
        for length in lengths
        for threshold in THRESHOLDS
    ]


@pytest.mark.parametrize("release", RELEASES, ids=lambda r: r.name)
def test_tokens_are_the_oracles(checkpoint: CheckpointFactory, release: Release) -> None:
    requests = asks(release.served.block_length)
    results = release.start(checkpoint).assert_exact(requests)
    for threshold in THRESHOLDS:
        chosen = [r for a, r in zip(requests, results, strict=True) if a.threshold == threshold]
        assert_reveals(threshold, chosen, 1 + release.served.token_shift)


def assert_reveals(threshold: float, results: list[OracleResult], least: int) -> None:
    """The threshold did what it is here for; else equal tokens would show little.

    `least` positions may be revealed whatever the threshold: with token shift, a block's first
    one beside the surest.
    """
    steps = [(n, m) for r in results for n, m in zip(r.revealed, r.masked, strict=True) if m > 2]
    few = sum(n <= least for n, _ in steps) / len(steps)
    at_once = sum(n == m for n, m in steps) / len(steps)
    holds = {1.0: few == 1, 0.5: 0 < few < 1, 0.1: at_once > 0}
    assert holds[threshold], (few, at_once)
