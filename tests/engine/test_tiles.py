"""Logits are computed and read in tiles of a bounded number of rows, to the same tokens."""

import random
from typing import Any

import pytest
from checkpoints import VOCABULARY_SIZE
from harness import Ask, Engine, prompt
from oracle_sampling import GREEDY, Sampling

ROWS = 3
SAMPLED = Sampling(temperature=0.9, seed=4, top_k=30, frequency_penalty=0.5, bad_words=((20, 21),))


@pytest.fixture
def rows_of_heads(compiled: Engine, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of each product with the head, once tiles hold three rows."""
    model = compiled.core.model_executor.driver_worker.worker.model_runner.model
    head, rows = model.head, []

    def recorded(hidden_TD: Any) -> Any:
        rows.append(len(hidden_TD))
        return head(hidden_TD)

    monkeypatch.setattr(model, "head", recorded)
    monkeypatch.setattr("vllm_edlm.tiles.TILE_BYTES", ROWS * 4 * VOCABULARY_SIZE)
    return rows


@pytest.mark.parametrize("logprobs", [None, 3])
@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED])
def test_tiles(
    compiled: Engine, rows_of_heads: list[int], sampling: Sampling, logprobs: int | None
) -> None:
    rng = random.Random(0)
    asks = [
        Ask(
            prompt(rng.randint(1, 70), seed=900 + i),
            threshold=(0.3, 0.6)[i % 2],
            sampling=sampling,
            logprobs=logprobs,
            reveal=(None, "margin", "entropy")[i % 3],
        )
        for i in range(6)
    ]
    compiled.assert_exact(asks)
    assert max(rows_of_heads) == ROWS
    assert len(rows_of_heads) > len(compiled.forwards)
